"""How an entry of the cache is made: by one process, and whole."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from truthgpt.errors import RunDirectoryError

logger = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def exclusive_maker(folder: Path, task: str) -> Iterator[None]:
    """One process at a time in the body: the others wait until it has made the cache entry `folder`, or is dead.

    The lock is the kernel's and goes with the process that holds it. First clears away what killed processes left.

    Args:
        folder: the entry, which the body makes with `new_folder` if it is still missing.
        task: what the other process does, to tell a user why this one waits.

    Raises:
        RunDirectoryError: the cache cannot be written.
    """
    lock = _lock_path(folder)
    with cache_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_leftovers(folder.parent)
        descriptor = _take_or_wait(lock, task)
    try:
        yield
    finally:
        _release(lock, descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it when the body is done and removed when it fails.

    What is in the way under that name is a damaged entry and is removed, or whole where file locks do not work.

    Raises:
        RunDirectoryError: the cache cannot be written.
    """
    with cache_errors(folder):
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        yield temporary
        with cache_errors(folder):
            if folder.is_dir():
                shutil.rmtree(folder)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError of the body into a RunDirectoryError that names the cache entry `folder` and the way out."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"cache {folder}: {error.strerror or error}; free some space, or set TRUTHGPT_CACHE_DIR to a folder that "
            "can be written"
        ) from error


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it. OSError when the disk is full."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _take_or_wait(lock: Path, task: str) -> int | None:
    """Descriptor of the lock; None on a file system that has no locks."""
    try:
        descriptor = _take(lock, wait=False)
        if descriptor is None:
            logger.info("another process is %s; waiting for it", task)
            descriptor = _take(lock, wait=True)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): two processes may do the same work", lock, error.strerror)
        return None
    return descriptor


def _take(lock: Path, *, wait: bool) -> int | None:
    """Descriptor of the lock; None when somebody else has it and `wait` is false."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Whoever had the lock before has deleted its file: then this one is nobody's.
            if os.path.samestat(lock.stat(), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(lock: Path, descriptor: int | None) -> None:
    if descriptor is None:
        return
    lock.unlink(missing_ok=True)
    # A process forked meanwhile has the descriptor too, and closing one of two would not let go.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _remove_leftovers(parent: Path) -> None:
    """Remove temporary folders that nobody holds the lock of: their makers were killed."""
    for name in {path.name.split(".")[1] for path in parent.glob(".*.*")}:
        folder = parent / name
        with suppress(OSError):  # no locks here, or not ours to delete
            descriptor = _take(_lock_path(folder), wait=False)
            if descriptor is not None:
                for leftover in parent.glob(f".{name}.tmp-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                _release(_lock_path(folder), descriptor)
