"""The ceiling of this machine: how fast it multiplies large matrices, measured and not read off a data sheet."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import torch

from truthgpt.runtime.onednn import matmul

GPU_SIZE = 8192
"""Rows and columns on a GPU: large enough that its speed no longer rises with the size."""
CPU_SIZE = 1024
WARM_UP_REPEATS = 3
REPEATS = 20


@dataclass(frozen=True)
class MatmulSpeed:
    """Speed of a square matrix product: `flops_per_s`, rows and columns (`size`), type of the elements (`dtype`)."""

    flops_per_s: float
    size: int
    dtype: str


def measure_matmul_speed(device: torch.device, dtype: torch.dtype) -> MatmulSpeed:
    """Multiply two random matrices again and again; the median is the speed. Takes well under a second.

    The numbers are random because a GPU multiplies zeros faster: it draws less power, and clocks higher.

    Args:
        device: where to multiply.
        dtype: type of the matrices; float32 uses TF32 where this process allows it.
    """
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    for _ in range(WARM_UP_REPEATS):
        product = matmul(left, right)
    of_each = _seconds_by_events(left, right, product) if device.type == "cuda" else _seconds_by_clock(left, right)
    seconds = statistics.median(of_each)
    return MatmulSpeed(2 * size**3 / seconds, size, str(dtype).removeprefix("torch."))


def _seconds_by_events(left: torch.Tensor, right: torch.Tensor, product: torch.Tensor) -> list[float]:
    """The GPU's own clock, read once all products are done: the host's time to launch them does not count."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        torch.mm(left, right, out=product)
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]


def _seconds_by_clock(left: torch.Tensor, right: torch.Tensor) -> list[float]:
    seconds = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        product = matmul(left, right)
        float(product[0, 0])  # waits, where the device works on its own
        seconds.append(time.perf_counter() - start_s)
    return seconds
