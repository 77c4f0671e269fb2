"""PyTorch's scaled dot-product attention, through transformers' own adapter."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from truthgpt.attention.base import declares


@declares("dense", "packed", "padded", "noncausal", "sliding_window")
def sdpa_attention(module: torch.nn.Module, *tensors: Any, **keywords: Any) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa` attention: cuDNN, flash, memory-efficient or plain kernels, as PyTorch picks by shape."""
    output, weights = sdpa_attention_forward(module, *tensors, **keywords)
    return output, weights
