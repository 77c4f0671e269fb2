from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt.data.order import BLOCK, EpochPermutations, KeyedPermutation
from truthgpt.runtime.seeds import derive_seed


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
def test_is_a_bijection(length: int, key: int) -> None:
    images = KeyedPermutation(length, key)(np.arange(length))
    assert np.array_equal(np.sort(images), np.arange(length))


@pytest.mark.parametrize("length", [*range(1, 70), 255, 256, 257, 1023, 1025])
def test_every_small_length(length: int) -> None:
    order = KeyedPermutation(length, 42)
    assert sorted(order[position] for position in range(length)) == list(range(length))


@given(st.integers(1, 2**62), st.integers(), st.data())
def test_big_lengths_stay_inside_and_never_collide(length: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=50, unique=True)))
    images = KeyedPermutation(length, key)(positions)
    assert len(set(images.tolist())) == len(positions)
    assert images.min() >= 0 and images.max() < length


def test_spread_over_a_big_range() -> None:
    images = KeyedPermutation(2**33, 5)(np.arange(100_000))
    counts = np.histogram(images, bins=64, range=(0, 2**33))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 120  # 63 degrees of freedom: p of about 1e-5
    assert len(set(images.tolist())) == 100_000


def test_positions_are_independent_of_each_other() -> None:
    order = KeyedPermutation(1000, 7)
    images = order(np.arange(1000))
    assert [order[position] for position in (0, 17, 999)] == images[[0, 17, 999]].tolist()
    assert np.array_equal(order(np.arange(1000).reshape(10, 100)), images.reshape(10, 100))
    assert len(order) == 1000


def test_keys_give_unlike_orders() -> None:
    orders = [KeyedPermutation(500, key)(np.arange(500)) for key in range(40)]
    same = [int((a == b).sum()) for i, a in enumerate(orders) for b in orders[:i]]
    assert np.mean(same) == pytest.approx(1.0, abs=0.25)  # two random orders agree in one place on average
    assert max(same) < 12


@pytest.mark.parametrize("length", [5, 32, 50])
def test_every_sample_comes_first_about_equally_often(length: int) -> None:
    draws = 40 * length
    counts = np.zeros((2, length))
    for key in range(draws):
        images = KeyedPermutation(length, key * 0x5851F42D4C957F2D + 1)(np.array([0, length - 1]))
        counts[[0, 1], images] += 1
    chi_square = ((counts - 40) ** 2 / 40).sum(axis=1)
    assert (chi_square < length - 1 + 5 * np.sqrt(2 * length)).all()


def test_neighbours_are_torn_apart() -> None:
    images = KeyedPermutation(4096, 3)(np.arange(4096)).astype(float)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(np.arange(4096), images)[0, 1]) < 0.06


def test_is_fixed_for_ever() -> None:
    """A changed formula would silently change what every resumed run trains on."""
    assert KeyedPermutation(10, 42)(np.arange(10)).tolist() == [1, 5, 2, 9, 8, 0, 7, 6, 3, 4]
    assert KeyedPermutation(2**40, 42)[12345] == 833030043367


@pytest.mark.parametrize("position", [-1, 10])
def test_outside(position: int) -> None:
    with pytest.raises(IndexError):
        KeyedPermutation(10, 1)[position]


@pytest.mark.parametrize("length", [0, -1, 2**62 + 1])
def test_bad_length(length: int) -> None:
    with pytest.raises(ValueError, match="length must be"):
        KeyedPermutation(length, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3 * BLOCK), st.lists(st.tuples(st.integers(0, 3), st.integers(0), st.integers(0)), max_size=6))
def test_runs_of_an_epoch_are_parts_of_its_permutation(length: int, runs: list[tuple[int, int, int]]) -> None:
    orders = EpochPermutations(length, 7, "a", 1)
    for epoch, one, other in runs:
        first, stop = sorted((one % (length + 1), other % (length + 1)))
        whole = KeyedPermutation(length, derive_seed(7, "a", 1, epoch))(np.arange(length))
        assert np.array_equal(orders.images(epoch, first, stop), whole[first:stop])
        assert np.array_equal(orders.whole(epoch), whole)


@pytest.mark.parametrize(("first", "stop"), [(-1, 3), (3, 2), (9, 11)])
def test_runs_outside(first: int, stop: int) -> None:
    with pytest.raises(IndexError):
        EpochPermutations(10, 1, "a").images(0, first, stop)
