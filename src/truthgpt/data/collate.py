"""Samples to micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from truthgpt.data.base import IGNORED_LABEL, Batch, Sample


class LMCollator:
    """Pads samples on the right to the longest of them.

    No attention mask is needed: with causal attention no real position sees the padding behind it, and padding is
    labelled -100, so a pad token that doubles as end-of-text is still learnt where it is real.

    Args:
        pad_token_id: written into `input_ids` behind a sample's end.
        pad_to_multiple_of: the length is rounded up to a multiple of this many tokens.
        max_seq_len: rounding stops here, so that padding never leaves the model's context; None: no limit.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1, max_seq_len: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_seq_len = max_seq_len

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One micro-batch: `input_ids` and `labels`, int64 `(B, T)`."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if self.max_seq_len is not None:
            length = max(longest, min(length, self.max_seq_len))
        input_ids = np.full((len(samples), length), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(samples), length), IGNORED_LABEL, dtype=np.int64)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample["input_ids"])] = sample["input_ids"]
            labels[row, : len(sample["labels"])] = sample["labels"]
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
