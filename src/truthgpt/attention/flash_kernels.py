"""Causal attention over packed documents as Triton kernels, forward and backward. Imported on a GPU only.

FlashAttention-2 (Dao 2023, arXiv 2307.08691) with two changes for packed rows. A block of queries begins at the start
of its first query's document, read from a tensor, so that the grid does not depend on how many documents there are or
how long they get; and of the blocks of keys in between only those at a border, the diagonal or the edge of the window
are masked. Gradients of keys and values are summed over a group's query heads inside one program: no atomics, and the
result is the same every time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

# Dense rows, and packed ones: the fastest found on an H200 for 16,384 tokens, dense and in documents of 170.
_FORWARD = {
    False: {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 4, 2)},
    True: {64: (64, 32, 4, 3), 128: (64, 32, 4, 3), 256: (64, 32, 4, 2)},
}
"""By the largest head size: queries and keys a block, warps, stages."""
_BACKWARD = {
    False: {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 64, 8, 1)},
    True: {64: (64, 64, 4, 1), 128: (32, 64, 4, 3), 256: (32, 64, 8, 1)},
}
"""By the largest head size: rows of the blocks that a program walks over, rows of its own block, warps, stages."""


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    scaling: float,
    window: int,
    packed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, T, H, D)` and the base-2 logarithm of the softmax's denominator, float32 `(B, H, T)`.

    Args:
        query: `(B, H, T, D)` in half precision; key and value may have fewer heads.
        starts: int32 `(B, T)`, where in its row the document of each position begins.
        window: positions a query sees at most, its own included; 0: no limit.
        packed: whether rows hold several documents; decides the sizes of the blocks only.
    """
    batch, heads, length, head_size = query.shape
    output = torch.empty(batch, length, heads, head_size, dtype=query.dtype, device=query.device)
    log_sums = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    block = _block_of(head_size)
    block_m, block_n, warps, stages = _of_size(_FORWARD[packed], block)
    with torch.cuda.device(query.device):
        _forward[(triton.cdiv(length, block_m), heads, batch)](
            query, key, value, starts, output, log_sums,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            length, scaling * LOG2_E, window,
            GROUP=heads // key.shape[1], HEADS=heads, HEAD_SIZE=head_size, BLOCK_D=block, WINDOWED=window > 0,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return output, log_sums


def backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    scaling: float,
    window: int,
    packed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, in their shapes.

    Args:
        gradient: of the output, `(B, T, H, D)`.
        ends: int32 `(B, T)`, where in its row the document of each position ends (exclusive).
    """
    batch, heads, length, head_size = query.shape
    groups = key.shape[1]
    gradient = gradient.contiguous()
    d_query, d_key, d_value = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    deltas = torch.empty_like(log_sums)
    block = _block_of(head_size)
    small, large, warps, stages = _of_size(_BACKWARD[packed], block)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    sizes = {"HEADS": heads, "HEAD_SIZE": head_size, "BLOCK_D": block}
    with torch.cuda.device(query.device):
        _deltas[(triton.cdiv(length, 128), heads, batch)](output, gradient, deltas, length, BLOCK_M=128, **sizes)
        _keys_backward[(triton.cdiv(length, large), groups, batch)](
            query, key, value, ends, gradient, log_sums, deltas, d_key, d_value,
            *strides, length, scaling, scaling * LOG2_E, window,
            GROUP=heads // groups, WINDOWED=window > 0, BLOCK_M=small, BLOCK_N=large,
            num_warps=warps, num_stages=stages, **sizes,
        )  # fmt: skip
        _queries_backward[(triton.cdiv(length, large), heads, batch)](
            query, key, value, starts, gradient, log_sums, deltas, d_query,
            *strides, length, scaling, scaling * LOG2_E, window,
            GROUP=heads // groups, WINDOWED=window > 0, BLOCK_M=large, BLOCK_N=small,
            num_warps=warps, num_stages=stages, **sizes,
        )  # fmt: skip
    return d_query, d_key, d_value


_Blocks = tuple[int, int, int, int]


def _of_size(table: Mapping[int, _Blocks], head_size: int) -> _Blocks:
    return next(blocks for size, blocks in table.items() if head_size <= size)


def _block_of(head_size: int) -> int:
    return max(16, int(triton.next_power_of_2(head_size)))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rows(start, stride, rows, columns, length, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the rows `rows` of a matrix of `length` rows, zeros beyond it."""
    places = start + rows[:, None].to(tl.int64) * stride + columns[None, :]
    inside = (rows < length)[:, None]
    if HEAD_SIZE < BLOCK_D:
        inside = inside & (columns < HEAD_SIZE)[None, :]
    return tl.load(places, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_rows(start, stride, rows, columns, values, length, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    places = start + rows[:, None].to(tl.int64) * stride + columns[None, :]
    inside = (rows < length)[:, None]
    if HEAD_SIZE < BLOCK_D:
        inside = inside & (columns < HEAD_SIZE)[None, :]
    tl.store(places, values.to(start.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _seen(rows, columns, starts, window, WINDOWED: tl.constexpr):  # type: ignore[no-untyped-def]
    """True where the query of a row may look at the key of a column."""
    seen = (columns[None, :] <= rows[:, None]) & (columns[None, :] >= starts[:, None])
    if WINDOWED:
        seen = seen & (rows[:, None] - columns[None, :] < window)
    return seen


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _key_range(  # type: ignore[no-untyped-def]
    first_start,
    last_start,
    first_row,
    length,
    window,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys that a block of queries looks at: begin, begin and end of the blocks that need no mask, end."""
    begin = first_start
    bare_begin = last_start
    if WINDOWED:
        begin = tl.maximum(begin, first_row - window + 1)
        bare_begin = tl.maximum(bare_begin, first_row + BLOCK_M - window)
    begin = begin // BLOCK_N * BLOCK_N
    end = tl.minimum(first_row + BLOCK_M, length)
    bare_end = tl.maximum(first_row // BLOCK_N * BLOCK_N, begin)
    bare_begin = tl.minimum(tl.maximum(tl.cdiv(bare_begin, BLOCK_N) * BLOCK_N, begin), bare_end)
    return begin, bare_begin, bare_end, end


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _forward_blocks(  # type: ignore[no-untyped-def]
    values_sum, row_max, row_sum, q, key, value, k_stride, v_stride, begin, end, rows, row_starts, length, scale,
    window, MASKED: tl.constexpr, WINDOWED: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    for first in range(begin, end, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        k = _rows(key, k_stride, columns, dims, length, HEAD_SIZE, BLOCK_D)
        scores = tl.dot(q, tl.trans(k)) * scale
        if MASKED:
            scores = tl.where(_seen(rows, columns, row_starts, window, WINDOWED), scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing yet keeps -inf, and -inf minus itself is NaN.
        base = tl.where(new_max == -float("inf"), 0.0, new_max) if MASKED else new_max
        weights = tl.exp2(scores - base[:, None])
        correction = tl.exp2(row_max - base)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        values_sum = values_sum * correction[:, None]
        v = _rows(value, v_stride, columns, dims, length, HEAD_SIZE, BLOCK_D)
        values_sum = tl.dot(weights.to(v.dtype), v, values_sum)
        row_max = new_max
    return values_sum, row_max, row_sum


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _forward(  # type: ignore[no-untyped-def]
    query, key, value, starts, output, log_sums,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    length, scale, window,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The last blocks of a row have the most keys: they begin first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q = _rows(query + batch * q_batch + head * q_head, q_row, rows, dims, length, HEAD_SIZE, BLOCK_D)
    row_starts = tl.load(starts + batch * length + rows, mask=rows < length, other=0)
    last_row = tl.minimum(first_row + BLOCK_M, length) - 1
    begin, bare_begin, bare_end, end = _key_range(
        tl.load(starts + batch * length + first_row), tl.load(starts + batch * length + last_row),
        first_row, length, window, WINDOWED, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    keys = key + batch * k_batch + head // GROUP * k_head
    values = value + batch * v_batch + head // GROUP * v_head
    values_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    values_sum, row_max, row_sum = _forward_blocks(
        values_sum, row_max, row_sum, q, keys, values, k_row, v_row, begin, bare_begin, rows, row_starts, length, scale,
        window, True, WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    values_sum, row_max, row_sum = _forward_blocks(
        values_sum, row_max, row_sum, q, keys, values, k_row, v_row, bare_begin, bare_end, rows, row_starts, length,
        scale, window, False, WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    values_sum, row_max, row_sum = _forward_blocks(
        values_sum, row_max, row_sum, q, keys, values, k_row, v_row, bare_end, end, rows, row_starts, length, scale,
        window, True, WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    row_stride = HEADS * HEAD_SIZE
    out = output + batch * length * row_stride + head * HEAD_SIZE
    _store_rows(out, row_stride, rows, dims, values_sum / row_sum[:, None], length, HEAD_SIZE, BLOCK_D)
    tl.store(log_sums + (batch * HEADS + head) * length + rows, row_max + tl.log2(row_sum), mask=rows < length)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _deltas(  # type: ignore[no-untyped-def]
    output, gradient, deltas, length,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Product of the output of every row with its gradient, float32 `(B, H, T)`."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    row_stride = HEADS * HEAD_SIZE
    place = batch * length * row_stride + head * HEAD_SIZE
    o = _rows(output + place, row_stride, rows, dims, length, HEAD_SIZE, BLOCK_D).to(tl.float32)
    g = _rows(gradient + place, row_stride, rows, dims, length, HEAD_SIZE, BLOCK_D).to(tl.float32)
    tl.store(deltas + (batch * HEADS + head) * length + rows, tl.sum(o * g, 1), mask=rows < length)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _key_blocks(  # type: ignore[no-untyped-def]
    d_k, d_v, k, v, query, gradient, log_sums, deltas, q_stride, g_stride, begin, end, columns, column_ends, length,
    scale, window, MASKED: tl.constexpr, WINDOWED: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    for first in range(begin, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q = _rows(query, q_stride, rows, dims, length, HEAD_SIZE, BLOCK_D)
        log_sum = tl.load(log_sums + rows, mask=rows < length, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale - log_sum[None, :])  # (N, M)
        if MASKED:
            seen = (rows[None, :] >= columns[:, None]) & (rows[None, :] < column_ends[:, None])
            if WINDOWED:
                seen = seen & (rows[None, :] - columns[:, None] < window)
            weights = tl.where(seen, weights, 0.0)
        g = _rows(gradient, g_stride, rows, dims, length, HEAD_SIZE, BLOCK_D)
        d_v = tl.dot(weights.to(g.dtype), g, d_v)
        delta = tl.load(deltas + rows, mask=rows < length, other=0.0)
        d_scores = weights * (tl.dot(v, tl.trans(g)) - delta[None, :])
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k)
    return d_k, d_v


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _keys_backward(  # type: ignore[no-untyped-def]
    query, key, value, ends, gradient, log_sums, deltas, d_key, d_value,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    length, scaling, scale, window,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(0) * BLOCK_N
    group = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    columns = first_column + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    k = _rows(key + batch * k_batch + group * k_head, k_row, columns, dims, length, HEAD_SIZE, BLOCK_D)
    v = _rows(value + batch * v_batch + group * v_head, v_row, columns, dims, length, HEAD_SIZE, BLOCK_D)
    column_ends = tl.load(ends + batch * length + columns, mask=columns < length, other=0)
    last_column = tl.minimum(first_column + BLOCK_N, length) - 1
    # Queries from the diagonal to the end of the last key's document; those in between need no mask while all keys
    # are behind them and in the first key's document, which reaches least far.
    end = tl.load(ends + batch * length + last_column)
    bare_end = tl.load(ends + batch * length + first_column)
    if WINDOWED:
        end = tl.minimum(end, last_column + window)
        bare_end = tl.minimum(bare_end, first_column + window)
    bare_begin = first_column + BLOCK_N
    bare_end = tl.maximum(bare_end // BLOCK_M * BLOCK_M, bare_begin)
    mask_end = tl.minimum(bare_begin, end)
    bare_end = tl.minimum(bare_end, tl.maximum(end // BLOCK_M * BLOCK_M, bare_begin))
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    row_stride = HEADS * HEAD_SIZE
    for member in range(0, GROUP):
        head = group * GROUP + member
        queries = query + batch * q_batch + head * q_head
        gradients = gradient + batch * length * row_stride + head * HEAD_SIZE
        sums = log_sums + (batch * HEADS + head) * length
        products = deltas + (batch * HEADS + head) * length
        d_k, d_v = _key_blocks(
            d_k, d_v, k, v, queries, gradients, sums, products, q_row, row_stride, first_column, mask_end, columns,
            column_ends, length, scale, window, True, WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        d_k, d_v = _key_blocks(
            d_k, d_v, k, v, queries, gradients, sums, products, q_row, row_stride, bare_begin, bare_end, columns,
            column_ends, length, scale, window, False, WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        d_k, d_v = _key_blocks(
            d_k, d_v, k, v, queries, gradients, sums, products, q_row, row_stride, bare_end, end, columns,
            column_ends, length, scale, window, True, WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    place = (batch * tl.num_programs(1) + group) * length * HEAD_SIZE
    _store_rows(d_key + place, HEAD_SIZE, columns, dims, d_k * scaling, length, HEAD_SIZE, BLOCK_D)
    _store_rows(d_value + place, HEAD_SIZE, columns, dims, d_v, length, HEAD_SIZE, BLOCK_D)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _query_blocks(  # type: ignore[no-untyped-def]
    d_q, q, g, log_sum, delta, key, value, k_stride, v_stride, begin, end, rows, row_starts, length, scale,
    window, MASKED: tl.constexpr, WINDOWED: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    for first in range(begin, end, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        k = _rows(key, k_stride, columns, dims, length, HEAD_SIZE, BLOCK_D)
        v = _rows(value, v_stride, columns, dims, length, HEAD_SIZE, BLOCK_D)
        weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None])
        if MASKED:
            weights = tl.where(_seen(rows, columns, row_starts, window, WINDOWED), weights, 0.0)
        d_scores = weights * (tl.dot(g, tl.trans(v)) - delta[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q)
    return d_q


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _queries_backward(  # type: ignore[no-untyped-def]
    query, key, value, starts, gradient, log_sums, deltas, d_query,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    length, scaling, scale, window,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    row_stride = HEADS * HEAD_SIZE
    q = _rows(query + batch * q_batch + head * q_head, q_row, rows, dims, length, HEAD_SIZE, BLOCK_D)
    gradients = gradient + batch * length * row_stride + head * HEAD_SIZE
    g = _rows(gradients, row_stride, rows, dims, length, HEAD_SIZE, BLOCK_D)
    log_sum = tl.load(log_sums + (batch * HEADS + head) * length + rows, mask=rows < length, other=0.0)
    delta = tl.load(deltas + (batch * HEADS + head) * length + rows, mask=rows < length, other=0.0)
    row_starts = tl.load(starts + batch * length + rows, mask=rows < length, other=0)
    last_row = tl.minimum(first_row + BLOCK_M, length) - 1
    begin, bare_begin, bare_end, end = _key_range(
        tl.load(starts + batch * length + first_row), tl.load(starts + batch * length + last_row),
        first_row, length, window, WINDOWED, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    keys = key + batch * k_batch + head // GROUP * k_head
    values = value + batch * v_batch + head // GROUP * v_head
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_q = _query_blocks(
        d_q, q, g, log_sum, delta, keys, values, k_row, v_row, begin, bare_begin, rows, row_starts, length, scale,
        window, True, WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    d_q = _query_blocks(
        d_q, q, g, log_sum, delta, keys, values, k_row, v_row, bare_begin, bare_end, rows, row_starts, length,
        scale, window, False, WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    d_q = _query_blocks(
        d_q, q, g, log_sum, delta, keys, values, k_row, v_row, bare_end, end, rows, row_starts, length, scale, window,
        True, WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    place = (batch * HEADS + head) * length * HEAD_SIZE
    _store_rows(d_query + place, HEAD_SIZE, rows, dims, d_q * scaling, length, HEAD_SIZE, BLOCK_D)
