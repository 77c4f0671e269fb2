"""Attention over keys and values that lie in the blocks of a paged cache, as transformers' models call it.

The tokens of all sequences stand one after the other in one row. How they find the positions before them depends on
the pass: a kernel reads the blocks for one new token a sequence (`InBlocks`), several new ones go through PyTorch's
variable-length flash attention (`Ragged`) or one sequence at a time (`OneByOne`); without a kernel, one new token of
each sequence is computed in a rectangle (`Rectangle`), that of a lone sequence where its keys lie (`Alone`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import library

from truthgpt.attention.gpu import HALF, MAX_HEAD_SIZE
from truthgpt.attention.varlen import varlen_between
from truthgpt.runtime.device import has_triton

if has_triton():
    from truthgpt.attention.paged_kernels import paged_decode, write_pages

KEY_PAGES, VALUE_PAGES = "truthgpt_key_pages", "truthgpt_value_pages"
"""Attributes of an attention module: its layer's part of the cache."""


Blocks = tuple[int, ...] | range
"""A sequence's blocks in order; a range where they follow one another, which is read without a copy."""


class KeysValues(NamedTuple):
    """Pages, `(blocks, block_size, H_kv, D)`, or what new tokens add to them, `(N, H_kv, D)`."""

    keys: torch.Tensor
    values: torch.Tensor


class Scores(NamedTuple):
    """What is done to the products of queries and keys; `window` counts a query's own position too."""

    scaling: float
    window: int | None
    softcap: float | None


class PagedStep(Protocol):
    """Where the tokens of a forward pass stand, and how they attend."""

    def attention(self, query: torch.Tensor, new: KeysValues, pages: KeysValues, scores: Scores) -> torch.Tensor:
        """Store what is new, `(1, H_kv, N, D)`, and attend for `(1, H, N, D)` queries: `(1, N, H, D)`."""
        ...


