"""No cache: every new token runs the whole sequence again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoKVCache:
    """Keeps nothing: right for training, and the slow reference for generation."""

    keeps: bool = False
