"""What an attention backend is, and how it says what it can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

AttentionFunction = Callable[..., tuple[torch.Tensor, None]]
"""transformers' attention interface:
`(module, query (B, H, T, D), key, value, attention_mask, scaling, dropout, **kwargs) -> (output (B, T, H, D), None)`;
key and value may have fewer heads than the query (grouped queries)."""

Capability = Literal["dense", "packed", "padded", "noncausal", "sliding_window"]
Function = TypeVar("Function", bound=Callable[..., Any])

_DENSE_ONLY: frozenset[Capability] = frozenset({"dense"})


def declares(*capabilities: Capability) -> Callable[[Function], Function]:
    """Decorator for an attention function that can do more than dense causal attention.

    `dense`: causal rows; `packed`: several documents in a row, kept apart by `cu_seq_lens`; `padded`: honours an
    attention mask; `noncausal`: without the causal limit; `sliding_window`: honours the `sliding_window` argument.
    """

    def mark(function: Function) -> Function:
        function.capabilities = frozenset(capabilities)  # type: ignore[attr-defined]
        return function

    return mark


def packed_arguments(position_ids: torch.Tensor, cu_seq_lens: torch.Tensor) -> dict[str, Any]:
    """What a transformers model is called with so that its attention keeps packed documents apart.

    The names are those that transformers' variable-length attention functions take.

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
    }


def capabilities_of(function: AttentionFunction) -> frozenset[Capability]:
    """What `function` declares; dense causal attention when it declares nothing."""
    return getattr(function, "capabilities", _DENSE_ONLY)
