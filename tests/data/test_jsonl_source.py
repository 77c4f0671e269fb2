from __future__ import annotations

import gzip
import json
import logging
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.stream_contract import check_cursors, read_shards
from truthgpt.data import jsonl_source
from truthgpt.data.base import Document, IdentifiedSource, StreamSource
from truthgpt.data.jsonl_source import JsonlSource, parse_row
from truthgpt.data.rows import BadRow, BadRowPolicy, RowFields
from truthgpt.errors import ConfigError, DataError


def source(
    path: Path,
    format: Literal["text", "prompt_completion", "chat"] = "text",
    train_on: Literal["all", "completion", "assistant"] = "all",
    on_bad_row: Literal["error", "skip"] = "error",
    max_bad_fraction: float = 0.5,
) -> JsonlSource:
    fields = RowFields(format, "text", "prompt", "completion", "messages", train_on)
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


def test_a_byte_order_mark_in_the_middle_is_no_json(file: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2:1: not valid JSON"):
        read(file, b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')


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
    ('{"q": "a", "a": "b"}', 1, r"no field .*\(set data.text_field, or data.format: prompt_completion\)"),
    ('{"messages": []}', 1, r"no field .*\(set data.text_field, or data.format: chat\)"),
    ("{}", 1, "no field 'text', the row has none"),
    ('{"id": 1, "text": null}', 11, "field 'text' must be a string, found null"),
    ('{"text": 3.5}', 2, "field 'text' must be a string, found a number"),
    ('{"text": true}', 2, "field 'text' must be a string, found a boolean"),
    ('{"text": ["a"]}', 2, "field 'text' must be a string, found a list"),
    ('{"text": {"a": 1}}', 2, "field 'text' must be a string, found an object"),
    ('{"text": "a\x00b"}', 12, "not valid JSON: Invalid control character"),
    ("[" * 200_000, 1, "nested too deeply"),
    ('{"text": "a", "n": ' + "9" * 5000 + "}", 1, "not readable JSON"),
]


@pytest.mark.parametrize(("line", "column", "reason"), BAD_LINES, ids=[reason[-30:] for _, _, reason in BAD_LINES])
def test_bad_row_names_file_line_column_and_an_excerpt(file: Path, line: str, column: int, reason: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:3:{column}: {reason}.*on_bad_row: skip") as error:
        read(file, '{"text": "fine"}\n\n' + line + "\n")
    assert repr(line[:60]) in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(("name", "what"), [("rows.csv", "a .csv file"), ("rows.json", "a JSON array")])
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_text(' [{"text": "a"}]')
    with pytest.raises(DataError, match=rf"{name}: {what}, and jsonl reads JSON Lines; set data.source: hf"):
        source(tmp_path / name)


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
def test_any_bytes_are_a_row_or_a_bad_row(line: bytes) -> None:
    try:
        assert isinstance(parse_row(line), dict)
    except BadRow as error:
        assert 1 <= error.column <= len(line) + 2


def test_chat_rows(file: Path) -> None:
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    (document,) = source(file, "chat", "assistant").documents()
    assert document.conversation is not None
    assert [message["role"] for message in document.conversation.messages] == ["user", "assistant"]
    assert document.conversation.trained == "assistant"


def test_bad_chat_row_names_the_column_of_its_field(file: Path) -> None:
    file.write_text('{"id": 1, "messages": [{"role": "user"}]}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1:11: messages\[0\] has no 'content', only 'role'"):
        list(source(file, "chat").documents())


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_read_as_plain_ones(tmp_path: Path, suffix: str) -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}'
    path = tmp_path / f"rows{suffix}"
    assert [(d.text, d.where) for d in read(path, PACKERS[suffix](data))] == [("a", f"{path}:1"), ("b", f"{path}:3")]
    with pytest.raises(DataError, match=rf"rows{suffix}:3:9: not valid JSON"):
        read(path, PACKERS[suffix](b'{"text": "a"}\n\n{"text" "b"}'))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_archives_of_several_parts(tmp_path: Path, suffix: str) -> None:
    parts = [PACKERS[suffix](f'{{"text": "{index}"}}\n'.encode()) for index in range(3)]
    assert [d.text for d in read(tmp_path / f"rows{suffix}", b"".join(parts))] == ["0", "1", "2"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [0.999, 0.5, 0.1])
def test_truncated_archive_is_named(tmp_path: Path, suffix: str, kept: float) -> None:
    rows = "".join(json.dumps({"text": f"row {index * 7919 % 10007}"}) + "\n" for index in range(20_000)).encode()
    packed = PACKERS[suffix](rows)
    with pytest.raises(DataError, match=rf"rows{suffix}: the archive ends early \(after line \d+\); copy or download"):
        read(tmp_path / f"rows{suffix}", packed[: int(len(packed) * kept)])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_damaged_archive_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=rf"rows{suffix}: the archive is damaged: "):
        read(tmp_path / f"rows{suffix}", b'{"text": "this is no archive"}\n')


def test_zst_with_a_long_window(tmp_path: Path) -> None:
    """As `zstd --long=31` packs large dumps; on its own the library reads windows of 128 MiB only."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = stream.compress(b'{"text": "a"}\n{"text": "b"}\n') + stream.flush()
    assert [document.text for document in read(tmp_path / "rows.jsonl.zst", packed)] == ["a", "b"]


def test_zst_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"needs the package zstandard \(pip install 'truthgpt\[zstd\]'\)"):
        read(tmp_path / "rows.jsonl.zst", PACKERS[".jsonl.zst"](b'{"text": "a"}'))


def write_folder(folder: Path, rows: int) -> None:
    for name, suffix in (("a", ".jsonl"), ("b", ".jsonl.gz"), ("sub/c", ".jsonl.zst")):
        lines = [json.dumps({"text": f"{name} {index} é"}, ensure_ascii=index % 2 == 0) for index in range(rows)]
        path = folder / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PACKERS[suffix]("\n \r\n".join(lines).encode()))
    (folder / "notes.txt").write_text("not rows")


def test_folder_is_a_stream_of_files(tmp_path: Path) -> None:
    write_folder(tmp_path, 5)
    rows = source(tmp_path)
    assert isinstance(rows, StreamSource)
    assert isinstance(rows, IdentifiedSource)
    assert [Path(name).name for name in rows.shards()] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    documents = list(rows.documents())
    assert len(documents) == 15
    check_cursors(rows, documents)
    assert list(source(tmp_path / "*.jsonl*").documents()) == documents[:10]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.sampled_from(["", " \t", "{}", '{"text": 1}', "no", '{"text": ""}', '{"text": "é"}', '{"text": "\\ud83d"}'])
        | st.text(max_size=4).map(lambda text: json.dumps({"text": text})),
        max_size=12,
    ),
    end=st.sampled_from(["\n", "\r\n"]),
    suffix=st.sampled_from(sorted(PACKERS)),
    mark=st.booleans(),
)
def test_reading_from_any_cursor_gives_the_rest(
    tmp_path: Path, lines: list[str], end: str, suffix: str, mark: bool
) -> None:
    path = tmp_path / f"rows{suffix}"
    content = b"\xef\xbb\xbf" * mark + end.join([*lines, '{"text": "last"}']).encode()
    path.write_bytes(PACKERS[suffix](content))
    rows = source(path, on_bad_row="skip", max_bad_fraction=1.0)
    check_cursors(rows, list(rows.documents()))


def test_an_error_behind_a_cursor_has_the_right_line(file: Path) -> None:
    file.write_bytes('{"text": "é"}\n\n{"text": "b"}\n{"text": 3}\n{"text": "\xff"}\n'.encode("latin-1"))
    file.write_bytes(file.read_bytes().replace(b"\xe9", "é".encode()))
    rows = source(file, on_bad_row="error")
    _, cursor = next(iter(rows.read(0)))
    rest = rows.read(0, cursor)
    assert next(rest)[0].where == f"{file}:3"
    with pytest.raises(DataError, match=r"rows\.jsonl:4:2: field 'text' must be a string, found a number"):
        next(rest)
    byte = file.read_bytes().index(b"\xff")
    skipping = source(file, on_bad_row="skip").read(0, cursor)
    with pytest.raises(DataError, match=rf"rows\.jsonl:5:11: not UTF-8 at byte {byte} of the file"):
        list(source(file).read(0, (file.read_bytes().index(b'{"text": "\xff'), 4)))
    assert [document.text for document, _ in skipping] == ["b"]


def test_a_plain_file_is_entered_by_seeking(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('{"text": "a"}\n' * 5000 + '{"text": "b"}\n')
    cursors = [cursor for _, cursor in source(file).read(0)]
    parsed = []
    monkeypatch.setattr(jsonl_source, "parse_row", lambda line, offset: parsed.append(offset) or json.loads(line))
    (document,) = (document for document, _ in source(file).read(0, cursors[-2]))
    assert document.text == "b"
    assert parsed == [5000 * 14]


def test_an_overlong_line_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_source, "MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"rows\.jsonl:2:1: the line is longer than 1 MiB"):
        read(file, '{"text": "a"}\n{"text": "' + "a" * (1 << 20) + '"}\n{"text": "b"}\n')


@pytest.mark.parametrize("suffix", PACKERS)
def test_memory_stays_below_four_times_the_longest_row(tmp_path: Path, suffix: str) -> None:
    size = 4 << 20
    text = random.Random(0).randbytes(size // 2).hex().encode()
    lines = b'{"text": "' + text + b'"}\n' + b'{"text": "b"}\n' * 10_000
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(PACKERS[suffix](lines))
    del lines, text
    tracemalloc.start()
    count = sum(1 for _ in source(path).documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_001
    assert peak < 4 * size


def test_identity_and_fingerprint(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_folder(tmp_path / folder, 3)
    one, two = source(tmp_path / "one"), source(tmp_path / "two")
    assert one.identity() == source(tmp_path / "one").identity()
    assert len({one.identity(), two.identity(), source(tmp_path / "one", "chat").identity()}) == 3
    assert one.fingerprint() == two.fingerprint()
    (tmp_path / "two/a.jsonl").write_text((tmp_path / "two/a.jsonl").read_text().replace("1", "2"))
    assert one.fingerprint() != two.fingerprint()


def test_unreadable_file(file: Path) -> None:
    file.write_text('{"text": "a"}\n')
    rows = source(file)
    file.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read: No such file"):
        read_shards(rows)
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read: No such file"):
        rows.identity()
