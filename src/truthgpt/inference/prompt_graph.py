"""The tokens of a few short prompts as a CUDA graph: alone, they take the host far longer than the device.

A graph is captured for a number of tokens when it is first needed, and serves up to `MOST_PROMPTS` prompts with so many
tokens together. What is left of the row is a sequence of its own, all at position 0, and is written nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from truthgpt.attention.paged import InOneRow, PagedStep, Ragged
from truthgpt.inference.captured_pass import CapturedPass, capture
from truthgpt.runtime.cuda_graph import MemoryPool

TOKENS = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
"""Of a row; from there on the device is busy for longer than the host."""
MOST_PROMPTS = 8

Forward = Callable[[torch.Tensor, torch.Tensor, PagedStep, torch.Tensor], torch.Tensor]
"""`(input ids (1, N), position ids (1, N), step, rows (B,)) -> logits (B, V)` of these rows."""


class PromptGraphs:
    """Captured forward passes of prompts that have nothing before them in the cache.

    Args:
        forward: runs the model; what it does must depend on its tensors' values on the device only.
        pool: see `capture`.
    """

    def __init__(self, forward: Forward, pool: MemoryPool, device: torch.device) -> None:
        self._forward = forward
        self._pool = pool
        self._device = device
        self._captured: dict[int, CapturedPass] = {}

    @staticmethod
    def fit(starts: Sequence[int], counts: Sequence[int]) -> bool:
        """Whether a graph serves prompts of so many tokens, which stand behind so many others."""
        return not any(starts) and len(counts) <= MOST_PROMPTS and sum(counts) <= TOKENS[-1]

    def logits(self, prompts: Sequence[Sequence[int]], slots: npt.NDArray[np.int64]) -> torch.Tensor:
        """Logits `(B, V)` behind the last token of each; valid until the next call.

        Args:
            slots: where in the cache each token's keys and values go, those of all prompts one after the other.
        """
        counts = [len(prompt) for prompt in prompts]
        total = sum(counts)
        size = next(size for size in TOKENS if size >= total)
        row = np.zeros((3, size), dtype=np.int64)
        row[0, :total] = np.fromiter((token for prompt in prompts for token in prompt), np.int64, total)
        row[1, :total] = np.concatenate([np.arange(count) for count in counts])
        row[2] = -1
        row[2, :total] = slots
        borders = np.full(MOST_PROMPTS + 2, total, dtype=np.int64)
        borders[0], borders[-1] = 0, size
        borders[1 : len(counts) + 1] = np.cumsum(counts)
        values = np.concatenate([row.ravel(), borders])
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = capture(self._run, values, self._pool, self._device)
        captured.write(values)
        captured.graph.replay()
        return captured.logits[: len(counts)]

    def _run(self, inputs: torch.Tensor) -> torch.Tensor:
        rows, borders = inputs[: -MOST_PROMPTS - 2].view(3, -1), inputs[-MOST_PROMPTS - 2 :]
        size = rows.shape[1]
        of_both = borders.to(torch.int32).expand(2, -1).contiguous()  # queries and keys are the same
        step = InOneRow(rows[2], Ragged(of_both, None, (size, size), None), kernels=True)
        # Rows without a prompt take the last token's logits, or whatever stands there: nobody reads them.
        return self._forward(rows[None, 0], rows[None, 1], step, borders[1:-1] - 1)
