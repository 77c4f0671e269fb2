from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt.data.base import BatchOrder
from truthgpt.data.batch_order import (
    MIX_PERIOD,
    BucketedOrder,
    MixedOrder,
    ShuffledOrder,
    SourceShare,
    sample_weights,
)
from truthgpt.data.order import KeyedPermutation
from truthgpt.errors import DataError
from truthgpt.runtime.seeds import derive_seed


def flat(order: BatchOrder, steps: range) -> list[int]:
    return [index for step in steps for micro_batch in order.micro_batches(step) for index in micro_batch]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**40))
def test_shuffled_epochs_hold_every_sample_once(samples: int, micro: int, accum: int, seed: int) -> None:
    order = ShuffledOrder(samples, micro, accum, seed)
    assert order.steps_per_epoch == -(-samples // (micro * accum))
    for epoch in (0, 1):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        permutation = KeyedPermutation(samples, derive_seed(seed, "order", epoch))
        assert flat(order, steps) == permutation(np.arange(samples)).tolist()
        for step in steps[:-1]:
            assert [len(micro_batch) for micro_batch in order.micro_batches(step)] == [micro] * accum
        assert all(0 < len(micro_batch) <= micro for micro_batch in order.micro_batches(steps[-1]))


@st.composite
def bucketed(draw: st.DrawFn) -> tuple[BucketedOrder, list[int], list[int], int | None]:
    bins = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    lengths = draw(st.lists(st.integers(1, max(bins)), min_size=1, max_size=60))
    max_tokens = draw(st.none() | st.integers(1, 100))
    micro, accum, seed = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 2**40))
    return BucketedOrder(np.array(lengths), bins, micro, accum, seed, max_tokens), lengths, bins, max_tokens


@settings(max_examples=150, deadline=None)
@given(bucketed())
def test_bucketed_epochs_hold_every_sample_once_in_few_shapes(
    case: tuple[BucketedOrder, list[int], list[int], int | None],
) -> None:
    order, lengths, bins, max_tokens = case
    micro_batches = []
    for epoch in (0, 1):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        assert sorted(flat(order, steps)) == list(range(len(lengths)))
        counts = [len(order.micro_batches(step)) for step in steps]
        assert counts[:-1] == [order.describe()["grad_accum_steps"]] * (len(counts) - 1)
        micro_batches += [micro_batch for step in steps for micro_batch in order.micro_batches(step)]
    padded = [min(size for size in bins if size >= max(lengths[i] for i in batch)) for batch in micro_batches]
    for batch, size in zip(micro_batches, padded, strict=True):
        assert {min(other for other in bins if other >= lengths[index]) for index in batch} == {size}
        if max_tokens is not None:
            assert len(batch) == 1 or len(batch) * size <= max_tokens
    sizes = dict(zip(order.describe()["bins"], order.describe()["bin_batch_sizes"], strict=True))
    for size in set(padded):
        in_bin = sum(min(other for other in bins if other >= length) == size for length in lengths)
        batches = Counter(len(batch) for batch, other in zip(micro_batches, padded, strict=True) if other == size)
        full, rest = divmod(in_bin, sizes[size])
        assert batches == Counter({sizes[size]: 2 * full}) + Counter({rest: 2 if rest else 0})


def test_token_budget_sizes_batches_by_bin() -> None:
    order = BucketedOrder(np.array([60, 100, 500] * 20), [64, 128, 512], 8, 1, 1, max_tokens=256)
    assert order.describe()["bin_batch_sizes"] == [4, 2, 1]
    assert Counter(len(order.micro_batches(step)[0]) for step in range(order.steps_per_epoch)) == {4: 5, 2: 10, 1: 20}


