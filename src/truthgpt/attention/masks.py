"""Masks, for where no kernel does without: who may look at whom in packed and in windowed rows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Masks of the batch in work, by its `cu_seq_lens`: layers of one kind share theirs, and it goes with the batch."""


def shared_packed_mask(cu_seq_lens: torch.Tensor, batch: int, length: int, window: int | None) -> torch.Tensor:
    """`packed_mask`, made once a batch for all layers with the same window."""
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


def window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a token may look in a dense row: itself and the `window - 1` before it; bool `(T, T)`.

    Made once for all layers and steps: a model has one or two windows, and rows seldom change length.
    """
    if torch.compiler.is_compiling():
        return _near(length, window, device)
    return _kept_window_mask(length, window, device)


@lru_cache(maxsize=4)
def _kept_window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    return _near(length, window, device)


def _near(length: int, window: int, device: torch.device) -> torch.Tensor:
    places = torch.arange(length, device=device)
    distance = places.unsqueeze(1) - places.unsqueeze(0)
    return (distance >= 0) & (distance < window)
