from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from truthgpt.data.base import IdentifiedSource, Source
from truthgpt.data.jsonl_source import JsonlSource
from truthgpt.data.rows import BadRowPolicy, RowFields
from truthgpt.data.stream_holdout import HoldoutSource, held_out, hold_out
from truthgpt.errors import DataError

from .stream_fakes import ListStream, doc, numbered, rest_of_pass, sample_stream, settings


class IdentifiedStream(ListStream):
    """A stream that knows its documents without reading them."""

    def __init__(self, name: str | None, count: int = 3) -> None:
        super().__init__([numbered(count)])
        self.name = name

    def documents(self) -> object:
        return (document for document, _ in self.read(0))

    def identity(self) -> str | None:
        return self.name


def test_a_share_of_the_keys_is_held_out() -> None:
    keys = [f"key {number}" for number in range(4000)]
    chosen = {fraction: {key for key in keys if held_out(key, fraction)} for fraction in (0.0, 0.05, 0.5, 1.0)}
    assert [len(chosen[fraction]) for fraction in (0.0, 1.0)] == [0, 4000]
    assert 0.04 < len(chosen[0.05]) / 4000 < 0.06
    assert 0.47 < len(chosen[0.5]) / 4000 < 0.53
    assert chosen[0.05] < chosen[0.5], "a larger share only adds documents"


def test_the_choice_is_the_same_everywhere() -> None:
    # SHA-256 of "a" begins with 0xca97..., 0.79 of the way.
    assert (held_out("a", 0.79), held_out("a", 0.80)) == (False, True)


def test_training_and_validation_share_all_documents() -> None:
    shards = [numbered(30), [], numbered(50, first=100)]
    source = ListStream(shards)
    validation = [document.text for document in HoldoutSource(source, 0.3).documents()]
    expected = [document.text for shard in shards for document in shard if held_out(document.key, 0.3)]
    assert validation == expected
    assert len(validation) == 80 - len(rest_of_pass(sample_stream(source, settings(16), held_out=0.3)))


def test_only_the_first_documents_are_looked_at() -> None:
    source = ListStream([numbered(30), numbered(50, first=100)])
    everything = list(HoldoutSource(source, 0.5, max_documents=80).documents())
    source.documents_read = 0
    first = list(HoldoutSource(source, 0.5, max_documents=40).documents())
    assert source.documents_read == 40
    assert [document.text for document in first] == [
        document.text for document in everything if document.text[:4] < "0110"
    ]


def test_pieces_continue_only_what_is_held_out_too() -> None:
    pieces = [doc("x", continues=place > 0, key=f"{place}") for place in range(40)]
    chosen = [held_out(piece.key, 0.5) for piece in pieces]
    found = [document.continues for document in HoldoutSource(ListStream([pieces, pieces[:1]]), 0.5).documents()]
    expected = [place > 0 and chosen[place - 1] for place in range(40) if chosen[place]]
    assert found[: len(expected)] == expected
    assert {True, False} <= set(expected)


def test_a_shard_never_continues_another() -> None:
    key = next(f"{number}" for number in range(100) if held_out(f"{number}", 0.5))
    shards = [[doc("a", key=key)], [doc("b", key=key, continues=True)]]
    assert [document.continues for document in HoldoutSource(ListStream(shards), 0.5).documents()] == [False, False]


def test_identity() -> None:
    assert HoldoutSource(ListStream([numbered(3)]), 0.5).identity() is None, "only reading tells"
    assert HoldoutSource(IdentifiedStream(None), 0.5).identity() is None
    holdout = HoldoutSource(IdentifiedStream("files"), 0.5)
    assert isinstance(holdout, IdentifiedSource)
    plain_source: Source = holdout
    assert plain_source.layout == "rows"
    changed = IdentifiedStream("files")
    changed.digest = "other"
    others = [
        HoldoutSource(IdentifiedStream("others"), 0.5),
        HoldoutSource(IdentifiedStream("files"), 0.4),
        HoldoutSource(IdentifiedStream("files"), 0.5, max_documents=7),
        HoldoutSource(changed, 0.5),
    ]
    assert len({source.identity() for source in (holdout, *others)}) == 5
    assert holdout.identity() == HoldoutSource(IdentifiedStream("files"), 0.5).identity()


def test_nothing_held_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ListStream([numbered(5)])
    with caplog.at_level(logging.WARNING):
        assert hold_out(source, 0.0, tmp_path) is None
        assert caplog.records == []
        assert source.documents_read == 0
        assert hold_out(source, 1e-9, tmp_path, max_documents=4) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("none of the first 4 documents of the stream is held out")


def test_something_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ListStream([numbered(500)])
    validation = hold_out(source, 0.5, tmp_path)
    assert source.documents_read == 500, "it reads them once, to count them"
    assert validation is not None
    assert list(validation) == list(HoldoutSource(source, 0.5).documents())
    assert caplog.records == []


def test_a_known_stream_is_not_read_again(tmp_path: Path) -> None:
    """The holding out of 1,000 documents has an identity, and an index in the cache from the first time on."""
    assert hold_out(IdentifiedStream("files", 1000), 0.1, tmp_path) is not None
    source = IdentifiedStream("files", 1000)
    validation = hold_out(source, 0.1, tmp_path)
    assert validation is not None and 50 < len(validation) < 150
    assert source.documents_read == 0


def test_rows_are_counted_once_before_training(tmp_path: Path) -> None:
    """The first of 1,060 rows to be malformed is row 1,050, far behind the first one that is held out."""
    lines = [json.dumps({"text": f"row {number}"}) for number in range(1049)] + ["{"] * 40
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    fields = RowFields("text", "text", "prompt", "completion", "messages", "all")
    source = JsonlSource([str(tmp_path)], fields, BadRowPolicy("skip", max_bad_fraction=0.01))
    with pytest.raises(DataError, match="jsonl:1060:2: 11 of 1060 rows are malformed, more than"):
        hold_out(source, 0.005, tmp_path / "cache")
