from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.data.base import Document
from truthgpt.data.jsonl_source import BadRowPolicy, JsonlSource, RowFields, parse_row
from truthgpt.errors import DataError


def source(
    path: Path,
    format: Literal["text", "prompt_completion"] = "text",
    train_on: Literal["all", "completion"] = "all",
    on_bad_row: Literal["error", "skip"] = "error",
    max_bad_fraction: float = 0.5,
) -> JsonlSource:
    fields = RowFields(format, "text", "prompt", "completion", train_on)
    return JsonlSource([str(path)], fields, BadRowPolicy(on_bad_row, max_bad_fraction))


def read(path: Path, data: bytes | str) -> list[Document]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(source(path).documents())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_texts_blank_lines_and_no_final_newline(file: Path) -> None:
    documents = read(file, '{"text": "a"}\n\n  \n{"text": "b\\n\\u0000", "other": null}')
    assert [(d.text, d.where, d.continues) for d in documents] == [
        ("a", f"{file}:1", False),
        ("b\n\0", f"{file}:4", False),
    ]


def test_byte_order_mark_and_crlf_change_nothing(file: Path) -> None:
    plain = read(file, '{"text": "a"}\n{"text": "b"}\n')
    windows = read(file, b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert windows == plain


def test_key_is_the_content_not_the_place(file: Path) -> None:
    first = read(file, '{"text": "a"}\n{"text": "b"}\n{"text": "a"}')
    second = read(file, '\n{"text": "b", "id": 7}\n{"text": "a"}')
    assert [d.key for d in first] == [second[1].key, second[0].key, second[1].key]
    assert first[0].key != first[1].key


@pytest.mark.parametrize(("train_on", "prompt_trained"), [("all", True), ("completion", False)])
def test_prompt_and_completion(file: Path, train_on: Literal["all", "completion"], prompt_trained: bool) -> None:
    file.write_text('{"prompt": "", "completion": "x"}\n{"completion": " four", "prompt": "2+2="}')
    documents = list(source(file, "prompt_completion", train_on).documents())
    assert [[(s.text, s.trained) for s in d.segments] for d in documents] == [
        [("", prompt_trained), ("x", True)],
        [("2+2=", prompt_trained), (" four", True)],
    ]


BAD_LINES = [
    ('{"text": "a" "b"}', 14, "not valid JSON: Expecting ',' delimiter"),
    ('{"text": "a"} trailing', 15, "not valid JSON: Extra data"),
    ('{"text": "cut o', 10, "not valid JSON: Unterminated string"),
    ('{"text": "a", "text": "b"}', 15, "the key 'text' stands twice"),
    ('{"text": "a", "in": {"k": 1, "k": 2}}', 30, "the key 'k' stands twice"),
    ('["text"]', 1, "a row must be a JSON object, found a list"),
    ("17", 1, "a row must be a JSON object, found a number"),
    ('{"body": "a", "id": 1}', 1, r"no field 'text', the row has 'body', 'id' \(set data.text_field\)"),
    ("{}", 1, "no field 'text', the row has none"),
    ('{"id": 1, "text": null}', 11, "field 'text' must be a string, found null"),
    ('{"text": 3.5}', 2, "field 'text' must be a string, found a number"),
    ('{"text": true}', 2, "field 'text' must be a string, found a boolean"),
    ('{"text": ["a"]}', 2, "field 'text' must be a string, found a list"),
    ('{"text": {"a": 1}}', 2, "field 'text' must be a string, found an object"),
    ("[" * 200_000, 1, "nested too deeply"),
    ('{"text": "a", "n": ' + "9" * 5000 + "}", 1, "not readable JSON"),
]


@pytest.mark.parametrize(("line", "column", "reason"), BAD_LINES, ids=[reason[-30:] for _, _, reason in BAD_LINES])
def test_bad_row_names_file_line_column_and_an_excerpt(file: Path, line: str, column: int, reason: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:3:{column}: {reason}.*on_bad_row: skip") as error:
        read(file, '{"text": "fine"}\n\n' + line + "\n")
    assert repr(line[:60]) in str(error.value)
    assert len(str(error.value)) < 500


def test_invalid_utf8_names_byte_and_column(file: Path) -> None:
    first = '{"text": "é"}\n'.encode()
    with pytest.raises(DataError, match=rf"rows\.jsonl:2:12: not UTF-8 at byte {len(first) + 12} of the file"):
        read(file, first + '{"text": "é'.encode() + b'\xff"}')


def test_skip_counts_and_says_it_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text('{"text": "a"}\n{"text": 1}\n{"text": "  "}\nnonsense\n{"text": "b"}\n')
    rows = source(file, on_bad_row="skip")
    with caplog.at_level(logging.INFO):
        assert [d.text for d in rows.documents()] == ["a", "b"]
        assert [d.text for d in rows.documents()] == ["a", "b"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "skipped 2 malformed of 5 rows; the first:" in caplog.messages[0]
    assert "rows.jsonl:2:2: field 'text' must be a string" in caplog.messages[0]
    assert "left out 1 of 5 rows without text" in caplog.messages[1]


def test_skip_has_a_limit(file: Path) -> None:
    file.write_text('{"text": "a"}\n' * 9 + "nonsense\n")
    assert len(list(source(file, on_bad_row="skip", max_bad_fraction=0.1).documents())) == 9
    with pytest.raises(DataError, match=r"1 of 10 rows are malformed, more than data.max_bad_fraction 0.09"):
        list(source(file, on_bad_row="skip", max_bad_fraction=0.09).documents())


@pytest.mark.parametrize("data", ["", "\n \n", '{"text": ""}\n{"text": " \\n"}'])
def test_no_usable_row(file: Path, data: str) -> None:
    with pytest.raises(DataError, match=r"0 usable documents in .*rows\.jsonl"):
        read(file, data)


def test_unpaired_surrogate_is_kept_as_replacement_and_said(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    (document,) = read(file, '{"text": "a\\ud83d \\ud83d\\ude00"}')
    assert document.text == "a\ufffd \U0001f600"
    assert "unpaired surrogates in 1 texts" in caplog.text


@given(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(), max_size=4))
def test_any_object_comes_back(row: dict[str, object]) -> None:
    assert parse_row(json.dumps(row).encode()) == row


@given(st.binary(max_size=40))
def test_any_bytes_are_a_row_or_a_value_error(line: bytes) -> None:
    try:
        assert isinstance(parse_row(line), dict)
    except ValueError as error:
        assert 1 <= error.column <= len(line) + 2  # type: ignore[attr-defined]
