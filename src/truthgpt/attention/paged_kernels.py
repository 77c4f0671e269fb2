"""Attention of new tokens over a paged cache, and writing to its pages, as Triton kernels. Imported on a GPU only.

Pages are those of PagedAttention (Kwon et al. 2023, arXiv 2309.06180). A program reads one key-value head of a part of
one sequence, once for all query heads that share it, and a second kernel joins the parts as flash-decoding does (Dao
et al. 2023). How many parts there may be follows from shapes alone, so that a CUDA graph can be replayed with other
lengths; which positions a part has is found on the device, where the lengths are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Positions a program holds at a time, its warps, and the stages of the pipeline that fetches them."""

    positions: int
    warps: int
    stages: int


_HALF = {64: Tile(64, 4, 3), 128: Tile(32, 4, 3), 256: Tile(32, 8, 3)}
"""By the largest head size."""
_FLOAT32 = {64: Tile(32, 4, 1), 128: Tile(16, 4, 1), 256: Tile(16, 8, 1)}
"""The same for float32, whose products are not made by tensor cores."""

ENOUGH_PROGRAMS = 2
"""Programs of a multiprocessor from which sequences are no longer split to fill the GPU."""
SPLIT_PROGRAMS = 4
"""Programs of a multiprocessor aimed at when they are split."""
LEAST_POSITIONS = 128
"""Positions worth a part of their own: each part costs its share of the kernel that joins them."""
LONG_POSITIONS = 4096
"""Positions from which a sequence is split in any case: alone, it would outlast a batch of short ones."""
MOST_LONG_SPLITS = 8
"""Parts made for that reason only: in a batch of short sequences most of their programs find nothing to do."""
MOST_SPLITS = 128


