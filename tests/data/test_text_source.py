from __future__ import annotations

import bz2
import gzip
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.stream_contract import check_cursors
from truthgpt.data.base import IdentifiedSource, StreamSource
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


@pytest.mark.parametrize(
    ("data", "fix"),
    [
        ("né".encode("utf-16"), "iconv -f UTF-16 -t UTF-8$"),
        ("né".encode("latin-1"), "iconv -f ISO-8859-1 -t UTF-8$"),
        (gzip.compress(b"text"), "the file is compressed, and only JSON Lines are read so: unpack it$"),
        (bz2.compress(b"text"), "the file is compressed"),
        (zstandard.ZstdCompressor().compress(b"text"), "the file is compressed"),
    ],
    ids=["UTF-16", "Latin-1", "gzip", "bzip2", "Zstandard"],
)
def test_what_to_do_about_a_file_that_is_not_utf8(tmp_path: Path, data: bytes, fix: str) -> None:
    with pytest.raises(DataError, match=f"not UTF-8 at byte .*; .*{fix}"):
        list(TextSource([write(tmp_path / "a.txt", data)]).documents())


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


def test_files_are_shards(tmp_path: Path) -> None:
    for name, text in (("a.txt", "one\n"), ("b.txt", " \n"), ("c.txt", "two")):
        write(tmp_path / name, text.encode())
    source = TextSource([str(tmp_path)])
    assert isinstance(source, StreamSource)
    assert isinstance(source, IdentifiedSource)
    assert [Path(name).name for name in source.shards()] == ["a.txt", "b.txt", "c.txt"]
    check_cursors(source, list(source.documents()))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.sampled_from(["", " ", "é" * 200, "x" * 900, "\0", "text"]), min_size=1, max_size=60),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
)
def test_a_lone_file_can_be_entered_behind_any_piece(tmp_path: Path, lines: list[str], end: str, mark: bool) -> None:
    source = TextSource([write(tmp_path / "a.txt", b"\xef\xbb\xbf" * mark + end.join([*lines, "z"]).encode())])
    documents = list(source.documents())
    check_cursors(source, documents)
    assert [document.continues for document in documents] == [d.key != "a.txt#0" for d in documents]


def test_a_piece_is_entered_by_seeking(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xff\n" + b"line\n" * 10_000)
    with pytest.raises(DataError, match="not UTF-8 at byte 0"):
        next(TextSource([path]).read(0))
    document, _ = next(TextSource([path]).read(0, (2 + 5 * 9000, 90)))
    assert (document.key, document.where) == ("a.txt#90", f"{path} (byte 45002)")


@pytest.mark.parametrize("files", [1, 2])
def test_memory_stays_below_four_times_the_longest_document(tmp_path: Path, files: int) -> None:
    size = 8 << 20
    for index in range(files):
        write(tmp_path / f"{index}.txt", b"a" * size)
    tracemalloc.start()
    lengths = [len(document.text) for document in TextSource([str(tmp_path)]).documents()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [size] * files
    assert peak < 4 * size


def test_identity_and_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one")
    first = TextSource([path])
    assert (first.identity(), first.fingerprint()) == (TextSource([path]).identity(), TextSource([path]).fingerprint())
    before = first.identity(), first.fingerprint()
    write(tmp_path / "a.txt", b"two")
    assert first.fingerprint() != before[1]
    write(tmp_path / "a.txt", b"three")
    assert first.identity() != before[0]