class Reach(Protocol):
    """How the tokens of many sequences find the positions they attend to."""

    def attend(self, queries: torch.Tensor, new: KeysValues, pages: KeysValues, scores: Scores) -> torch.Tensor:
        """`(N, H, D)` queries, whose keys and values, `(N, H_kv, D)`, are in `pages` already: `(N, H, D)`."""
        ...


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface for `(1, H, N, D)`: stores the new keys and values, then attends, both as the
    step in use says (`step_in_use`).

    What else models pass (position ids, cache flags) says nothing that attention depends on; a model for which it
    does is found by the probe.
    """
    del attention_mask, dropout, others
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = getattr(module, KEY_PAGES), getattr(module, VALUE_PAGES)
    attend = torch.ops.truthgpt.paged_attention if torch.compiler.is_compiling() else _in_step
    return attend(query, key, value, keys, values, scaling, sliding_window, softcap), None


class _InUse(threading.local):
    step: PagedStep | None = None


_in_use = _InUse()


@contextmanager
def step_in_use(step: PagedStep) -> Iterator[None]:
    """Attention in this thread is that of `step` inside."""
    before, _in_use.step = _in_use.step, step
    try:
        yield
    finally:
        _in_use.step = before


def _in_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    assert _in_use.step is not None, "a forward pass outside of step_in_use"
    scores = Scores(scaling, window, softcap)
    return _in_use.step.attention(query, KeysValues(key, value), KeysValues(keys, values), scores)


# Compiled layers see an operator, not the step: its numbers are others every time, and each would be compiled for.
_operator = library.custom_op(
    "truthgpt::paged_attention",
    _in_step,
    mutates_args=("keys", "values"),
    schema="(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, float scaling, int? window, "
    "float? softcap) -> Tensor",
)


@_operator.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: object) -> torch.Tensor:
    del key, others
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@dataclass(frozen=True)
class InOneRow:
    """The tokens of all sequences, one after the other.

    Attributes:
        slots: int64 `(N,)`: where in the flattened pages each token's keys and values go; -1: nowhere (padding).
        reach: what each of them attends to.
        kernels: a GPU with Triton runs it.
    """

    slots: torch.Tensor
    reach: Reach
    kernels: bool

    def attention(self, query: torch.Tensor, new: KeysValues, pages: KeysValues, scores: Scores) -> torch.Tensor:
        """See `PagedStep`."""
        keys, values = (tensor[0].transpose(0, 1).to(pages.keys.dtype) for tensor in new)
        if self.kernels:
            write_pages(keys, values, pages.keys, pages.values, self.slots)
        else:
            pages.keys.flatten(0, 1).index_copy_(0, self.slots, keys)
            pages.values.flatten(0, 1).index_copy_(0, self.slots, values)
        output = self.reach.attend(query[0].transpose(0, 1), KeysValues(keys, values), pages, scores)
        return output.unsqueeze(0).contiguous()  # some models view the heads as one


@dataclass(frozen=True)
class Alone:
    """One new token of one sequence whose blocks follow one another, where no kernel serves, in as few operations as
    there can be: a small model waits for each.

    Attributes:
        slots: of the sequence's positions, the new one last.
    """

    slots: range

    def attention(self, query: torch.Tensor, new: KeysValues, pages: KeysValues, scores: Scores) -> torch.Tensor:
        """See `PagedStep`."""
        heads, size, slots = query.shape[1], query.shape[3], self.slots
        first = slots.start if scores.window is None else max(slots.start, slots.stop - scores.window)
        keys, values = (
            _written(each, added, slots.stop - 1)[None, first : slots.stop].transpose(1, 2)
            for each, added in zip(pages, new, strict=True)
        )
        rows = query.reshape(1, keys.shape[1], heads // keys.shape[1], size)  # those that share keys
        return _attend(rows, keys, values, None, scores).view(1, 1, heads, size)


@dataclass(frozen=True)
class InBlocks:
    """One new token a sequence, by a kernel.

    Attributes:
        tables: int32 `(B, M)`: the blocks of each sequence; what lies beyond them is not read.
        lengths: int32 `(B,)`: positions of each sequence, the new one included.
    """

    tables: torch.Tensor
    lengths: torch.Tensor

    def attend(self, queries: torch.Tensor, new: KeysValues, pages: KeysValues, scores: Scores) -> torch.Tensor:
        """See `Reach`."""
        del new
        return paged_decode(queries, *pages, self.tables, self.lengths, scores.scaling, scores.window, scores.softcap)


@dataclass(frozen=True)
class OneByOne:
    """Sequence i has `counts[i]` new tokens behind `starts[i]` old ones, in `blocks[i]`."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    blocks: tuple[Blocks, ...]

    def attend(self, queries: torch.Tensor, new: KeysValues, pages: KeysValues, scores: Scores) -> torch.Tensor:
        """See `Reach`."""
        del new
        outputs = []
        parts = torch.split(queries, list(self.counts))
        for start, of_sequence, blocks in zip(self.starts, parts, self.blocks, strict=True):
            total = start + of_sequence.shape[0]
            first = (
                0 if scores.window is None else max(0, start + 1 - scores.window)
            )  # no new token sees what is left out
            keys, values = (_positions(each, blocks, first, total) for each in pages)
            outputs.append(_of_sequence(of_sequence, keys, values, scores))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


@dataclass(frozen=True)
class Ragged:
    """Several new tokens of many sequences, on a GPU.

    Attributes:
        borders: int32 `(2, B + 1)`: where each sequence's queries and keys begin.
        seen: int64: slots of all positions of all sequences; None: there are new ones only.
        longest: the most queries and keys of a sequence.
        one_by_one: the same for scores and types that flash attention does not know; None: it knows them.
    """

    borders: torch.Tensor
    seen: torch.Tensor | None
    longest: tuple[int, int]
    one_by_one: OneByOne | None

    def attend(self, queries: torch.Tensor, new: KeysValues, pages: KeysValues, scores: Scores) -> torch.Tensor:
        """See `Reach`."""
        if not flash_serves(queries, scores.softcap):
            assert self.one_by_one is not None
            return self.one_by_one.attend(queries, new, pages, scores)
        keys, values = new if self.seen is None else (each.flatten(0, 1)[self.seen] for each in pages)
        return varlen_between(queries, keys, values, self.borders, self.longest, scores.scaling, scores.window)


