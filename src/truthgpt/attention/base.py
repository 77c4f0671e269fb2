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


def capabilities_of(function: AttentionFunction) -> frozenset[Capability]:
    """What `function` declares; dense causal attention when it declares nothing."""
    return getattr(function, "capabilities", _DENSE_ONLY)
