"""What a source holds, known without reading it again; and how an entry of the cache is made by one process, whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import Conversation, Document, IdentifiedSource, Source
from truthgpt.data.holdout import key_hash
from truthgpt.errors import DataError, RunDirectoryError
from truthgpt.runtime.task_progress import task_progress

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of every key: a change of the files' layout or of what is hashed raises it."""
RECENT_S = 2.0
"""A file changed so shortly before it was read may change again without its time changing: file systems count time in
steps of up to two seconds."""
HASHES_FILE = "hashes.bin"
META_FILE = "meta.json"

_ENCODE_CHARACTERS = 2**20
_TIME_NS = re.compile(r"(?<!\w)\d{19}(?!\w)")
"""A time since 1970 in nanoseconds, as `file_identity.stat_identity` writes them."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@dataclass(frozen=True)
class SourceIndex:
    """What a pass over a source found.

    `hashes` are the first 64 bits of each document's hashed key, uint64 `(documents,)`. `digest` is the fingerprint of
    all keys and contents, not of the places they were read from. `identity` is what the source said of itself then.
    """

    hashes: npt.NDArray[np.uint64]
    digest: str
    identity: str | None


@dataclass(frozen=True)
class _IndexMeta:
    """Contents of `meta.json`."""

    digest: str
    documents: int


def index_source(source: Source, cache_dir: Path | None = None) -> SourceIndex:
    """Hashes and digest of a source's documents: from the cache when it is the one read before, else by reading.

    A source without an identity is read every time. An index is kept only when the identity was the same before and
    after reading and holds no time of the last two seconds.

    Args:
        source: where the documents come from.
        cache_dir: folder of all caches; None: keep nothing.

    Raises:
        DataError: no document at all, or whatever the source raises.
    """
    identity = source_identity(source)
    if identity is None or cache_dir is None:
        return _read_source(source, identity)
    key = hashlib.sha256(f"{FORMAT_VERSION}\n{identity}".encode()).hexdigest()[:32]
    folder = cache_dir / "index" / key
    index = _open(folder, identity)
    if index is not None:
        return index
    try:
        with exclusive_maker(folder, "reading the same documents"):
            index = _open(folder, identity)
            if index is None:
                started_s = time.time()
                index = _read_source(source, identity)
                if source_identity(source) == identity and not _is_recent(identity, started_s):
                    _write(folder, index)
    except RunDirectoryError as error:
        logger.warning("%s; the documents are read at every start", error)
    return index or _read_source(source, identity)


def source_identity(source: Source) -> str | None:
    """What the source says of itself without reading its documents; None when it cannot."""
    return source.identity() if isinstance(source, IdentifiedSource) else None


def _read_source(source: Source, identity: str | None) -> SourceIndex:
    hashes = array("Q")
    content = hashlib.sha256()
    with task_progress("reading", None, "documents") as advance:
        for document in source.documents():
            hashes.append(key_hash(document.key))
            _add_document(content, document)
            advance(1)
    if not hashes:
        raise DataError("0 usable documents: the data source yields none; check data.source and data.path")
    return SourceIndex(np.frombuffer(hashes, dtype=np.uint64), content.hexdigest(), identity)


def _add_document(digest: hashlib._Hash, document: Document) -> None:
    _add_text(digest, document.key)
    digest.update(bytes([document.continues, document.conversation is not None]))
    digest.update(len(document.segments).to_bytes(8, "little"))
    for segment in document.segments:
        _add_text(digest, segment.text)
        digest.update(bytes([segment.trained]))
    if document.conversation is not None:
        _add_text(digest, _conversation_json(document.conversation))


def _add_text(digest: hashlib._Hash, text: str) -> None:
    """Add `text` with its length in front, so that no two lists of texts run together into the same bytes."""
    digest.update(len(text).to_bytes(8, "little"))
    for start in range(0, len(text), _ENCODE_CHARACTERS):  # a huge text is never there a second time
        digest.update(text[start : start + _ENCODE_CHARACTERS].encode())


def _conversation_json(conversation: Conversation) -> str:
    """Keys stay in their order: a template may print a tool as it stands."""
    return json.dumps([conversation.messages, conversation.tools, conversation.trained], default=dict)


def _is_recent(identity: str, now_s: float) -> bool:
    return any(int(time_ns) / 1e9 > now_s - RECENT_S for time_ns in _TIME_NS.findall(identity))


def _open(folder: Path, identity: str) -> SourceIndex | None:
    """The index in `folder`; None when there is none, or one that is damaged."""
    path = folder / HASHES_FILE
    try:
        meta = _IndexMeta(**json.loads((folder / META_FILE).read_bytes()))
        if path.stat().st_size != meta.documents * 8:
            return None
        hashes: npt.NDArray[np.uint64] = np.memmap(path, dtype=np.uint64, mode="r")
    except (OSError, ValueError, TypeError):
        return None
    return SourceIndex(hashes, meta.digest, identity)


def _write(folder: Path, index: SourceIndex) -> None:
    with new_folder(folder) as temporary, cache_errors(folder):
        write_synced(temporary / HASHES_FILE, index.hashes.tobytes())
        meta = _IndexMeta(index.digest, len(index.hashes))
        write_synced(temporary / META_FILE, json.dumps(asdict(meta)).encode())


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
