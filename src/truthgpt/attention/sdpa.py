"""PyTorch's scaled dot-product attention: dense rows, sliding windows, and packed documents kept apart."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from truthgpt.attention.base import declares

VARLEN_DTYPES = (torch.bfloat16, torch.float16)
VARLEN_HEAD_SIZE = 256
"""What torch's variable-length flash attention takes: half precision, heads of at most this size, no dropout."""

_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Masks of the batch in work, by its `cu_seq_lens`: layers of one kind share theirs, and it goes with the batch."""


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
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over `torch.nn.functional.scaled_dot_product_attention`.

    Without a mask and without `cu_seq_lens_q` rows are dense and causal (or not, as the module says). A layer whose
    `sliding_window` is shorter than the row sees that many positions, its own included. `cu_seq_lens_q` (see
    `data.base.Batch`) keeps packed documents apart: on a GPU in half precision through torch's variable-length
    attention, which needs no mask tensor; elsewhere through an explicit block mask for each kind of layer.

    Args:
        query: `(B, H, T, D)`; key and value may have fewer heads.
        others: what a model passes beyond that, handed on to transformers' `sdpa` (which refuses soft-capping).
    """
    length = query.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    if cu_seq_lens_q is not None:
        if _has_varlen(query, dropout):
            return _varlen(query, key, value, scaling, window, cu_seq_lens_q), None
        attention_mask = _packed_mask(cu_seq_lens_q, query.shape[0], length, window)
    elif attention_mask is None and window is not None and _causal(module, is_causal):
        attention_mask = _window_mask(length, window, query.device)
    output, weights = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )
    return output, weights


def _causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal


def _has_varlen(query: torch.Tensor, dropout: float) -> bool:
    fits = query.dtype in VARLEN_DTYPES and query.shape[-1] <= VARLEN_HEAD_SIZE
    return query.is_cuda and fits and dropout == 0.0


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    cu_seq_lens: torch.Tensor,
) -> torch.Tensor:
    """Packed rows as one list of documents: `(B, H, T, D)` in, `(B, T, H, D)` out."""
    batch, heads, length, _ = query.shape
    if key.shape[1] != heads:  # torch 2.13 asks for `enable_gqa` here, which torch 2.11 does not have
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        value = value.repeat_interleave(heads // value.shape[1], dim=1)
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (B * T, H, D)
    behind = -1 if window is None else window - 1  # the kernel counts the positions before a token, not itself
    output = varlen_attn(
        query, key, value, cu_seq_lens, cu_seq_lens, length, length, scale=scaling, window_size=(behind, 0)
    )
    assert isinstance(output, torch.Tensor)  # a pair only with `return_aux`
    return output.view(batch, length, *output.shape[1:])


def _packed_mask(cu_seq_lens: torch.Tensor, batch: int, length: int, window: int | None) -> torch.Tensor:
    """True where a token may look: bool `(B, 1, T, T)`, shared by all layers with the same window."""
    if torch.compiler.is_compiling():
        return packed_mask(cu_seq_lens, batch, length, window)
    if cu_seq_lens not in _masks:
        _masks[cu_seq_lens] = {}
    masks: dict[int | None, torch.Tensor] = _masks[cu_seq_lens]
    if window not in masks:
        masks[window] = packed_mask(cu_seq_lens, batch, length, window)
    return masks[window]


def packed_mask(cu_seq_lens: torch.Tensor, batch: int, length: int, window: int | None) -> torch.Tensor:
    """True where a token may look: itself and earlier tokens of its own document, at most `window` in all.

    Args:
        cu_seq_lens: as in `data.base.Batch`.

    Returns:
        bool `(B, 1, T, T)`.
    """
    positions = torch.arange(batch * length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    documents = torch.searchsorted(cu_seq_lens, positions, right=True).view(batch, 1, length)
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)  # (B, 1, T, T)
    return same & _near(length, length if window is None else window, cu_seq_lens.device)


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """`_near`, made once for all layers and steps: a model has one or two windows, and rows seldom change length."""
    if torch.compiler.is_compiling():
        return _near(length, window, device)
    return _kept_window_mask(length, window, device)


@lru_cache(maxsize=4)
def _kept_window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    return _near(length, window, device)


def _near(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a token may look in a dense row: itself and the `window - 1` before it; bool `(T, T)`."""
    places = torch.arange(length, device=device)
    distance = places.unsqueeze(1) - places.unsqueeze(0)
    return (distance >= 0) & (distance < window)
