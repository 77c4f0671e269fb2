"""Samples to micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from truthgpt.data.base import IGNORED_LABEL, Batch, PackedSample, Sample
from truthgpt.data.packing import max_packed_documents


class LMCollator:
    """Pads samples on the right to the longest of them.

    No attention mask is needed: with causal attention no real position sees the padding behind it, and padding is
    labelled -100, so a pad token that doubles as end-of-text is still learnt where it is real.

    Args:
        pad_token_id: written into `input_ids` behind a sample's end.
        pad_to_multiple_of: the length is rounded up to a multiple of this many tokens.
        max_seq_len: rounding stops here, so that padding never leaves the model's context; None: no limit.
        bins: lengths, the length is first raised to the smallest that holds the longest sample; None, or no bin holds
            it: the longest sample.
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int = 1,
        max_seq_len: int | None = None,
        bins: Sequence[int] | None = None,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_seq_len = max_seq_len
        self.bins = sorted(bins or ())

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One micro-batch: `input_ids` and `labels`, int64 `(B, T)`."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        length = next((size for size in self.bins if size >= longest), longest)
        length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if self.max_seq_len is not None:
            length = max(longest, min(length, self.max_seq_len))
        input_ids = np.full((len(samples), length), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(samples), length), IGNORED_LABEL, dtype=np.int64)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample["input_ids"])] = sample["input_ids"]
            labels[row, : len(sample["labels"])] = sample["labels"]
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


class PackedCollator:
    """Stacks packed rows to a micro-batch whose shapes never change.

    Args:
        rows: rows of every micro-batch; those that are missing in the last one of an epoch are padding without labels.
        max_seq_len: positions a row.
        pad_token_id: fills missing rows.
    """

    def __init__(self, rows: int, max_seq_len: int, pad_token_id: int) -> None:
        self.rows = rows
        self.max_seq_len = max_seq_len
        self.pad_token_id = pad_token_id
        self._borders = rows * max_packed_documents(max_seq_len) + 1

    def __call__(self, samples: Sequence[PackedSample]) -> Batch:
        """`input_ids`, `labels` and `position_ids`, int64 `(rows, max_seq_len)`; `cu_seq_lens`, int32 `(N + 1,)`.

        Raises:
            ValueError: more samples than rows, or a row of another length or of too many documents.
        """
        if len(samples) > self.rows:
            raise ValueError(f"{len(samples)} packed rows do not fit into a micro-batch of {self.rows}")
        shape = (self.rows, self.max_seq_len)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        position_ids = np.tile(np.arange(self.max_seq_len, dtype=np.int64), (self.rows, 1))
        for row, sample in enumerate(samples):
            input_ids[row] = sample["input_ids"]
            labels[row] = sample["labels"]
            position_ids[row] = sample["position_ids"]
        missing = np.full(self.rows - len(samples), self.max_seq_len, dtype=np.int64)
        ends = np.cumsum(np.concatenate([*(sample["document_lengths"] for sample in samples), missing]))
        cu_seq_lens = np.full(self._borders, self.rows * self.max_seq_len, dtype=np.int32)
        cu_seq_lens[0] = 0
        cu_seq_lens[1 : len(ends) + 1] = ends
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
            "cu_seq_lens": torch.from_numpy(cu_seq_lens),
        }
