"""Bits per byte: a loss that models with different tokenizers can be compared by."""

from __future__ import annotations

import math
from typing import Literal

import torch

from truthgpt.metrics.base import EvalBatch
from truthgpt.metrics.loss import LossMetric


class BitsPerByteMetric:
    """Summed cross-entropy in bits, divided by the bytes of text the supervised tokens spell (Gao et al. 2020).

    Predicting a special token costs bits and spells no byte, so it makes the value larger, never smaller.

    Args:
        byte_lengths: int64 `(V,)`, the bytes each token id spells (`token_byte_lengths`). Ids beyond V, which a model
            with a padded vocabulary has, spell none.
    """

    name: str = "bits_per_byte"
    direction: Literal["min", "max"] = "min"

    def __init__(self, byte_lengths: torch.Tensor) -> None:
        # One zero more at the end: ignored labels and ids beyond the tokenizer's all read that one.
        self._byte_lengths = torch.cat([byte_lengths, byte_lengths.new_zeros(1)])
        self._loss = LossMetric()
        self._bytes: torch.Tensor | int = 0

    def reset(self) -> None:
        """Forget everything."""
        self._loss.reset()
        self._bytes = 0

    def update(self, batch: EvalBatch) -> None:
        """Take in one batch; the sums stay on its device."""
        labels = batch.labels  # (B, T)
        if self._byte_lengths.device != labels.device:
            self._byte_lengths = self._byte_lengths.to(labels.device)
        spells_nothing = self._byte_lengths.numel() - 1
        known = (labels >= 0) & (labels < spells_nothing)
        spelled = self._byte_lengths[torch.where(known, labels, spells_nothing)].sum()
        self._loss.update(batch)
        self._bytes = self._bytes + spelled

    def compute(self) -> float:
        """Bits a byte; NaN without any token, infinite when the tokens spell no byte at all."""
        loss_sum, tokens = self._loss.totals()
        if tokens == 0:
            return math.nan
        spelled = int(self._bytes)
        return loss_sum / math.log(2) / spelled if spelled else math.inf
