"""Attention over keys and values that lie in the blocks of a paged cache, as transformers' models call it.

The tokens of all sequences stand one after the other in one row. Where a GPU's kernels serve, one new token a sequence
goes through `paged_kernels`, several through PyTorch's variable-length flash attention. Elsewhere one new token a
sequence is computed for all sequences at once, several for one sequence at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from truthgpt.attention.gpu import HALF, MAX_HEAD_SIZE
from truthgpt.attention.varlen import varlen_between
from truthgpt.runtime.device import has_triton

if has_triton():
    from truthgpt.attention.paged_kernels import paged_decode, write_pages

KEY_PAGES, VALUE_PAGES = "truthgpt_key_pages", "truthgpt_value_pages"
"""Attributes of an attention module: its layer's part of the cache."""


Blocks = tuple[int, ...] | range
"""A sequence's blocks in order; a range where they follow one another, which is read without a copy."""


@dataclass(frozen=True)
class PaddedPositions:
    """Positions of several sequences, the last of each its only new one.

    Attributes:
        slots: int64 `(B * T,)`: where each sequence's positions are, then any up to the longest.
        distance: int64 `(B, T)`: how far behind the new one each is; below 0 where there is none.
    """

    slots: torch.Tensor
    distance: torch.Tensor


@dataclass(frozen=True)
class PagedStep:
    """Where the tokens of a forward pass stand: sequence i has `counts[i]` new ones behind `starts[i]` old ones.

    Attributes:
        slots: int64 `(N,)`: where in the flattened pages each token's keys and values go; -1: nowhere (padding).
        block_tables: int32 `(B, M)`: the blocks of each sequence; what lies beyond them is not read.
        lengths: int32 `(B,)`: positions of each sequence, the new ones included.
        starts, counts, blocks: the same for the host; empty when `decoding`.
        borders: int32 `(2, B + 1)`: where each sequence's queries and keys begin, for several new tokens on a GPU.
        seen: int64: slots of all positions of all sequences; None: there are new ones only.
        alone: slots of all positions of the only sequence, which has one new token and blocks that follow one another,
            where no kernel serves.
        padded: the same of all sequences in a rectangle, where each has one new token and no kernel serves.
        kernels: a GPU with Triton runs it.
        decoding: one new token a sequence, which the kernels attend for.
    """

    slots: torch.Tensor
    block_tables: torch.Tensor
    lengths: torch.Tensor
    starts: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    blocks: tuple[Blocks, ...] = ()
    borders: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    alone: range | None = None
    padded: PaddedPositions | None = None
    kernels: bool = False
    decoding: bool = False


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    paged: PagedStep,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface for `(1, H, N, D)`: stores the new keys and values, then attends.

    What else models pass (position ids, cache flags) says nothing that attention depends on; a model for which it
    does is found by the probe.
    """
    del attention_mask, dropout, others
    keys, values = getattr(module, KEY_PAGES), getattr(module, VALUE_PAGES)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if paged.alone is not None and softcap is None:
        return _alone(query, key, value, keys, values, paged.alone, scaling, sliding_window), None
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)  # (N, H_kv, D)
    if paged.kernels:
        write_pages(new_keys.to(keys.dtype), new_values.to(keys.dtype), keys, values, paged.slots)
    else:
        keys.flatten(0, 1).index_copy_(0, paged.slots, new_keys.to(keys.dtype))
        values.flatten(0, 1).index_copy_(0, paged.slots, new_values.to(keys.dtype))
    queries = query[0].transpose(0, 1)  # (N, H, D)
    if paged.decoding:
        tables, lengths = paged.block_tables, paged.lengths
        output = paged_decode(queries, keys, values, tables, lengths, scaling, sliding_window, softcap)
    else:
        attend = _left_out if torch.compiler.is_compiling() else _of_several
        output = attend(queries, new_keys, new_values, keys, values, paged, scaling, sliding_window, softcap)
    return output.unsqueeze(0).contiguous(), None  # some models view the heads as one


def _alone(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: range,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """One new token of one sequence, `(1, 1, H, D)`: a model that is small waits for every operation there is."""
    heads, size = query.shape[1], query.shape[3]
    first = slots.start if window is None else max(slots.start, slots.stop - window)
    seen_keys, seen_values = (
        _written(pages, new, slots.stop - 1)[None, first : slots.stop].transpose(1, 2)
        for pages, new in ((keys, key), (values, value))
    )
    rows = query.reshape(1, keys.shape[2], heads // keys.shape[2], size)  # those that share keys
    return F.scaled_dot_product_attention(rows, seen_keys, seen_values, scale=scaling).view(1, 1, heads, size)


def _written(pages: torch.Tensor, new: torch.Tensor, slot: int) -> torch.Tensor:
    """The pages in a row, `(positions, H_kv, D)`, with the token's `(1, H_kv, 1, D)` at its slot."""
    positions = pages.view(-1, *pages.shape[2:])
    positions[slot] = new[0, :, 0]
    return positions


