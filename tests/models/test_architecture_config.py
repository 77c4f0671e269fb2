"""The model's configuration: every name checked, and only what the YAML says changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config, Gemma3TextConfig, GPT2Config, HrmTextConfig, LlamaConfig

from truthgpt.errors import ConfigError
from truthgpt.models.architecture import check_context, context_length, load_architecture

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def load(name: str | None = None, **overrides: object) -> object:
    return load_architecture(name, overrides, trust_remote_code=False)


def test_values_arrive() -> None:
    config = load(**LLAMA, num_attention_heads=2, rope_theta=5000.0)
    assert isinstance(config, LlamaConfig) and config.hidden_size == 32 and config.num_attention_heads == 2
    assert config.rope_parameters["rope_theta"] == 5000.0


def test_aliases_of_transformers_are_known() -> None:
    config = load(model_type="gpt2", hidden_size=16, num_hidden_layers=1, n_head=2)
    assert isinstance(config, GPT2Config) and config.n_embd == 16 and config.n_layer == 1


@pytest.mark.parametrize(
    ("overrides", "phrases"),
    [
        ({"model_type": "lama"}, ["no causal language model of type 'lama'", "did you mean", "llama"]),
        ({"model_type": "xyzzy"}, ["'xyzzy'", "for example gpt2"]),
        ({**LLAMA, "hiden_size": 8}, ["model.config.hiden_size", "did you mean hidden_size"]),
        ({**LLAMA, "n_layer": 8, "heads": 2}, ["model.config.n_layer", "model.config.heads"]),
        ({**LLAMA, "hidden_size": "big"}, ["model.config: transformers refuses it", "hidden_size"]),
        ({"model_type": "gpt2", "rope_theta": 1.0}, ["model.config.rope_theta"]),
        (
            {"model_type": "qwen2", "sliding_window": 16},
            ["model.config.sliding_window: 16 has no effect", "None (leave it out"],
        ),
    ],
)
def test_mistakes_are_named(overrides: dict[str, object], phrases: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**overrides)
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_what_is_kept_as_another_value_is_taken() -> None:
    """HRM is given the layers of a stack and keeps those of all cycles; the version is that of the library here."""
    for layers in (2, HrmTextConfig.num_hidden_layers):  # the default too, of which nothing changes
        config: Any = load(model_type="hrm_text", num_hidden_layers=layers, transformers_version="4.31.0")
        assert config.num_layers_per_stack == layers


def test_folder_with_changes(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=48, num_attention_heads=4, vocab_size=99, tie_word_embeddings=True).save_pretrained(
        tmp_path
    )
    plain = load(str(tmp_path))
    changed = load(str(tmp_path), attention_dropout=0.25)
    assert isinstance(plain, LlamaConfig) and isinstance(changed, LlamaConfig)
    assert (plain.hidden_size, plain.attention_dropout) == (48, 0.0)
    assert (changed.hidden_size, changed.vocab_size, changed.attention_dropout) == (48, 99, 0.25)
    assert changed.tie_word_embeddings
    with pytest.raises(ConfigError, match="did you mean attention_dropout"):
        load(str(tmp_path), atention_dropout=0.25)
    with pytest.raises(ConfigError, match="is a llama model, not gpt2"):
        load(str(tmp_path), model_type="gpt2")


OWN_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("own", "overrides", "expected"),
    [
        (OWN_ROPE, {"attention_dropout": 0.25}, OWN_ROPE),
        (OWN_ROPE, {"rope_theta": 1e6}, {**OWN_ROPE, "rope_theta": 1e6}),
        (OWN_ROPE, {"rope_scaling": LINEAR}, {**LINEAR, "rope_theta": 500000.0}),
        (OWN_ROPE, {"rope_parameters": LINEAR}, {**LINEAR, "rope_theta": 500000.0}),
        (OWN_ROPE, {"rope_scaling": LINEAR, "rope_theta": 1e6}, {**LINEAR, "rope_theta": 1e6}),
        ({**LINEAR, "rope_theta": 5000.0}, {"rope_theta": 1e6}, {**LINEAR, "rope_theta": 1e6}),
        ({**LINEAR, "rope_theta": 5000.0}, {"rope_scaling": None}, {"rope_type": "default", "rope_theta": 5000.0}),
    ],
)
def test_rotary_settings_of_a_pretrained_model(
    tmp_path: Path, own: dict[str, object], overrides: dict[str, object], expected: dict[str, object]
) -> None:
    LlamaConfig(rope_parameters=dict(own)).save_pretrained(tmp_path)
    before = copy.deepcopy(overrides)
    changed: Any = load(str(tmp_path), **overrides)
    assert changed.rope_parameters == expected
    assert overrides == before, "the YAML's own values were written into"


def test_rotary_settings_for_each_kind_of_layer(tmp_path: Path) -> None:
    config: Any = Gemma3TextConfig(num_hidden_layers=6)
    config.rope_parameters["full_attention"]["rope_theta"] = 5e5
    config.save_pretrained(tmp_path)
    changed: Any = load(str(tmp_path), rope_parameters={"full_attention": LINEAR})
    assert changed.rope_parameters == {
        "full_attention": {**LINEAR, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    for overrides in ({"rope_theta": 1e6}, {"rope_scaling": LINEAR}, {"rope_parameters": LINEAR}):
        with pytest.raises(ConfigError, match=r"model\.config\.rope_\w+: the model has .* for .*full_attention"):
            load(str(tmp_path), **overrides)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("{}")
    (tmp_path / "file").touch()
    for place, problem in (
        ("", "has no config.json"),
        ("none", "does not exist"),
        ("file", "is a file"),
        ("run", f"is a run; its model is one folder below .set it to {tmp_path / 'run/model'}"),
        ("run/model", "no model can be read from"),
    ):
        with pytest.raises(ConfigError, match=rf"^model\.name_or_path: .*{problem}"):
            load(str(tmp_path / place))
    with pytest.raises(ConfigError, match=r"^model\.name_or_path: \./none does not exist"):
        load("./none")


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (GPT2Config(n_positions=64), 64),
        (LlamaConfig(max_position_embeddings=128), 128),
        (Gemma3Config(text_config={"max_position_embeddings": 96}), 96),
    ],
)
def test_context(config: object, length: int) -> None:
    assert context_length(config) == length  # type: ignore[arg-type]
    check_context(config, length, from_scratch=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"set data.max_seq_len to at most {length}, or raise model.config"):
        check_context(config, length + 1, from_scratch=True)  # type: ignore[arg-type]
