from __future__ import annotations

import pickle
import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truthgpt.data import packing
from truthgpt.data.base import IGNORED_LABEL, Sample
from truthgpt.data.packing import PackedDataset, best_fit, join_samples, max_packed_documents
from truthgpt.data.samples import RowDataset

from .conftest import MakeStore, rows


def sample(*tokens: int) -> Sample:
    values = np.array(tokens, dtype=np.int64)
    return {"input_ids": values[:-1], "labels": values[1:]}


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Rows that first-fit decreasing takes, in plain Python."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        row = next((row for row, left in enumerate(free) if left >= length), None)
        if row is None:
            free.append(capacity - length)
        else:
            free[row] -= length
    return len(free)


@st.composite
def items(draw: st.DrawFn) -> tuple[npt.NDArray[np.int64], int]:
    capacity = draw(st.integers(1, 300))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=80))
    return np.array(lengths, dtype=np.int64), capacity


@settings(max_examples=200, deadline=None)
@given(items(), st.integers(1, 90))
def test_every_item_is_in_one_row_and_no_row_overflows(
    packed: tuple[npt.NDArray[np.int64], int], max_items: int
) -> None:
    lengths, capacity = packed
    found = best_fit(lengths, capacity, max_items)
    assert sorted(item for row in found for item in row) == list(range(len(lengths)))
    assert all(0 < len(row) <= max_items and lengths[row].sum() <= capacity for row in found)
    assert best_fit(lengths, capacity, max_items) == found


@settings(max_examples=200, deadline=None)
@given(items())
def test_few_rows(packed: tuple[npt.NDArray[np.int64], int]) -> None:
    """Both decreasing methods take at most 11/9 of the least possible plus one row (Johnson 1974)."""
    lengths, capacity = packed
    count = len(best_fit(lengths, capacity, 1000))
    least = -(-int(lengths.sum()) // capacity)
    assert least <= count <= max(11 / 9 * first_fit_decreasing(lengths.tolist(), capacity) + 1, least)


def test_the_fullest_row_that_fits_is_taken() -> None:
    assert best_fit(np.array([6, 5, 4, 3]), 10, 9) == [[0, 2], [1, 3]]
    assert best_fit(np.array([7, 5, 3, 2, 2]), 10, 9) == [[0, 2], [1, 3, 4]]
    assert best_fit(np.array([1, 1, 1]), 10, 2) == [[0, 1], [2]]


@pytest.mark.parametrize(("lengths", "max_items"), [([0], 1), ([11], 1), ([3], 0)])
def test_what_cannot_be_packed(lengths: list[int], max_items: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        best_fit(np.array(lengths), 10, max_items)


@pytest.mark.parametrize("capacity", [512, 1024, 4096])
def test_short_documents_fill_rows(capacity: int) -> None:
    drawn = np.random.default_rng(0).lognormal(np.log(150), 0.5, 20_000)  # mean 170 tokens
    lengths = np.clip(drawn, 2, capacity).astype(np.int64)
    found = best_fit(lengths, capacity, max_packed_documents(capacity) - 1)
    assert lengths.sum() / (len(found) * capacity) > 0.985


def test_a_million_documents_take_seconds() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(150), 0.5, 100_000), 2, 4096).astype(np.int64)
    started = time.process_time()
    best_fit(lengths, 4096, 1000)
    assert time.process_time() - started < 2  # a tenth of them; about 0.1 s


def test_join_samples() -> None:
    row = join_samples([sample(1, 2, 3), sample(4, 5)], 6, 9)
    assert {name: values.tolist() for name, values in row.items()} == {  # type: ignore[attr-defined]
        "input_ids": [1, 2, 4, 9, 9, 9],
        "labels": [2, 3, 5, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL],
        "position_ids": [0, 1, 0, 0, 1, 2],
        "document_lengths": [2, 1, 3],
    }
    assert all(values.dtype == np.int64 for values in row.values())  # type: ignore[attr-defined]


def test_join_samples_of_a_full_and_of_an_empty_row() -> None:
    full = join_samples([sample(1, 2, 3), sample(4, 5)], 3, 9)
    assert (full["document_lengths"].tolist(), full["position_ids"].tolist()) == ([2, 1], [0, 1, 0])
    empty = join_samples([], 3, 9)
    assert (empty["document_lengths"].tolist(), empty["labels"].tolist()) == ([3], [IGNORED_LABEL] * 3)
    with pytest.raises(ValueError, match="samples of 3 tokens do not fit into a row of 2"):
        join_samples([sample(1, 2, 3), sample(4, 5)], 2, 9)


@pytest.mark.parametrize(("max_seq_len", "documents"), [(2, 2), (4, 2), (8, 3), (512, 129)])
def test_documents_in_a_row(max_seq_len: int, documents: int) -> None:
    assert max_packed_documents(max_seq_len) == documents


