from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truthgpt.data import samples
from truthgpt.data.base import IGNORED_LABEL, Document, Sample, Segment
from truthgpt.data.packing import PackedDataset
from truthgpt.data.samples import BlockDataset, ConcatenatedDataset, Overlong, RowDataset
from truthgpt.errors import DataError

from .conftest import MakeStore, byte_tokenizer, rows

END = 256
same_fixture = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ids(text: str) -> list[int]:
    found: list[int] = byte_tokenizer()(text).input_ids
    return found


def plain(sample: Sample) -> tuple[list[int], list[int]]:
    assert sample["input_ids"].dtype == sample["labels"].dtype == np.int64
    return sample["input_ids"].tolist(), sample["labels"].tolist()


def everything(dataset: BlockDataset | RowDataset | ConcatenatedDataset) -> list[tuple[list[int], list[int]]]:
    return [plain(dataset.read(index)) for index in range(len(dataset))]


def test_blocks_join_documents(make_store: MakeStore) -> None:
    dataset = BlockDataset(make_store(rows("abc", "d")), max_seq_len=2)
    a, b, c, d = ids("abcd")
    assert everything(dataset) == [([a, b], [b, c]), ([c, END], [END, d]), ([d], [END])]


@same_fixture
@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8), max_seq_len=st.integers(2, 40))
def test_blocks_predict_every_token_but_the_first_once(
    make_store: MakeStore, texts: list[str], max_seq_len: int
) -> None:
    store = make_store(rows(*texts))
    blocks = everything(BlockDataset(store, max_seq_len))
    assert [token for inputs, _ in blocks for token in inputs] == store.tokens[:-1].tolist()
    assert [label for _, labels in blocks for label in labels] == store.tokens[1:].tolist()
    assert all(len(inputs) == max_seq_len for inputs, _ in blocks[:-1])
    assert 1 <= len(blocks[-1][0]) <= max_seq_len


def test_blocks_mask_untrained_tokens(make_store: MakeStore) -> None:
    (block,) = everything(BlockDataset(make_store(rows(("ab", "c"))), max_seq_len=8))
    assert block == (ids("abc"), [IGNORED_LABEL, *ids("c"), END])


def test_blocks_need_two_tokens(make_store: MakeStore) -> None:
    with pytest.raises(DataError, match="1 tokens; at least 2"):
        BlockDataset(make_store(rows("")), max_seq_len=4)


def test_block_index_out_of_range(make_store: MakeStore) -> None:
    with pytest.raises(IndexError):
        BlockDataset(make_store(rows("abc")), max_seq_len=4).read(1)


def test_rows_with_and_without_prompt(make_store: MakeStore) -> None:
    dataset = RowDataset(make_store(rows(("ab", "c"), "d")), 8, "truncate")
    assert everything(dataset) == [
        (ids("abc"), [IGNORED_LABEL, *ids("c"), END]),
        (ids("d"), [END]),
    ]
    assert (dataset.overlong_rows, dataset.unsupervised_samples) == (0, 0)


def windows(texts: Sequence[str], max_seq_len: int, overlong: Overlong) -> list[tuple[list[int], list[int]]]:
    """What the rows should become, in plain Python."""
    found = []
    for text in texts:
        tokens = [*ids(text), END]
        pieces = [tokens[start : start + max_seq_len + 1] for start in range(0, len(tokens) - 1, max_seq_len)]
        if overlong == "truncate":
            pieces = pieces[:1]
        if overlong == "drop" and len(pieces) > 1:
            pieces = []
        found += [(piece[:-1], piece[1:]) for piece in pieces]
    return found


@same_fixture
@given(
    texts=st.lists(st.text(alphabet="abc", min_size=1, max_size=20), max_size=8),
    max_seq_len=st.integers(2, 12),
    overlong=st.sampled_from(["truncate", "split", "drop"]),
)
def test_overlong_rows(make_store: MakeStore, texts: list[str], max_seq_len: int, overlong: Overlong) -> None:
    texts = ["x", *texts]
    dataset = RowDataset(make_store(rows(*texts)), max_seq_len, overlong)
    assert everything(dataset) == windows(texts, max_seq_len, overlong)
    assert dataset.overlong_rows == sum(len(text) > max_seq_len for text in texts)
    assert dataset.lengths.dtype == np.int32
    assert dataset.lengths.tolist() == [len(inputs) for inputs, _ in everything(dataset)]


