"""Files that are there whole or not at all: temporary beside the target, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from truthgpt.errors import RunDirectoryError

_TEMPORARY_NAME = re.compile(r"\..+\.tmp-[A-Za-z0-9-]+-\d+")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_MIB = 2**20


def temporary_beside(target: Path) -> Path:
    """Name of the temporary file for `target`: `.<name>.tmp-<host>-<pid>` in the same folder.

    Beside the target, because a rename is atomic only within one file system; host and pid, so that two processes
    that share the folder never write the same temporary.
    """
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname()) or "host"
    return target.with_name(f".{target.name}.tmp-{host}-{os.getpid()}")


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes left behind in `folder`; call it only while nobody else writes there.

    A folder that does not exist is fine. A symbolic link is removed, not followed.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if not _TEMPORARY_NAME.fullmatch(path.name):
            continue
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def create_exclusive(path: Path) -> BinaryIO:
    """A new file opened for writing; a leftover of the same name is removed, a symbolic link never followed.

    Raises:
        OSError: the file cannot be created.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def commit_file(temporary: Path, target: Path) -> None:
    """Make `temporary` the file `target`, durably: fsync, rename, fsync the folder.

    The temporary is gone afterwards, also on failure, and also where both are hard links of one file (a rename of one
    onto the other does nothing).

    Raises:
        RunDirectoryError: the disk is full or not writable.
    """
    with disk_errors(target):
        size_bytes = temporary.stat().st_size
    with disk_errors(target, size_bytes):
        try:
            _sync(temporary)
            temporary.replace(target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`, so that a reader or a crash sees the old or the new content, whole.

    Raises:
        RunDirectoryError: the disk is full or not writable; the old content is untouched.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = temporary_beside(path)
    with disk_errors(path, len(content)):
        try:
            with create_exclusive(temporary) as file:
                file.write(content)
            commit_file(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append one line to `path`, creating the file and its folder where they are missing.

    The file is opened anew each time, so a run whose directory was deleted goes on writing. After a failed write it is
    cut back to its old length: a full disk leaves no half line that the next one would be glued to.

    Raises:
        OSError: the line could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = f"{line}\n".encode(errors="backslashreplace")
    with path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            # A nearly full disk takes a part of the data without an error; only the next write fails.
            while data:
                data = data[file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(start)
            raise


class HashingWriter(io.RawIOBase):
    """Passes everything on to `file`, counting and hashing it: a large file need not be read again for its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0
        self.error: OSError | None = None
        """What went wrong, for a writer that hides it (torch.save turns it into a RuntimeError about positions)."""

    @property
    def sha256(self) -> str:
        """Digest of everything written, in hexadecimal."""
        return self._digest.hexdigest()

    def write(self, data: Any) -> int:
        """Write `data` (bytes or another flat buffer); OSError when the disk fails."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(data)
        self.size_bytes += len(data)
        return len(data)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_atomic(target: Path, link: Path) -> None:
    """Point `link` at `target`, in the same folder: a hard link, swapped in by rename.

    Where the file system has none it is a relative symbolic link, and where it has neither a copy.

    Raises:
        RunDirectoryError: the disk is full or not writable; what `link` was is untouched.
    """
    temporary = temporary_beside(link)
    with disk_errors(link):
        temporary.unlink(missing_ok=True)
    for make in (temporary.hardlink_to, lambda file: temporary.symlink_to(file.name)):
        try:
            make(target)
        except OSError as error:
            if error.errno in _NO_LINKS:
                continue
            with disk_errors(link):
                raise
        commit_file(temporary, link)
        return
    copy_atomic(target, link)


def copy_atomic(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`, swapped in by rename.

    Raises:
        RunDirectoryError: the disk is full or not writable; what `target` was is untouched.
    """
    temporary = temporary_beside(target)
    try:
        with disk_errors(target), source.open("rb") as original, create_exclusive(temporary) as copy:
            shutil.copyfileobj(original, copy, _MIB)
        commit_file(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError of the body into a RunDirectoryError that names `path`, the reason, and free and needed bytes."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(_explain(path, error, needed_bytes)) from error


@contextlib.contextmanager
def rust_disk_errors() -> Iterator[None]:
    """Turn what safetensors and tokenizers say of the disk in their own words into the OSError that it is."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing narrower
        found = _RUST_ERROR.search(str(error))
        if found is not None:
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def _explain(path: Path, error: OSError, needed_bytes: int | None) -> str:
    reason = error.strerror or str(error)
    if error.errno not in _DISK_FULL:
        return f"cannot write {path}: {reason}; choose an output_dir that this user can write to"
    needed = "" if needed_bytes is None else f", about {needed_bytes / _MIB:.1f} MiB ({needed_bytes} bytes) needed"
    free = _free_bytes(path)
    return (
        f"cannot write {path}: {reason} ({free / _MIB:.1f} MiB ({free} bytes) free{needed}); free some space, lower "
        "checkpoint.keep_last, or choose an output_dir on a larger disk, then go on with --resume auto"
    )


def _free_bytes(path: Path) -> int:
    """Free space of the file system that holds `path`, or would hold it."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
