"""Perplexity: the exponential of the mean cross-entropy."""

from __future__ import annotations

import math
from typing import Literal

from truthgpt.metrics.base import EvalBatch
from truthgpt.metrics.loss import LossMetric


class PerplexityMetric:
    """exp(nats a token) over the whole evaluation (Jelinek et al. 1977).

    The exponential is taken once, of the mean over all tokens: a mean of the batches' perplexities would depend on
    the batch size.
    """

    name: str = "ppl"
    direction: Literal["min", "max"] = "min"

    def __init__(self) -> None:
        self._loss = LossMetric()

    def reset(self) -> None:
        """Forget everything."""
        self._loss.reset()

    def update(self, batch: EvalBatch) -> None:
        """Take in one batch; the sums stay on its device."""
        self._loss.update(batch)

    def compute(self) -> float:
        """The perplexity; infinite where it leaves the range of a float, NaN without any token."""
        try:
            return math.exp(self._loss.compute())
        except OverflowError:
            return math.inf
