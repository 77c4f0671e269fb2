"""A micro-batch cut into smaller ones: the same samples in the same order, so that the sum of their losses stays."""

from __future__ import annotations

import torch

from truthgpt.data.base import Batch
from truthgpt.data.packing import max_packed_documents


def cut_micro_batch(batch: Batch, rows: int) -> list[Batch]:
    """`batch` in pieces of at most `rows` rows.

    Packed rows come out as the collator would have packed them: `cu_seq_lens` begins at 0 in every piece, and has the
    length that goes with its rows.
    """
    total, length = batch["input_ids"].shape if "input_ids" in batch else (len(batch["labels"]), 0)
    if total <= rows:
        return [batch]
    pieces: list[Batch] = []
    for first in range(0, total, rows):
        last = min(first + rows, total)
        piece = {name: tensor[first:last] for name, tensor in batch.items() if name != "cu_seq_lens"}
        if "cu_seq_lens" in batch:
            piece["cu_seq_lens"] = _borders(batch["cu_seq_lens"], first * length, last * length, last - first, length)
        pieces.append(piece)
    return pieces


def _borders(borders: torch.Tensor, start: int, end: int, rows: int, length: int) -> torch.Tensor:
    """The borders between two positions, from 0 on; every row begins a document, so both positions are borders."""
    inside = borders[(borders > start) & (borders <= end)] - start
    found = torch.full((rows * max_packed_documents(length) + 1,), end - start, dtype=borders.dtype)
    found[0] = 0
    unique = torch.unique(inside)
    found[1 : len(unique) + 1] = unique
    return found
