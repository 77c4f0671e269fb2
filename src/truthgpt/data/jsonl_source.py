"""JSON Lines files, plain or compressed: one object a line, each row a sample of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from truthgpt.data.base import SHARD_START, Cursor, Document
from truthgpt.data.compressed_file import ArchiveError, is_compressed, open_binary
from truthgpt.data.file_identity import content_fingerprint, stat_identity
from truthgpt.data.paths import resolve_files
from truthgpt.data.rows import EXCERPT_CHARACTERS, BadRow, BadRowPolicy, RowFields, RowReader, json_type
from truthgpt.data.text_source import UTF8_BOM
from truthgpt.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
"""Endings of the files taken from a folder."""
MAX_LINE_BYTES = 256 * 2**20
"""A longer line is refused, so that a file without line ends cannot fill the memory."""
UTF8_CHARACTER_BYTES = 4
_OTHER_KINDS = (".csv", ".tsv", ".parquet", ".arrow")


class _DoubleKey(ValueError):
    """A JSON object has the key `args[0]` twice."""


class JsonlSource:
    """Rows of JSON Lines files, read line by line; what a row means is decided by `rows.RowReader`.

    Blank lines are allowed; a byte-order mark is dropped. Files ending in `.gz` and `.zst` are read as they are.
    As a stream, each file is a shard; a plain file is entered in the middle at once, a compressed one by reading it
    again up to there.

    Args:
        paths: files, folders or globs.
        fields: what a row holds.
        bad_rows: what a malformed row does.
        suffixes: endings of the files taken from a folder.

    Raises:
        DataError: a path that matches no file, or a file of another kind.
    """

    layout: Literal["stream", "rows"] = "rows"

    def __init__(
        self, paths: Sequence[str], fields: RowFields, bad_rows: BadRowPolicy, suffixes: tuple[str, ...] = SUFFIXES
    ) -> None:
        self._files = resolve_files(paths, suffix=suffixes)
        for path in self._files:
            _refuse_other_kind(path)
        self._fields = fields
        self._bad_rows = bad_rows
        self._reported = False
        self._stream_reader = RowReader(fields, bad_rows, whole_pass=False)

    def documents(self) -> Iterator[Document]:
        """All usable rows in order.

        Raises:
            DataError: `file:line:column` of a malformed row; or, with `on_bad_row: skip`, too many of them; or no row
                at all; or a file that cannot be read.
            ConfigError: a `.zst` file without the package that reads it.
        """
        reader = RowReader(self._fields, self._bad_rows)
        for path in self._files:
            for document, _ in _read_file(path, SHARD_START, reader):
                yield document
        more = f" and {len(self._files) - 1} more files" if len(self._files) > 1 else ""
        reader.finish(f"{self._files[0]}{more}", report=not self._reported)
        self._reported = True

    def identity(self) -> str:
        """Paths, sizes and times of the files, and what is read from a row."""
        return f"jsonl {self._fields} {self._bad_rows} {stat_identity(self._files)}"

    def shards(self) -> Sequence[str]:
        """The files."""
        return [str(path) for path in self._files]

    def read(self, shard: int, cursor: Cursor = SHARD_START) -> Iterator[tuple[Document, Cursor]]:
        """Usable rows of one file from `cursor` on: (byte offset, lines before) in a plain file, (lines before,) in a
        compressed one.

        Raises:
            DataError: as `documents` does.
        """
        return _read_file(self._files[shard], cursor, self._stream_reader)

    def fingerprint(self) -> str:
        """Digest of the files' names, sizes and contents, and of what is read from a row."""
        return content_fingerprint(self._files, repr(self._fields))


