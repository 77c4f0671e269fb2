"""Whether files are the same: by place and time, or by content; large ones by samples."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from truthgpt.data import file_identity
from truthgpt.data.file_identity import content_fingerprint, stat_identity
from truthgpt.errors import DataError


def write(folder: Path, **contents: bytes) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


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