def paged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of one new token a sequence over its pages; `(B, H, D)` in the type of the query.

    Args:
        query: `(B, H, D)` in bf16, fp16 or float32.
        keys, values: one layer's pages `(blocks, block_size, H_kv, D)`, in the query's type; H is a multiple of H_kv.
        block_tables: int32 `(B, M)`, the blocks of each sequence in order; what follows them is not read.
        lengths: int32 `(B,)`, positions to attend to: the new token's own is the last and already written. A row of
            length 0 pads a batch, and its output is 0.
        scaling: factor of the scores.
        window: positions a query sees at most, its own included.
        softcap: bends the scores to `softcap * tanh(scores / softcap)`.
    """
    query = _with_whole_heads(query)
    tile = tile_of(query.shape[2], query.dtype)
    positions = block_tables.shape[1] * keys.shape[1]
    if window is not None:
        positions = min(positions, window + tile.positions)
    splits = split_count(query.shape[0], keys.shape[2], positions, _processors(query.device))
    return decode(query, keys, values, block_tables, lengths, scaling, window, softcap, splits, tile)


def write_pages(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write the keys and values of new tokens to their places, in place and in one launch.

    Args:
        key, value: `(N, H_kv, D)`.
        keys, values: one layer's pages `(blocks, block_size, H_kv, D)`.
        slots: int64 `(N,)`, block times block size plus place in the block, each at most once; -1: not written.
    """
    key, value = _with_whole_heads(key), _with_whole_heads(value)
    tokens, kv_heads, head_size = key.shape
    block_d = _block_of(head_size)
    block_h = min(int(triton.next_power_of_2(kv_heads)), 4096 // block_d)
    with torch.cuda.device_of(key):  # type: ignore[no-untyped-call, unused-ignore]
        _write[(tokens, _cdiv(kv_heads, block_h))](
            key, value, keys, values, slots,
            *key.stride()[:2], *value.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
            KV_HEADS=kv_heads, HEAD_SIZE=head_size, BLOCK_SIZE=keys.shape[1], BLOCK_H=block_h, BLOCK_D=block_d,
            num_warps=max(1, min(8, block_h * block_d // 256)),
        )  # fmt: skip


def split_count(batch: int, kv_heads: int, positions: int, processors: int) -> int:
    """Parts that a sequence may be read in, decided without its length.

    Args:
        positions: the most that a sequence can attend to.
        processors: multiprocessors of the GPU.
    """
    programs = max(1, batch * kv_heads)
    splits = min(MOST_LONG_SPLITS, _cdiv(positions, LONG_POSITIONS))
    if programs < ENOUGH_PROGRAMS * processors:
        splits = max(splits, SPLIT_PROGRAMS * processors // programs)
    return max(1, min(splits, _cdiv(positions, LEAST_POSITIONS), MOST_SPLITS))


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    splits: int,
    tile: Tile,
) -> torch.Tensor:
    """`paged_decode` in so many parts a sequence at most, with tiles of this size."""
    batch, heads, head_size = query.shape
    block_size, kv_heads = keys.shape[1:3]
    output = torch.empty(batch, heads, head_size, dtype=query.dtype, device=query.device)
    partials, log_sums = output, output
    if splits > 1:
        partials = torch.empty(batch, heads, splits, head_size, dtype=torch.float32, device=query.device)
        log_sums = torch.empty(batch, heads, splits, dtype=torch.float32, device=query.device)
    block_d = _block_of(head_size)
    sizes = {
        "HEADS": heads, "HEAD_SIZE": head_size, "BLOCK_D": block_d, "WINDOWED": window is not None,
        "TILE": tile.positions, "LEAST": max(1, LEAST_POSITIONS // tile.positions),
    }  # fmt: skip
    window = 0 if window is None else window
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call, unused-ignore]
        _decode[(kv_heads, batch, splits)](
            query, keys, values, block_tables, lengths, output, partials, log_sums,
            *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], block_tables.stride(0), splits, window,
            scaling * LOG2_E if softcap is None else scaling / softcap, 0.0 if softcap is None else softcap * LOG2_E,
            GROUP=heads // kv_heads, BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK_SIZE=block_size,
            CAPPED=softcap is not None, SPLIT=splits > 1, num_warps=tile.warps, num_stages=tile.stages, **sizes,
        )  # fmt: skip
        if splits > 1:
            _join[(heads, batch)](
                partials, log_sums, lengths, output, splits, window, CHUNK=4096 // block_d, num_warps=4, **sizes
            )
    return output


def tile_of(head_size: int, dtype: torch.dtype) -> Tile:
    """The tile for this size of heads."""
    table = _FLOAT32 if dtype == torch.float32 else _HALF
    return next(tile for size, tile in table.items() if head_size <= size)


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 on the CPU, where Triton's interpreter runs the kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _with_whole_heads(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose heads lie in one piece each, as the kernels read them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _cdiv(whole: int, part: int) -> int:
    return -(-whole // part)


def _block_of(head_size: int) -> int:
    return max(16, int(triton.next_power_of_2(head_size)))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _parts(length, splits, window, WINDOWED: tl.constexpr, TILE: tl.constexpr, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """First position that is read, positions a part, and parts that have any; one at least, to write the zeros."""
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - window, 0) // TILE * TILE
    tiles = tl.cdiv(length - begin, TILE)
    share = tl.maximum(tl.cdiv(tiles, splits), LEAST)
    return begin, share * TILE, tl.maximum(tl.cdiv(tiles, share), 1)


@triton.jit(do_not_specialize=["table_row", "splits", "window"])  # type: ignore[untyped-decorator, unused-ignore]
def _decode(  # type: ignore[no-untyped-def]
    query, keys, values, block_tables, lengths, output, partials, log_sums,
    q_row, q_head, k_block, k_position, k_head, v_block, v_position, v_head, table_row, splits, window, scale, cap,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_SIZE: tl.constexpr, CAPPED: tl.constexpr, SPLIT: tl.constexpr,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, WINDOWED: tl.constexpr, TILE: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    # Heads of one sequence, which lie side by side in memory, are read at the same time; parts beyond the ends of
    # short sequences come last.
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    first, last, used = 0, length, 1
    if WINDOWED or SPLIT:
        begin, share, used = _parts(length, splits, window, WINDOWED, TILE, LEAST)
        first = begin
        if SPLIT:
            if split >= used:
                return
            first = begin + split * share
            last = tl.minimum(first + share, length)
    members = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    shown = (members < GROUP)[:, None] & (dims < HEAD_SIZE)[None, :]
    heads = kv_head * GROUP + members
    q = tl.load(query + row * q_row + heads[:, None] * q_head + dims[None, :], mask=shown, other=0.0)
    table = block_tables + row * table_row
    keys += kv_head * k_head + dims[None, :]
    values += kv_head * v_head + dims[None, :]
    values_sum = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_G], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    positions = first + tl.arange(0, TILE)
    # A tile may lie in several blocks. Their numbers are fetched a tile ahead, or each tile would wait twice.
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=positions < last, other=0)
    for start in range(first, last, TILE):
        positions = start + tl.arange(0, TILE)
        inside = positions < last
        if WINDOWED:
            inside = inside & (positions >= length - window)
        here = blocks.to(tl.int64)[:, None]
        places = (positions % BLOCK_SIZE)[:, None]
        following = positions + TILE
        blocks = tl.load(table + following // BLOCK_SIZE, mask=following < last, other=0)
        wanted = inside[:, None]
        if HEAD_SIZE < BLOCK_D:
            wanted = wanted & (dims < HEAD_SIZE)[None, :]
        k = tl.load(keys + here * k_block + places * k_position, mask=wanted, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(2 * scores) - 1)
        # In each tile there is a position to see: the maximum is finite.
        scores = tl.where(inside[None, :], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        v = tl.load(values + here * v_block + places * v_position, mask=wanted, other=0.0)
        values_sum = tl.dot(weights.to(v.dtype), v, values_sum * correction[:, None], input_precision="ieee")
        row_max = new_max
    values_sum = values_sum / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    rows = row * HEADS + heads
    if used == 1:
        there = output + rows[:, None] * HEAD_SIZE + dims[None, :]
        tl.store(there, values_sum.to(output.dtype.element_ty), mask=shown)
    elif SPLIT:
        rows = rows * splits + split
        tl.store(partials + rows[:, None] * HEAD_SIZE + dims[None, :], values_sum, mask=shown)
        tl.store(log_sums + rows, row_max + tl.log2(row_sum), mask=members < GROUP)


@triton.jit(do_not_specialize=["splits", "window"])  # type: ignore[untyped-decorator, unused-ignore]
def _join(  # type: ignore[no-untyped-def]
    partials, log_sums, lengths, output, splits, window,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, WINDOWED: tl.constexpr, TILE: tl.constexpr,
    LEAST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The mean of the parts of one head, weighted by their softmax denominators."""
    row = tl.program_id(1).to(tl.int64)
    _, _, used = _parts(tl.load(lengths + row), splits, window, WINDOWED, TILE, LEAST)
    if used == 1:
        return
    place = row * HEADS + tl.program_id(0)
    dims = tl.arange(0, BLOCK_D)
    values_sum = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    largest = -float("inf")
    for first in range(0, used, CHUNK):
        parts = first + tl.arange(0, CHUNK)
        log_sum = tl.load(log_sums + place * splits + parts, mask=parts < used, other=-float("inf"))
        wanted = (parts < used)[:, None] & (dims < HEAD_SIZE)[None, :]
        rows = place * splits + parts
        part = tl.load(partials + rows[:, None] * HEAD_SIZE + dims[None, :], mask=wanted, other=0.0)
        new_largest = tl.maximum(largest, tl.max(log_sum, 0))
        weights = tl.exp2(log_sum - new_largest)
        correction = tl.exp2(largest - new_largest)
        total = total * correction + tl.sum(weights, 0)
        values_sum = values_sum * correction + tl.sum(part * weights[:, None], 0)
        largest = new_largest
    values_sum = (values_sum / total).to(output.dtype.element_ty)
    tl.store(output + place * HEAD_SIZE + dims, values_sum, mask=dims < HEAD_SIZE)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _write(  # type: ignore[no-untyped-def]
    key, value, keys, values, slots,
    key_row, key_head, value_row, value_head, k_block, k_position, k_head, v_block, v_position, v_head,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    position = slot % BLOCK_SIZE
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    wanted = (heads < KV_HEADS) & (dims < HEAD_SIZE)
    k = tl.load(key + row * key_row + heads * key_head + dims, mask=wanted)
    v = tl.load(value + row * value_row + heads * value_head + dims, mask=wanted)
    k_start = keys + block * k_block + position * k_position
    v_start = values + block * v_block + position * v_position
    tl.store(k_start + heads * k_head + dims, k.to(keys.dtype.element_ty), mask=wanted)
    tl.store(v_start + heads * v_head + dims, v.to(values.dtype.element_ty), mask=wanted)
