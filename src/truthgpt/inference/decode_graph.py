"""One new token of many sequences as a CUDA graph: the host starts one thing instead of a thousand kernels.

A graph is captured for a size of the batch and of the block tables when it is first needed, and serves every batch up to
that size; the rows left over have length 0 and are written nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from truthgpt.attention.paged import PagedStep
from truthgpt.inference.token_sequence import TokenSequence

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LEAST_BLOCKS = 8
WARM_UPS = 3
"""Passes before a capture: kernels are chosen and compiled in them."""
_TOKEN, _POSITION, _SLOT, _LENGTH, _TABLE = range(5)
"""Columns of what a graph reads: one number each, and from the last one on the blocks."""

Forward = Callable[[torch.Tensor, torch.Tensor, PagedStep], torch.Tensor]
"""`(input ids (1, N), position ids (1, N), step) -> logits (N, V)`."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    staging: torch.Tensor
    logits: torch.Tensor


class DecodeGraphs:
    """Captured forward passes of one token a sequence.

    Args:
        forward: runs the model; what it does must depend on its tensors' values on the device only.
        block_size: positions of a block.
        compiled: `forward` has compiled parts, which may be compiled here.
    """

    def __init__(self, forward: Forward, block_size: int, device: torch.device, compiled: bool) -> None:
        self._forward = forward
        self._block_size = block_size
        self._device = device
        self._stance = "default" if compiled else "force_eager"
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._tables = _Tables()

    def logits(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """Logits `(B, V)` behind the last token of each, which has its place in the cache; valid until the next call."""
        count = len(sequences)
        size = next((size for size in BATCH_SIZES if size >= count), count)
        tables = self._tables.of(sequences)
        width = max(LEAST_BLOCKS, 1 << (tables.shape[1] - 1).bit_length())
        rows = np.zeros((size, _TABLE + width), dtype=np.int64)
        starts = np.fromiter((s.computed for s in sequences), np.int64, count)
        rows[:count, _TOKEN] = np.fromiter((s.tokens[-1] for s in sequences), np.int64, count)
        rows[:count, _POSITION] = starts
        blocks = tables[np.arange(count), starts // self._block_size]
        rows[:count, _SLOT] = blocks * self._block_size + starts % self._block_size
        rows[count:, _SLOT] = -1
        rows[:count, _LENGTH] = starts + 1
        rows[:count, _TABLE : _TABLE + tables.shape[1]] = tables
        captured = self._captured.get((size, width))
        if captured is None:
            captured = self._captured[(size, width)] = self._capture(rows)
        captured.staging.copy_(torch.from_numpy(rows))
        captured.inputs.copy_(captured.staging, non_blocking=True)
        captured.graph.replay()
        return captured.logits[:count]

    def _capture(self, rows: npt.NDArray[np.int64]) -> _Captured:
        inputs = torch.from_numpy(rows).to(self._device)
        staging = torch.from_numpy(rows).pin_memory()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run(inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._run(inputs)
        return _Captured(graph, inputs, staging, logits)

    @torch.no_grad()
    def _run(self, inputs: torch.Tensor) -> torch.Tensor:
        step = PagedStep(
            slots=inputs[:, _SLOT].contiguous(),
            block_tables=inputs[:, _TABLE:].to(torch.int32),
            lengths=inputs[:, _LENGTH].to(torch.int32),
            kernels=True,
        )
        with torch.compiler.set_stance(self._stance):
            return self._forward(inputs[None, :, _TOKEN], inputs[None, :, _POSITION], step)


class _Tables:
    """Block tables as rows of numbers, of which only what has changed is written anew."""

    def __init__(self) -> None:
        self._rows: npt.NDArray[np.int64] = np.zeros((1, 1), dtype=np.int64)
        self._held: list[tuple[Any, int, int]] = []

    def of(self, sequences: Sequence[TokenSequence]) -> npt.NDArray[np.int64]:
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
