"""What a key-value cache is to generation, before any memory is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one token in one layer: `kv_heads` vectors of `head_size` each."""

    kv_heads: int
    head_size: int


class KVCachePolicy(Protocol):
    """How generation keeps the keys and values of tokens it has seen."""

    @property
    def keeps(self) -> bool:
        """Whether a model that cannot use this cache keeps transformers' own instead of none."""
        ...