same_fixture = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@same_fixture
@given(
    texts=st.lists(st.text(alphabet="abcdefgh", min_size=1, max_size=25), min_size=1, max_size=30),
    max_seq_len=st.integers(2, 30),
    seed=st.integers(0, 5),
)
def test_every_sample_is_in_one_row(make_store: MakeStore, texts: list[str], max_seq_len: int, seed: int) -> None:
    samples = RowDataset(make_store(rows(*texts)), max_seq_len, "split")
    dataset = PackedDataset(samples, max_seq_len, 300, seed)
    found = [dataset.row_documents(index) for index in range(len(dataset))]
    assert sorted(member for row in found for member in row) == list(range(len(samples)))
    for index, members in enumerate(found):
        row = dataset.read(index, epoch=3)
        lengths = [int(samples.lengths[member]) for member in members]
        used = sum(lengths)
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) == max_seq_len
        assert row["document_lengths"].tolist() == lengths + [max_seq_len - used] * (used < max_seq_len)
        assert len(row["document_lengths"]) <= max_packed_documents(max_seq_len)
        for name in ("input_ids", "labels"):
            expected = np.concatenate([samples.read(member)[name] for member in members])  # type: ignore[literal-required]
            assert np.array_equal(row[name][:used], expected)  # type: ignore[literal-required]
    assert dataset.fill == pytest.approx(samples.lengths.sum() / (len(dataset) * max_seq_len))
    assert 0 < dataset.fill <= 1


def test_windows_cover_all_samples(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACKING_WINDOW", 7)
    monkeypatch.setattr(packing, "ROWS_PER_WINDOW", 1)
    samples = RowDataset(make_store(rows(*("abcdefghij"[: 1 + n % 9] for n in range(40)))), 10, "truncate")
    dataset = PackedDataset(samples, 10, 0, 1)
    found = [dataset.row_documents(index) for index in range(len(dataset))]
    assert sorted(member for row in found for member in row) == list(range(40))
    sizes = np.cumsum([len(row) for row in found])
    assert {7, 14, 21, 28, 35, 40} <= set(sizes.tolist())


def test_long_rows_get_larger_windows(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACKING_WINDOW", 3)
    samples = RowDataset(make_store(rows(*["abcd"] * 64)), 16, "truncate")
    assert len(PackedDataset(samples, 16, 0, 1)) == 16  # windows of three would leave a quarter of every row


def test_neighbours_in_the_file_do_not_share_rows_by_that(make_store: MakeStore) -> None:
    samples = RowDataset(make_store(rows(*["abcd"] * 400)), 8, "truncate")
    orders = []
    for seed in (1, 2, 1):
        dataset = PackedDataset(samples, 8, 0, seed)
        orders.append([dataset.row_documents(index) for index in range(len(dataset))])
    assert orders[0] == orders[2] != orders[1]
    assert sum(abs(row[0] - row[1]) == 1 for row in orders[0] if len(row) == 2) < 10


def test_fingerprints(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (RowDataset(make_store(rows(text, "b")), 8, "truncate") for text in ("a", "c"))
    prints = [first.fingerprint]
    prints += [PackedDataset(*arguments).fingerprint for arguments in ((first, 8, 0, 1), (first, 9, 0, 1))]
    prints += [PackedDataset(*arguments).fingerprint for arguments in ((first, 8, 1, 1), (second, 8, 0, 1))]
    monkeypatch.setattr(packing, "PACKING_VERSION", 2)
    prints.append(PackedDataset(first, 8, 0, 1).fingerprint)
    assert len(set(prints)) == 6
    assert PackedDataset(first, 8, 0, 1).fingerprint == PackedDataset(first, 8, 0, 2).fingerprint


def test_rows_out_of_range_and_pickling(make_store: MakeStore) -> None:
    dataset = PackedDataset(RowDataset(make_store(rows("abc", "de")), 8, "truncate"), 8, 0, 1)
    with pytest.raises(IndexError):
        dataset.read(len(dataset))
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own object, as a loader process gets it
    assert copy.read(0)["input_ids"].tolist() == dataset.read(0)["input_ids"].tolist()


def test_the_packing_is_fixed_for_ever(make_store: MakeStore) -> None:
    """A change silently changes what every resumed run trains on; raise PACKING_VERSION with it."""
    samples = RowDataset(make_store(rows(*("abcdefgh"[: 1 + n % 7] for n in range(12)))), 8, "truncate")
    dataset = PackedDataset(samples, 8, 0, 1)
    assert [dataset.row_documents(index) for index in range(len(dataset))] == [
        [6, 7],
        [5, 1],
        [11, 2],
        [4, 9],
        [10, 3],
        [8, 0],
    ]
