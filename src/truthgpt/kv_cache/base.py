"""What a key-value cache policy tells generation."""

from __future__ import annotations

from typing import Protocol


class KVCachePolicy(Protocol):
    """How generation keeps the keys and values of tokens it has seen."""

    @property
    def use_cache(self) -> bool:
        """Whether the model keeps a cache at all."""
        ...
