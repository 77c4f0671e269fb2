"""Entries of the cache are made by one process, whole, whoever is killed meanwhile."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from truthgpt.data.cache_entry import cache_errors, exclusive_maker, new_folder, write_synced
from truthgpt.errors import RunDirectoryError

MADE = b"made"


def make(folder: Path, go: Path | None = None) -> bool:
    """Make the entry `folder` unless it is there; half way, wait for the file `go`. Whether this call made it."""
    with exclusive_maker(folder, "making it"):
        if (folder / "file").exists():
            return False
        with new_folder(folder) as temporary:
            write_synced(temporary / "half", MADE)
            while go is not None and not go.exists():
                time.sleep(0.01)
            (temporary / "half").rename(temporary / "file")
        return True


def make_and_log(folder: Path, go: Path, log: Path) -> None:
    logging.basicConfig(filename=log, level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("truthgpt").info("made: %s", make(folder, go))


def start(*arguments: Path) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=make_and_log, args=arguments, daemon=True)
    process.start()
    return process


def await_(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started_half(folder: Path, go: Path, log: Path) -> multiprocessing.process.BaseProcess:
    """A process that has made half of the entry."""
    process = start(folder, go, log)
    await_(lambda: list(folder.parent.glob(f".{folder.name}.tmp-*/half")))
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_entry_is_made_once_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "kind" / "0a"
    assert [make(folder), make(folder)] == [True, False]
    assert (folder / "file").read_bytes() == MADE
    assert names(folder.parent) == ["0a"] and names(folder) == ["file"]


def test_nobody_sees_half_an_entry(tmp_path: Path) -> None:
    folder = tmp_path / "0a"
    with exclusive_maker(folder, "making it"), new_folder(folder) as temporary:
        assert not folder.exists() and temporary.parent == tmp_path
    assert folder.is_dir()


def test_what_is_in_the_way_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "0a"
    folder.mkdir()
    (folder / "damaged").touch()
    assert make(folder)
    assert names(folder) == ["file"]


def test_failed_maker_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "0a"
    with pytest.raises(KeyError), exclusive_maker(folder, "making it"), new_folder(folder) as temporary:
        write_synced(temporary / "file", MADE)
        raise KeyError
    assert names(tmp_path) == []


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_process_waits_and_takes_over_from_a_killed_one(tmp_path: Path, killed: bool) -> None:
    folder, go, log = tmp_path / "kind" / "0a", tmp_path / "go", tmp_path / "second"
    first = started_half(folder, go, tmp_path / "first")
    second = start(folder, go, log)
    await_(lambda: log.exists() and "another process is making it; waiting for it" in log.read_text())
    if killed:
        first.kill()
        first.join()
    go.touch()
    first.join()
    second.join()
    assert second.exitcode == 0
    assert f"made: {killed}" in log.read_text()
    assert (folder / "file").read_bytes() == MADE


def test_a_third_finds_the_lock_of_the_one_that_waited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first deletes the lock's file when it is done: what the second then holds must be there for others to see."""
    caplog.set_level(logging.INFO)
    folder, entered, go = tmp_path / "0a", threading.Event(), threading.Event()

    def second() -> None:
        with exclusive_maker(folder, "making it"):
            entered.set()
            go.wait(60)

    waiting = threading.Thread(target=second, daemon=True)
    with exclusive_maker(folder, "making it"):
        waiting.start()
        await_(lambda: "waiting for it" in caplog.text)
        assert not entered.is_set()
    assert entered.wait(60)
    assert names(tmp_path) == [".0a.lock"]
    go.set()
    waiting.join()
    assert names(tmp_path) == []


def test_leftovers_of_killed_makers_are_removed_and_nobody_elses(tmp_path: Path) -> None:
    go = tmp_path / "go"
    cache = tmp_path / "kind"
    killed = started_half(cache / "0a", go, tmp_path / "1")
    killed.kill()
    killed.join()
    working = started_half(cache / "0b", go, tmp_path / "2")
    assert not list(cache.glob(".0a.*"))  # the next maker cleared up
    assert make(cache / "0c")
    assert len(list(cache.glob(".0b.*"))) == 2  # half an entry and its lock
    go.touch()
    working.join()
    assert make(cache / "0a")
    assert names(cache) == ["0a", "0b", "0c"]


def test_cache_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    other = tmp_path / ".0b.tmp-xyz"
    other.mkdir()
    folder = tmp_path / "0a"
    assert make(folder)
    assert (folder / "file").read_bytes() == MADE
    assert "No locks available): two processes may do the same work" in caplog.text
    assert other.exists()  # nobody knows whether its maker lives


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "kind").write_text("a file")
    with pytest.raises(RunDirectoryError, match=r"cache .*kind/0a: .*; free some space, or set TRUTHGPT_CACHE_DIR"):
        make(tmp_path / "kind" / "0a")


def test_full_disk() -> None:
    with (
        pytest.raises(RunDirectoryError, match=r"cache entry: No space left on device; free some space"),
        cache_errors(Path("entry")),
    ):
        write_synced(Path("/dev/full"), MADE)
