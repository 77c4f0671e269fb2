"""Resuming with another configuration: what is refused, what is said, what passes in silence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.config.changes import compare_configs
from truthgpt.config.schema import Config

OLD: dict[str, Any] = Config().model_dump(mode="json")


def changed(**changes: Any) -> dict[str, Any]:
    """`OLD` with dotted keys (written with two underscores for a dot) set."""
    new = copy.deepcopy(OLD)
    for key, value in changes.items():
        *path, last = key.split("__")
        section = new
        for part in path:
            section = section[part]
        section[last] = value
    return new


def test_the_same_is_no_change() -> None:
    changes = compare_configs(OLD, copy.deepcopy(OLD))
    assert changes.refused == [] and changes.said == []


@pytest.mark.parametrize("key", ["training.weights", "model.lora.target_modules", "model.attention.verify"])
def test_a_key_that_is_newer_than_the_run_has_not_changed(key: str) -> None:
    older = copy.deepcopy(OLD)
    *path, last = key.split(".")
    section = older
    for part in path:
        section = section[part]
    del section[last]
    changes = compare_configs(older, OLD)
    assert changes.refused == [] and changes.said == []


def test_a_newer_key_that_is_set_is_a_change() -> None:
    older = copy.deepcopy(OLD)
    del older["training"]["weights"]
    (problem,) = compare_configs(older, changed(training__weights="bf16_master")).refused
    assert problem.key == "training.weights" and "not set -> bf16_master" in problem.message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"model__config": {"model_type": "gpt2"}}, "model.config"),
        ({"model__tokenizer__type": "byte"}, "model.tokenizer.type"),
        ({"model__attention__backend": "mine"}, "model.attention.backend"),
        ({"data__max_seq_len": 99}, "data.max_seq_len"),
        ({"data__source": {"type": "text"}}, "data.source.type"),
        ({"data__validation_fraction": 0.5}, "data.validation_fraction"),
        ({"optimizer__type": "lion"}, "optimizer.type"),
    ],
)
def test_another_run_is_refused(change: dict[str, Any], key: str) -> None:
    changes = compare_configs(OLD, changed(**change))
    assert key in [problem.key for problem in changes.refused] or any(p.key.startswith(key) for p in changes.refused)
    for problem in changes.refused:
        assert "changed since the run started: " in problem.message and problem.suggestion is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training__learning_rate": 1.0}, "training.learning_rate 5.0e-05 -> 1.0"),
        ({"training__max_steps": 7}, "training.max_steps null -> 7"),
        ({"ema__decay": 0.5}, "ema.decay 0.999 -> 0.5"),
        ({"guards__max_consecutive_skips": 3}, "guards.max_consecutive_skips 10 -> 3"),
        ({"model__gradient_checkpointing": True}, "model.gradient_checkpointing auto -> true"),
    ],
)
def test_another_schedule_is_said(change: dict[str, Any], said: str) -> None:
    changes = compare_configs(OLD, changed(**change))
    assert changes.refused == [] and changes.said == [said]


@pytest.mark.parametrize(
    "change",
    [
        {"run_name": "other"},
        {"output_dir": "elsewhere"},
        {"logging__project": "p"},
        {"hardware__device": "cpu"},
        {"checkpoint__keep_last": 9},
        {"data__num_workers": 0},
        {"data__path": ["moved.txt"]},
        {"resume__enabled": True},
        {"generate__prompts": ["x"]},
        {"model__memory__policy": "other"},
    ],
)
def test_the_rest_is_silent(change: dict[str, Any]) -> None:
    changes = compare_configs(OLD, changed(**change))
    assert changes.refused == [] and changes.said == []


@given(st.sampled_from([(8, 2), (2, 8), (16, 1), (4, 4), (1, 16), (8, 1), (3, 5), (16, 2)]))
def test_samples_a_step_stay(shape: tuple[int, int]) -> None:
    size, steps = shape
    changes = compare_configs(OLD, changed(training__train_batch_size=size, training__grad_accum_steps=steps))
    if size * steps == 16:
        assert changes.refused == []
    else:
        (problem,) = changes.refused
        assert problem.key == "training.train_batch_size" and f"16 -> {size * steps}" in problem.message


def test_options_that_come_and_go() -> None:
    old, new = changed(optimizer={"type": "adamw", "fused": True, "eps": 1e-8}), changed()
    assert compare_configs(old, new).said == ["optimizer.eps 1.0e-08 -> not set"]
