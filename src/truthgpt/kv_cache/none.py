"""No cache of ours: every new token runs the whole sequence again, or transformers' own cache is used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoKVCache:
    """Keeps nothing: right for training, and the slow reference for generation.

    Args:
        keeps: transformers' own cache keeps instead, for a model that cannot use a paged one.
    """

    keeps: bool = False
