"""Whether files are the same: by place and time, or by content; large ones by samples."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from truthgpt.data import file_identity
from truthgpt.data.file_identity import content_fingerprint, is_recent, stat_identity
from truthgpt.errors import DataError


def write(folder: Path, **contents: bytes) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def age(files: list[Path], seconds: float) -> None:
    for file in files:
        os.utime(file, (time.time() - seconds,) * 2)


def test_identity_is_place_size_and_time(tmp_path: Path) -> None:
    files = write(tmp_path, a=b"one", b=b"two")
    before = stat_identity(files)
    assert stat_identity(files) == before
    assert stat_identity(files[::-1]) != before
    os.utime(files[0], ns=(1, 1))
    assert stat_identity(files) != before


def test_fingerprint_is_name_and_content_not_time_nor_folder(tmp_path: Path) -> None:
    files = write(tmp_path / "here", a=b"one", b=b"two")
    before = content_fingerprint(files)
    os.utime(files[0], ns=(1, 1))
    assert content_fingerprint(files) == before
    assert content_fingerprint(write(tmp_path / "there", a=b"one", b=b"two")) == before
    assert content_fingerprint(files[::-1]) != before
    assert content_fingerprint(files, "other settings") != before
    assert content_fingerprint(write(tmp_path / "here", a=b"onE", b=b"two")) != before
    assert content_fingerprint(write(tmp_path / "other", a=b"one", c=b"two")) != before


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is opened from now on."""
    opened: list[Path] = []
    real = Path.open

    def counted(path: Path, mode: str) -> object:
        opened.append(path)
        return real(path, mode)

    monkeypatch.setattr(Path, "open", counted)
    return opened


def test_files_are_read_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path, a=b"one", b=b"two")
    age(files, 60)
    opened = count_reads(monkeypatch)
    before = [content_fingerprint(files) for _ in range(3)]
    assert opened == files and len(set(before)) == 1
    assert content_fingerprint(files, "other settings") != before[0]
    assert content_fingerprint(files[::-1]) != before[0]
    files[0].write_bytes(b"onE")
    age(files[:1], 50)
    assert content_fingerprint(files) != before[0]


def test_file_that_changed_just_now_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s)  # it stays just now, however long the test takes
    files = write(tmp_path, a=b"one")
    now_ns = int(now_s * 1e9)
    os.utime(files[0], ns=(now_ns, now_ns))
    before = content_fingerprint(files)
    files[0].write_bytes(b"onE")
    os.utime(files[0], ns=(now_ns, now_ns))  # within one step of a coarse clock
    assert content_fingerprint(files) != before


@pytest.mark.parametrize(("seconds", "recent"), [(-3600, True), (0, True), (1, True), (4, False)])
def test_recent_times_are_found_in_an_identity(
    tmp_path: Path, seconds: float, recent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s)
    files = write(tmp_path, a=b"one", b=b"two")
    age(files[:1], 60)
    age(files[1:], seconds)
    assert is_recent(f"settings {stat_identity(files)}", time.time()) is recent


def test_bytes_do_not_run_from_one_file_into_the_next(tmp_path: Path) -> None:
    first = content_fingerprint(write(tmp_path, a=b"12", b=b"3"))
    assert content_fingerprint(write(tmp_path, a=b"1", b=b"23")) != first


def test_large_files_are_sampled_first_and_last_block_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_identity, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(file_identity, "SAMPLED_BLOCKS", 4)
    monkeypatch.setattr(file_identity, "BLOCK_BYTES", 16)
    content = bytearray(range(250)) * 8
    (file,) = write(tmp_path, big=bytes(content))
    before = content_fingerprint([file])
    seen = []
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        seen.append(content_fingerprint([file]) != before)
    assert sum(seen) == 4 * 16 and all(seen[:16]) and all(seen[-16:])
    file.write_bytes(bytes(content) + b"x")
    assert content_fingerprint([file]) != before


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    for look in (stat_identity, content_fingerprint):
        with pytest.raises(DataError, match=r"gone: cannot be read: No such file"):
            look([tmp_path / "gone"])
