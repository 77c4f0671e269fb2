"""The kernels of the paged cache against the formula in float64, and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="PyTorch's CUDA builds for Linux bring Triton")

from truthgpt.attention import paged_kernels
from truthgpt.attention.paged_kernels import decode, paged_decode, split_count, tile_of, write_pages

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
RAGGED = (1, 300, 0, 16, 129, 17, 64, 700)
"""A padding row among them, a single token, and lengths on and beside the borders of blocks and tiles."""
ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Largest norm of the difference, as a share of the result's."""


@dataclass
class Cache:
    """Pages that hold NaN wherever no token lies, block 0 above all: it stands in the tables beyond every sequence."""

    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor

    @property
    def slots(self) -> list[torch.Tensor]:
        """Of each sequence, where in the flattened pages its tokens lie."""
        block_size = self.keys.shape[1]
        positions = [torch.arange(length, device=self.tables.device) for length in self.lengths.tolist()]
        return [
            table[at // block_size].long() * block_size + at % block_size
            for table, at in zip(self.tables, positions, strict=True)
        ]


def cache_of(
    lengths: Sequence[int],
    block_size: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    spare: int = 3,
) -> Cache:
    """Random keys and values in shuffled blocks; the tables have `spare` columns more than the longest sequence."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // block_size) for length in lengths]
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    tables = torch.zeros(len(lengths), max(counts) + spare, dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    shape = (sum(counts) + 1, block_size, kv_heads, head_size)
    keys, values = (torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
    cache = Cache(keys, values, tables.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    for slots in cache.slots:
        for pages in (keys, values):
            new = torch.randn(len(slots), kv_heads, head_size, generator=generator)
            pages.flatten(0, 1)[slots] = new.to(dtype).to(DEVICE)
    return cache


def query_of(cache: Cache, group: int) -> torch.Tensor:
    """A query whose rows and heads do not lie side by side."""
    batch, kv_heads, head_size = len(cache.lengths), cache.keys.shape[2], cache.keys.shape[3]
    generator = torch.Generator().manual_seed(1)
    wide = 2 * torch.randn(batch, 3, kv_heads * group, 2 * head_size, generator=generator)
    return wide.to(cache.keys.dtype).to(DEVICE)[:, 1, :, :head_size]


def exact(
    query: torch.Tensor, cache: Cache, scaling: float, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """Softmax by the formula in float64, row by row."""
    output = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    group = query.shape[1] // cache.keys.shape[2]
    for row, slots in enumerate(cache.slots):
        if len(slots) == 0:
            continue
        seen = slots if window is None else slots[-window:]
        keys, values = (
            pages.flatten(0, 1)[seen].double().repeat_interleave(group, dim=1) for pages in (cache.keys, cache.values)
        )
        scores = torch.einsum("hd,nhd->hn", query[row].double(), keys) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        output[row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), values)
    return output


def assert_near(output: torch.Tensor, expected: torch.Tensor) -> None:
    assert output.shape == expected.shape
    assert (output.double() - expected).norm() < ERRORS[output.dtype] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(3, 1), (2, 4), (1, 16)], ids=["own", "group4", "group16"])
def test_ragged_sequences(dtype: torch.dtype, head_size: int, heads: tuple[int, int]) -> None:
    """All sizes of blocks, windows and soft caps."""
    kv_heads, group = heads
    for block_size in (16, 32, 64, 128):
        cache = cache_of(RAGGED, block_size, kv_heads, head_size, dtype)
        query = query_of(cache, group)
        for window, softcap in ((None, None), (100, None), (1, None), (None, 5.0), (300, 20.0)):
            output = paged_decode(query, cache.keys, cache.values, cache.tables, cache.lengths, 0.1, window, softcap)
            assert output.dtype == dtype and output.is_contiguous()
            assert_near(output, exact(query, cache, 0.1, window, softcap))


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 33, 128])
@pytest.mark.parametrize("window", [None, 200])
def test_any_number_of_parts_gives_the_same(splits: int, window: int | None) -> None:
    for dtype, head_size in product((torch.float16, torch.float32), (64, 256)):
        cache = cache_of((*RAGGED, 3000, 1025), 16, 2, head_size, dtype)
        query = query_of(cache, 4)
        tensors = (query, cache.keys, cache.values, cache.tables, cache.lengths)
        output = decode(*tensors, 0.125, window, None, splits, tile_of(head_size, dtype))
        assert_near(output, exact(query, cache, 0.125, window))


def test_a_batch_of_nothing_but_padding_is_zero() -> None:
    cache = cache_of((5, 7), 16, 2, 64, torch.float16)
    cache.lengths.zero_()
    query = query_of(cache, 4)
    for splits in (1, 4):
        tensors = (query, cache.keys, cache.values, cache.tables, cache.lengths)
        assert torch.equal(decode(*tensors, 0.1, None, None, splits, tile_of(64, query.dtype)), 0 * query)


def test_scores_that_grow_along_the_sequence() -> None:
    """Each tile and each part has a larger maximum than those before, in the end far beyond what exp can hold."""
    cache = cache_of((300, 3000), 16, 1, 256, torch.float32)
    for slots in cache.slots:
        cache.keys.flatten(0, 1)[slots] *= torch.linspace(0, 30, len(slots), device=DEVICE)[:, None, None]
    query = query_of(cache, 4)
    tensors = (query, cache.keys, cache.values, cache.tables, cache.lengths)
    for splits, scaling in product((1, 33), (0.01, 1.0)):
        output = decode(*tensors, scaling, None, None, splits, tile_of(256, query.dtype))
        assert_near(output, exact(query, cache, scaling))


def test_number_of_parts() -> None:
    """One while sequences fill the GPU, more for a few long ones; never more than there is to share."""
    assert split_count(64, 8, 1024, 132) == 1
    assert split_count(8, 8, 8192, 132) == 8
    assert split_count(1, 8, 8192, 132) == 64
    assert split_count(1, 8, 1024, 132) == 8
    assert split_count(1, 8, 100, 132) == 1
    assert split_count(256, 8, 16384, 132) == 4
    assert split_count(256, 8, 1 << 20, 132) == 8
    assert split_count(1, 1, 1 << 20, 132) == 128
    assert split_count(0, 8, 1024, 132) == 8


def test_pages_beyond_two_to_the_31_elements() -> None:
    """Offsets into a large cache do not fit 32 bits."""
    pages = torch.zeros(2**31 // (16 * 8 * 64) + 2, 16, 8, 64, dtype=torch.bfloat16, device=DEVICE)
    last = pages.shape[0] - 1
    slots = torch.arange(last * 16, last * 16 + 10, device=DEVICE)
    key = torch.randn(10, 8, 64, device=DEVICE).bfloat16()
    write_pages(key, key, pages, torch.zeros_like(pages), slots)
    assert torch.equal(pages[last, :10], key)
    tables = torch.tensor([[last]], dtype=torch.int32, device=DEVICE)
    cache = Cache(pages, pages, tables, torch.tensor([10], dtype=torch.int32, device=DEVICE))
    query = query_of(cache, 4)
    assert_near(paged_decode(query, pages, pages, tables, cache.lengths, 0.1), exact(query, cache, 0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [(8, 64), (3, 80), (1, 256), (32, 128)])
def test_written_tokens_are_read_back(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """Keys and values as a projection gives them, one beside the other; -1 writes nothing, nor anything else."""
    generator = torch.Generator().manual_seed(0)
    tokens, blocks, block_size = 50, 6, 16
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    slots[::7] = -1
    both = torch.randn(tokens, 2, *heads, generator=generator).to(dtype).to(DEVICE)
    keys, values = (torch.randn(blocks, block_size, *heads, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    expected = [keys.clone(), values.clone()]
    written = slots >= 0
    for part, pages in enumerate(expected):
        pages.flatten(0, 1)[slots[written].to(DEVICE)] = both[written.to(DEVICE), part]
    write_pages(both[:, 0], both[:, 1], keys, values, slots.to(DEVICE))
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_heads_that_do_not_lie_in_one_piece() -> None:
    """Elements of a head apart from each other: copied first, not read wrongly."""
    cache = cache_of((40, 9), 16, 2, 64, torch.float16)
    query = query_of(cache, 4)
    apart = query.transpose(1, 2).contiguous().transpose(1, 2)
    tensors = (cache.keys, cache.values, cache.tables, cache.lengths)
    assert torch.equal(paged_decode(apart, *tensors, 0.1), paged_decode(query, *tensors, 0.1))
    new = torch.randn(2, 64, 2, device=DEVICE).half().transpose(1, 2)
    slots = torch.stack([slots[-1] for slots in cache.slots])
    write_pages(new, -new, cache.keys, cache.values, slots)
    assert torch.equal(cache.keys.flatten(0, 1)[slots], new)
    assert torch.equal(cache.values.flatten(0, 1)[slots], -new)


def next_token(query: torch.Tensor, new: torch.Tensor, slots: torch.Tensor, cache: Cache) -> torch.Tensor:
    """What a layer does: write, then attend."""
    write_pages(new[0], new[1], cache.keys, cache.values, slots)
    return paged_decode(query * 1.5, cache.keys, cache.values, cache.tables, cache.lengths, 0.1, 128) + 1


def expected_next(query: torch.Tensor, new: torch.Tensor, slots: torch.Tensor, cache: Cache) -> torch.Tensor:
    """The same by the formula, from the pages before."""
    keys, values = cache.keys.clone(), cache.values.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            keys.flatten(0, 1)[slot], values.flatten(0, 1)[slot] = new[0, row], new[1, row]
    return exact(query * 1.5, Cache(keys, values, cache.tables, cache.lengths), 0.1, 128) + 1


def last_slots(cache: Cache) -> torch.Tensor:
    """Where each sequence's last token lies; -1 for padding."""
    return torch.stack([s[-1] if len(s) else s.new_tensor(-1) for s in cache.slots])


def random_like(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).half().to(DEVICE)


@pytest.mark.parametrize("batch", [3, 40], ids=["split", "whole"])
def test_a_graph_is_replayed_with_other_lengths(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths, blocks and slots change in place between replays; nothing is read back while it is captured."""
    monkeypatch.setattr(paged_kernels, "_processors", lambda _: 16)
    lengths = [(37 * row) % 600 for row in range(batch - 1)] + [1500]
    cache = cache_of(lengths, 16, 2, 64, torch.float16)
    query, new, slots = query_of(cache, 4), random_like(2, batch, 2, 64), last_slots(cache)
    before = cache.keys.clone(), cache.values.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        next_token(query, new, slots, cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = next_token(query, new, slots, cache)
    for shift in (0, 1, 2):
        cache.keys.copy_(before[0])
        cache.values.copy_(before[1])
        lengths = lengths[-shift:] + lengths[:-shift]
        cache.tables.copy_(cache.tables.roll(shift, 0))
        if shift == 2:
            lengths[1] = 0  # a sequence has ended
        cache.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        slots.copy_(last_slots(cache))
        expected = expected_next(query, new, slots, cache)
        graph.replay()
        assert_near(output, expected)


def test_no_call_waits_for_the_gpu() -> None:
    cache = cache_of(RAGGED, 16, 2, 64, torch.float16)
    query, new, slots = query_of(cache, 4), random_like(2, len(RAGGED), 2, 64), last_slots(cache)
    next_token(query, new, slots, cache)  # compiling may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    next_token(query, new, slots, cache)


def test_the_result_is_the_same_every_time() -> None:
    cache = cache_of((3000, 700, 40), 16, 2, 64, torch.bfloat16)
    tensors = (query_of(cache, 4), cache.keys, cache.values, cache.tables, cache.lengths)
    first = paged_decode(*tensors, 0.125)
    assert all(torch.equal(paged_decode(*tensors, 0.125), first) for _ in range(10))
