from __future__ import annotations

import logging
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truthgpt.data import packing
from truthgpt.data.base import IGNORED_LABEL, Sample
from truthgpt.data.packing import PackedDataset, best_fit, compare_filling, join_samples, max_packed_documents
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
    assert time.process_time() - started < 20  # a tenth of them; about 0.1 s, and the square of their number for ever


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


@pytest.fixture
def samples(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> RowDataset:
    """Forty samples, enough for an entry of the cache."""
    monkeypatch.setattr(packing, "SMALL_SAMPLES", 40)
    return RowDataset(make_store(rows(*("abcdefghij"[: 1 + n % 9] for n in range(40)))), 10, "truncate")


def count_packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of samples of every window that is packed from now on."""
    packed: list[int] = []
    real = best_fit

    def counted(lengths: npt.NDArray[np.int64], capacity: int, max_items: int) -> list[list[int]]:
        packed.append(len(lengths))
        return real(lengths, capacity, max_items)

    monkeypatch.setattr(packing, "best_fit", counted)
    return packed


def members(dataset: PackedDataset) -> list[list[int]]:
    return [dataset.row_documents(index) for index in range(len(dataset))]


def test_second_start_packs_nothing(samples: RowDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = count_packings(monkeypatch)
    expected = members(PackedDataset(samples, 10, 0, 1))
    assert packed == [40]
    datasets = [PackedDataset(samples, 10, pad_token_id, 1, tmp_path) for pad_token_id in (0, 0, 3)]
    assert packed == [40, 40]
    assert [members(dataset) for dataset in datasets] == [expected] * 3
    assert {dataset.fill for dataset in datasets} == {PackedDataset(samples, 10, 0, 1).fill}
    assert len(list((tmp_path / "packing").iterdir())) == 1
    assert not (tmp_path / "cache" / "packing").exists()


def test_what_shapes_a_packing_is_in_its_key(
    make_store: MakeStore, samples: RowDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RowDataset(make_store(rows(*["abc"] * 40)), 10, "truncate")
    variants = [(samples, 10, 1), (samples, 10, 2), (samples, 12, 1), (other, 10, 1)]
    for number, (dataset, length, seed) in enumerate(variants, start=1):
        found = PackedDataset(dataset, length, 0, seed, tmp_path)
        assert members(found) == members(PackedDataset(dataset, length, 0, seed))
        assert len(list((tmp_path / "packing").iterdir())) == number
    for number, version in enumerate(("PACKING_VERSION", "FORMAT_VERSION"), start=5):
        monkeypatch.setattr(packing, version, 99)
        PackedDataset(samples, 10, 0, 1, tmp_path)
        assert len(list((tmp_path / "packing").iterdir())) == number


def test_few_samples_are_not_kept(samples: RowDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SMALL_SAMPLES", 41)
    PackedDataset(samples, 10, 0, 1, tmp_path)
    assert not (tmp_path / "packing").exists()


@pytest.mark.parametrize("name", ["members.bin", "borders.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "empty", "other"])
def test_damaged_packing_is_made_again(
    samples: RowDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    expected = members(PackedDataset(samples, 10, 0, 1, tmp_path))
    (file,) = tmp_path.glob(f"packing/*/{name}")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-1], "empty": b"", "other": b"[]"}[damage])
    packed = count_packings(monkeypatch)
    for _ in range(2):
        assert members(PackedDataset(samples, 10, 0, 1, tmp_path)) == expected
    assert packed == [40]


def test_packing_of_another_number_of_samples_is_made_again(samples: RowDataset, tmp_path: Path) -> None:
    expected = members(PackedDataset(samples, 10, 0, 1, tmp_path))
    (folder,) = tmp_path.glob("packing/*")
    (folder / "meta.json").write_text('{"samples": 1, "rows": 1}')
    (folder / "members.bin").write_bytes(bytes(4))
    (folder / "borders.bin").write_bytes(bytes(8))
    assert members(PackedDataset(samples, 10, 0, 1, tmp_path)) == expected


def test_cache_that_cannot_be_written_costs_only_time(
    samples: RowDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "packing").write_text("a file")
    assert members(PackedDataset(samples, 10, 0, 1, tmp_path)) == members(PackedDataset(samples, 10, 0, 1))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the samples are packed at every start" in caplog.text


def test_disk_that_is_full_costs_only_time(
    samples: RowDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write_synced", full)
    packed = count_packings(monkeypatch)
    assert len(members(PackedDataset(samples, 10, 0, 1, tmp_path))) > 1
    assert packed == [40]  # not packed again after the failure
    assert "No space left on device; free some space" in caplog.text
    assert list((tmp_path / "packing").iterdir()) == []


def test_of_two_that_want_the_same_packing_one_waits(
    samples: RowDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed, begun, go, real = [], threading.Event(), threading.Event(), best_fit

    def slow(lengths: npt.NDArray[np.int64], capacity: int, max_items: int) -> list[list[int]]:
        packed.append(len(lengths))
        begun.set()
        assert go.wait(60)
        return real(lengths, capacity, max_items)

    monkeypatch.setattr(packing, "best_fit", slow)
    caplog.set_level(logging.INFO)
    found: list[PackedDataset] = []
    makers = [
        threading.Thread(target=lambda: found.append(PackedDataset(samples, 10, 0, 1, tmp_path)), daemon=True)
        for _ in range(2)
    ]
    makers[0].start()
    assert begun.wait(60)
    makers[1].start()
    deadline = time.monotonic() + 60
    while "another process is packing the same samples; waiting for it" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    go.set()
    for maker in makers:
        maker.join()
    assert packed == [40] and members(found[0]) == members(found[1])


def test_kept_packing_pickles_small_and_without_the_arrays(samples: RowDataset, tmp_path: Path) -> None:
    kept, made = PackedDataset(samples, 10, 0, 1, tmp_path), PackedDataset(samples, 10, 0, 1)
    expected = members(made)
    assert members(kept) == expected  # mapped by now
    sizes = [len(pickle.dumps(dataset._packing)) for dataset in (kept, made)]
    assert sizes[0] < 500 + 2 * len(str(tmp_path))
    assert sizes[1] > 40 * 4
    copy = pickle.loads(pickle.dumps(kept))  # noqa: S301 - our own object, as a loader process gets it
    assert members(copy) == expected and copy.read(1)["labels"].tolist() == made.read(1)["labels"].tolist()


@pytest.mark.parametrize(("samples", "bits"), [(1, 32), (2**31 - 1, 32), (2**31, 64)])
def test_indices_have_room(samples: int, bits: int) -> None:
    assert np.dtype(packing._index_dtype(samples)).itemsize * 8 == bits


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


def test_packing_is_compared_with_padding() -> None:
    """Rows of just over half a row's length cannot share one; short ones can, and unequal ones waste padding."""
    long = np.full(40, 60)
    assert compare_filling(long, max_seq_len=100, batch_size=4) == (0.6, 1.0)
    mixed = np.array([10, 90] * 50)
    packed, padded = compare_filling(mixed, max_seq_len=100, batch_size=8)
    assert packed == 1.0 and padded < 0.7
    assert compare_filling(np.array([5]), max_seq_len=100, batch_size=8) == (0.05, 1.0)
    many = np.resize(mixed, 200_000)
    assert compare_filling(many, 100, 8)[0] > 0.99, "a window of them stands for all"
