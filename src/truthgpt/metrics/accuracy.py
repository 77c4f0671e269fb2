"""Accuracy: how often the most likely class or token is the right one."""

from __future__ import annotations

from typing import Literal

import torch

from truthgpt.data.base import IGNORED_LABEL
from truthgpt.metrics.base import EvalBatch


class AccuracyMetric:
    """Share of supervised positions whose largest logit is the label's, in [0, 1].

    Images: logits `(B, C)` and labels `(B,)`. Text: logits `(B, T, V)` and labels `(B, T)`, where the tokens are
    counted over the whole evaluation, so the value does not depend on how the rows were batched.
    """

    name: str = "accuracy"
    direction: Literal["min", "max"] = "max"

    def __init__(self) -> None:
        self._right: torch.Tensor | int = 0
        self._supervised: torch.Tensor | int = 0

    def reset(self) -> None:
        """Forget everything."""
        self._right = 0
        self._supervised = 0

    def update(self, batch: EvalBatch) -> None:
        """Take in one batch; the counts stay on its device."""
        # No label is negative but the ignored one, which no argmax equals: the comparison leaves it out by itself.
        self._right = self._right + (batch.logits.argmax(dim=-1) == batch.labels).sum(dtype=torch.int64)
        self._supervised = self._supervised + (batch.labels != IGNORED_LABEL).sum(dtype=torch.int64)

    def compute(self) -> float:
        """Share of right ones; NaN without any supervised position. Waits for the device."""
        supervised = int(self._supervised)
        return int(self._right) / supervised if supervised else float("nan")
