"""One new token of many sequences as a CUDA graph.

A graph is captured for a size of the batch and of the block tables when it is first needed, and serves every batch up
to that size; the rows left over have length 0 and are written nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from truthgpt.attention.paged import InBlocks, InOneRow, PagedStep
from truthgpt.inference.captured_pass import CapturedPass, MemoryPool, capture
from truthgpt.inference.token_sequence import KeptTokens

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LEAST_BLOCKS = 8
_TOKEN, _POSITION, _SLOT, _LENGTH, _SOURCE, _TABLE = range(6)
"""Columns of what a graph reads: one number each, and from the last one on the blocks."""

Forward = Callable[[torch.Tensor, torch.Tensor, PagedStep], torch.Tensor]
"""`(input ids (1, N), position ids (1, N), step) -> logits (N, V)`."""


class DecodeGraphs:
    """Captured forward passes of one token a sequence.

    Args:
        forward: runs the model; what it does must depend on its tensors' values on the device only.
        block_size: positions of a block.
        pool: see `capture`.
    """

    def __init__(self, forward: Forward, block_size: int, pool: MemoryPool, device: torch.device) -> None:
        self._forward = forward
        self._block_size = block_size
        self._device = device
        self._pool = pool
        self._captured: dict[tuple[int, int], CapturedPass] = {}
        self._tables = _Tables()

    def logits(
        self, sequences: Sequence[KeptTokens], ahead: tuple[torch.Tensor, Sequence[int]] | None
    ) -> torch.Tensor:
        """Logits `(B, V)` behind the next token of each, which has its place in the cache; valid until the next call.

        Args:
            ahead: where the tokens are when the host does not know them yet: that of row i is `ahead[0][ahead[1][i]]`.
        """
        count = len(sequences)
        size = next((size for size in BATCH_SIZES if size >= count), count)
        tables = self._tables.of(sequences)
        width = max(LEAST_BLOCKS, 1 << (tables.shape[1] - 1).bit_length())
        rows = np.zeros((size, _TABLE + width), dtype=np.int64)
        starts = np.fromiter((s.computed for s in sequences), np.int64, count)
        if ahead is None:
            rows[:count, _TOKEN] = np.fromiter((s.tokens[-1] for s in sequences), np.int64, count)
        else:
            rows[:count, _SOURCE] = ahead[1]
        rows[:count, _POSITION] = starts
        blocks = tables[np.arange(count), starts // self._block_size]
        rows[:count, _SLOT] = blocks * self._block_size + starts % self._block_size
        rows[count:, _SLOT] = -1
        rows[:count, _LENGTH] = starts + 1
        rows[:count, _TABLE : _TABLE + tables.shape[1]] = tables
        captured = self._captured.get((size, width))
        if captured is None:
            captured = self._captured[(size, width)] = capture(self._run, rows, self._pool, self._device)
        captured.write(rows)
        if ahead is not None:
            # A row without a token (its logits were not finite) ends when the host sees it.
            captured.inputs[:count, _TOKEN] = ahead[0][captured.inputs[:count, _SOURCE]].clamp_min(0)
        captured.graph.replay()
        return captured.logits[:count]

    def _run(self, inputs: torch.Tensor) -> torch.Tensor:
        reach = InBlocks(inputs[:, _TABLE:].to(torch.int32), inputs[:, _LENGTH].to(torch.int32))
        step = InOneRow(inputs[:, _SLOT].contiguous(), reach, kernels=True)
        return self._forward(inputs[None, :, _TOKEN], inputs[None, :, _POSITION], step)


class _Tables:
    """Block tables as rows of numbers, of which only what has changed is written anew."""

    def __init__(self) -> None:
        self._rows: npt.NDArray[np.int64] = np.zeros((1, 1), dtype=np.int64)
        self._held: list[tuple[Any, int, int]] = []

    def of(self, sequences: Sequence[KeptTokens]) -> npt.NDArray[np.int64]:
        """`(B, M)`, valid until the next call; beyond a sequence's blocks stands anything."""
        widest = max(len(s.kept.blocks) for s in sequences)
        if len(sequences) > self._rows.shape[0] or widest > self._rows.shape[1]:
            self._rows = np.zeros((2 * len(sequences), 2 * widest), dtype=np.int64)
            self._held = []
        for row, sequence in enumerate(sequences):
            blocks = sequence.kept.blocks
            held = (sequence.kept, len(blocks), blocks[-1])
            if row >= len(self._held):
                self._held.append((None, 0, 0))
            if self._held[row] != held:
                self._rows[row, : len(blocks)] = blocks
                self._held[row] = held
        return self._rows[: len(sequences), :widest]
