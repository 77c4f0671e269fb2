from __future__ import annotations

import dataclasses
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from truthgpt.data import stream as stream_module
from truthgpt.data.base import Document, StreamSource
from truthgpt.data.jsonl_source import JsonlSource
from truthgpt.data.rows import BadRowPolicy, RowFields
from truthgpt.data.stream import SampleStream, StreamPosition, WeightedStream
from truthgpt.data.stream_holdout import held_out
from truthgpt.data.stream_samples import StreamSettings
from truthgpt.data.tokenization import DocumentEncoder
from truthgpt.errors import DataError

from .conftest import BEGIN, byte_tokenizer
from .stream_fakes import (
    ENCODER,
    END,
    VOCAB,
    ListStream,
    doc,
    ids,
    numbered,
    plain,
    rest_of_pass,
    sample_stream,
    settings,
)

SHAPES: dict[str, tuple[Literal["stream", "rows"], dict[str, object]]] = {
    "rows": ("rows", {}),
    "split rows": ("rows", {"overlong": "split", "max_seq_len": 3}),
    "joined text": ("stream", {"max_seq_len": 5}),
    "packing": ("rows", {"packing": True, "max_seq_len": 16}),
    "packed text": ("stream", {"packing": True, "max_seq_len": 16}),
    "bucketing": ("rows", {"bins": (4, 6, 8)}),
    "pieces": ("stream", {"max_seq_len": 5}),
}


def shaped(name: str, shards: list[list[Document]]) -> tuple[ListStream, StreamSettings]:
    layout, changes = SHAPES[name]
    if name == "pieces":
        shards = [[dataclasses.replace(document, continues=True) for document in shard] for shard in shards]
    return ListStream(shards, layout), settings(**changes)  # type: ignore[arg-type]


def three_shards() -> list[list[Document]]:
    return [numbered(7), numbered(1, first=100), numbered(5, first=200)]


def texts_of(groups: list[Any]) -> Counter[str]:
    """Documents of rows that fit whole, as their first four characters (their number)."""
    return Counter(bytes(sample["input_ids"][:4]).hex() for samples, _, _ in groups for sample in samples)


def numbers_of(documents: list[Document]) -> Counter[str]:
    return Counter(bytes(ids(document.text)[:4]).hex() for document in documents)


@run_settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    window=st.integers(1, 7),
    fraction=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_every_training_document_once_a_pass(sizes: list[int], window: int, fraction: float, seed: int) -> None:
    shards = [numbered(size, first=100 * shard) for shard, size in enumerate(sizes)]
    training = [item for shard in shards for item in shard if not held_out(item.key, fraction)]
    stream = sample_stream(ListStream(shards), settings(shuffle_window=window), held_out=fraction, seed=seed)
    if not training:
        with pytest.raises(DataError, match="0 usable documents"):
            stream.next_group()
        return
    for _ in range(3):
        assert texts_of(rest_of_pass(stream)) == numbers_of(training)
    assert (stream.counts.documents, stream.counts.held_out) == (3 * len(training), 3 * (sum(sizes) - len(training)))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("fraction", [0.0, 0.4])
def test_going_on_from_any_position(name: str, fraction: float) -> None:
    source, shape = shaped(name, three_shards())
    stream = sample_stream(source, shape, held_out=fraction)
    states, groups = [], []
    while stream.position.place.epoch < 2:
        states.append(json.dumps(stream.position.to_state()))
        groups.append(plain(stream.next_group()))
    states.append(json.dumps(stream.position.to_state()))
    for number, state in enumerate(states[:-1]):
        position = StreamPosition.from_state(json.loads(state))
        resumed = sample_stream(source, shape, position, held_out=fraction)
        for later in range(number, min(number + 9, len(groups))):
            assert json.dumps(resumed.position.to_state()) == states[later]
            assert plain(resumed.next_group()) == groups[later]


@run_settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    window=st.integers(1, 9),
    given_out=st.integers(0, 60),
)
def test_going_on_is_exact_whatever_the_sizes(name: str, sizes: list[int], window: int, given_out: int) -> None:
    source, shape = shaped(name, [numbered(size, first=100 * shard) for shard, size in enumerate(sizes)])
    shape = settings(**{**vars(shape), "shuffle_window": window})
    stream = sample_stream(source, shape)
    for _ in range(given_out):
        stream.next_group()
    resumed = sample_stream(source, shape, StreamPosition.from_state(stream.position.to_state()))
    assert [plain(resumed.next_group()) for _ in range(12)] == [plain(stream.next_group()) for _ in range(12)]
    assert resumed.counts == stream.counts