@same_fixture
@given(
    texts=st.lists(st.text(alphabet="abc", min_size=1, max_size=20), max_size=8),
    max_seq_len=st.integers(2, 12),
    overlong=st.sampled_from(["truncate", "split", "drop"]),
)
def test_rows_count_what_is_trained_on(
    make_store: MakeStore, texts: list[str], max_seq_len: int, overlong: Overlong
) -> None:
    """By these numbers a mixture is weighted: those of rows that are cut or left out would spoil its shares."""
    texts = ["x", *texts]
    dataset = RowDataset(make_store(rows(*texts)), max_seq_len, overlong)
    kept = [bool(windows([text], max_seq_len, overlong)) for text in texts]
    assert dataset.documents == sum(kept)
    assert dataset.tokens == sum(len(inputs) for inputs, _ in windows(texts, max_seq_len, overlong)) + sum(kept)
    packed = PackedDataset(dataset, max_seq_len, pad_token_id=0, seed=0)
    assert (packed.documents, packed.tokens) == (dataset.documents, dataset.tokens)


def test_a_row_whose_first_piece_is_left_out_counts_once(make_store: MakeStore) -> None:
    store = make_store(rows(("abcdef", "ghijkl"), "a"))
    dataset = RowDataset(store, 4, "split")
    assert (dataset.documents, dataset.tokens, dataset.unsupervised_samples) == (2, 4 + 4 + 1 + 2, 1)
    whole = RowDataset(store, 16, "split")
    assert (whole.documents, whole.tokens) == (store.meta.documents, store.meta.tokens)
    joined = BlockDataset(store, 4)
    assert (joined.documents, joined.tokens) == (store.meta.documents, store.meta.tokens)


@pytest.mark.parametrize(
    ("overlong", "level", "done"),
    [("truncate", "WARNING", "truncated"), ("split", "INFO", "split"), ("drop", "WARNING", "dropped")],
)
def test_overlong_rows_are_said(
    make_store: MakeStore, caplog: pytest.LogCaptureFixture, overlong: Overlong, level: str, done: str
) -> None:
    store = make_store(rows("abcd", "abcde", "a"))
    with caplog.at_level(logging.INFO):
        caplog.clear()
        RowDataset(store, 4, overlong)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (level, f"{done} 1 of 3 rows longer than max_seq_len 4 tokens")
    ]


def test_rows_are_called_what_they_are(make_store: MakeStore, caplog: pytest.LogCaptureFixture) -> None:
    """Of two sets that are cut, a message says which one it speaks of."""
    RowDataset(make_store(rows(("abcdef", "g"), "a")), 4, "truncate", called="validation rows")
    assert "truncated 1 of 2 validation rows longer" in caplog.text
    assert "left out 1 samples without a token the loss counts, of 2 validation rows" in caplog.text
    with pytest.raises(DataError, match="0 usable validation rows of 1"):
        RowDataset(make_store(rows("abcdef")), 4, "drop", called="validation rows")


def test_overlong_row_as_error_is_named(make_store: MakeStore) -> None:
    documents = rows("abcd", "abcde")
    store = make_store(documents)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 5 tokens, data.max_seq_len is 4"):
        RowDataset(store, 4, "error", documents)
    with pytest.raises(DataError, match=r"row 1 \(from 0\): 5 tokens"):
        RowDataset(store, 4, "error")
    assert len(RowDataset(store, 5, "error")) == 2


@same_fixture
@given(
    pairs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=30),
    max_seq_len=st.integers(2, 8),
    overlong=st.sampled_from(["truncate", "split", "drop"]),
    at_once=st.integers(1, 50),
)
def test_every_piece_of_the_mask_is_looked_at(
    make_store: MakeStore, pairs: list[tuple[int, int]], max_seq_len: int, overlong: Overlong, at_once: int
) -> None:
    documents = rows(("", "x"), ("y", ""), *[("p" * prompt, "c" * completion) for prompt, completion in pairs])
    store = make_store(documents)
    trained, offsets = store.trained, store.offsets.tolist()
    assert trained is not None
    starts, lengths = samples._windows(np.array(offsets), max_seq_len, overlong)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "_TOKENS_AT_ONCE", at_once)
        found = samples._supervised(store, starts, lengths)
    labels = [trained[start + 1 : start + length] for start, length in zip(starts, lengths, strict=True)]
    assert found.tolist() == [bool(mask.any()) for mask in labels]


