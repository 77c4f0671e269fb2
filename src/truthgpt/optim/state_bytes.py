"""What an optimizer keeps, in bytes: known before there is one, for the memory plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from truthgpt.optim.groups import HIDDEN

ASSUMED_BYTES = 8
"""A weight of an optimizer that is not listed: two float32 averages, as AdamW keeps."""
_BLOCK, _FEWEST = 256, 4096
"""torchao's 8-bit averages: a float32 scale for every block, and none of small parameters."""


def optimizer_bytes(optimizer: str, groups: Sequence[dict[str, Any]], weights: str) -> int | None:
    """Bytes of the state that `optimizer` keeps for the parameters of `groups`, counters left out; None: not listed.

    Args:
        groups: from `parameter_groups`.
        weights: `training.weights`.
    """
    if optimizer not in _BYTES:
        return None
    of_one = _BYTES[optimizer]
    return round(sum(of_one(parameter, group["kind"], weights) for group in groups for parameter in group["params"]))


def _two_averages(parameter: Tensor, kind: str, weights: str) -> float:
    return 8 * parameter.numel()


def _adamw(parameter: Tensor, kind: str, weights: str) -> float:
    """Two averages, and the float32 copy of bf16 weights."""
    return (12 if weights == "bf16_master" else 8) * parameter.numel()


def _adamw8bit(parameter: Tensor, kind: str, weights: str) -> float:
    if parameter.numel() < _FEWEST or parameter.numel() % _BLOCK:
        return 8 * parameter.numel()
    return 2 * (1 + 4 / _BLOCK) * parameter.numel()


def _muon(parameter: Tensor, kind: str, weights: str) -> float:
    """One momentum for the layers' matrices, AdamW's for the rest."""
    return (parameter.element_size() if kind == HIDDEN else 8) * parameter.numel()


def _lion(parameter: Tensor, kind: str, weights: str) -> float:
    """One momentum, in the type of the weight."""
    return parameter.element_size() * parameter.numel()


def _adafactor(parameter: Tensor, kind: str, weights: str) -> float:
    """Mean squares of the rows and of the columns; of a vector, of every weight."""
    if parameter.ndim < 2:
        return parameter.element_size() * parameter.numel()
    rows, columns = parameter.numel() // parameter.shape[-1], parameter.numel() // parameter.shape[-2]
    return (rows + columns) * parameter.element_size()


_BYTES: dict[str, Callable[[Tensor, str, str], float]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "muon": _muon,
    "schedule_free": _two_averages,
    "lion": _lion,
    "adafactor": _adafactor,
}
