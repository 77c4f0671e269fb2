"""One source read while training: windows of documents become shuffled samples, from a position a checkpoint holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from truthgpt.data.base import SHARD_START, Cursor, Document, PackedSample, Sample, StreamSource
from truthgpt.data.order import KeyedPermutation
from truthgpt.data.packing import join_samples
from truthgpt.data.stream_holdout import held_out
from truthgpt.data.stream_samples import Carry, StreamCounts, StreamSettings, arrange, cut_blocks, cut_rows
from truthgpt.data.tokenization import DocumentEncoder
from truthgpt.errors import DataError
from truthgpt.runtime.seeds import derive_seed

WINDOW_CHARACTERS = 2**23
"""A window ends here even when it holds fewer documents: about two million tokens, 32 MB, two seconds of tokenising."""


@dataclass(frozen=True)
class WeightedStream:
    """A source of a mixture. `name` tells it from the others and keys its order; `weight` is its share relative to
    theirs; `held_out` is the share of its documents that are kept for validation and skipped here."""

    name: str
    source: StreamSource
    weight: float = 1.0
    held_out: float = 0.0


def require_sample(stream: WeightedStream, encoder: DocumentEncoder, settings: StreamSettings) -> None:
    """Read a stream up to the first training document that gives a sample: before a run begins, not in its first step.

    It changes no position. Malformed rows that are skipped on the way count again when training reads them.

    Raises:
        DataError: no document gives one, or one on the way cannot be read or used.
    """
    source, counts = stream.source, StreamCounts()
    for shard in range(len(source.shards())):
        for document, _ in source.read(shard):
            if held_out(document.key, stream.held_out):
                counts.held_out += 1
                continue
            counts.documents += 1
            # Of joined text no block is left out; of rows some are, for their length or their labels.
            joined = source.layout == "stream" and not settings.packing
            if joined or cut_rows([document], encoder, settings, counts)[0]:
                return
    raise _nothing_usable(source.shards(), counts)


@dataclass(frozen=True)
class Place:
    """Where a window begins: the pass, the place in its order of shards, the cursor in that shard (behind a training
    document, or its start), and the window's number in the pass."""

    epoch: int = 0
    shard: int = 0
    cursor: Cursor = SHARD_START
    window: int = 0


@dataclass(frozen=True)
class StreamPosition:
    """Everything from which a stream goes on: the window being given out and the groups already `given` of it; `carry`,
    `counts` and `usable` (groups of this pass) are those at the window's beginning."""

    place: Place = field(default_factory=Place)
    carry: Carry = field(default_factory=Carry)
    counts: StreamCounts = field(default_factory=StreamCounts)
    usable: int = 0
    given: int = 0

    def to_state(self) -> dict[str, Any]:
        """Plain values."""
        parts = {"place": vars(self.place), "carry": vars(self.carry), "counts": vars(self.counts)}
        return {**parts, "usable": self.usable, "given": self.given}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> StreamPosition:
        """The position `to_state` was called on; lists may have taken the place of tuples."""
        place = Place(**state["place"])
        place = dataclasses.replace(place, cursor=tuple(place.cursor))
        counts = StreamCounts(**state["counts"])
        return StreamPosition(place, Carry(**state["carry"]), counts, state["usable"], state["given"])


@dataclass(frozen=True)
class Group:
    """What a stream gives out at a time: one sample or, bucketed, one micro-batch of them; `documents` that begin in
    it and its `tokens`, without padding."""

    samples: list[Sample] | list[PackedSample]
    documents: int
    tokens: int


class SampleStream:
    """Samples of one source without end, pass after pass.

    Pass e visits the shards in a permutation keyed by (seed, name, e). Its training documents are read in that order,
    in windows of `shuffle_window` that may cross shard borders; the samples of a window are given out in an order keyed
    by (seed, name, e, window).

    Joined text stays in reading order, and its blocks are what is shuffled: so the pieces of one text stay together,
    from one window to the next too, and a block that a window leaves unfilled goes on in the next one. The blocks of a
    pass are those BlockDataset would cut. Rows are shuffled whole; packed ones share a row with others of their window.
    A piece that `continues` is then a row of its own, as in RowDataset, closed where its window ends.

    Going on from a position reads that one window again, wherever it is.

    Args:
        stream: the source.
        encoder: documents to tokens.
        settings: shapes of samples and groups.
        seed: seed of the run.
        position: where to go on.

    Raises:
        DataError: a stream without shards.
    """

    def __init__(
        self,
        stream: WeightedStream,
        encoder: DocumentEncoder,
        settings: StreamSettings,
        seed: int,
        position: StreamPosition,
    ) -> None:
        self.position = position
        """Behind the last group given out."""
        self.counts = position.counts
        """Counts with those of the window being given out."""
        self._name = stream.name
        self._shards = stream.source.shards()
        self._encoder = encoder
        self._settings = settings
        self._seed = seed
        self._windows = _WindowReader(stream, settings.shuffle_window, seed)
        self._joined = stream.source.layout == "stream" and not settings.packing
        self._window: _Window | None = None

    def next_group(self) -> Group:
        """The next group.

        Raises:
            DataError: a document that cannot be read or used, a pass without a usable document, or a window that has
                changed since the position was saved.
        """
        while self._window is None:
            self._window = self._read_window()
        window, given = self._window, self.position.given
        group = window.group(given, self._settings)
        if given + 1 < len(window.groups):
            self.position = dataclasses.replace(self.position, given=given + 1)
        else:
            self.position, self._window = window.after, None
        return group

    def _read_window(self) -> _Window | None:
        """The window of the position; None, and the position behind it, when it gives no sample."""
        start = self.position
        found = self._windows.read(start.place)
        ends_pass = found.ends_pass(start.place)
        counts = dataclasses.replace(start.counts)
        counts.documents += len(found.documents)
        counts.held_out += found.held_out
        if self._joined:
            samples, begins, carry = cut_blocks(
                self._encoder.runs(found.documents), counts, start.carry, self._settings.max_seq_len, ends_pass
            )
        else:
            samples, begins = cut_rows(found.documents, self._encoder, self._settings, counts)
            carry = Carry()
        key = derive_seed(self._seed, "window", self._name, start.place.epoch, start.place.window)
        groups = arrange(np.array([len(sample["input_ids"]) for sample in samples]), self._settings, key)
        usable = start.usable + len(groups)
        if ends_pass and usable == 0:
            raise _nothing_usable(self._shards, counts)
        after = StreamPosition(found.next_place, carry, counts, usable=0 if ends_pass else usable)
        self.counts = counts
        if start.given and start.given >= len(groups):
            raise DataError(
                f"{self._name}: the data changed: a window that gave more than {start.given} samples gives "
                f"{len(groups)} now; restore it, or start a new run in another output_dir"
            )
        if not groups:
            self.position = after
            return None
        return _Window(samples, begins, groups, after)


