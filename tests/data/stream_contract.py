"""What every StreamSource promises, checked by reading it."""

from __future__ import annotations

from collections.abc import Sequence

from truthgpt.data.base import Cursor, Document, StreamSource


def read_shards(source: StreamSource) -> list[list[tuple[Document, Cursor]]]:
    """All shards, read whole."""
    return [list(source.read(shard)) for shard in range(len(source.shards()))]


def check_cursors(source: StreamSource, documents: Sequence[Document], every: int = 1) -> None:
    """The shards hold `documents` in order, and reading from the cursor behind each `every`-th gives exactly the rest.

    A cursor travels through a checkpoint as plain numbers, hence the round trip over a list.
    """
    shards = read_shards(source)
    assert [document for shard in shards for document, _ in shard] == list(documents)
    for index, shard in enumerate(shards):
        for place in range(0, len(shard), every):
            cursor = tuple(int(number) for number in list(shard[place][1]))
            assert list(source.read(index, cursor)) == shard[place + 1 :]