def test_bins_are_mixed_and_epochs_differ() -> None:
    order = BucketedOrder(np.array([1] * 100 + [9] * 100), [4, 10], 5, 1, 1)
    kinds = ["short" if order.micro_batches(step)[0][0] < 100 else "long" for step in range(40)]
    changes = sum(one != other for one, other in pairwise(kinds))
    assert 10 < changes < 30  # 19.5 on average
    epochs = [[order.micro_batches(step)[0] for step in range(epoch * 40, epoch * 40 + 40)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert {frozenset(batch) for batch in epochs[0]}.isdisjoint({frozenset(batch) for batch in epochs[1]})
    kinds_later = ["short" if batch[0] < 100 else "long" for batch in epochs[1]]
    assert kinds != kinds_later
    other_seed = BucketedOrder(np.array([1] * 100 + [9] * 100), [4, 10], 5, 1, 2)
    assert [other_seed.micro_batches(step)[0] for step in range(40)] != epochs[0]


def test_a_sample_longer_than_every_bin() -> None:
    with pytest.raises(ValueError, match=r"sample of 9 tokens fits into none of the bins \[4, 8\]"):
        BucketedOrder(np.array([3, 9]), [8, 4], 1, 1, 1)


@pytest.mark.parametrize(
    "build", [lambda: ShuffledOrder(0, 1, 1, 1), lambda: BucketedOrder(np.zeros(0, dtype=np.int64), [4], 1, 1, 1)]
)
def test_no_samples(build: Callable[[], BatchOrder]) -> None:
    with pytest.raises(DataError, match="0 training samples"):
        build()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.05, 20)), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2**40),
)
def test_mixed_sources_are_read_evenly(shares: list[tuple[int, float]], micro: int, accum: int, seed: int) -> None:
    order = MixedOrder([SourceShare(*share) for share in shares], micro, accum, seed)
    total = sum(samples for samples, _ in shares)
    assert order.steps_per_epoch == -(-total // (micro * accum))
    steps = range(600 // (micro * accum))
    assert all([len(b) for b in order.micro_batches(step)] == [micro] * accum for step in steps)
    found = np.array(flat(order, steps))
    first = 0
    slots = order.describe()["shares"]
    for (samples, _), places in zip(shares, slots, strict=True):
        mine = found[(found >= first) & (found < first + samples)] - first
        # Spread evenly from the first step on: at any moment each source is at most one read from its place, and so is
        # each of the others that make up the count.
        share = places / MIX_PERIOD
        assert abs(len(mine) - len(found) * share) <= 1 + len(shares) * share
        for start in range(0, len(mine) - samples + 1, samples):
            assert sorted(mine[start : start + samples].tolist()) == list(range(samples))
        rest = mine[len(mine) - len(mine) % samples :]
        assert len(set(rest.tolist())) == len(rest)
        first += samples


def test_mixed_passes_have_their_own_orders_and_cross_periods() -> None:
    order = MixedOrder([SourceShare(30, 1.0), SourceShare(5, 1.0)], 10, 1, 3)
    found = np.array(flat(order, range(3 * MIX_PERIOD // 10)))
    mine = found[found < 30].reshape(-1, 30)
    assert len(mine) == 3 * MIX_PERIOD // 60
    assert (np.sort(mine, axis=1) == np.arange(30)).all()
    assert len(np.unique(mine, axis=0)) == len(mine)
    periods = (found < 30).reshape(3, MIX_PERIOD)
    assert not np.array_equal(periods[0], periods[1])
    assert periods.sum(axis=1).tolist() == [MIX_PERIOD // 2] * 3


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8))
def test_any_step_alone(steps: list[int]) -> None:
    def fresh() -> list[BatchOrder]:
        return [
            ShuffledOrder(9000, 4, 3, 1),
            BucketedOrder(np.arange(1, 101), [10, 50, 100], 4, 3, 1),
            MixedOrder([SourceShare(37, 3.0), SourceShare(9000, 1.0)], 4, 3, 1),
        ]

    for used, *new in zip(fresh(), *(fresh() for _ in steps), strict=True):
        assert [used.micro_batches(step) for step in steps] == [
            order.micro_batches(step) for order, step in zip(new, steps, strict=True)
        ]


def test_a_step_costs_the_same_wherever_it_is() -> None:
    started = time.process_time()
    ShuffledOrder(10**12, 4, 2, 1).micro_batches(10**13)
    MixedOrder([SourceShare(10**12, 1.0), SourceShare(5, 1e-3)], 4, 2, 1).micro_batches(10**12)
    assert time.process_time() - started < 20, "counted up to them, it takes for ever"


def test_bucketing_a_million_samples_is_quick() -> None:
    lengths = np.random.default_rng(0).integers(1, 513, 10**6)
    started = time.process_time()
    order = BucketedOrder(lengths, [64, 128, 256, 512], 8, 2, 1)
    order.micro_batches(0)
    assert time.process_time() - started < 30  # about 0.3 s


@pytest.mark.parametrize(
    ("weights", "slots"),
    [
        ([1, 1], [5000, 5000]),
        ([2, 1], [6667, 3333]),
        ([1, 1, 1], [3334, 3333, 3333]),
        ([1e-9, 1.0, 1e-9], [1, 9998, 1]),
        ([7], [10000]),
    ],
)
def test_shares(weights: list[float], slots: list[int]) -> None:
    order = MixedOrder([SourceShare(10, weight) for weight in weights], 1, 1, 1)
    assert order.describe()["shares"] == slots


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30))
def test_shares_add_up(weights: list[float]) -> None:
    slots = MixedOrder([SourceShare(10, weight) for weight in weights], 1, 1, 1).describe()["shares"]
    assert sum(slots) == MIX_PERIOD
    exact = np.array(weights) / sum(weights) * MIX_PERIOD
    assert (np.abs(np.array(slots) - exact) <= len(weights)).all()
    assert min(slots) >= 1


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_weights(weight: float) -> None:
    with pytest.raises(ValueError, match="positive, finite weights"):
        MixedOrder([SourceShare(10, 1.0), SourceShare(10, weight)], 1, 1, 1)


def test_an_empty_source_in_a_mixture_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.sources\[1\]: 0 training samples"):
        MixedOrder([SourceShare(10, 1.0), SourceShare(0, 1.0)], 1, 1, 1)


@settings(deadline=None)
@given(st.sampled_from(["documents", "tokens"]), st.lists(st.integers(1, 100), min_size=9, max_size=9))
def test_weights_by_documents_and_tokens(mix_by: str, numbers: list[int]) -> None:
    """Samples drawn by the weights hold the units in the wanted shares."""
    weights, samples, units = [1.0, 2.0, numbers[0] / 10], numbers[1:4], numbers[4:7]
    unused = [1, 1, 1]
    documents, tokens = (units, unused) if mix_by == "documents" else (unused, units)
    by_sample = sample_weights(weights, mix_by, samples, documents, tokens)  # type: ignore[arg-type]
    per_unit = np.array(by_sample) * np.array(units) / np.array(samples)
    assert per_unit / per_unit.sum() == pytest.approx(np.array(weights) / sum(weights))


def test_descriptions_are_plain_and_tell_orders_apart() -> None:
    lengths = np.array([3, 4, 9])
    orders: list[BatchOrder] = [
        ShuffledOrder(3, 2, 3, 1),
        ShuffledOrder(3, 2, 2, 1),
        ShuffledOrder(4, 2, 3, 1),
        BucketedOrder(lengths, [4, 10], 2, 3, 1),
        BucketedOrder(lengths, [5, 10], 2, 3, 1),
        BucketedOrder(lengths, [4, 10], 3, 2, 1),
        BucketedOrder(lengths, [4, 10], 2, 3, 1, max_tokens=12),
        MixedOrder([SourceShare(3, 1.0)], 2, 3, 1),
        MixedOrder([SourceShare(3, 1.0), SourceShare(3, 2.0)], 2, 3, 1),
        MixedOrder([SourceShare(3, 1.0), SourceShare(3, 1.0)], 2, 3, 1),
        MixedOrder([SourceShare(3, 1.0), SourceShare(3, 1.0)], 2, 2, 1),
    ]
    texts = [json.dumps(order.describe(), sort_keys=True) for order in orders]
    assert len(set(texts)) == len(orders)
    assert [json.loads(text) for text in texts] == [order.describe() for order in orders]
    assert ShuffledOrder(3, 1, 6, 9).describe() == orders[0].describe()
    assert BucketedOrder(lengths, [10, 4], 2, 3, 9).describe() == orders[3].describe()
    assert MixedOrder([SourceShare(3, 2.0), SourceShare(3, 4.0)], 6, 1, 9).describe() == orders[8].describe()


def test_orders_are_fixed_for_ever() -> None:
    """A changed formula would silently change what every resumed run trains on."""
    assert ShuffledOrder(10, 2, 2, 1).micro_batches(3) == [[9, 7], [5, 8]]
    assert BucketedOrder(np.arange(1, 11), [3, 10], 2, 2, 1).micro_batches(4) == [[5, 4], [3]]
    assert MixedOrder([SourceShare(4, 3.0), SourceShare(6, 1.0)], 2, 2, 1).micro_batches(3000) == [[1, 8], [2, 3]]