@dataclass(frozen=True)
class _Window:
    """Samples of a window, the documents that begin in each, the samples of every group, and the position behind."""

    samples: list[Sample]
    begins: list[int]
    groups: list[list[int]]
    after: StreamPosition

    def group(self, number: int, settings: StreamSettings) -> Group:
        members = self.groups[number]
        samples = [self.samples[member] for member in members]
        documents = sum(self.begins[member] for member in members)
        tokens = sum(len(sample["input_ids"]) for sample in samples)
        if settings.packing:
            return Group([join_samples(samples, settings.max_seq_len, settings.pad_token_id)], documents, tokens)
        return Group(samples, documents, tokens)


@dataclass(frozen=True)
class _Found:
    """Training documents of a window, the held-out ones passed over for them, and where the next window begins."""

    documents: list[Document]
    held_out: int
    next_place: Place

    def ends_pass(self, place: Place) -> bool:
        return self.next_place.epoch > place.epoch


class _Entry(NamedTuple):
    """A training document, its shard's place in the order, the cursor behind it, the held-out documents passed over
    for it, and whether no other follows in the pass. Without a document when the pass has none."""

    document: Document | None
    shard: int
    cursor: Cursor
    held_out: int
    last: bool


class _WindowReader:
    """Training documents of a window: a pure function of its place; windows in a row are read without opening again."""

    def __init__(self, stream: WeightedStream, documents: int, seed: int) -> None:
        self._stream = stream
        self._shards = len(stream.source.shards())
        self._documents = documents
        self._seed = seed
        self._open: tuple[Place, Iterator[_Entry]] | None = None
        if self._shards == 0:
            raise DataError(f"{stream.name}: the stream has no shards; check data.path")

    def read(self, place: Place) -> _Found:
        """The window that begins at `place`; the last one of a pass may be shorter."""
        if self._open is None or self._open[0] != place:
            self._open = place, self._read_pass(place)
        reader = self._open[1]
        documents: list[Document] = []
        characters = held_out = 0
        while True:
            entry = next(reader)
            held_out += entry.held_out
            if entry.document is not None:
                documents.append(entry.document)
                characters += sum(len(segment.text) for segment in entry.document.segments)
            if entry.last:
                self._open = None
                return _Found(documents, held_out, Place(place.epoch + 1))
            if len(documents) == self._documents or characters >= WINDOW_CHARACTERS:
                break
        next_place = Place(place.epoch, entry.shard, entry.cursor, place.window + 1)
        self._open = next_place, reader
        return _Found(documents, held_out, next_place)

    def _read_pass(self, place: Place) -> Iterator[_Entry]:
        """The rest of a pass. Reads one document ahead, to tell which is the last."""
        ahead: _Entry | None = None
        passed_over = 0
        # A window begins at a shard's start or right behind a training document, which a piece may continue.
        follows, before = place.cursor != SHARD_START, place.shard
        for document, shard, cursor in self._read_shards(place):
            follows, before = follows and shard == before, shard
            if held_out(document.key, self._stream.held_out):
                passed_over, follows = passed_over + 1, False
                continue
            if document.continues and not follows:
                document = dataclasses.replace(document, continues=False)
            if ahead is not None:
                yield ahead
            ahead = _Entry(document, shard, cursor, passed_over, last=False)
            passed_over, follows = 0, True
        if ahead is None:
            ahead = _Entry(None, place.shard, place.cursor, 0, last=True)
        yield ahead._replace(held_out=ahead.held_out + passed_over, last=True)

    def _read_shards(self, place: Place) -> Iterator[tuple[Document, int, Cursor]]:
        """The rest of a pass: every document, the place of its shard in the order, and the cursor behind it."""
        key = derive_seed(self._seed, "shards", self._stream.name, place.epoch)
        order = KeyedPermutation(self._shards, key)
        cursor = place.cursor
        for position in range(place.shard, self._shards):
            shard = int(order(np.array([position], dtype=np.int64))[0])
            for document, behind in self._stream.source.read(shard, cursor):
                yield document, position, behind
            cursor = SHARD_START


def _nothing_usable(shards: Sequence[str], counts: StreamCounts) -> DataError:
    more = f" and {len(shards) - 1} more shards" if len(shards) > 1 else ""
    return DataError(
        f"0 usable documents in {shards[0]}{more}, read to the end: {counts.documents} documents read, "
        f"{counts.held_out} held out for validation, {counts.overlong} longer than data.max_seq_len, "
        f"{counts.unsupervised} samples without a token the loss counts; check data.path, data.max_seq_len, "
        "data.overlong, data.train_on and data.validation_fraction"
    )
