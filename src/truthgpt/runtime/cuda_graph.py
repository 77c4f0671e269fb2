"""Recording a CUDA graph, after which torch is as it was, also when that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

MemoryPool = Any
"""What `torch.cuda.graph_pool_handle` gives: torch does not export its type."""


class CaptureError(RuntimeError):
    """A computation cannot be recorded: it reads values on the host."""


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: MemoryPool) -> Iterator[None]:
    """What runs inside on the current device becomes `graph`, with its memory in `pool`, and is not computed.

    Raises:
        CaptureError: see there.
        torch.OutOfMemoryError: the pool cannot hold it.
    """
    current = torch.cuda.current_stream()
    try:
        # Not "global", the default: a loader's thread, which pins batches meanwhile, would break it.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _undo(current, pool)
        cause = error.__context__ or error  # the computation's, not that of the end which failed too
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        reason = str(cause).partition("\n")[0]
        raise CaptureError(f"it cannot be recorded as a CUDA graph: {reason}") from error


def _undo(stream: torch.cuda.Stream, pool: MemoryPool) -> None:
    """Leave a recording that failed, after which torch would stay on its stream, take memory for it and refuse to draw
    random numbers."""
    torch.cuda.set_stream(stream)
    index = stream.device.index
    with suppress(RuntimeError):  # it ended before it failed
        torch._C._cuda_endAllocateToPool(index, pool)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
