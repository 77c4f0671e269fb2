"""PyTorch's scaled dot-product attention: dense rows, sliding windows, and packed documents kept apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from truthgpt.attention.base import declares
from truthgpt.attention.causal_attention import causal_attention
from truthgpt.attention.gpu import in_autocast_type, kernels_fit
from truthgpt.attention.masks import shared_packed_mask, window_mask
from truthgpt.attention.varlen import varlen_attention
from truthgpt.runtime.device import has_triton

# Chosen here, not at each call: torch.compile would have to look into the search for the package.
_without_mask = causal_attention if has_triton() else varlen_attention


@declares("dense", "packed", "padded", "noncausal", "sliding_window")
def sdpa_attention(
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
    """transformers' attention interface over `torch.nn.functional.scaled_dot_product_attention`.

    Without a mask and without `cu_seq_lens_q` rows are dense and causal (or not, as the module says), and PyTorch picks
    the kernel by shape and GPU. A layer whose `sliding_window` is shorter than the row sees that many positions, its
    own included; `cu_seq_lens_q` (see `data.base.Batch`) keeps packed documents apart. Both are done without a mask on
    a GPU in half precision, by our Triton kernels or, where Triton is missing, PyTorch's variable-length attention;
    elsewhere by a mask for each kind of layer.

    Args:
        query: `(B, H, T, D)`; key and value may have fewer heads.
        document_spans: see `attention.base.packed_arguments`.
        others: what a model passes beyond that, handed on to transformers' `sdpa` (which refuses soft-capping).
    """
    query, key, value = in_autocast_type(query, key, value)
    length = query.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    windowed = attention_mask is None and window is not None and causal
    if (cu_seq_lens_q is not None or windowed) and kernels_fit(query, dropout):
        return _without_mask(query, key, value, scaling, window, cu_seq_lens_q, document_spans), None
    if cu_seq_lens_q is not None:
        attention_mask = shared_packed_mask(cu_seq_lens_q, query.shape[0], length, window)
    elif windowed and window is not None:
        attention_mask = window_mask(length, window, query.device)
    output, weights = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )
    return output, weights
