"""What changed between the configuration a run started with and the one it is resumed with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from truthgpt.config.strict_yaml import flow
from truthgpt.errors import Problem

_IDENTITY = ("seed", "model", "data", "optimizer.type", "training.weights")
"""What makes a run the run it is: changed on resume, the result would be neither the old run nor a new one."""

_NOT_IDENTITY = (
    "model.attention.verify",
    "model.gradient_checkpointing",
    "model.kv_cache",
    "model.memory",
    "model.trust_remote_code",
    # Where the data lies may change; what it holds is checked by its fingerprint.
    "data.path",
    "data.validation_path",
    "data.sources.path",
    "data.sources.validation_path",
    "data.num_workers",
    "data.prefetch_factor",
    "data.persistent_workers",
)
_SAID = ("training", "optimizer", "ema", "guards", "data.validation_path", "model.gradient_checkpointing")
"""What may change, and is said in one line; everything else changes silently."""

_BATCH = ("training.train_batch_size", "training.grad_accum_steps")


@dataclass(frozen=True)
class Changes:
    """Changes that forbid resuming, and changes worth saying."""

    refused: list[Problem]
    said: list[str]


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Compare two resolved configurations (nested mappings), key by key."""
    from truthgpt.config.schema import Config  # here: pydantic takes a third of the time a command may take to start

    before, after, defaults = _flatten(old), _flatten(new), _flatten(Config().model_dump(mode="json"))
    known = tuple(key.partition("[")[0] for key in before)
    refused, said = [], []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        if not _under(key.partition("[")[0], known) and after.get(key) == defaults.get(key):
            continue  # a key that is newer than the run: its default is what the run did without it
        change = f"{_shown(before, key)} -> {_shown(after, key)}"
        if _under(key, _IDENTITY) and not _under(key, _NOT_IDENTITY):
            hint = "set it back, or start a new run with another output_dir"
            refused.append(Problem(key=key, message=f"changed since the run started: {change}", suggestion=hint))
        elif _under(key, _SAID):
            said.append(f"{key} {change}")
    if _global_batch(before) != _global_batch(after):
        message = f"samples a step changed since the run started: {_global_batch(before)} -> {_global_batch(after)}"
        hint = "keep train_batch_size x grad_accum_steps as it was"
        refused.append(Problem(key="training.train_batch_size", message=message, suggestion=hint))
    return Changes(refused, said)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return flow(values[key]) if key in values else "not set"


def _global_batch(flat: Mapping[str, Any]) -> int:
    product = 1
    for key in _BATCH:
        product *= int(flat[key])
    return product


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    key = re.sub(r"\[\d+\]", "", key)
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                flat |= _flatten(item, f"{prefix}{key}[{index}].")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
