"""Attention by PyTorch's flash kernels: FlashAttention 2, or the newer ones of an installed package."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from truthgpt.attention.gpu import kernel_obstacle
from truthgpt.attention.kernel_backend import kernel_backend
from truthgpt.attention.varlen import varlen_attention

logger = logging.getLogger(__name__)

PACKAGES = {"FA4": "flash_attn.cute", "FA3": "flash_attn_interface"}
"""PyTorch's names of kernels that can take the place of its own, and the module that holds them; best first."""


@lru_cache(maxsize=1)
def activate_best_kernels() -> str:
    """Let PyTorch's flash attention use the newest kernels installed, once a process; returns their name."""
    for name, module in PACKAGES.items():
        try:
            if importlib.util.find_spec(module) is None:
                continue
            activate_flash_attention_impl(name)
        except (ImportError, AttributeError, RuntimeError, ValueError, OSError) as error:
            # A package for another CUDA or PyTorch version: say so, and go on with the next best.
            reason = str(error).split("\n", 1)[0]
            logger.warning("flash attention: %s is installed and cannot be used: %s", module, reason)
            continue
        return name
    return "FA2"


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    cu_seq_lens: torch.Tensor | None,
    spans: torch.Tensor | None,
) -> torch.Tensor:
    if cu_seq_lens is not None or window is not None:
        return varlen_attention(query, key, value, scaling, window, cu_seq_lens, spans)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    return output.transpose(1, 2)


flash_attention = kernel_backend(_flash, kernel_obstacle)
