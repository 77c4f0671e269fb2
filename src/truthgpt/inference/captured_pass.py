"""A forward pass captured as a CUDA graph: the host starts one thing instead of a thousand kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

MemoryPool = Any
"""What `torch.cuda.graph_pool_handle` gives: torch does not export its type."""
WARM_UPS = 3
"""Passes before a capture: kernels are chosen and compiled in them."""


class CaptureError(RuntimeError):
    """The pass cannot be captured: it reads values on the host."""


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
        CaptureError: see there.
    """
    inputs = torch.from_numpy(values).to(device)
    staging = cycle([(torch.from_numpy(values).pin_memory(), torch.cuda.Event()) for _ in range(2)])  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run(inputs)
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Not "global", the default: a loader's thread, which pins batches while a run writes samples, would break it.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = run(inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _undo(current, pool)
        cause = str(error.__context__ or error).partition("\n")[0]  # the pass, not its end that failed too
        raise CaptureError(f"it cannot be captured as a CUDA graph: {cause}") from error
    return CapturedPass(graph, inputs, staging, logits)


def _undo(stream: torch.cuda.Stream, pool: MemoryPool) -> None:
    """Leave a capture that failed, after which torch would stay on its stream, take memory for it and refuse to draw
    random numbers."""
    torch.cuda.set_stream(stream)
    index = stream.device.index
    with suppress(RuntimeError):  # it ended before it failed
        torch._C._cuda_endAllocateToPool(index, pool)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
