"""A forward pass captured as a CUDA graph: the host starts one thing instead of a thousand kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import numpy.typing as npt
import torch

from truthgpt.runtime.cuda_graph import MemoryPool, recording

WARM_UPS = 3
"""Passes before a capture: kernels are chosen and compiled in them."""


@dataclass(frozen=True)
class CapturedPass:
    """A graph, what it reads, and the logits that it writes, which are valid until another graph of its pool runs."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    staging: Iterator[tuple[torch.Tensor, torch.cuda.Event]]
    """Page-locked memory on the host, in turn, so that one can be written while the device reads another; and when it
    has been read."""
    logits: torch.Tensor

    def write(self, values: npt.NDArray[np.int64]) -> None:
        """Set the inputs; waits for the device only when it is two passes behind."""
        staging, has_been_read = next(self.staging)
        has_been_read.synchronize()
        staging.copy_(torch.from_numpy(values))
        self.inputs.copy_(staging, non_blocking=True)
        has_been_read.record()


@torch.no_grad()
def capture(
    run: Callable[[torch.Tensor], torch.Tensor],
    values: npt.NDArray[np.int64],
    pool: MemoryPool,
    device: torch.device,
) -> CapturedPass:
    """Capture `run`, which makes logits of its inputs, int64 on the device, and depends on nothing else.

    Args:
        values: inputs to run it with before; what it writes to the cache is written then too.
        pool: memory that graphs share, `torch.cuda.graph_pool_handle()`.

    Raises:
        CaptureError: it reads values on the host.
    """
    inputs = torch.from_numpy(values).to(device)
    staging = cycle([(torch.from_numpy(values).pin_memory(), torch.cuda.Event()) for _ in range(2)])  # type: ignore[no-untyped-call]
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run(inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with recording(graph, pool):
        logits = run(inputs)
    return CapturedPass(graph, inputs, staging, logits)
