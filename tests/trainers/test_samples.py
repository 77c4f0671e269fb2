"""Samples while training: the same with every cache, and training goes on as if there were none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.test_build import small_config

from truthgpt.build import build_components
from truthgpt.build_trainer import build_trainer

torch.set_num_threads(1)

PROMPTS = "generate={prompts: [the, a, the], max_new_tokens: 9, temperature: 0.8}"
CACHES = ("model.kv_cache.type=none", "model.kv_cache={type: paged, block_size: 4}")
BLOOM = "model.config={model_type: bloom, hidden_size: 64, n_layer: 1, n_head: 2, hidden_dropout: 0.1}"
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