def _of_several(
    queries: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    paged: PagedStep,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention where sequences have several new tokens; `(N, H, D)`."""
    flash = queries.dtype in HALF and queries.shape[-1] <= MAX_HEAD_SIZE and softcap is None
    if paged.padded is not None:
        return _all_at_once(queries, keys, values, paged.padded, scaling, window, softcap)
    if not flash or paged.borders is None:
        return _one_by_one(queries, keys, values, paged, scaling, window, softcap)
    if paged.seen is not None:
        new_keys, new_values = (pages.flatten(0, 1)[paged.seen] for pages in (keys, values))
    longest = max(paged.counts), max(s + n for s, n in zip(paged.starts, paged.counts, strict=True))
    return varlen_between(queries, new_keys, new_values, paged.borders, longest, scaling, window)


def _one_by_one(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    paged: PagedStep,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    outputs = []
    parts = torch.split(queries, list(paged.counts))
    for start, of_sequence, blocks in zip(paged.starts, parts, paged.blocks, strict=True):
        total = start + of_sequence.shape[0]
        first = 0 if window is None else max(0, start + 1 - window)  # what no new token can see is left out
        seen_keys, seen_values = (_positions(pages, blocks, first, total) for pages in (keys, values))
        if softcap is None:
            outputs.append(_plain(of_sequence, seen_keys, seen_values, scaling, window))
        else:
            outputs.append(_softcapped(of_sequence, seen_keys, seen_values, scaling, window, softcap))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


_left_out = torch.compiler.disable(_of_several)  # type: ignore[no-untyped-call]
"""The same as compiled layers call it: it looks at numbers that are others in every step."""


def _all_at_once(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padded: PaddedPositions,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One query a sequence: `(B, H, D)`."""
    batch, heads, size = queries.shape
    shape = (batch, -1, *keys.shape[2:])
    seen_keys, seen_values = (
        pages.flatten(0, 1).index_select(0, padded.slots).view(shape).transpose(1, 2) for pages in (keys, values)
    )
    visible = padded.distance >= 0 if window is None else (padded.distance >= 0) & (padded.distance < window)
    rows = queries.view(batch, keys.shape[2], heads // keys.shape[2], size)  # those that share keys
    mask = visible[:, None, None]
    if softcap is None:
        output = F.scaled_dot_product_attention(rows, seen_keys, seen_values, attn_mask=mask, scale=scaling)
    else:
        scores = softcap * torch.tanh(rows.float() @ seen_keys.float().mT * (scaling / softcap))
        output = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(queries.dtype) @ seen_values
    return output.view(batch, heads, size)


def _positions(pages: torch.Tensor, blocks: Blocks, first: int, end: int) -> torch.Tensor:
    """Positions `first` to `end` of a sequence, `(H_kv, T, D)`; a view where its blocks follow one another."""
    size = pages.shape[1]
    skipped = first // size
    blocks = blocks[skipped : -(-end // size)]
    whole = pages[blocks.start : blocks.stop] if isinstance(blocks, range) else pages[list(blocks)]
    return whole.flatten(0, 1)[first - skipped * size : end - skipped * size].transpose(0, 1)


def _plain(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """`(n, H, D)` queries, the last of `(H_kv, T, D)` keys: `(n, H, D)`."""
    new, heads, size = queries.shape
    groups = heads // keys.shape[0]
    # The query heads that share keys stand as further rows, so that no key is repeated.
    rows = queries.view(new, keys.shape[0], groups, size).permute(1, 2, 0, 3).reshape(keys.shape[0], groups * new, size)
    mask = _visible(new, keys.shape[1], window, queries.device).repeat(groups, 1)
    output = F.scaled_dot_product_attention(rows[None], keys[None], values[None], attn_mask=mask, scale=scaling)
    return output[0].view(keys.shape[0], groups, new, size).permute(2, 0, 1, 3).reshape(new, heads, size)


def _softcapped(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float,
) -> torch.Tensor:
    """The same with scores that are bent: `softcap * tanh(scores / softcap)` (Gemma 2)."""
    new, heads, _ = queries.shape
    keys, values = (t.repeat_interleave(heads // t.shape[0], dim=0).float() for t in (keys, values))
    scores = torch.einsum("nhd,htd->hnt", queries.float(), keys) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(new, keys.shape[1], window, queries.device), float("-inf"))
    return torch.einsum("hnt,htd->nhd", scores.softmax(dim=-1), values).to(queries.dtype)


def _visible(new: int, total: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool `(new, total)`: which positions each of the last `new` sees."""
    distance = torch.arange(total - new, total, device=device)[:, None] - torch.arange(total, device=device)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
