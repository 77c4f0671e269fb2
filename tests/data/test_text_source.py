from __future__ import annotations

from pathlib import Path

import pytest

from truthgpt.data.text_source import MAX_PIECE_BYTES, TextSource
from truthgpt.errors import DataError


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_a_file_is_a_document_when_there_are_several(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", b"two\n" * 1000)
    write(tmp_path / "a.txt", b"one")
    write(tmp_path / "blank.txt", b" \n\n")
    documents = list(TextSource([str(tmp_path)]).documents())
    assert [(d.key, d.text, d.continues) for d in documents] == [
        ("a.txt", "one", False),
        ("b.txt", "two\n" * 1000, False),
    ]


@pytest.mark.parametrize(("size", "low", "high"), [(5_000, 15, 21), (20_000, 60, 101), (1_000_000, 90, 101)])
def test_a_lone_file_is_cut_into_whole_lines_that_join_again(tmp_path: Path, size: int, low: int, high: int) -> None:
    text = "".join(f"line {index} é\n" for index in range(size // 12))
    documents = list(TextSource([write(tmp_path / "a.txt", text.encode())]).documents())
    assert "".join(document.text for document in documents) == text
    assert all(document.text.endswith("\n") for document in documents)
    assert [document.continues for document in documents] == [False] + [True] * (len(documents) - 1)
    assert len({document.key for document in documents}) == len(documents)
    assert low <= len(documents) <= high


def test_pieces_of_a_big_file_stay_small(tmp_path: Path) -> None:
    line = b"x" * 99 + b"\n"
    documents = list(TextSource([write(tmp_path / "a.txt", line * 100_000)]).documents())
    assert max(len(document.text) for document in documents) <= MAX_PIECE_BYTES + len(line)


def test_one_long_line_is_one_document(tmp_path: Path) -> None:
    documents = list(TextSource([write(tmp_path / "a.txt", b"word " * 100_000)]).documents())
    assert [len(document.text) for document in documents] == [500_000]


def test_crlf_and_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    lines = [f"row {index}" for index in range(500)]
    plain = TextSource([write(tmp_path / "a.txt", "\n".join(lines).encode())])
    windows = TextSource([write(tmp_path / "b.txt", b"\xef\xbb\xbf" + "\r\n".join(lines).encode())])
    assert "".join(d.text for d in windows.documents()) == "".join(d.text for d in plain.documents())


def test_nul_and_missing_last_newline_are_kept(tmp_path: Path) -> None:
    (document,) = TextSource([write(tmp_path / "a.txt", b"a\0b\rc")]).documents()
    assert document.text == "a\0b\rc"


@pytest.mark.parametrize("other", [None, b"fine"])
def test_invalid_utf8_names_the_byte(tmp_path: Path, other: bytes | None) -> None:
    bad = write(tmp_path / "bad.txt", "good é\r\n".encode() * 1000 + b"\xff\n")
    if other is not None:
        write(tmp_path / "also.txt", other)
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 at byte 9000 \(0xff"):
        list(TextSource([str(tmp_path) if other else bad]).documents())


@pytest.mark.parametrize("data", [b"", b"\n\n \n", b"\xef\xbb\xbf"])
def test_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path / "a.txt", data)
    with pytest.raises(DataError, match=r"0 usable documents in .*a\.txt"):
        list(TextSource([path]).documents())


def test_unreadable_file(tmp_path: Path) -> None:
    source = TextSource([write(tmp_path / "a.txt", b"text")])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        list(source.documents())
