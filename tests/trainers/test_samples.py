"""Samples while training: the same with every cache, and training goes on as if there were none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tests.process import Cli
from tests.sample_data import BASE, write_config, write_sources
from tests.test_build import small_config

import truthgpt.inference.open_engine
from truthgpt.build import build_components
from truthgpt.build_trainer import build_trainer
from truthgpt.errors import ConfigError

torch.set_num_threads(1)

PROMPTS = "generate={prompts: [the, a, the], max_new_tokens: 9, temperature: 0.8}"
CACHES = ("model.kv_cache.type=none", "model.kv_cache={type: paged, block_size: 4}")
BLOOM = "model.config={model_type: bloom, hidden_size: 64, n_layer: 1, n_head: 2, hidden_dropout: 0.1}"
UNEVEN = (
    "model.config={model_type: deepseek_v3, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 2, q_lora_rank: 8, kv_lora_rank: 8, qk_rope_head_dim: 8, "
    "qk_nope_head_dim: 8, v_head_dim: 12, first_k_dense_replace: 1, max_position_embeddings: 64}"
)
LORA = ("model.lora={enabled: true, r: 2, dropout: 0.1, target_modules: [c_attn]}", "training.learning_rate=0.3")


@pytest.mark.parametrize("model", [(), LORA, (BLOOM,)], ids=["gpt2", "lora", "bloom"])
def test_samples_are_the_same_and_change_nothing(tmp_path: Path, model: tuple[str, ...]) -> None:
    weights, samples = [], []
    for number, changes in enumerate([("generate.prompts=[]",), *((cache, PROMPTS) for cache in CACHES)]):
        run = (
            "training.max_steps=4",
            "training.eval_interval=2",
            f"output_dir={tmp_path / str(number)}",
            *model,
            *changes,
        )
        config = small_config(tmp_path, *run)
        components = build_components(config)
        trainer = build_trainer(config, components)
        before = torch.get_rng_state()
        samples.append(trainer.parts.sample())
        assert torch.equal(torch.get_rng_state(), before)
        trainer.train()
        weights.append({name: value.tolist() for name, value in components.model.state_dict().items()})
        samples.append(trainer.parts.sample())
    assert samples[:2] == [[], []]
    assert samples[2:4] == samples[4:6] and samples[2] != samples[3]
    assert [sample["prompt"] for sample in samples[2]] == ["the", "a", "the"] and samples[2][0] != samples[2][2]
    assert weights[0] == weights[1] == weights[2]


def test_a_model_that_cannot_use_a_paged_cache_is_found_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once: that of `off by` is another number at every sample, since the weights are others."""
    errors = iter(range(100))
    obstacle = lambda model, layers: f"its logits would be off by {next(errors)}"  # noqa: E731
    monkeypatch.setattr(truthgpt.inference.open_engine, "paged_obstacle", obstacle)
    paged = ("model.kv_cache.type=paged", "training.max_steps=2", "training.eval_interval=1")
    with pytest.raises(ConfigError, match=r"model.kv_cache.type: paged cannot be used: its logits .*strict: true"):
        build_components(small_config(tmp_path, *paged, PROMPTS, "strict=true"))
    caplog.clear()  # what was said of the refused one, where an earlier test has set a lower level
    with caplog.at_level(logging.WARNING, "truthgpt"):
        config = small_config(tmp_path, *paged, PROMPTS)
        trainer = build_trainer(config, build_components(config))
        assert len(caplog.records) == 1, "at the start"
        environment = json.loads((tmp_path / "runs/t/environment.json").read_text())
        assert [fallback["part"] for fallback in environment["fallbacks"]] == ["model.kv_cache.type"]
        trainer.train()
        assert len(trainer.parts.sample()) == 3 and len(caplog.records) == 1
    asked = next(errors)
    for changes in (("generate.prompts=[]",), (PROMPTS, "model.kv_cache.type=none")):
        build_components(small_config(tmp_path, *paged, *changes, "strict=true"))
    assert next(errors) == asked + 1, "nobody asks where it does not matter"


def test_asking_whether_a_model_can_use_a_paged_cache_changes_nothing(tmp_path: Path) -> None:
    def state(*changes: str) -> tuple[object, ...]:
        components = build_components(small_config(tmp_path, *changes, "model.kv_cache.type=paged", *LORA))
        model = components.model
        modes = [module.training for module in model.modules()]
        return model.config._attn_implementation, modes, torch.get_rng_state().tolist(), components.kv_cache

    torch.manual_seed(3)
    assert state("generate.prompts=[]") == state(PROMPTS)


def test_a_strict_run_ends_before_it_begins(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", BASE)
    write_sources(tmp_path)
    arguments = ("train", "c.yaml", PROMPTS, "model.kv_cache.type=paged", UNEVEN, "strict=true")
    finished = Cli(tmp_path)(*arguments)
    assert finished.exit_code == 2 and "Traceback" not in finished.stderr
    assert (
        "error: model.kv_cache.type: paged cannot be used: keys and values of DeepseekV3ForCausalLM differ"
        in finished.stderr
    )
    assert not (tmp_path / "runs/t/metrics.jsonl").exists() and not (tmp_path / "runs/t/config.yaml").exists()
