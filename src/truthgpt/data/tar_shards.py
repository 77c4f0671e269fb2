"""Tar shards of samples: which files a path means, their members in order, and members grouped into samples.

An archive is read forward and header by header; nothing is written to disk, and a member's name is only ever a key.
Python's `tarfile` takes a damaged header or a missing end for the end of the archive; here both are errors, so that no
sample is lost silently. Its parser of a single header block is used.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, Self, TypeVar

from truthgpt.data.paths import at_home, resolve_files
from truthgpt.errors import ConfigError, DataError, Problem

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Files of these names are taken from a folder."""
MAX_MEMBER_BYTES = 256 * 2**20
"""A larger member is not read into memory."""
MAX_HEADER_BYTES = 2**20
"""Long names and other extended headers of one member take at most this much each."""
MAX_GZIP_RATIO = 250
"""A gzip shard that unpacks to more than `MAX_MEMBER_BYTES` may grow by this factor at most; text rarely passes 20,
and zeros alone reach 1,032."""

SPARSE = "a sparse member, which is not supported (pack without --sparse)"

_SKIP_BYTES = 2**20
_SHOWN_CHARACTERS = 120
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_EXTENDED_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")

T = TypeVar("T")


def require_webdataset() -> None:
    """Check that the webdataset library is there.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        problem = Problem(
            key="data.source", message="needs the package webdataset", suggestion="pip install 'truthgpt[webdataset]'"
        )
        raise ConfigError([problem]) from error


def shard_files(paths: Sequence[str]) -> list[Path]:
    """The shards that `paths` name, each once: files, folders (all `SHARD_SUFFIXES` below), globs, and braces
    (`shard-{000..009}.tar`), which the webdataset library expands.

    Raises:
        ConfigError: a URL or a `pipe:` command, or braces that cannot be expanded.
        DataError: a path, or one of those that braces expand to, that matches no shard.
    """
    files: dict[Path, Path] = {}
    for path in (expanded for pattern in paths for expanded in _expand(pattern)):
        matches = resolve_files([path])
        if not at_home(path).is_file():
            matches = [match for match in matches if match.name.endswith(SHARD_SUFFIXES)]
        if not matches:
            raise DataError(
                f"data path {path!r}: no {', '.join(SHARD_SUFFIXES)} file found; give a folder that has some"
            )
        for match in matches:
            files.setdefault(match.resolve(), match)
    if not files:
        raise DataError("data path: the list is empty; give at least one shard, folder or glob")
    return list(files.values())


def _expand(pattern: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    # A file or folder that exists under this very name is meant as it stands.
    expanded = [pattern]
    if not at_home(pattern).exists():
        try:
            expanded = expand_urls(pattern)
        except (ValueError, AssertionError, KeyError) as error:
            problem = Problem(
                key="data.path", message=f"{pattern!r} cannot be expanded: {error}", suggestion="shard-{000..009}.tar"
            )
            raise ConfigError([problem]) from error
    for path in expanded:
        if _URL.match(path):
            message = f"{path!r} is a URL or a command; only local files are read"
            fix = f"download the shards and give their path, or write './{path}' if this is a file's name"
            raise ConfigError([Problem(key="data.path", message=message, suggestion=fix)])
    return expanded


def shown(name: str) -> str:
    """A member's name as a message can show it: printable, and not too long."""
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= _SHOWN_CHARACTERS else name[:_SHOWN_CHARACTERS] + "..."


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of an archive: `size` bytes at `data_offset`; its first header stands at `offset`. All in bytes of the
    unpacked archive."""

    name: str
    offset: int
    data_offset: int
    size: int
    kind: bytes
    """The type byte of the tar header."""

    @property
    def is_file(self) -> bool:
        """Whether it holds data of its own: no folder, link or device."""
        return self.kind in tarfile.REGULAR_TYPES


class TarShard:
    """An open tar archive, plain or gzip (told apart by content), read forward; a plain one can be entered anywhere.

    Args:
        path: the file.

    Raises:
        DataError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._raw = path.open("rb")
            self._raw_bytes = path.stat().st_size
            self.compressed = self._raw.peek(2)[:2] == b"\x1f\x8b"
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error
        self._stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=self._raw) if self.compressed else self._raw
        self._position = 0
        self.end_offset = 0
        """Where the end mark stands, once `members` has met it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._raw.close()

    def members(self, start: int = 0) -> Iterator[TarMember]:
        """All members whose first header stands at byte `start` or later, `start` being such a header or the end.

        Raises:
            DataError: the archive is damaged or ends early; with the byte offset and the member before it.
        """
        offset = start
        before: str | None = None
        while (member := self._next_member(offset, before)) is not None:
            yield member
            offset = member.data_offset + (_padded(member.size) if _holds_data(member.kind) else 0)
            before = member.name
        self.end_offset = offset
        self._check_rest(before)

    def data(self, member: TarMember) -> bytes:
        """Content of a member. In a gzip shard only of the member that `members` has just given.

        Raises:
            DataError: it is too large or cut off.
        """
        if member.size > MAX_MEMBER_BYTES:
            raise DataError(
                f"{self.path}: member {shown(member.name)!r} has {member.size} bytes, more than the {MAX_MEMBER_BYTES} "
                "that are read at once; cut it into smaller ones"
            )
        self._go_to(member.data_offset, member.name)
        return self._read_exactly(member.size, member.name)

    def _next_member(self, offset: int, before: str | None) -> TarMember | None:
        """The member whose headers start at `offset`; None at the end mark, a block of zeros."""
        name: str | None = None
        size: int | None = None
        header_offset = offset
        while True:
            self._go_to(header_offset, before)
            info = self._header(header_offset, before)
            if info is None:
                if header_offset != offset:
                    raise self._refusal(header_offset, "an extended header is followed by no member", before)
                return None
            if info.type in (*_EXTENDED_TYPES, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                extension = self._extension(info, header_offset, before)
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    name = extension.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
                elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                    path, pax_size = self._pax_values(extension, header_offset, before)
                    name, size = path or name, size if pax_size is None else pax_size
                header_offset += tarfile.BLOCKSIZE + _padded(info.size)
                continue
            if info.type == tarfile.GNUTYPE_SPARSE:
                raise self._refusal(header_offset, SPARSE, before)
            member_size = info.size if size is None else size
            if member_size < 0:
                raise self._refusal(header_offset, "a negative size", before)
            return TarMember(name or info.name, offset, header_offset + tarfile.BLOCKSIZE, member_size, info.type)

    def _header(self, offset: int, before: str | None) -> tarfile.TarInfo | None:
        block = self._read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            if offset == 0:
                raise DataError(f"{self.path}: is no tar archive: it holds {len(block)} bytes; write the shard again")
            raise self._cut_off(before)
        if not block.strip(b"\0"):
            return None
        try:
            # Undecodable bytes of a name become text that can be encoded again: keys are hashed.
            return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            if offset == 0:
                raise DataError(
                    f"{self.path}: is no tar archive ({error}); shards are .tar or .tar.gz files, "
                    "for example of webdataset.ShardWriter or of tar --sort=name"
                ) from error
            raise self._refusal(offset, f"a damaged header ({error})", before) from error

    def _extension(self, info: tarfile.TarInfo, offset: int, before: str | None) -> bytes:
        if not 0 <= info.size <= MAX_HEADER_BYTES:
            raise self._refusal(offset, f"an extended header of {info.size} bytes", before)
        return self._read_exactly(info.size, before)

    def _pax_values(self, records: bytes, offset: int, before: str | None) -> tuple[str | None, int | None]:
        """Name and size of a pax header: records `length key=value`, each ended by a line feed."""
        path: str | None = None
        size: int | None = None
        start = 0
        while start < len(records):
            match = _PAX_RECORD.match(records, start)
            end = start + int(match[1]) if match else 0
            if match is None or not match.end() < end <= len(records):
                raise self._refusal(offset, "a damaged pax header", before)
            key, value = match[2], records[match.end() : end - 1]
            if key == b"path":
                path = value.decode("utf-8", "backslashreplace")
            elif key == b"size":
                if not value.isdigit() or len(value) > len(str(2**63)):
                    raise self._refusal(offset, f"a pax header with size {value[:20]!r}", before)
                size = int(value)
            elif key.startswith(b"GNU.sparse"):
                raise self._refusal(offset, SPARSE, before)
            start = end
        return path, size

    def _check_rest(self, before: str | None) -> None:
        """Behind the end mark there is only padding; reading it also checks the sum of a gzip shard."""
        while chunk := self._read(_SKIP_BYTES):
            if chunk.strip(b"\0"):
                raise self._refusal(
                    self._position - len(chunk), "data behind the end mark (archives joined with cat?)", before
                )

    def _go_to(self, offset: int, name: str | None) -> None:
        if not self.compressed:
            self._raw.seek(offset)
            self._position = offset
            return
        while self._position < offset:
            self._read_exactly(min(offset - self._position, _SKIP_BYTES), name)

    def _read_exactly(self, size: int, name: str | None) -> bytes:
        if not self.compressed and self._position + size > self._raw_bytes:
            raise self._cut_off(name)
        data = self._read(size)
        if len(data) < size:
            raise self._cut_off(name)
        return data

    def _read(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except EOFError as error:
            raise self._gzip_error("ends early") from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise self._gzip_error(f"is damaged ({error})") from error
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        self._position += len(data)
        if self.compressed and self._position > MAX_MEMBER_BYTES:
            self._check_ratio()
        return data

    def _check_ratio(self) -> None:
        packed = self._raw.tell()
        if self._position > MAX_GZIP_RATIO * packed:
            raise DataError(
                f"{self.path}: {packed} bytes unpack to more than {MAX_GZIP_RATIO} times as many, as a decompression "
                "bomb does; gunzip the shard if it is sound"
            )

    def _gzip_error(self, what: str) -> DataError:
        return DataError(
            f"{self.path}: the gzip stream {what} behind byte {self._position} of the archive in it; "
            "copy or write the shard again"
        )

    def _cut_off(self, name: str | None) -> DataError:
        place = "before its first member" if name is None else f"in or after member {shown(name)!r}"
        end = self._position if self.compressed else self._raw_bytes
        return DataError(f"{self.path}: the archive ends early, at byte {end}, {place}; copy or write the shard again")

    def _refusal(self, offset: int, reason: str, before: str | None) -> DataError:
        place = "" if before is None else f", after member {shown(before)!r}"
        return DataError(f"{self.path}: byte {offset}{place}: {reason}; copy or write the shard again")


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _holds_data(kind: bytes) -> bool:
    """Whether data blocks follow a header of this type; POSIX treats unknown types as files."""
    return kind in tarfile.REGULAR_TYPES or kind not in tarfile.SUPPORTED_TYPES


@dataclass(frozen=True)
class TarSample(Generic[T]):
    """The members of one key: a value for each suffix that is wanted, and the names of the other suffixes."""

    key: str
    parts: dict[str, T]
    others: list[str]
    next_offset: int
    """Where the next sample starts, in bytes of the unpacked archive."""


def tar_samples(
    shard: TarShard,
    wanted: frozenset[str],
    value: Callable[[TarMember], T],
    left_out: Counter[str],
    start: int = 0,
) -> Iterator[TarSample[T]]:
    """Samples of a shard: neighbouring members whose names agree up to the first dot, as webdataset groups them.

    Args:
        shard: the open archive.
        wanted: suffixes, in lower case and without the first dot, whose members are read.
        value: what is kept of a wanted member, called while the archive stands at its data.
        left_out: counts, by suffix, the members that are not read.
        start: where to begin, as `TarSample.next_offset` says.

    Raises:
        DataError: the archive is damaged, or a sample has two members of one suffix.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys

    last = TarMember("", start, start, 0, tarfile.REGTYPE)

    def named_values() -> Iterator[dict[str, object]]:
        nonlocal last
        for member in shard.members(start):
            if member.kind == tarfile.DIRTYPE:
                continue
            suffix = (base_plus_ext(member.name)[1] or "").lower()
            if suffix not in wanted or not member.is_file:
                left_out[f".{shown(suffix)}" if member.is_file and suffix else "others"] += 1
            # Names without a suffix belong to no sample; `__key__` and the like are the library's own.
            if not suffix or suffix.startswith("__") or not member.is_file:
                continue
            last = member
            yield {"fname": member.name, "data": value(member) if suffix in wanted else None, "__url__": ""}
        last = TarMember("", shard.end_offset, shard.end_offset, 0, tarfile.REGTYPE)

    try:
        for group in group_by_keys(named_values()):
            key = group.pop("__key__")
            del group["__url__"]
            parts = {suffix: part for suffix, part in group.items() if suffix in wanted}
            # A sample is complete when the next one's first member has come, or the end.
            yield TarSample(key, parts, [suffix for suffix in group if suffix not in wanted], last.offset)
    except ValueError as error:
        raise DataError(
            f"{shard.path}: byte {last.offset}: member {shown(last.name)!r} is the second of its sample with this "
            "suffix; give each member of a sample its own"
        ) from error