def _read_file(path: Path, cursor: Cursor, reader: RowReader) -> Iterator[tuple[Document, Cursor]]:
    compressed = is_compressed(path)
    number = cursor[-1] if cursor else 0
    offset = cursor[0] if cursor and not compressed else 0
    prefix = f"{path}:"
    try:
        with open_binary(path) as file:
            if compressed:
                for _ in range(number):
                    file.readline(MAX_LINE_BYTES)
            else:
                file.seek(offset)
            for line in iter(partial(file.readline, MAX_LINE_BYTES + 1), b""):
                number += 1
                start = offset
                offset += len(line)
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{path}:{number}:1: the line is longer than {MAX_LINE_BYTES >> 20} MiB; split it")
                if line.isspace():
                    continue
                where = f"{prefix}{number}"
                document = _read_line(line, where, start, number == 1, reader)
                if document is not None:
                    yield document, (number,) if compressed else (offset, number)
    except ArchiveError as error:
        raise DataError(f"{path}: {error} (after line {number}); copy or download the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check its permissions") from error


def _read_line(line: bytes, where: str, offset: int, first: bool, reader: RowReader) -> Document | None:
    """The document of one line that is not blank; None when it is left out."""
    if first and line.startswith(UTF8_BOM):
        line, offset = line[len(UTF8_BOM) :], offset + len(UTF8_BOM)
        if not line.strip():
            return None
    try:
        return reader.document(parse_row(line, offset), where)
    except BadRow as error:
        # A row that was parsed knows its field, not its column.
        column = error.column if error.field is None else _column_of(line.decode("utf-8"), error.field)
        excerpt = line.lstrip()[: EXCERPT_CHARACTERS * UTF8_CHARACTER_BYTES].decode("utf-8", errors="replace")
        reader.refuse(f"{where}:{column}", error, excerpt)
        return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DoubleKey(next(name for name in names if names.count(name) > 1))
    return found


def _refuse_other_kind(path: Path) -> None:
    """A file that is not JSON Lines by its name, or an array in a `.json` file; what cannot be opened is said later."""
    found = None
    if path.suffix in _OTHER_KINDS:
        found = f"a {path.suffix} file"
    elif path.suffix == ".json":
        with suppress(OSError), path.open("rb") as file:
            if file.read(64).removeprefix(UTF8_BOM).lstrip().startswith(b"["):
                found = "a JSON array"
    if found is not None:
        raise DataError(f"{path}: {found}, and jsonl reads JSON Lines; set data.source: hf, which reads such files")


_raw_decode = json.JSONDecoder(object_pairs_hook=_unique_keys).raw_decode


def parse_row(content: bytes, offset: int = 0) -> dict[str, Any]:
    """The JSON object on one line, strictly: UTF-8, nothing behind it, no key twice.

    Args:
        content: the line, with or without its line end.
        offset: where it stands in its file in bytes, for the message.

    Raises:
        BadRow: with the reason and the column.
    """
    try:
        text = content.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        column = len(content[: error.start].decode("utf-8")) + 1
        raise BadRow(f"not UTF-8 at byte {offset + error.start} of the file ({error.reason})", column=column) from error

    start = 0 if text.startswith("{") else len(text) - len(text.lstrip(" \t\r\n"))
    try:
        row, end = _raw_decode(text, start)
    except _DoubleKey as error:
        key = error.args[0]
        raise BadRow(f"the key {key!r} stands twice in one object", column=_column_of(text, key)) from error
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error.msg}", column=error.colno) from error
    except ValueError as error:
        raise BadRow(f"not readable JSON: {error}") from error
    except RecursionError as error:
        raise BadRow("nested too deeply") from error
    if rest := text[end:].strip(" \t\r\n"):
        raise BadRow("not valid JSON: Extra data", column=text.index(rest, end) + 1)
    if not isinstance(row, dict):
        raise BadRow(f"a row must be a JSON object, found {json_type(row)}")
    return row


def _column_of(text: str, key: str) -> int:
    """Column of the last place where `key` stands as JSON string, else 1."""
    return max(text.rfind(json.dumps(key)), text.rfind(json.dumps(key, ensure_ascii=False)), 0) + 1
