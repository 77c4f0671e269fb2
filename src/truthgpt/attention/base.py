"""What an attention backend is, and how it says what it can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

AttentionFunction = Callable[..., tuple[torch.Tensor, None]]
"""transformers' attention interface:
`(module, query (B, H, T, D), key, value, attention_mask, scaling, dropout, **kwargs) -> (output (B, T, H, D), None)`;
key and value may have fewer heads than the query (grouped queries)."""

Obstacle = Callable[[Any, torch.device, str], str | None]
"""`(model configuration, device, precision) -> why a backend cannot serve them`, or None."""

Capability = Literal["dense", "packed", "padded", "noncausal", "sliding_window"]
Function = TypeVar("Function", bound=Callable[..., Any])

_DENSE_ONLY: frozenset[Capability] = frozenset({"dense"})


def declares(*capabilities: Capability, obstacle: Obstacle | None = None) -> Callable[[Function], Function]:
    """Decorator for an attention function that can do more than dense causal attention, or not do it everywhere.

    `dense`: causal rows; `packed`: several documents in a row, kept apart by `cu_seq_lens`; `padded`: honours an
    attention mask; `noncausal`: without the causal limit; `sliding_window`: honours the `sliding_window` argument.

    Args:
        obstacle: asked at build for the model, device and precision (`bf16`, `fp16`, `none`) of the run; with a reason
            the run falls back to `sdpa`.
    """

    def mark(function: Function) -> Function:
        function.capabilities = frozenset(capabilities)  # type: ignore[attr-defined]
        function.obstacle = obstacle  # type: ignore[attr-defined]
        return function

    return mark


def packed_arguments(position_ids: torch.Tensor, cu_seq_lens: torch.Tensor) -> dict[str, Any]:
    """What a transformers model is called with so that its attention keeps packed documents apart.

    `cu_seq_lens_*` and `max_length_*` are the names that transformers' variable-length attention functions take;
    `document_spans`, int32 `(2, B, T)`, says where in its row the document of each position begins and ends.

    Args:
        position_ids: int64 `(B, T)`, from 0 in every document.
        cu_seq_lens: int32 `(N + 1,)`, borders of the documents in the flattened batch (see `data.base.Batch`).
    """
    length = position_ids.shape[1]  # an upper bound of a document's length that needs no look at the device
    return {
        "position_ids": position_ids,
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": length,
        "max_length_k": length,
        "document_spans": document_spans(cu_seq_lens, position_ids.shape[0], length),
    }


def document_spans(cu_seq_lens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Where in its row the document of each position begins and ends (exclusive): int32 `(2, B, T)`."""
    positions = torch.arange(batch * length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    behind = torch.searchsorted(cu_seq_lens, positions, right=True)
    flat = cu_seq_lens[torch.stack([behind - 1, behind])].view(2, batch, length)
    row_starts = torch.arange(0, batch * length, length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    return flat - row_starts.view(1, batch, 1)


def capabilities_of(function: AttentionFunction) -> frozenset[Capability]:
    """What `function` declares; dense causal attention when it declares nothing."""
    return getattr(function, "capabilities", _DENSE_ONLY)


def obstacle_of(function: AttentionFunction, architecture: Any, device: torch.device, precision: str) -> str | None:
    """Why `function` cannot serve a model on this device in this precision; None when it can, or does not say."""
    obstacle: Obstacle | None = getattr(function, "obstacle", None)
    return None if obstacle is None else obstacle(architecture, device, precision)
