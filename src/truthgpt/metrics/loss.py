"""Mean cross-entropy over all supervised tokens of an evaluation."""

from __future__ import annotations

from typing import Literal

import torch

from truthgpt.metrics.base import EvalBatch


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest float `device` can add up in: float64, or float32 on mps, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class LossMetric:
    """Cross-entropy in nats a token: the sum over all batches divided by their token count.

    Summing before dividing is what makes the value independent of how the samples were batched.
    """

    name: str = "loss"
    direction: Literal["min", "max"] = "min"

    def __init__(self) -> None:
        self._loss_sum: torch.Tensor | float = 0.0
        self._tokens: torch.Tensor | int = 0

    def reset(self) -> None:
        """Forget everything."""
        self._loss_sum = 0.0
        self._tokens = 0

    def update(self, batch: EvalBatch) -> None:
        """Take in one batch; the sums stay on its device."""
        self._loss_sum = self._loss_sum + batch.loss_sum.detach().to(sum_dtype(batch.loss_sum.device))
        self._tokens = self._tokens + batch.tokens.to(torch.int64)

    def totals(self) -> tuple[float, int]:
        """Summed loss in nats, and the number of tokens it was summed over. Waits for the device."""
        return float(self._loss_sum), int(self._tokens)

    def compute(self) -> float:
        """Nats a token; NaN without any token."""
        loss_sum, tokens = self.totals()
        return loss_sum / tokens if tokens else float("nan")
