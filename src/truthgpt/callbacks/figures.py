"""Log and evaluation rows as the flat, named figures that trackers draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def train_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a log row but its step, under `train/`."""
    return _numbers("train", row)


def eval_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Every number of an evaluation but its step (so not the samples), under `eval/`."""
    return _numbers("eval", row)


def _numbers(prefix: str, row: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{prefix}/{name}": value
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