def test_samples_without_a_supervised_token_are_left_out(
    make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    texts: list[str | tuple[str, str]] = [("abcdef", "g"), ("a", "b"), ("abcd", "e")]
    dataset = RowDataset(make_store(rows(*texts)), 4, "truncate")
    assert (len(dataset), dataset.overlong_rows, dataset.unsupervised_samples) == (2, 2, 1)
    assert [inputs for inputs, _ in everything(dataset)] == [ids("ab"), ids("abcd")]
    assert "left out 1 samples without a token the loss counts" in caplog.text
    pieces = RowDataset(make_store(rows(*texts)), 4, "split")
    assert [labels for _, labels in everything(pieces)] == [
        [IGNORED_LABEL, *ids("g"), END],
        [*ids("b"), END],
        [IGNORED_LABEL] * 3 + ids("e"),
        [END],
    ]
    assert pieces.unsupervised_samples == 1


def test_the_first_token_of_a_sample_is_no_label(make_store: MakeStore) -> None:
    document = Document("a", (Segment("a"), Segment("bcdefg", trained=False)), "here")
    dataset = RowDataset(make_store([document, *rows("b")]), 4, "truncate")
    assert (len(dataset), dataset.unsupervised_samples) == (1, 1)


def test_nothing_left_is_an_error(make_store: MakeStore) -> None:
    store = make_store(rows(("abcdef", "g")))
    with pytest.raises(DataError, match="0 usable rows of 1: 1 are longer"):
        RowDataset(store, 4, "truncate")
    with pytest.raises(DataError, match="0 usable rows of 1: 1 are longer"):
        RowDataset(store, 4, "drop")


def test_documents_of_a_joined_text_are_rows_too(make_store: MakeStore) -> None:
    store = make_store([*rows("abc", "", "defgh"), Document("more", (Segment("ij"),), "here", continues=True)])
    dataset = RowDataset(store, 4, "split")
    assert [inputs for inputs, _ in everything(dataset)] == [ids("abc"), ids("defg"), ids("hij")]
    assert (dataset.lengths.tolist(), dataset.overlong_rows, dataset.unsupervised_samples) == ([3, 4, 3], 1, 1)


@same_fixture
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_concatenated_datasets(make_store: MakeStore, sizes: list[int]) -> None:
    parts = [
        RowDataset(make_store(rows(*(f"{part}{row}" for row in range(size)))), 8, "truncate")
        for part, size in enumerate(sizes)
    ]
    whole = ConcatenatedDataset(parts)
    assert everything(whole) == [sample for part in parts for sample in everything(part)]
    assert plain(whole.read(-1)) == everything(parts[-1])[-1]  # type: ignore[arg-type]
    for outside in (sum(sizes), -sum(sizes) - 1):
        with pytest.raises(IndexError):
            whole.read(outside)


def test_concatenated_fingerprint_names_every_part_and_their_order(make_store: MakeStore) -> None:
    first, second = (RowDataset(make_store(rows(text)), 8, "truncate") for text in ("a", "b"))
    prints = [ConcatenatedDataset(parts).fingerprint for parts in ([first], [first, second], [second, first])]
    assert len({first.fingerprint, *prints}) == 4
    assert ConcatenatedDataset([first, second]).fingerprint == prints[1]
    with pytest.raises(ValueError, match="at least one"):
        ConcatenatedDataset([])


class EpochRecorder:
    """Remembers what was read in which epoch."""

    fingerprint = "e"

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return 3

    def read(self, index: int, epoch: int = 0) -> Sample:
        self.seen.append((index, epoch))
        return {"input_ids": np.zeros(1, dtype=np.int64), "labels": np.zeros(1, dtype=np.int64)}


def test_concatenated_datasets_pass_the_epoch_on() -> None:
    parts = [EpochRecorder(), EpochRecorder()]
    whole = ConcatenatedDataset(parts)
    whole.read(2, 5)
    whole.read(3, 6)
    assert [part.seen for part in parts] == [[(2, 5)], [(0, 6)]]


def test_reading_leaves_the_store_as_it_is(make_store: MakeStore) -> None:
    store = make_store(rows(("ab", "c")))
    sample = RowDataset(store, 8, "truncate").read(0)
    sample["input_ids"][:] = 7
    sample["labels"][:] = 7
    assert plain(RowDataset(store, 8, "truncate").read(0)) == (ids("abc"), [IGNORED_LABEL, *ids("c"), END])


def test_fingerprints(make_store: MakeStore) -> None:
    store, other = make_store(rows("abc", "d")), make_store(rows("abc", "e"))
    prints = [
        BlockDataset(store, 8).fingerprint,
        BlockDataset(store, 9).fingerprint,
        BlockDataset(other, 8).fingerprint,
        RowDataset(store, 8, "truncate").fingerprint,
        RowDataset(store, 8, "split").fingerprint,
    ]
    assert len(set(prints)) == 5
    assert BlockDataset(store, 8).fingerprint == prints[0]


def test_datasets_pickle(make_store: MakeStore) -> None:
    store = make_store(rows(("ab", "c"), "text " * 10_000))
    row_dataset = RowDataset(store, 8, "truncate")
    for dataset in (BlockDataset(store, 8), row_dataset, ConcatenatedDataset([row_dataset])):
        expected = everything(dataset)
        data = pickle.dumps(dataset)
        assert len(data) < 4000
        assert everything(pickle.loads(data)) == expected  # noqa: S301 - our own object, as a loader process gets it
