"""Atomic files: old or new content, nothing left behind, full disks named, links never followed."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truthgpt.errors import RunDirectoryError
from truthgpt.runtime.atomic_file import (
    HashingWriter,
    append_line,
    commit_file,
    copy_atomic,
    create_exclusive,
    link_atomic,
    remove_temporaries,
    sha256_of,
    temporary_beside,
    write_atomic,
)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_text_and_bytes_are_written_whole(tmp_path: Path) -> None:
    for content, expected in (("añ\n", "añ\n".encode()), (b"\0\xff", b"\0\xff")):
        write_atomic(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == expected
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_content_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_atomic(tmp_path / "f", "old")
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(RunDirectoryError, match=r"f: No space left on device \(.* free, about .*\(3 bytes\) needed\)"):
        write_atomic(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_is_not_writable_is_a_run_directory_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "open", failing(code))
    with pytest.raises(RunDirectoryError, match=rf"f: {os.strerror(code)}; choose an output_dir") as error:
        write_atomic(tmp_path / "f", "x")
    assert error.value.exit_code == 6


def test_a_symbolic_link_in_the_place_of_a_temporary_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    temporary_beside(tmp_path / "f").symlink_to(victim)
    write_atomic(tmp_path / "f", "new")
    assert victim.read_text() == "precious"
    assert (tmp_path / "f").read_text() == "new" and not (tmp_path / "f").is_symlink()


def test_the_temporary_of_this_process_is_told_from_another_s(tmp_path: Path) -> None:
    name = temporary_beside(tmp_path / "f.pt").name
    assert name.startswith(".f.pt.tmp-") and name.endswith(f"-{os.getpid()}")


def test_only_temporaries_are_removed(tmp_path: Path) -> None:
    kept = ["f", ".f", "f.tmp-host-1", ".f.tmp-host", ".hidden"]
    for name in [*kept, ".f.tmp-host-1", ".step_1.pt.tmp-a-b-22"]:
        (tmp_path / name).write_text("")
    (tmp_path / ".l.tmp-host-2").symlink_to(tmp_path / "f")
    (tmp_path / ".d.tmp-host-3/inside").mkdir(parents=True)
    remove_temporaries(tmp_path)
    remove_temporaries(tmp_path / "missing")
    assert names(tmp_path) == sorted(kept)


def test_commit_of_a_second_link_of_the_target_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    (tmp_path / "t").hardlink_to(tmp_path / "f")
    commit_file(tmp_path / "t", tmp_path / "f")
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("refused", [(), ("link",), ("link", "symlink")])
def test_links_are_hard_else_symbolic_else_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...]
) -> None:
    for call in refused:
        monkeypatch.setattr(os, call, failing(errno.EPERM))
    (tmp_path / "a").write_text("A")
    (tmp_path / "b").write_text("B")
    for target in ("a", "b", "b"):
        link_atomic(tmp_path / target, tmp_path / "l")
    assert (tmp_path / "l").read_text() == "B"
    assert (tmp_path / "l").is_symlink() == (refused == ("link",))
    assert (tmp_path / "l").samefile(tmp_path / "b") == (len(refused) < 2)
    assert names(tmp_path) == ["a", "b", "l"]


def test_a_failed_link_or_copy_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("A")
    (tmp_path / "l").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", failing(errno.ENOSPC))
        with pytest.raises(RunDirectoryError, match="No space"):
            link_atomic(tmp_path / "a", tmp_path / "l")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(RunDirectoryError, match="Input/output"):
        copy_atomic(tmp_path / "a", tmp_path / "l")
    assert (tmp_path / "l").read_text() == "old"
    assert names(tmp_path) == ["a", "l"]


def test_lines_are_appended_and_folders_made(tmp_path: Path) -> None:
    for line in ("one", "zwei ü", "lone \ud800"):
        append_line(tmp_path / "new" / "log", line)
    assert (tmp_path / "new" / "log").read_text() == "one\nzwei ü\nlone \\ud800\n"


def test_a_line_that_does_not_fit_leaves_no_piece_of_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    append_line(log, "x" * 50)
    child = os.fork()
    if not child:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            append_line(log, "y" * 200)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
    append_line(log, "z")
    assert log.read_text() == "x" * 50 + "\nz\n"


def test_the_hashing_writer_counts_hashes_and_remembers_its_error(tmp_path: Path) -> None:
    with create_exclusive(tmp_path / "f") as file:
        writer = HashingWriter(file)
        for piece in (b"abc", memoryview(b"def"), b""):
            writer.write(piece)
    assert writer.size_bytes == 6
    assert writer.sha256 == sha256_of(tmp_path / "f") == hashlib.sha256(b"abcdef").hexdigest()

    class Broken(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "full")

    writer = HashingWriter(Broken())
    with pytest.raises(OSError, match="full"):
        writer.write(b"x")
    assert writer.error is not None and writer.size_bytes == 0
