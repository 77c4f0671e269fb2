"""Where a JSON or CSV file is wrong that the `datasets` library could not read: its own words name no line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from truthgpt.data.compressed_file import ArchiveError, is_compressed, open_binary
from truthgpt.data.file_identity import READ_BYTES
from truthgpt.data.jsonl_source import parse_row
from truthgpt.data.rows import EXCERPT_CHARACTERS, BadRow, json_type
from truthgpt.data.text_source import UTF8_BOM

FIX = "correct the line, or give the rows as JSON Lines in data.path, where data.on_bad_row: skip leaves bad ones out"
MAX_CSV_FIELD_CHARACTERS = 2**31 - 1
"""The `csv` module refuses fields of more than 128 KiB until it is told otherwise; a document may well be longer."""
JSON_BLANKS = " \t\r\n"
_HEAD_BYTES = 4096
_decode = json.JSONDecoder(object_pairs_hook=lambda pairs: None).raw_decode
"""Value and end of the JSON that begins at an index; objects are None, so that an array of them takes no memory."""


class _Mistake(Exception):
    """What is wrong with a line; `text` is the line, `line` and `column` count from 1."""

    def __init__(self, reason: str, line: int, column: int, text: str) -> None:
        super().__init__(reason)
        self.line = line
        self.column = column
        self.text = text


def format_suffix(path: Path) -> str:
    """The ending that says what a file holds: of a compressed one that below `.gz` or `.zst`."""
    return Path(path.stem if is_compressed(path) else path.name).suffix


def is_json_lines(path: Path) -> bool:
    """Whether a file is one of JSON Lines: every `.jsonl`, and a `.json` unless it begins as a document does."""
    suffix = format_suffix(path)
    if suffix != ".json":
        return suffix == ".jsonl"
    try:
        return not _is_document(path)
    except (ArchiveError, OSError):
        return True  # the reader of JSON Lines says what is wrong with it


def find_mistake(path: Path, delimiter: str = ",") -> str | None:
    """The first mistake in a file of JSON or CSV: `file:line:column`, the reason, the start of the line and the fix;
    of any file what is wrong with the archive; None when nothing is.

    Args:
        path: the file, as messages call it; plain, .gz or .zst.
        delimiter: what stands between the fields of a CSV file.

    Raises:
        ConfigError: a `.zst` file and no package that reads it.
    """
    suffix = format_suffix(path)
    try:
        document = suffix in (".json", ".jsonl") and _is_document(path)
        with open_binary(path) as file:
            if document:
                _check_document(file)
            elif suffix in (".json", ".jsonl"):
                _check_json_lines(file)
            elif suffix in (".csv", ".tsv"):
                _check_csv(file, delimiter)
            while is_compressed(path) and file.read(READ_BYTES):
                pass
    except _Mistake as mistake:
        excerpt = mistake.text.strip()[:EXCERPT_CHARACTERS]
        return f"{path}:{mistake.line}:{mistake.column}: {mistake}: {excerpt!r}; {FIX}"
    except ArchiveError as error:
        return f"{path}: {error}; copy or download the file again"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}; check its permissions"
    return None


def _is_document(path: Path) -> bool:
    """Whether a file of JSON begins as an array, or as an object that takes several lines."""
    with open_binary(path) as file:
        for part in iter(partial(file.readline, _HEAD_BYTES), b""):
            line = part.removeprefix(UTF8_BOM).strip()
            if line:
                return line.startswith(b"[") or line == b"{"
    return False


def _decoded_lines(file: BinaryIO) -> Iterator[str]:
    """The lines with their ends, without a byte-order mark."""
    offset = 0
    for number, line in enumerate(file, 1):
        content = line.removeprefix(UTF8_BOM) if number == 1 else line
        start = offset + len(line) - len(content)
        offset += len(line)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            column = len(content[: error.start].decode("utf-8")) + 1
            reason = f"not UTF-8 at byte {start + error.start} of the file ({error.reason})"
            raise _Mistake(reason, number, column, content.decode("utf-8", errors="replace")) from error
        yield text


def _check_json_lines(file: BinaryIO) -> None:
    for number, text in enumerate(_decoded_lines(file), 1):
        if not text.strip():
            continue
        try:
            parse_row(text.encode())
        except BadRow as error:
            raise _Mistake(str(error), number, error.column, text) from error


def _check_document(file: BinaryIO) -> None:
    """An array by itself, or objects one after the other."""
    text = "".join(_decoded_lines(file))
    start = _skip(text, 0, JSON_BLANKS)
    array = text.startswith("[", start)
    try:
        while start < len(text):
            _, end = _decode(text, start)
            if array:
                _check_elements(text, start + 1)
            start = _skip(text, end, JSON_BLANKS)
            if array and start < len(text):
                raise _mistake_at(text, start, "not valid JSON: Extra data")
    except json.JSONDecodeError as error:
        raise _mistake_at(text, error.pos, f"not valid JSON: {error.msg}") from error
    except (RecursionError, ValueError):  # nested too deeply, a number of thousands of digits: Python tells no place
        return


def _check_elements(text: str, at: int) -> None:
    """Where the first element of a valid array is an object, all are; an array of strings is one of texts."""
    at = _skip(text, at, JSON_BLANKS)
    if not text.startswith("{", at):
        return
    while not text.startswith("]", at):
        element, end = _decode(text, at)
        if not text.startswith("{", at):
            raise _mistake_at(text, at, f"a row must be a JSON object, found {json_type(element)}")
        at = _skip(text, end, JSON_BLANKS + ",")


def _skip(text: str, at: int, characters: str) -> int:
    """Index of the first character from `at` on that is none of `characters`."""
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _mistake_at(text: str, at: int, reason: str) -> _Mistake:
    at = min(at, len(text.rstrip()))  # what is missing at the end is missing behind the last word
    start = text.rfind("\n", 0, at) + 1
    return _Mistake(reason, text.count("\n", 0, at) + 1, at - start + 1, text[start:].partition("\n")[0])


def _check_csv(file: BinaryIO, delimiter: str) -> None:
    """As `pandas` does: a row may have fewer fields than those above it, the first row also more than the header."""
    line = ""  # the first one of the row that is being read
    ended = False

    def lines() -> Iterator[str]:
        nonlocal line, ended
        for each in _decoded_lines(file):
            line = line or each
            yield each
        ended = True

    rows, width, number = 0, 0, 1
    limit = csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    try:
        reader = csv.reader(lines(), delimiter=delimiter)
        for fields in reader:
            if ended:  # the reader hands out a row at its last line, unless it still looks for a quotation mark
                raise _Mistake("the row has a quotation mark that is never closed", number, 1, line)
            rows += bool(fields)
            if rows > 2 and len(fields) > width:
                raise _Mistake(f"{len(fields)} fields, the rows above have {width}", number, 1, line)
            width = max(width, len(fields))
            line, number = "", reader.line_num + 1
    except csv.Error:  # a lone carriage return between fields: `pandas` allows it
        return
    finally:
        csv.field_size_limit(limit)