def flash_serves(queries: torch.Tensor, softcap: float | None) -> bool:
    """Whether PyTorch's variable-length flash attention computes this on a GPU."""
    return queries.dtype in HALF and queries.shape[-1] <= MAX_HEAD_SIZE and softcap is None


@dataclass(frozen=True)
class Rectangle:
    """One new token a sequence, where no kernel serves.

    Attributes:
        slots: int64 `(B * T,)`: where each sequence's positions are, then any up to the longest.
        distance: int64 `(B, T)`: how far behind the new one each is; below 0 where there is none.
    """

    slots: torch.Tensor
    distance: torch.Tensor

    def attend(self, queries: torch.Tensor, new: KeysValues, pages: KeysValues, scores: Scores) -> torch.Tensor:
        """See `Reach`."""
        del new
        batch, heads, size = queries.shape
        shape = (batch, -1, *pages.keys.shape[2:])
        keys, values = (
            each.flatten(0, 1).index_select(0, self.slots).view(shape).transpose(1, 2) for each in pages
        )  # (B, H_kv, T, D)
        visible = self.distance >= 0
        if scores.window is not None:
            visible &= self.distance < scores.window
        rows = queries.view(batch, keys.shape[1], heads // keys.shape[1], size)  # those that share keys
        return _attend(rows, keys, values, visible[:, None, None], scores).view(batch, heads, size)


def _written(pages: torch.Tensor, new: torch.Tensor, slot: int) -> torch.Tensor:
    """The pages in a row, `(positions, H_kv, D)`, with the token's `(1, H_kv, 1, D)` at its slot."""
    positions = pages.view(-1, *pages.shape[2:])
    positions[slot] = new[0, :, 0]
    return positions


def _positions(pages: torch.Tensor, blocks: Blocks, first: int, end: int) -> torch.Tensor:
    """Positions `first` to `end` of a sequence, `(1, H_kv, T, D)`; a view where its blocks follow one another."""
    size = pages.shape[1]
    skipped = first // size
    blocks = blocks[skipped : -(-end // size)]
    whole = pages[blocks.start : blocks.stop] if isinstance(blocks, range) else pages[list(blocks)]
    return whole.flatten(0, 1)[None, first - skipped * size : end - skipped * size].transpose(1, 2)


def _of_sequence(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
    """`(n, H, D)` queries, the last of `(1, H_kv, T, D)` keys: `(n, H, D)`."""
    new, heads, size = queries.shape
    shared, total = keys.shape[1:3]
    # The query heads that share keys stand as further rows, so that no key is repeated.
    rows = queries.view(new, shared, -1, size).permute(1, 2, 0, 3).reshape(1, shared, -1, size)
    behind = torch.arange(total - new, total, device=keys.device)[:, None] - torch.arange(total, device=keys.device)
    visible = behind >= 0 if scores.window is None else (behind >= 0) & (behind < scores.window)
    output = _attend(rows, keys, values, visible.repeat(heads // shared, 1), scores)
    return output.view(shared, -1, new, size).permute(2, 0, 1, 3).reshape(new, heads, size)


def _attend(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None, scores: Scores
) -> torch.Tensor:
    """`(B, H_kv, R, D)` queries over `(B, H_kv, T, D)` keys, of which each sees those that are `visible`."""
    if scores.softcap is None:
        return F.scaled_dot_product_attention(rows, keys, values, attn_mask=visible, scale=scores.scaling)
    # Scores that are bent (Gemma 2): `softcap * tanh(scores / softcap)`.
    products = rows.float() @ keys.float().mT * scores.scaling
    bent = scores.softcap * torch.tanh(products / scores.softcap)
    if visible is not None:
        bent = bent.masked_fill(~visible, -torch.inf)
    return (bent.softmax(dim=-1) @ values.float()).to(rows.dtype)
