"""The directory of one run: held by one process, never mixed with another run, its documents always whole. No torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

from truthgpt.errors import RunDirectoryError
from truthgpt.runtime.atomic_file import (
    create_exclusive,
    disk_errors,
    remove_temporaries,
    temporary_beside,
    write_atomic,
)
from truthgpt.runtime.environment import utc_now

logger = logging.getLogger(__name__)

_CONFIG, _ENVIRONMENT, _STATUS = "config.yaml", "environment.json", "status.json"
_METRICS, _CHECKPOINTS, _LOCK = "metrics.jsonl", "checkpoints", ".lock"
_MARKS = (_CONFIG, _STATUS, _METRICS, _CHECKPOINTS)
_PROBE_BYTES = 4096
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_LOCK_PATIENCE_S = 0.5
"""A listing of runs holds a lock for an instant; only a lock held longer is a run's."""


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands, for `status.json`; the directory adds its id and the times."""

    state: Literal["running", "complete", "preempted", "failed"]
    step: int
    max_steps: int
    best_metric: float | None = None
    best_step: int | None = None
    exit_code: int | None = None
    """None while the run goes on."""
    message: str | None = None
    """Why it ended: the error's text, or the reason it stopped early."""


class RunDirectory:
    """A run directory held by this process; get one from `claim`, and `release` it (or use it in a `with`)."""

    def __init__(self, path: Path, run_id: str, lock: _Lock) -> None:
        self.path = path
        self.checkpoints = path / _CHECKPOINTS
        self.model = path / "model"
        self.metrics = path / _METRICS
        self.log = path / "run.log"
        self.run_id = run_id
        self._lock = lock
        self._started_at = utc_now()
        self._documents: dict[str, str] = {}

    @classmethod
    def claim(cls, path: Path, *, resume: bool, overwrite: bool) -> RunDirectory:
        """Make `path` the directory of this run, before anything expensive is loaded.

        With `resume` a used directory keeps its files and its run id; with `overwrite` it is moved aside to
        `<name>.old-<UTC time>`, never deleted. Temporary files of killed processes are removed.

        Raises:
            RunDirectoryError: `path` is a file, cannot be written, is in use by another process, was used before and
                neither `resume` nor `overwrite` is given, or holds a `model/` of something else.
        """
        if resume and overwrite:
            raise RunDirectoryError(f"{path}: --resume and --overwrite exclude each other; give one of them")
        lock = _enter(path)
        try:
            used = is_run_directory(path)
            if not used and _holds_anything(path / "model"):
                raise RunDirectoryError(
                    f"{path / 'model'} is of no run in {path}, and this run's model would take its place; choose "
                    "another output_dir, or move that folder away"
                )
            if overwrite and used:
                lock = _move_aside(path, lock)
            elif not resume and used:
                raise RunDirectoryError(
                    f"{path} holds a run already; go on with it (--resume auto), move it aside and start anew "
                    "(--overwrite), or choose another output_dir"
                )
            with disk_errors(path):
                for folder in (path, path / _CHECKPOINTS, path / "model"):
                    remove_temporaries(folder)
            return cls(path, _known_run_id(path) or uuid.uuid4().hex, lock)
        except BaseException:
            lock.release()
            raise

    def release(self) -> None:
        """Let go of the directory; calling it again does nothing."""
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def write_config(self, text: str) -> None:
        """Write the resolved configuration to `config.yaml`. RunDirectoryError when it cannot be written."""
        self._write(_CONFIG, text)

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Write `environment.json`. RunDirectoryError when it cannot be written."""
        self._write(_ENVIRONMENT, json.dumps(environment, indent=2) + "\n")

    def write_status(self, status: RunStatus) -> None:
        """Write `status.json`, with the run id and the times. RunDirectoryError when it cannot be written."""
        values = asdict(status)
        if status.best_metric is not None and not math.isfinite(status.best_metric):
            values["best_metric"] = None  # JSON has no such number, and it is no best
        times = {"started_at": self._started_at, "updated_at": utc_now()}
        self._write(_STATUS, json.dumps({"run_id": self.run_id, **values, **times}, indent=2) + "\n")

    def written_status(self) -> dict[str, Any] | None:
        """The document that this process wrote as `status.json` last; None when it wrote none."""
        text = self._documents.get(_STATUS)
        return None if text is None else json.loads(text)

    def read_status(self) -> dict[str, Any] | None:
        """The document of `status.json`; None when there is none or it is damaged."""
        return read_status(self.path)

    def _write(self, name: str, text: str) -> None:
        if not self._lock.is_in_place():
            self._create_again()
        write_atomic(self.path / name, text)
        self._documents[name] = text

    def _create_again(self) -> None:
        """The directory was deleted under the run: it gets it back, unless another run has taken the place."""
        logger.warning("%s was deleted while this run uses it; it is created again", self.path)
        self._lock.release()
        self._lock = _enter(self.path)
        for name, text in self._documents.items():
            write_atomic(self.path / name, text)


def is_run_directory(path: Path) -> bool:
    """Whether `path` holds anything that a run writes."""
    return any((path / mark).exists() for mark in _MARKS)


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def is_in_use(path: Path) -> bool:
    """Whether a living process holds the run directory `path`; writes nothing."""
    try:
        descriptor = os.open(path / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def read_status(path: Path) -> dict[str, Any] | None:
    """The document of `status.json` in the run directory `path`; None when there is none or it is damaged."""
    return _read_object(path / _STATUS)


class _Lock:
    """An flock on a file that names its holder. The kernel drops it with the process, so a dead one holds nothing."""

    # Descriptors of the locks this process holds. A forked child (a data loader's worker) must close its copies, or
    # it would keep the lock of a parent that was killed until it notices, seconds later.
    held: ClassVar[set[int]] = set()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock. RunDirectoryError names the holder; OSError when the file cannot be opened."""
        deadline_s = time.monotonic() + _LOCK_PATIENCE_S
        while not self._try_once():
            if time.monotonic() >= deadline_s:
                advice = "wait for it, stop it, or choose another output_dir"
                raise RunDirectoryError(f"{self.path.parent} is in use by {self._holder()}; {advice}")
            time.sleep(0.02)

    def is_in_place(self) -> bool:
        """Whether the file at the lock's path is the one this process holds."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False

    def release(self) -> None:
        """Give the lock back. The file stays: deleting it would let two processes lock two files of one name."""
        # A forked child has closed its copy and forgotten it in `held`; its number may be another file by now.
        if self._descriptor is not None and self._descriptor in _Lock.held:
            _Lock.held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None

    def _try_once(self) -> bool:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self.path, flags, 0o666)
        _Lock.held.add(self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.release()
                raise
            logger.warning("%s cannot be locked (%s): make sure that no other run uses it", self.path, error.strerror)
        # Between open and flock the holder may have moved the directory aside (--overwrite): then this is its old lock.
        if not self.is_in_place():
            self.release()
            return False
        self._sign()
        return True

    def _sign(self) -> None:
        assert self._descriptor is not None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started_at": utc_now()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _holder(self) -> str:
        holder = _read_object(self.path)
        if holder is None or not {"pid", "host", "started_at"} <= holder.keys():
            return "another process"
        return f"process {holder['pid']} on host {holder['host']} since {holder['started_at']}"


def _close_held_locks() -> None:
    while _Lock.held:
        with contextlib.suppress(OSError):
            os.close(_Lock.held.pop())


os.register_at_fork(after_in_child=_close_held_locks)


def _enter(path: Path) -> _Lock:
    """Create `path`, see that it can be written, and lock it."""
    lock = _Lock(path / _LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        message = f"{path} cannot be a run directory: it, or a folder above it, is a file or a broken link"
        raise RunDirectoryError(f"{message}; choose another output_dir") from error
    except OSError as error:
        with disk_errors(path):
            raise error
    with disk_errors(path):
        _probe(path)
        lock.acquire()
    return lock


def _probe(path: Path) -> None:
    """Write a block to `path` and delete it: an OSError now is better than one at the first checkpoint."""
    probe = temporary_beside(path / "probe")
    try:
        with create_exclusive(probe) as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _move_aside(path: Path, lock: _Lock) -> _Lock:
    """Rename the used directory and lock a new one in its place, holding the old lock until then."""
    # The folder itself, should `path` be a symbolic link: the new run stays on the disk the link was made for.
    folder = path.resolve()
    aside = folder.with_name(f"{folder.name}.old-{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}")
    with disk_errors(path):
        folder.rename(aside)
        folder.mkdir()
    logger.info("the run that was in %s is now in %s", path, aside)
    try:
        return _enter(path)
    finally:
        lock.release()


def _known_run_id(path: Path) -> str | None:
    """The id of the run in `path`: from its status or, should that be lost, from its newest checkpoint manifest."""
    manifests = sorted((path / _CHECKPOINTS).glob("step_*.json"), reverse=True)
    for document in (read_status(path), *map(_read_object, manifests)):
        if document is not None and isinstance(document.get("run_id"), str):
            run_id: str = document["run_id"]
            return run_id
    return None


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
