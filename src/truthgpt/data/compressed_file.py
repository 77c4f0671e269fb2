"""Files of bytes, plain, gzip or Zstandard, read as one stream with bounded memory; a cut archive is an error."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from truthgpt.errors import ConfigError, Problem

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BUFFER_BYTES = 128 * 1024
ZSTD_INPUT_BYTES = 4 * 1024
"""Compressed bytes handed over at a time: 4 bytes of Zstandard can stand for 128 KiB, so this bounds the memory."""
ZSTD_WINDOW_BYTES = 2**31
"""The largest window of `zstd --long=31`, as large dumps are packed; the library refuses one of more than 128 MiB.
Memory is taken as the file fills it."""


class ArchiveError(Exception):
    """A compressed file ends early or is damaged; the text says which."""


def is_compressed(path: Path) -> bool:
    """Whether the file's name says that it is compressed: no place in it can be reached without reading up to there."""
    return path.suffix in (".gz", ".zst")


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The file for reading, decompressed by its ending, inside a `with` block.

    Raises:
        ArchiveError: while reading: a compressed file is cut or damaged.
        ConfigError: a `.zst` file and no package that reads it.
        OSError: the file cannot be read.
    """
    if not is_compressed(path):
        with path.open("rb") as file:
            yield file
        return
    damage: tuple[type[Exception], ...] = (zlib.error, gzip.BadGzipFile)
    zstandard = _import_zstandard() if path.suffix == ".zst" else None
    if zstandard is not None:
        damage = (zstandard.ZstdError,)
    try:
        with path.open("rb") as file:
            raw = gzip.GzipFile(fileobj=file) if zstandard is None else _ZstandardReader(file, zstandard)
            # BufferedReader finds line ends in C; GzipFile.readline is a Python call a line.
            with io.BufferedReader(cast(io.RawIOBase, raw), BUFFER_BYTES) as stream:
                yield cast(BinaryIO, stream)
    except EOFError as error:
        raise ArchiveError("the archive ends early") from error
    except damage as error:
        raise ArchiveError(f"the archive is damaged: {error}") from error


class _ZstandardReader(io.RawIOBase):
    """Decompressed bytes of a Zstandard file of one or more frames.

    zstandard's own `stream_reader` takes the end of a cut file for the end of the data, hence this class.
    """

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        while not self._output:
            data = self._input or self._file.read(ZSTD_INPUT_BYTES)
            self._input = b""
            if not data:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        count = min(len(target), len(self._output))
        target[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _import_zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(
            [
                Problem(
                    key="data.path",
                    message="a .zst file needs the package zstandard",
                    suggestion="pip install 'truthgpt[zstd]'",
                )
            ]
        ) from error
    return zstandard
