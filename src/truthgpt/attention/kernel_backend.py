"""A backend made of a GPU kernel: what the kernel does not do goes to `sdpa`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from truthgpt.attention.base import AttentionFunction, Obstacle, declares
from truthgpt.attention.gpu import in_autocast_type, kernels_fit
from truthgpt.attention.sdpa import sdpa_attention

Kernel = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        float | None,
        int | None,
        torch.Tensor | None,
        torch.Tensor | None,
    ],
    torch.Tensor,
]
"""`(query, key, value, scaling, window, cu_seq_lens, document_spans) -> output (B, T, H, D)`; rows are dense without
`cu_seq_lens`."""


def kernel_backend(kernel: Kernel, obstacle: Obstacle) -> AttentionFunction:
    """transformers' attention interface over `kernel`; masks, float32, dropout and what is not causal go to `sdpa`."""

    @declares("dense", "packed", "padded", "noncausal", "sliding_window", obstacle=obstacle)
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        document_spans: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = in_autocast_type(query, key, value)
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        if attention_mask is not None or not causal or not kernels_fit(query, dropout):
            return sdpa_attention(
                module, query, key, value, attention_mask, scaling, dropout, sliding_window, is_causal, cu_seq_lens_q,
                document_spans, **others,
            )  # fmt: skip
        window = sliding_window if sliding_window is not None and sliding_window < query.shape[2] else None
        return kernel(query, key, value, scaling, window, cu_seq_lens_q, document_spans), None

    return attention
