"""JSON Lines files: one object a line, each row a sample of its own."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from truthgpt.data.base import Document, Segment
from truthgpt.data.paths import resolve_files
from truthgpt.data.text_source import UTF8_BOM
from truthgpt.errors import DataError

logger = logging.getLogger(__name__)

EXCERPT_CHARACTERS = 60


@dataclass(frozen=True)
class RowFields:
    """What a row holds and which of its fields are read; names as in `data.*`."""

    format: Literal["text", "prompt_completion"]
    text_field: str
    prompt_field: str
    completion_field: str
    train_on: Literal["all", "completion"]


@dataclass(frozen=True)
class BadRowPolicy:
    """What a malformed row does: end the run, or be skipped up to a share of all rows."""

    on_bad_row: Literal["error", "skip"]
    max_bad_fraction: float


class _BadRow(ValueError):
    """A row that cannot be used; `column` counts characters from 1."""

    def __init__(self, column: int, reason: str) -> None:
        super().__init__(reason)
        self.column = column


class _DoubleKey(ValueError):
    """A JSON object has the key `args[0]` twice."""


@dataclass
class _Tally:
    """What one pass over the files met."""

    rows: int = 0
    usable: int = 0
    empty: int = 0
    bad: int = 0
    surrogates: int = 0
    first_bad: str = ""


class JsonlSource:
    """Rows of JSON Lines files, read line by line.

    With `format: text` a row's text is one trained segment. With `prompt_completion` it is two: the prompt, trained
    only with `train_on: all`, and the completion. The key of a row is a digest of its content, so that the split does
    not depend on the order of the rows. Blank lines are allowed; a byte-order mark is dropped; rows whose text (or
    completion) is only white space are left out and counted; half of a surrogate pair becomes U+FFFD, counted too.

    Args:
        paths: files, folders (all `*.jsonl` below) or globs.
        fields: what a row holds.
        bad_rows: what a malformed row does.

    Raises:
        DataError: a path that matches no file.
    """

    layout: Literal["stream", "rows"] = "rows"

    def __init__(self, paths: Sequence[str], fields: RowFields, bad_rows: BadRowPolicy) -> None:
        self._files = resolve_files(paths, suffix=".jsonl")
        self._fields = fields
        self._bad_rows = bad_rows
        self._reported = False

    def documents(self) -> Iterator[Document]:
        """All usable rows in order.

        Raises:
            DataError: `file:line:column` of a malformed row; or, with `on_bad_row: skip`, too many of them; or no row
                at all.
        """
        tally = _Tally()
        for path in self._files:
            try:
                yield from self._read_file(path, tally)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
        self._check(tally)

    def _read_file(self, path: Path, tally: _Tally) -> Iterator[Document]:
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(UTF8_BOM) if number == 1 else line
                content_offset = offset + len(line) - len(content)
                offset += len(line)
                if not content.strip():
                    continue
                tally.rows += 1
                try:
                    segments = self._segments(parse_row(content, content_offset), content, tally)
                except _BadRow as error:
                    self._meet_bad_row(f"{path}:{number}:{error.column}: {error}: {_excerpt(content)}", tally, error)
                    continue
                if not segments[-1].text.strip():
                    tally.empty += 1
                    continue
                tally.usable += 1
                yield Document(_content_key(segments), segments, where=f"{path}:{number}")

    def _segments(self, row: dict[str, Any], content: bytes, tally: _Tally) -> tuple[Segment, ...]:
        fields = self._fields
        if fields.format == "text":
            return (Segment(_text_of(row, fields.text_field, "text_field", content, tally)),)
        prompt = _text_of(row, fields.prompt_field, "prompt_field", content, tally)
        completion = _text_of(row, fields.completion_field, "completion_field", content, tally)
        return (Segment(prompt, trained=fields.train_on == "all"), Segment(completion))

    def _meet_bad_row(self, message: str, tally: _Tally, error: _BadRow) -> None:
        if self._bad_rows.on_bad_row == "error":
            raise DataError(f"{message}; correct the row, or set data.on_bad_row: skip") from error
        tally.bad += 1
        tally.first_bad = tally.first_bad or message

    def _check(self, tally: _Tally) -> None:
        """End of a pass: refuse too many bad rows or no usable one, and say once what was left out."""
        files = str(self._files[0]) + (f" and {len(self._files) - 1} more files" if len(self._files) > 1 else "")
        limit = self._bad_rows.max_bad_fraction
        if tally.bad > limit * tally.rows:
            raise DataError(
                f"{files}: {tally.bad} of {tally.rows} rows are malformed, more than data.max_bad_fraction {limit} "
                f"allows; correct them or raise the limit; the first: {tally.first_bad}"
            )
        if tally.usable == 0:
            raise DataError(f"0 usable documents in {files}: {tally.rows} rows, {tally.empty} without text")
        if self._reported:
            return
        self._reported = True
        if tally.bad:
            logger.warning(
                "%s: skipped %d malformed of %d rows; the first: %s", files, tally.bad, tally.rows, tally.first_bad
            )
        if tally.empty:
            logger.warning("%s: left out %d of %d rows without text", files, tally.empty, tally.rows)
        if tally.surrogates:
            logger.warning("%s: unpaired surrogates in %d texts became U+FFFD", files, tally.surrogates)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DoubleKey(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def parse_row(content: bytes, offset: int = 0) -> dict[str, Any]:
    """The JSON object on one line, strictly: UTF-8, nothing behind it, no key twice.

    Args:
        content: the line, with or without its line end.
        offset: where it stands in its file in bytes, for the message.

    Raises:
        ValueError: with the reason, and the column as attribute `column`.
    """
    try:
        text = content.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        column = len(content[: error.start].decode("utf-8")) + 1
        raise _BadRow(column, f"not UTF-8 at byte {offset + error.start} of the file ({error.reason})") from error

    try:
        row = _DECODER.decode(text)
    except _DoubleKey as error:
        key = error.args[0]
        raise _BadRow(_column_of(text, key), f"the key {key!r} stands twice in one object") from error
    except json.JSONDecodeError as error:
        raise _BadRow(error.colno, f"not valid JSON: {error.msg}") from error
    except ValueError as error:
        raise _BadRow(1, f"not readable JSON: {error}") from error
    except RecursionError as error:
        raise _BadRow(1, "nested too deeply") from error
    if not isinstance(row, dict):
        raise _BadRow(1, f"a row must be a JSON object, found {_json_type(row)}")
    return row


def _text_of(row: dict[str, Any], field: str, setting: str, content: bytes, tally: _Tally) -> str:
    """The string in `field`, encodable as UTF-8."""
    if field not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise _BadRow(1, f"no field {field!r}, the row has {there} (set data.{setting})")
    text = row[field]
    if not isinstance(text, str):
        column = _column_of(content.decode("utf-8"), field)
        raise _BadRow(column, f"field {field!r} must be a string, found {_json_type(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        tally.surrogates += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _column_of(text: str, key: str) -> int:
    """Column of the last place where `key` stands as JSON string, else 1."""
    return max(text.rfind(json.dumps(key)), text.rfind(json.dumps(key, ensure_ascii=False)), 0) + 1


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


def _excerpt(content: bytes) -> str:
    return repr(content.decode("utf-8", errors="replace").strip()[:EXCERPT_CHARACTERS])


def _content_key(segments: tuple[Segment, ...]) -> str:
    digest = hashlib.sha256()
    for segment in segments:
        data = segment.text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]
