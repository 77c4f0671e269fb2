"""ATTENTION_BACKENDS: how attention is computed.

A backend that cannot serve a run (no GPU, a model it does not compute) is replaced by `sdpa`: its probe says so for the
machine, its function's `obstacle` for the model and precision.
"""

from __future__ import annotations

import ctypes
import importlib.util
from typing import TYPE_CHECKING

from truthgpt.factories.registry import Availability, NoOptions, Registry

if TYPE_CHECKING:
    from truthgpt.attention.base import AttentionFunction

ATTENTION_BACKENDS = Registry("attention backend")
FALLBACK = "sdpa"


_DRIVERS = ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so")


def _probe_gpu() -> Availability:
    """By the driver, so that listing the components need not import torch; what the GPU can do is asked at build."""
    for driver in _DRIVERS:
        try:
            ctypes.CDLL(driver)
        except OSError:
            continue
        return Availability(True)
    return Availability(False, "its kernels need a GPU, and no GPU driver is installed", FALLBACK)


def _probe_triton() -> Availability:
    gpu = _probe_gpu()
    if not gpu.available or importlib.util.find_spec("triton") is not None:
        return gpu
    return Availability(False, "Triton is not installed", FALLBACK)


@ATTENTION_BACKENDS.register("sdpa", options=NoOptions)
def build_sdpa() -> AttentionFunction:
    """PyTorch's scaled dot-product attention; always there."""
    from truthgpt.attention.sdpa import sdpa_attention

    return sdpa_attention


@ATTENTION_BACKENDS.register("flash", options=NoOptions, probe=_probe_gpu)
def build_flash() -> AttentionFunction:
    """Flash attention: FlashAttention 4 or 3 where installed, else PyTorch's own."""
    from truthgpt.attention.flash import activate_best_kernels, flash_attention

    activate_best_kernels()
    return flash_attention


@ATTENTION_BACKENDS.register("triton", options=NoOptions, probe=_probe_triton)
def build_triton() -> AttentionFunction:
    """Our Triton kernels for dense, windowed and packed rows."""
    from truthgpt.attention.triton_attention import triton_attention

    return triton_attention
