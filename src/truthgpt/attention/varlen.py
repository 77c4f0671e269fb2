"""PyTorch's variable-length flash attention over packed, windowed or dense rows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

# torch 2.13 wants to be told of grouped queries; torch 2.11 takes them as they are.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    cu_seq_lens: torch.Tensor | None,
    spans: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of rows that are dense (no `cu_seq_lens`) or packed; `(B, H, T, D)` to `(B, T, H, D)`.

    Args:
        window: positions a query sees at most, its own included; None: no limit.
        spans: not needed here.
    """
    del spans
    batch, _, length, _ = query.shape
    if cu_seq_lens is None:
        cu_seq_lens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (B * T, H, D)
    behind = -1 if window is None else window - 1  # the kernel counts the positions before a token, not itself
    output = varlen_attn(
        query, key, value, cu_seq_lens, cu_seq_lens, length, length, scale=scaling, window_size=(behind, 0), **_GROUPED
    )
    assert isinstance(output, torch.Tensor)  # a pair only with `return_aux`
    return output.view(batch, length, *output.shape[1:])


def varlen_between(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: tuple[int, int],
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of the last positions of several sequences: `(N, H, D)` over `(S, H_kv, D)` to `(N, H, D)`.

    Args:
        borders: int32 `(2, B + 1)`: where each sequence's queries and keys begin; its last query sees its last key.
        longest: the most queries and keys of a sequence.
    """
    behind = -1 if window is None else window - 1
    output = varlen_attn(
        *(query, key, value, borders[0], borders[1], *longest),
        scale=scaling,
        window_size=(behind, 0),
        **_GROUPED,
    )
    assert isinstance(output, torch.Tensor)  # a pair only with `return_aux`
    return output
