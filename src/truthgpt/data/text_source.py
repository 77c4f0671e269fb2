"""Plain text files as a stream of documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from truthgpt.data.base import SHARD_START, Cursor, Document, Segment
from truthgpt.data.file_identity import content_fingerprint, stat_identity
from truthgpt.data.paths import file_keys, resolve_files
from truthgpt.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
PIECES = 100
"""A lone file is cut into about this many documents, so that a share of them can be held out."""
MIN_PIECE_BYTES = 256
MAX_PIECE_BYTES = 64 * 1024
CONVERT = "convert the file, for example: iconv -f {} -t UTF-8"
UNPACK = "the file is compressed, and only JSON Lines are read so: unpack it"
FIXES = {
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), CONVERT.format("UTF-16")),
    **dict.fromkeys((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"PK\x03\x04"), UNPACK),
}
"""What to do about a file that is not UTF-8, by its first bytes: UTF-16, and gzip, Zstandard, xz, bzip2 and zip."""


class TextSource:
    """UTF-8 text files, one document a file; a lone file is cut into pieces of whole lines.

    The pieces of a lone file are `size / 100` bytes, at least 256 bytes and at most 64 KiB, plus the rest of the last
    line: 1 MB gives about 100 documents, 5 KB about 20. Pieces that follow each other are marked `continues`: the text
    is joined again, without an end-of-text token, wherever both are in the same split. A byte-order mark is dropped
    and CRLF read as LF; everything else is kept as it is. Files of white space only are left out. As a stream, each
    file is a shard.

    Args:
        paths: files, folders (all files below) or globs.

    Raises:
        DataError: a path that matches no file.
    """

    layout: Literal["stream", "rows"] = "stream"

    def __init__(self, paths: Sequence[str]) -> None:
        self._files = resolve_files(paths)
        self._keys = file_keys(self._files)

    def documents(self) -> Iterator[Document]:
        """All documents in order.

        Raises:
            DataError: a file that cannot be read or is not UTF-8 (with the byte offset), or no text at all.
        """
        usable = 0
        for shard in range(len(self._files)):
            for document, _ in self.read(shard):
                usable += 1
                yield document
        if usable == 0:
            first = str(self._files[0])
            more = f" and {len(self._files) - 1} more files" if len(self._files) > 1 else ""
            raise DataError(f"0 usable documents in {first}{more}: there is only white space; set data.path to text")

    def identity(self) -> str:
        """Paths, sizes and times of the files."""
        return f"text {stat_identity(self._files)}"

    def shards(self) -> Sequence[str]:
        """The files."""
        return [str(path) for path in self._files]

    def read(self, shard: int, cursor: Cursor = SHARD_START) -> Iterator[tuple[Document, Cursor]]:
        """Documents of one file from `cursor` on: (byte offset, pieces before).

        Raises:
            DataError: as `documents` does.
        """
        path = self._files[shard]
        documents = self._cut_file(path, cursor) if len(self._files) == 1 else self._whole_file(shard, cursor)
        for document, after in documents:
            if document.text.strip():
                yield document, after

    def fingerprint(self) -> str:
        """Digest of the files' names, sizes and contents."""
        return content_fingerprint(self._files)

    def _whole_file(self, shard: int, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        if cursor != SHARD_START:
            return
        path = self._files[shard]
        with _open(path) as file:
            text = _decode(file.read(), path, offset=0)
            end = file.tell()
        yield Document(self._keys[shard], (Segment(text),), where=str(path)), (end, 1)

    def _cut_file(self, path: Path, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        offset, index = cursor or (0, 0)
        with _open(path) as file:
            piece_bytes = min(max(path.stat().st_size // PIECES, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
            file.seek(offset)
            for piece in _whole_line_pieces(file, piece_bytes):
                text = _decode(piece, path, offset)
                where = f"{path} (byte {offset})"
                document = Document(f"{path.name}#{index}", (Segment(text),), where, continues=index > 0)
                offset, index = offset + len(piece), index + 1
                yield document, (offset, index)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error


def _whole_line_pieces(file: BinaryIO, piece_bytes: int) -> Iterator[bytes]:
    while piece := file.read(piece_bytes):
        yield piece if piece.endswith(b"\n") else piece + file.readline()


def _decode(data: bytes, path: Path, offset: int) -> str:
    """Text of `data`, which stands at byte `offset` of the file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        known = (fix for begins, fix in FIXES.items() if offset == 0 and data.startswith(begins))
        fix = next(known, CONVERT.format("ISO-8859-1"))
        raise DataError(
            f"{path}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}: {error.reason}); {fix}"
        ) from error
    if offset == 0:
        text = text.removeprefix(UTF8_BOM.decode())
    return text.replace("\r\n", "\n")