def test_order_differs_with_pass_window_and_seed() -> None:
    source = ListStream([numbered(20, first=100 * shard) for shard in range(5)])
    shape = settings(shuffle_window=10)
    stream = sample_stream(source, shape)
    first, second = rest_of_pass(stream), rest_of_pass(stream)
    assert first != second
    assert first == rest_of_pass(sample_stream(source, shape))
    assert first != rest_of_pass(sample_stream(source, shape, seed=8))
    opened = [shard for shard, _ in source.shards_opened]
    assert sorted(opened[:5]) == sorted(opened[5:10]) == list(range(5))
    assert opened[:5] != opened[5:10], "the shards are visited in another order in each pass"
    texts = [bytes(sample["input_ids"][:4]) for samples, _, _ in first for sample in samples]
    assert texts != sorted(texts)
    places = [
        [sorted(texts[start : start + 10]).index(text) for text in texts[start : start + 10]] for start in (0, 10)
    ]
    assert places[0] != places[1], "each window has its own permutation"


def test_a_lone_window_has_another_order_in_each_pass() -> None:
    stream = sample_stream(ListStream([numbered(20)]), settings(shuffle_window=20))
    assert rest_of_pass(stream) != rest_of_pass(stream)


def test_windows_are_shuffled_within_themselves() -> None:
    stream = sample_stream(ListStream([numbered(40)]), settings(shuffle_window=10))
    numbers = [
        int(bytes(ENCODER_TEXT[token] for token in group.samples[0]["input_ids"][:4])) for group in take(stream, 40)
    ]
    for window in range(4):
        part = numbers[10 * window : 10 * window + 10]
        assert sorted(part) == list(range(10 * window, 10 * window + 10))
        assert part != sorted(part)


ENCODER_TEXT = {ids(digit)[0]: ord(digit) for digit in "0123456789"}


def take(stream: SampleStream, count: int) -> list[Any]:
    return [stream.next_group() for _ in range(count)]


def test_joined_text_is_given_out_block_by_block_past_the_pass() -> None:
    pieces = [doc("abc"), doc("def", continues=True), doc("gh"), doc("ij", continues=True)]
    stream = sample_stream(ListStream([pieces], "stream"), settings(4, shuffle_window=2))
    text = [*ids("abcdef"), END, *ids("ghij"), END]
    inputs = text[:-1]  # the last token is a label only
    blocks = sorted(inputs[start : start + 4] for start in range(0, len(inputs), 4))
    for _ in range(2):
        found = rest_of_pass(stream)
        assert sorted(samples[0]["input_ids"] for samples, _, _ in found) == blocks
        assert sum(documents for _, documents, _ in found) == 4
    assert stream.counts.documents == 8


def test_a_shard_never_continues_another() -> None:
    pieces = [[doc("ab", continues=True)], [doc("cd", continues=True)]]
    for window in (1, 2):
        stream = sample_stream(ListStream(pieces, "stream"), settings(9, shuffle_window=window))
        ((samples, _, _),) = rest_of_pass(stream)
        assert samples[0]["input_ids"] in ([*ids("ab"), END, *ids("cd")], [*ids("cd"), END, *ids("ab")])


def test_a_piece_whose_predecessor_is_held_out_continues_nothing() -> None:
    pieces = [doc(text, continues=place > 0, key=f"{place}") for place, text in enumerate("abcdefghijkl")]
    chosen = [not held_out(piece.key, 0.4) for piece in pieces]
    assert 2 < sum(chosen) < len(chosen)
    text: list[int] = []
    for place, piece in enumerate(pieces):
        if chosen[place]:
            text += ids(piece.text)
            text += [] if place + 1 < len(pieces) and chosen[place + 1] else [END]
    for window in (1, 2, 50):
        stream = sample_stream(ListStream([pieces], "stream"), settings(200, shuffle_window=window), held_out=0.4)
        ((samples, _, _),) = rest_of_pass(stream)
        assert samples[0]["input_ids"] == text[:-1]


def test_packed_rows_hold_the_windows_documents_whole() -> None:
    stream = sample_stream(ListStream([numbered(50)]), settings(24, packing=True, shuffle_window=20))
    found = rest_of_pass(stream)
    documents: Counter[tuple[int, ...]] = Counter()
    for (sample,), begins, tokens in found:
        start = 0
        pieces = []
        for length in sample["document_lengths"]:
            pieces.append(tuple(sample["input_ids"][start : start + length]))
            start += length
        assert start == len(sample["input_ids"]) == 24
        padding = 24 - tokens
        documents.update(pieces[:-1] if padding else pieces)
        assert begins == len(pieces) - bool(padding)
    assert documents == Counter(tuple(ids(document.text)) for document in numbered(50))


def test_resuming_reads_one_window_only() -> None:
    source = ListStream([numbered(3000), numbered(3000, first=3000)])
    shape = settings(shuffle_window=64)
    stream = sample_stream(source, shape)
    for _ in range(5000):
        stream.next_group()
    source.documents_read = 0
    resumed = sample_stream(source, shape, StreamPosition.from_state(stream.position.to_state()))
    assert plain(resumed.next_group()) == plain(stream.next_group())
    assert source.documents_read <= 64 + 1


