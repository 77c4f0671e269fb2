"""A stream in memory that counts what is read of it, and what the tests of streams share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from truthgpt.data.base import SHARD_START, Cursor, Document, Segment
from truthgpt.data.stream import Group, SampleStream, StreamPosition, WeightedStream
from truthgpt.data.stream_samples import StreamSettings
from truthgpt.data.tokenization import DocumentEncoder

from .conftest import byte_tokenizer

END = 256
VOCAB = 258
ENCODER = DocumentEncoder(byte_tokenizer(), VOCAB)


class ListStream:
    """Shards of documents from memory; a cursor is the number of documents before."""

    def __init__(self, shards: Sequence[Sequence[Document]], layout: Literal["stream", "rows"] = "rows") -> None:
        self.layout: Literal["stream", "rows"] = layout
        self.content = shards
        self.documents_read = 0
        self.shards_opened: list[tuple[int, Cursor]] = []
        self.digest = "digest"

    def shards(self) -> Sequence[str]:
        return [f"shard {number}" for number in range(len(self.content))]

    def read(self, shard: int, cursor: Cursor = SHARD_START) -> Iterator[tuple[Document, Cursor]]:
        assert isinstance(cursor, tuple), "a cursor is a tuple, also out of a checkpoint"
        self.shards_opened.append((shard, cursor))
        first = cursor[0] if cursor else 0
        for number, document in enumerate(self.content[shard][first:], start=first + 1):
            self.documents_read += 1
            yield document, (number,)

    def fingerprint(self) -> str:
        return self.digest


def doc(text: str, *, continues: bool = False, trained: bool = True, key: str | None = None) -> Document:
    return Document(key or f"key {text}", (Segment(text, trained),), where=f"file:{text[:20]}", continues=continues)


def numbered(count: int, first: int = 0, length: int = 4) -> list[Document]:
    """Documents of distinct texts of `length` characters and up."""
    return [doc(f"{number:0{length}d}" + "x" * (number % 5)) for number in range(first, first + count)]


def ids(text: str) -> list[int]:
    found: list[int] = byte_tokenizer()(text).input_ids
    return found


def settings(max_seq_len: int = 8, **changes: object) -> StreamSettings:
    values: dict[str, object] = {"micro_batch_size": 2, "grad_accum_steps": 2, "shuffle_window": 4}
    return StreamSettings(max_seq_len, **{**values, **changes})  # type: ignore[arg-type]


def sample_stream(
    source: ListStream,
    shape: StreamSettings,
    position: StreamPosition | None = None,
    held_out: float = 0.0,
    seed: int = 7,
) -> SampleStream:
    stream = WeightedStream("fake", source, held_out=held_out)
    return SampleStream(stream, ENCODER, shape, seed, position or StreamPosition())


def plain(group: Group) -> tuple[list[dict[str, list[int]]], int, int]:
    """A group as values that compare."""
    samples = [{name: array.tolist() for name, array in sample.items()} for sample in group.samples]  # type: ignore[attr-defined]
    return samples, group.documents, group.tokens


def rest_of_pass(stream: SampleStream) -> list[tuple[list[dict[str, list[int]]], int, int]]:
    """All groups up to the end of the pass."""
    epoch, found = stream.position.place.epoch, []
    while stream.position.place.epoch == epoch:
        found.append(plain(stream.next_group()))
    return found
