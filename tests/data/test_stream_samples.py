from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from truthgpt.data.base import IGNORED_LABEL, Document, Sample, Segment
from truthgpt.data.packing import max_packed_documents
from truthgpt.data.stream_samples import Carry, StreamCounts, StreamSettings, arrange, cut_blocks, cut_rows
from truthgpt.errors import DataError

from .stream_fakes import ENCODER, END, doc, ids, settings

Plain = list[tuple[list[int], list[int]]]
texts_and_continues = st.lists(st.tuples(st.text("abc", max_size=9), st.booleans()), min_size=1, max_size=12)


def plain(samples: list[Sample]) -> Plain:
    for sample in samples:
        assert sample["input_ids"].dtype == sample["labels"].dtype == np.int64
    return [(sample["input_ids"].tolist(), sample["labels"].tolist()) for sample in samples]


def joined(documents: list[Document]) -> list[int]:
    """Ids of the documents as one text, an end-of-text token where one does not go on."""
    found: list[int] = []
    for number, document in enumerate(documents):
        if number and not document.continues:
            found.append(END)
        found += ids(document.text)
    return [*found, END]


def blocks_of(tokens: list[int], max_seq_len: int) -> Plain:
    pieces = [tokens[start : start + max_seq_len + 1] for start in range(0, len(tokens) - 1, max_seq_len)]
    return [(piece[:-1], piece[1:]) for piece in pieces]


@run_settings(max_examples=60, deadline=None)
@given(texts=texts_and_continues, max_seq_len=st.integers(2, 9), window=st.integers(1, 5))
def test_blocks_of_windows_are_those_of_the_whole_text(
    texts: list[tuple[str, bool]], max_seq_len: int, window: int
) -> None:
    documents = [doc(text, continues=goes_on and place > 0) for place, (text, goes_on) in enumerate(texts)]
    carry, found, begins = Carry(), [], []
    for first in range(0, len(documents), window):
        runs = ENCODER.runs(documents[first : first + window])
        last = first + window >= len(documents)
        samples, begun, carry = cut_blocks(runs, StreamCounts(), carry, max_seq_len, ends_pass=last)
        assert len(begun) == len(samples)
        found += plain(samples)
        begins += begun
    tokens = joined(documents)
    assert found == blocks_of(tokens, max_seq_len)
    assert carry == Carry()
    if found:
        assert sum(begins) == len(documents)


def test_blocks_count_documents_where_they_begin() -> None:
    samples, begins, carry = cut_blocks(
        ENCODER.runs([doc("ab"), doc("c"), doc("defgh")]), StreamCounts(), Carry(), 3, ends_pass=False
    )
    # ab. | c.d | efg | h  (a dot is the end-of-text token)
    assert [inputs for inputs, _ in plain(samples)] == [[*ids("ab"), END], [*ids("c"), END, *ids("d")], ids("efg")]
    assert begins == [1, 2, 0]
    assert carry == Carry(ids("h"), [1], [], [END])


@run_settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text("abc", max_size=5), min_size=2, max_size=9), max_seq_len=st.integers(2, 9))
def test_documents_that_spell_their_end_out_are_cut_as_those_that_do_not(texts: list[str], max_seq_len: int) -> None:
    """In two windows; of rows too. One of them has its last block a window earlier, its end being there already."""
    cut = []
    for end in ("<|endoftext|>", ""):
        counts, carry, samples, begins = StreamCounts(), Carry(), [], []
        documents = [doc(text + end) for text in texts]
        for window, last in ((documents[:-1], False), (documents[-1:], True)):
            found, begun, carry = cut_blocks(ENCODER.runs(window), counts, carry, max_seq_len, last)
            samples += plain(found)
            begins += begun
        rows, row_begins = cut_rows(documents, ENCODER, settings(max_seq_len), StreamCounts())
        cut.append((samples, begins, plain(rows), row_begins))
        assert counts.double_eos == (len(texts) if end else 0)
    assert cut[0] == cut[1]


def test_blocks_mask_untrained_tokens_across_windows() -> None:
    prompt = Document("k", (Segment("abcd", trained=False), Segment("e")), "here")
    samples, _, carry = cut_blocks(ENCODER.runs([prompt]), StreamCounts(), Carry(), 3, ends_pass=False)
    assert plain(samples) == [(ids("abc"), [IGNORED_LABEL] * 3)]
    assert carry == Carry(ids("de"), [0, 1], [], [END])
    samples, _, _ = cut_blocks(ENCODER.runs([doc("f")]), StreamCounts(), carry, 3, ends_pass=True)
    assert plain(samples) == [([*ids("de"), END], [*ids("e"), END, *ids("f")]), (ids("f"), [END])]