def test_shards_are_opened_once_a_pass() -> None:
    source = ListStream(three_shards())
    rest_of_pass(sample_stream(source, settings(shuffle_window=2)))
    assert sorted(source.shards_opened) == [(0, ()), (1, ()), (2, ())]


def test_a_window_of_large_documents_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "WINDOW_CHARACTERS", 30)
    source = ListStream([[doc(f"{number}" * 10) for number in range(9)]])
    stream = sample_stream(source, settings(16, shuffle_window=1000))
    stream.next_group()
    assert source.documents_read == 3 + 1
    assert len(rest_of_pass(stream)) == 8


def test_counts_of_what_is_left_out() -> None:
    documents = [doc("a" * 20), doc("b"), doc("cc", trained=False), doc("d" * 30)]
    stream = sample_stream(ListStream([documents]), settings(8, overlong="drop", shuffle_window=2))
    take(stream, 1)
    rest_of_pass(stream)
    counts = stream.counts
    assert (counts.documents, counts.overlong) == (4, 2)
    position = StreamPosition.from_state(json.loads(json.dumps(stream.position.to_state())))
    assert position.counts == counts


@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_problems_of_the_encoder_are_counted(layout: Literal["stream", "rows"]) -> None:
    encoder = DocumentEncoder(byte_tokenizer(begin=True), VOCAB)
    documents = [doc(f"{BEGIN}ab"), doc("cd"), doc(f"{BEGIN}ef")]
    stream = WeightedStream("fake", ListStream([documents], layout))
    made = SampleStream(stream, encoder, settings(16), 1, StreamPosition())
    made.next_group()
    assert (made.counts.double_bos, made.counts.missing_eos) == (2, 0)


def test_nothing_usable_in_a_pass() -> None:
    prompt_only = [doc("a" * 20), doc("b" * 20)]
    stream = sample_stream(ListStream([prompt_only]), settings(8, overlong="drop", shuffle_window=1))
    with pytest.raises(
        DataError, match=r"0 usable documents in shard 0, .* 2 documents read, 0 held out .*, 2 longer than"
    ):
        stream.next_group()
    with pytest.raises(DataError, match="0 documents read, 2 held out"):
        sample_stream(ListStream([prompt_only, []]), settings(), held_out=1.0).next_group()
    with pytest.raises(DataError, match="0 usable documents"):
        sample_stream(ListStream([[], []], "stream"), settings()).next_group()
    with pytest.raises(DataError, match="fake: the stream has no shards"):
        sample_stream(ListStream([]), settings())


def test_nothing_usable_in_a_later_pass() -> None:
    source = ListStream([numbered(3)])
    stream = sample_stream(source, settings(16))
    rest_of_pass(stream)
    source.content = [[]]
    with pytest.raises(DataError, match="0 usable documents in shard 0, read to the end"):
        stream.next_group()


def test_a_pass_with_few_usable_documents_goes_on() -> None:
    documents = [doc("a" * 20), doc("b" * 20), doc("c"), doc("d" * 20)]
    stream = sample_stream(ListStream([documents]), settings(8, overlong="drop", shuffle_window=1))
    assert [plain(stream.next_group())[0][0]["input_ids"] for _ in range(3)] == [ids("c")] * 3


def test_a_window_that_shrank_is_refused() -> None:
    stream = sample_stream(ListStream([numbered(8)]), settings(shuffle_window=8))
    take(stream, 6)
    shrunk = sample_stream(ListStream([numbered(4)]), settings(shuffle_window=8), stream.position)
    with pytest.raises(DataError, match="fake: the data changed: a window that gave more than 6 samples gives 4 now"):
        shrunk.next_group()


def jsonl_stream(folder: Path, rows: list[int], compressed: bool) -> StreamSource:
    folder.mkdir()
    number = 0
    for shard, count in enumerate(rows):
        lines = "".join(json.dumps({"text": f"row {number + row:05d}"}) + "\n" for row in range(count))
        number += count
        if compressed:
            (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            (folder / f"{shard}.jsonl").write_text(lines)
    fields = RowFields("text", "text", "prompt", "completion", "messages", "all")
    return JsonlSource([str(folder)], fields, BadRowPolicy("error", 0.01))


@pytest.mark.parametrize("compressed", [False, True])
def test_going_on_in_real_files(tmp_path: Path, compressed: bool) -> None:
    source = jsonl_stream(tmp_path / "data", [30, 1, 40], compressed)

    def made(position: StreamPosition) -> SampleStream:
        return SampleStream(WeightedStream("jsonl", source), ENCODER, settings(16, shuffle_window=9), 3, position)

    stream = made(StreamPosition())
    for _ in range(160):
        resumed = made(StreamPosition.from_state(json.loads(json.dumps(stream.position.to_state()))))
        assert plain(resumed.next_group()) == plain(stream.next_group())
    assert stream.position.place.epoch == 2
