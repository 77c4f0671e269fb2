"""What an optimizer keeps for a weight, in bytes: known before there is one, for the memory plan."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

ASSUMED_BYTES = 8
"""A weight of an optimizer that is not listed: two float32 averages, as AdamW keeps."""


def _adamw(parameter: Tensor, weights: str) -> int:
    """Two averages, and the float32 copy of bf16 weights."""
    return parameter.numel() * (12 if weights == "bf16_master" else 8)


def _lion(parameter: Tensor, weights: str) -> int:
    """One momentum, in the type of the weight."""
    return parameter.numel() * parameter.element_size()


def _adafactor(parameter: Tensor, weights: str) -> int:
    """Mean squares of the rows and of the columns; of a vector, of every weight."""
    if parameter.ndim < 2:
        return parameter.numel() * parameter.element_size()
    rows, columns = parameter.numel() // parameter.shape[-1], parameter.numel() // parameter.shape[-2]
    return (rows + columns) * parameter.element_size()


_BYTES: dict[str, Callable[[Tensor, str], int]] = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor}


def state_bytes(optimizer: str, parameter: Tensor, weights: str) -> int | None:
    """Bytes of the state that `optimizer` keeps for `parameter`, counters left out; None: it is not listed.

    Args:
        weights: `training.weights`.
    """
    return _BYTES[optimizer](parameter, weights) if optimizer in _BYTES else None