def test_rows_follow_the_policy_for_long_ones() -> None:
    documents = [doc("abcd"), doc("abcde"), doc("a")]
    expected = {
        "truncate": ([(ids("abcd"), [*ids("bcd"), END]), (ids("abcd"), ids("bcde")), (ids("a"), [END])], [1, 1, 1]),
        "split": (
            [(ids("abcd"), [*ids("bcd"), END]), (ids("abcd"), ids("bcde")), (ids("e"), [END]), (ids("a"), [END])],
            [1, 1, 0, 1],
        ),
        "drop": ([(ids("abcd"), [*ids("bcd"), END]), (ids("a"), [END])], [1, 1]),
    }
    for overlong, (rows, begins) in expected.items():
        counts = StreamCounts()
        samples, begun = cut_rows(documents, ENCODER, settings(4, overlong=overlong), counts)
        assert (plain(samples), begun, counts.overlong, counts.unsupervised) == (rows, begins, 1, 0)
    with pytest.raises(DataError, match=r"file:abcde: 5 tokens, data.max_seq_len is 4; .* truncate, split or drop"):
        cut_rows(documents, ENCODER, settings(4, overlong="error"), StreamCounts())


def test_rows_without_a_supervised_token_are_left_out_and_counted() -> None:
    long_prompt = Document("k", (Segment("abcdef", trained=False), Segment("g")), "here")
    counts = StreamCounts()
    assert cut_rows([long_prompt, doc("a")], ENCODER, settings(4), counts)[1] == [1]
    assert (counts.overlong, counts.unsupervised) == (1, 1)
    samples, begins = cut_rows([long_prompt], ENCODER, settings(4, overlong="split"), StreamCounts())
    assert plain(samples) == [([*ids("ef"), *ids("g")], [IGNORED_LABEL, *ids("g"), END])]
    assert begins == [1], "the document begins with its first piece that is given out"


lengths_of_samples = st.lists(st.integers(1, 16), max_size=40).map(lambda values: np.array(values, dtype=np.int64))


@run_settings(max_examples=60, deadline=None)
@given(lengths=lengths_of_samples, packing=st.booleans(), bucketed=st.booleans(), key=st.integers(0, 2**60))
def test_every_sample_is_in_one_group(
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]], packing: bool, bucketed: bool, key: int
) -> None:
    shape = settings(16, packing=packing, bins=(4, 8, 16) if bucketed and not packing else None)
    groups = arrange(lengths, shape, key)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    if packing:
        assert all(lengths[group].sum() <= 16 for group in groups)
        assert all(len(group) < max_packed_documents(16) for group in groups)
    elif not bucketed:
        assert all(len(group) == 1 for group in groups)


def bin_of(length: int) -> int:
    return 4 if length <= 4 else 8 if length <= 8 else 16


@run_settings(max_examples=60, deadline=None)
@given(lengths=lengths_of_samples, max_tokens=st.sampled_from([None, 8, 40]))
def test_buckets_hold_one_bin_and_leave_one_partial_batch_a_bin(
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]], max_tokens: int | None
) -> None:
    shape = settings(16, micro_batch_size=3, bins=(4, 8, 16), max_tokens=max_tokens)
    partial: list[int] = []
    for group in arrange(lengths, shape, key=5):
        (length,) = {bin_of(int(lengths[index])) for index in group}
        full = 3 if max_tokens is None else max(1, max_tokens // length)
        assert len(group) <= full
        partial += [length] * (len(group) < full)
    assert len(partial) == len(set(partial))


def test_the_first_token_of_a_row_is_no_label() -> None:
    document = Document("k", (Segment("a"), Segment("bcdefg", trained=False)), "here")
    counts = StreamCounts()
    assert cut_rows([document], ENCODER, settings(4), counts) == ([], [])
    assert counts.unsupervised == 1


def test_a_packed_row_holds_a_bounded_number_of_documents() -> None:
    groups = arrange(np.ones(40, dtype=np.int64), settings(16, packing=True), key=3)
    assert {len(group) for group in groups} == {max_packed_documents(16) - 1}


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"bins": (4, 8, 16)}])
def test_the_key_decides_the_order(changes: dict[str, object]) -> None:
    lengths = np.arange(100, dtype=np.int64) % 16 + 1
    shape = settings(16, **changes)
    assert arrange(lengths, shape, key=1) == arrange(lengths, shape, key=1)
    assert arrange(lengths, shape, key=1) != arrange(lengths, shape, key=2)


def test_packed_rows_and_buckets_come_in_mixed_order() -> None:
    lengths = np.arange(400, dtype=np.int64) % 16 + 1
    rows = [int(lengths[group].max()) for group in arrange(lengths, settings(16, packing=True), key=1)]
    assert rows != sorted(rows, reverse=True), "best fit makes the rows with the longest samples first"
    bins = [bin_of(int(lengths[group[0]])) for group in arrange(lengths, settings(16, bins=(4, 8, 16)), key=1)]
    assert bins != sorted(bins)


def test_rows_of_a_micro_batch() -> None:
    assert StreamSettings(16, 3, 1).rows_of(16) == 3
    assert StreamSettings(16, 3, 1, max_tokens=40).rows_of(8) == 5
    assert StreamSettings(16, 3, 1, max_tokens=4).rows_of(8) == 1
