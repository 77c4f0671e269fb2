"""Attention by our Triton kernels: dense, windowed and packed rows, without any mask."""

from __future__ import annotations

from typing import Any

import torch

from truthgpt.attention.causal_attention import causal_attention
from truthgpt.attention.gpu import kernel_obstacle
from truthgpt.attention.kernel_backend import kernel_backend
from truthgpt.runtime.device import has_triton


def _obstacle(architecture: Any, device: torch.device, precision: str) -> str | None:
    return kernel_obstacle(architecture, device, precision) or (None if has_triton() else "Triton is not installed")


triton_attention = kernel_backend(causal_attention, _obstacle)
