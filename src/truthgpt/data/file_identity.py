"""Whether files are the ones read before: by their place and time without reading, or by their content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from truthgpt.data.paths import file_keys
from truthgpt.errors import DataError

WHOLE_BYTES = 2**30
"""Files of this many bytes together are fingerprinted whole (about one second); larger ones by samples."""
SAMPLED_BLOCKS = 1024
BLOCK_BYTES = 4096
READ_BYTES = 2**20
RECENT_S = 2.0
"""A file changed so shortly before it was read may change again without its time changing: file systems count time in
steps of up to two seconds."""

_TIME_NS = re.compile(r"(?<!\w)\d{19}(?!\w)")
"""A time since 1970 in nanoseconds, as `stat_identity` writes them."""


def stat_identity(files: Sequence[Path]) -> str:
    """Path, size and modification time of every file, as text.

    Raises:
        DataError: a file that is gone.
    """
    return json.dumps([[str(file.resolve()), *_size_and_time(file)] for file in files])


def is_recent(identity: str, now_s: float) -> bool:
    """Whether a file of `identity` was changed in the two seconds before `now_s`, so that its time says little."""
    return any(int(time_ns) / 1e9 > now_s - RECENT_S for time_ns in _TIME_NS.findall(identity))


def content_fingerprint(files: Sequence[Path], settings: str = "") -> str:
    """SHA-256 over name, size and content of the files, in order; moving the folder that holds them changes nothing.

    When they hold more than `WHOLE_BYTES` together, 1,024 blocks of 4 KiB spread evenly over each file stand for its
    content, the first and the last among them: a change of size, of order or of a name is always seen, an edit that
    keeps the size of a very large file not always. Files are read once a process (a second a GB), unless their identity
    changes or is too young to be trusted.

    Args:
        files: the files, in the order they are read.
        settings: what shapes the documents that are read from them.

    Raises:
        DataError: a file that cannot be read.
    """
    identity = stat_identity(files)
    if is_recent(identity, time.time()):
        return _read_fingerprint(files, settings)
    return _kept_fingerprint(identity, tuple(files), settings)


@lru_cache(maxsize=128)
def _kept_fingerprint(identity: str, files: tuple[Path, ...], settings: str) -> str:
    """The fingerprint of files whose identity was `identity` before they were read."""
    return _read_fingerprint(files, settings)


def _read_fingerprint(files: Sequence[Path], settings: str) -> str:
    sizes = [_size_and_time(file)[0] for file in files]
    whole = sum(sizes) <= WHOLE_BYTES
    digest = hashlib.sha256(settings.encode())
    for file, key, size in zip(files, file_keys(files), sizes, strict=True):
        digest.update(json.dumps([key, size]).encode())
        try:
            with file.open("rb") as stream:
                if whole or size <= SAMPLED_BLOCKS * BLOCK_BYTES:
                    while data := stream.read(READ_BYTES):
                        digest.update(data)
                else:
                    for block in range(SAMPLED_BLOCKS):
                        stream.seek(block * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                        digest.update(stream.read(BLOCK_BYTES))
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}; check its permissions") from error
    return digest.hexdigest()


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        status: os.stat_result = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; check the path and its permissions") from error
    return status.st_size, status.st_mtime_ns
