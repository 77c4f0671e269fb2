"""Causal attention by our Triton kernels as a PyTorch operator, which torch.compile takes as one piece."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import library

from truthgpt.attention.base import document_spans


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    cu_seq_lens: torch.Tensor | None,
    spans: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of rows that are dense (no `cu_seq_lens`) or packed; `(B, H, T, D)` to `(B, T, H, D)`."""
    batch, _, length, head_size = query.shape
    if spans is None:
        spans = (
            _dense_spans(batch, length, query.device)
            if cu_seq_lens is None
            else document_spans(cu_seq_lens, batch, length)
        )
    scaling = head_size**-0.5 if scaling is None else scaling
    window = 0 if window is None else window
    output: torch.Tensor = torch.ops.truthgpt.causal_attention(
        query, key, value, spans, scaling, window, cu_seq_lens is not None
    )[0]
    return output


def _dense_spans(batch: int, length: int, device: torch.device) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return _row_spans(batch, length, device)
    return _kept_row_spans(batch, length, device)


@lru_cache(maxsize=4)
def _kept_row_spans(batch: int, length: int, device: torch.device) -> torch.Tensor:
    return _row_spans(batch, length, device)


def _row_spans(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """The spans of rows that hold one document each."""
    spans = torch.zeros(2, batch, length, dtype=torch.int32, device=device)
    spans[1] = length
    return spans


@library.custom_op(
    "truthgpt::causal_attention",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor query, Tensor key, Tensor value, Tensor spans, float scaling, int window, "
    "bool packed) -> (Tensor, Tensor)",
)
def _causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    scaling: float,
    window: int,
    packed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from truthgpt.attention.flash_kernels import forward

    query, key, value = (_with_whole_heads(tensor) for tensor in (query, key, value))
    return forward(query, key, value, spans[0].contiguous(), scaling, window, packed)


@_causal_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    scaling: float,
    window: int,
    packed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, head_size = query.shape
    output = query.new_empty(batch, length, heads, head_size)
    return output, query.new_empty(batch, heads, length, dtype=torch.float32)


@library.custom_op(
    "truthgpt::causal_attention_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor log_sums, Tensor spans, "
    "float scaling, int window, bool packed) -> (Tensor, Tensor, Tensor)",
)
def _causal_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    spans: torch.Tensor,
    scaling: float,
    window: int,
    packed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from truthgpt.attention.flash_kernels import backward

    query, key, value = (_with_whole_heads(tensor) for tensor in (query, key, value))
    starts, ends = (part.contiguous() for part in spans)
    return backward(gradient, query, key, value, output, log_sums, starts, ends, scaling, window, packed)


@_causal_attention_backward.register_fake
def _(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    spans: torch.Tensor,
    scaling: float,
    window: int,
    packed: bool,
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, spans, ctx.scaling, ctx.window, ctx.packed = inputs
    ctx.save_for_backward(query, key, value, *output, spans)


def _backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, value, output, log_sums, spans = ctx.saved_tensors
    gradients = torch.ops.truthgpt.causal_attention_backward(
        gradient, query, key, value, output, log_sums, spans, ctx.scaling, ctx.window, ctx.packed
    )
    return (*gradients, None, None, None, None)


_causal_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def _with_whole_heads(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose heads lie in one piece each, as the kernels read them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
