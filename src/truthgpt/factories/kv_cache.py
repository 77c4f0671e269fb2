"""KV_CACHES: what generation keeps of the tokens it has seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from truthgpt.factories.registry import NoOptions, Registry

if TYPE_CHECKING:
    from truthgpt.kv_cache.base import KVCachePolicy

KV_CACHES = Registry("kv cache", runtime=("block_size",))


@KV_CACHES.register("none", options=NoOptions)
def build_none() -> KVCachePolicy:
    """No cache, which is right for training."""
    from truthgpt.kv_cache.none import NoKVCache

    return NoKVCache()


@KV_CACHES.register("paged", options=NoOptions)
def build_paged(block_size: int) -> KVCachePolicy:
    """Blocks of a few positions, taken on demand and shared by texts with the same beginning."""
    from truthgpt.kv_cache.paged import PagedKVCache

    return PagedKVCache(block_size)
