"""Keys and values in blocks of a few positions each, taken on demand and shared by sequences with the same beginning.

After PagedAttention (Kwon et al. 2023): a sequence of any length wastes less than one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from truthgpt.kv_cache.base import LayerShape
from truthgpt.kv_cache.blocks import BlockPool


@dataclass(frozen=True)
class PagedKVCache:
    """Asks for a paged cache; its memory is taken when the model and the device are known.

    Args:
        block_size: positions of a block. Small blocks waste less, large ones take fewer steps to look up.
    """

    block_size: int
    keeps: bool = True

    def allocate(self, layers: Sequence[LayerShape], blocks: int, dtype: torch.dtype, device: torch.device) -> KVPages:
        """Take the memory of `blocks` blocks."""
        return KVPages(layers, blocks, self.block_size, dtype, device)


class KVPages:
    """The memory of a paged cache, and who holds which block of it.

    Args:
        layers: shapes of the layers that attend, in their order.
        blocks: blocks in all; a block holds `block_size` positions of every layer.
        dtype: type of the keys and values.

    Attributes:
        pool: who holds what.
        keys, values: a tensor `(blocks, block_size, kv_heads, head_size)` for every layer.
    """

    def __init__(
        self, layers: Sequence[LayerShape], blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pool = BlockPool(blocks, block_size)
        shapes = [(blocks, block_size, layer.kv_heads, layer.head_size) for layer in layers]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, `(source, target)`, in every layer."""
        if not pairs:
            return
        sources, targets = (torch.tensor(side, device=self.keys[0].device) for side in zip(*pairs, strict=True))
        for pages in (*self.keys, *self.values):
            pages[targets] = pages[sources]


def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block: the keys and values of `block_size` positions in every layer."""
    return 2 * block_size * dtype.itemsize * sum(layer.kv_heads * layer.head_size for layer in layers)
