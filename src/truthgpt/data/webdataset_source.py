"""Tar shards of samples (the webdataset format) as rows to train on, or as labelled images.

Only members of a closed list of types are read: `.json`, `.txt`, `.cls` and images; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from truthgpt.data.base import SHARD_START, Cursor, Document, ImageExample
from truthgpt.data.file_identity import content_fingerprint, stat_identity
from truthgpt.data.jsonl_source import parse_row
from truthgpt.data.paths import file_keys
from truthgpt.data.rows import EXCERPT_CHARACTERS, BadRow, BadRowPolicy, RowFields, RowReader, json_type
from truthgpt.data.tar_shards import (
    MAX_MEMBER_BYTES,
    TarMember,
    TarSample,
    TarShard,
    require_webdataset,
    shard_files,
    shown,
    tar_samples,
)
from truthgpt.data.text_source import UTF8_BOM
from truthgpt.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
MAX_CLASSES = 2**20
"""A larger integer label is taken for a mistake: every integer below it is a class."""

_REPORTED_KINDS = 5


class _BadMember(BadRow):
    """A sample, or the member of it that `where` names, that cannot be decoded."""

    def __init__(self, reason: str, where: str, content: bytes = b"") -> None:
        super().__init__(reason)
        self.where = where
        start = content.strip()[: 4 * EXCERPT_CHARACTERS]
        self.excerpt = start.decode("utf-8", errors="replace")[:EXCERPT_CHARACTERS]


class WebdatasetSource:
    """Samples of tar shards as rows; what a row means is decided by `rows.RowReader`.

    The `.json` member of a sample is its row. With `format: text`, a `.txt` member is the text where the row has none;
    of it a byte-order mark is dropped and CRLF read as LF. Other members are left out and counted. As a stream, each
    shard can be entered at any sample: a plain one at once, a gzip one by reading it again up to there.

    Args:
        paths: shards, folders (all `.tar`, `.tar.gz` and `.tgz` below), globs or braces; local files only.
        fields: what a row holds.
        bad_rows: what a malformed row does. A damaged archive always ends the run.

    Raises:
        ConfigError: webdataset is not installed, or a path is a URL or a command.
        DataError: a path that matches no shard.
    """

    layout: Literal["stream", "rows"] = "rows"

    def __init__(self, paths: Sequence[str], fields: RowFields, bad_rows: BadRowPolicy) -> None:
        require_webdataset()
        self._files = shard_files(paths)
        self._fields = fields
        self._bad_rows = bad_rows
        self._wanted = frozenset({"json", "txt"} if fields.format == "text" else {"json"})
        self._reported = False
        self._stream_reader = RowReader(fields, bad_rows, whole_pass=False)

    def documents(self) -> Iterator[Document]:
        """All usable samples in order.

        Raises:
            DataError: `shard:sample.json:line:column` of a malformed row; or, with `on_bad_row: skip`, too many of
                them; or no row at all; or a shard that is damaged or ends early.
        """
        reader = RowReader(self._fields, self._bad_rows)
        left_out: Counter[str] = Counter()
        for path in self._files:
            for document, _ in self._read_shard(path, SHARD_START, reader, left_out):
                yield document
        name = _name_of(self._files)
        reader.finish(name, report=not self._reported)
        self._report(name, left_out)

    def identity(self) -> str:
        """Paths, sizes and times of the shards, and what is read from a sample."""
        return f"webdataset {self._fields} {self._bad_rows} {stat_identity(self._files)}"

    def shards(self) -> Sequence[str]:
        """The shards' paths."""
        return [str(path) for path in self._files]

    def read(self, shard: int, cursor: Cursor = SHARD_START) -> Iterator[tuple[Document, Cursor]]:
        """Usable samples of one shard from `cursor` on: (byte offset,) in a plain shard, (samples before,) in a gzip
        one.

        Raises:
            DataError: as `documents` does.
        """
        path = self._files[shard]
        left_out: Counter[str] = Counter()
        yield from self._read_shard(path, cursor, self._stream_reader, left_out)
        self._report(str(path), left_out)

    def fingerprint(self) -> str:
        """Digest of the shards' names, sizes and contents, and of what is read from a sample."""
        return content_fingerprint(self._files, repr(self._fields))

    def _read_shard(
        self, path: Path, cursor: Cursor, reader: RowReader, left_out: Counter[str]
    ) -> Iterator[tuple[Document, Cursor]]:
        place = cursor[0] if cursor else 0
        with TarShard(path) as shard:
            start, passed = (0, place) if shard.compressed else (place, 0)
            samples = tar_samples(shard, self._wanted, shard.data, left_out, start)
            for number, sample in enumerate(samples, start=1):
                if number <= passed:
                    continue
                document = self._document(sample, f"{path}:{shown(sample.key)}", reader)
                if document is not None:
                    yield document, (number,) if shard.compressed else (sample.next_offset,)

    def _document(self, sample: TarSample[bytes], where: str, reader: RowReader) -> Document | None:
        """The document of one sample; None when it is left out."""
        try:
            return reader.document(self._row(sample, where), where)
        except BadRow as error:
            # Only a row can have a wrong field: the text of a `.txt` member is always a string.
            found = error if isinstance(error, _BadMember) else _bad_field(error, sample.parts["json"], f"{where}.json")
            reader.refuse(found.where, found, found.excerpt)
            return None

    def _row(self, sample: TarSample[bytes], where: str) -> dict[str, Any]:
        if not sample.parts:
            wanted = " or ".join(f".{suffix}" for suffix in sorted(self._wanted))
            raise _BadMember(f"no {wanted} member stands beside", where, _suffixes(sample.others).encode())
        row = _json_row(sample.parts["json"], f"{where}.json") if "json" in sample.parts else {}
        if "txt" in sample.parts and self._fields.text_field not in row:
            row[self._fields.text_field] = _text(sample.parts["txt"], f"{where}.txt")
        return row

    def _report(self, name: str, left_out: Counter[str]) -> None:
        if not self._reported:
            self._reported = True
            _report_left_out(name, left_out, self._wanted)


class WebdatasetImageSource:
    """Labelled images of plain tar shards, by index.

    Every sample has one image (`.jpg .jpeg .png .webp`) and its class: an integer in a `.cls` member, or else the
    field `label_field` of a `.json` member, an integer or a string. The shards are indexed once by reading headers and
    labels; `read` then goes straight to an image. Classes are "0" to "n-1" for integers, else the strings, sorted.

    Args:
        paths: shards, folders (all `.tar` below), globs or braces; local files only.
        label_field: field of a `.json` member that holds the class.
        classes: names of the classes, in the order of their labels, where another source has set them: another label
            is an error. None: the labels found, at least two.

    Raises:
        ConfigError: webdataset is not installed, or a path is a URL or a command.
        DataError: a path that matches no shard, a gzip shard, a damaged one, or a sample without image or label.
    """

    def __init__(self, paths: Sequence[str], label_field: str, classes: Sequence[str] | None = None) -> None:
        require_webdataset()
        self._files = shard_files(paths)
        self._label_field = label_field
        self._keys: list[str] = []
        self._sample_keys: list[str] = []
        # 8 bytes an entry: shard, offset and size of every image.
        self._places = (array("q"), array("q"), array("q"))
        labels: list[int | str] = []
        left_out: Counter[str] = Counter()
        for number, (path, name) in enumerate(zip(self._files, file_keys(self._files), strict=True)):
            labels.extend(self._index(number, path, name, left_out))
        name = _name_of(self._files)
        self.classes: Sequence[str] = _class_names(labels, classes, name)
        numbers = {label: number for number, label in enumerate(self.classes)}
        self._labels = array("q", [numbers[str(label)] for label in labels])
        _report_left_out(name, left_out, IMAGE_SUFFIXES | {"cls", "json"})

    def keys(self) -> Sequence[str]:
        """`<shard>/<sample>` of every image, in the order of the shards."""
        return self._keys

    def read(self, index: int) -> ImageExample:
        """Image `index`.

        Raises:
            DataError: its shard cannot be read, or ends before the image does.
        """
        shard, offset, size = (column[index] for column in self._places)
        path = self._files[shard]
        where = f"{path}:{shown(self._sample_keys[index])}"
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error
        if len(data) < size:
            raise DataError(f"{where}: the shard has become shorter since it was indexed; start again")
        return ImageExample(data, self._labels[index], where)

    def fingerprint(self) -> str:
        """SHA-256 over the classes, the index with every label, and the shards' contents."""
        digest = hashlib.sha256(json.dumps([list(self.classes), self._keys]).encode())
        for column in (*self._places, self._labels):
            digest.update(column.tobytes())
        digest.update(content_fingerprint(self._files).encode())
        return digest.hexdigest()

    def _index(self, number: int, path: Path, name: str, left_out: Counter[str]) -> Iterator[int | str]:
        """Note the place of every image of a shard, and give its label."""
        with TarShard(path) as shard:
            if shard.compressed:
                raise DataError(f"{path}: images are read by place, which gzip does not allow; run: gunzip {path}")
            for sample in tar_samples(shard, IMAGE_SUFFIXES | {"cls", "json"}, _itself, left_out):
                where = f"{path}:{shown(sample.key)}"
                image = _image_of(sample, where)
                self._keys.append(f"{name}/{sample.key}")
                self._sample_keys.append(sample.key)
                for column, value in zip(self._places, (number, image.data_offset, image.size), strict=True):
                    column.append(value)
                yield self._label(shard, sample, where)

    def _label(self, shard: TarShard, sample: TarSample[TarMember], where: str) -> int | str:
        from webdataset.autodecode import decoders

        if "cls" in sample.parts:
            content = shard.data(sample.parts["cls"])
            try:
                return _checked_label(decoders["cls"](content))
            except BadRow as error:
                raise DataError(f"{where}.cls: {error}; correct the member") from error
            except ValueError as error:
                raise DataError(f"{where}.cls: a class is an integer from 0, found {content[:20]!r}") from error
        if "json" not in sample.parts:
            raise DataError(
                f"{where}: no label, a .cls or .json member; the members of a sample must stand together "
                "(webdataset.ShardWriter, or tar --sort=name)"
            )
        content = shard.data(sample.parts["json"])
        try:
            return self._label_in(_json_row(content, f"{where}.json"))
        except BadRow as error:
            found = error if isinstance(error, _BadMember) else _bad_field(error, content, f"{where}.json")
            raise DataError(f"{found.where}: {found}: {found.excerpt!r}; correct the member") from error

    def _label_in(self, row: dict[str, Any]) -> int | str:
        field = self._label_field
        if field not in row:
            there = ", ".join(map(repr, row)) or "none"
            raise BadRow(f"no field {field!r}, it has {there} (set data.label_field)")
        try:
            return _checked_label(row[field])
        except BadRow as error:
            raise BadRow(f"field {field!r}: {error}", field) from error


def _itself(member: TarMember) -> TarMember:
    return member


def _json_row(content: bytes, where: str) -> dict[str, Any]:
    content = content.removeprefix(UTF8_BOM)
    try:
        return parse_row(content)
    except BadRow as error:
        decoding = error.__cause__
        # Of JSON that cannot be decoded the column is one of its line, else one of the whole member.
        place = decoding.pos if isinstance(decoding, json.JSONDecodeError) else error.column - 1
        raise _bad_member(str(error), content, place, where) from error


def _bad_field(error: BadRow, content: bytes, where: str) -> _BadMember:
    """A mistake in a row that was parsed, with the place of its field in the `.json` member."""
    content = content.removeprefix(UTF8_BOM)
    place = 0 if error.field is None else _key_place(content.decode(), error.field)
    return _bad_member(str(error), content, place, where)


def _bad_member(reason: str, content: bytes, place: int, where: str) -> _BadMember:
    before = content.decode("utf-8", errors="replace")[:place]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return _BadMember(reason, f"{where}:{line}:{column}", content)


def _key_place(text: str, key: str) -> int:
    """Where a key of the JSON object `text` stands, which has it once; keys of objects inside it do not count."""
    decode = json.JSONDecoder().raw_decode
    end = text.index("{") + 1
    while True:
        start = text.index('"', end)
        found, end = decode(text, start)
        if found == key:
            return start
        value = text.index(":", end) + 1
        while text[value].isspace():
            value += 1
        _, end = decode(text, value)


def _text(content: bytes, where: str) -> str:
    from webdataset.autodecode import decoders

    try:
        text: str = decoders["txt"](content)
    except UnicodeDecodeError as error:
        raise _BadMember(f"not UTF-8 at byte {error.start} ({error.reason})", where, content) from error
    return text.removeprefix(UTF8_BOM.decode()).replace("\r\n", "\n")


def _image_of(sample: TarSample[TarMember], where: str) -> TarMember:
    images = [suffix for suffix in sample.parts if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        has = _suffixes(images or [*sample.parts, *sample.others])
        wanted = " ".join(f".{suffix}" for suffix in sorted(IMAGE_SUFFIXES))
        raise DataError(
            f"{where}: a sample has one image ({wanted}), this one has {has}; the members of a sample must "
            "stand together (webdataset.ShardWriter, or tar --sort=name)"
        )
    image = sample.parts[images[0]]
    if not 0 < image.size <= MAX_MEMBER_BYTES:
        raise DataError(f"{where}.{images[0]}: an image of {image.size} bytes; 1 to {MAX_MEMBER_BYTES} can be read")
    return image


def _checked_label(label: Any) -> int | str:
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise BadRow(f"a class is an integer or a string, found {json_type(label)}")
    if isinstance(label, int) and not 0 <= label < MAX_CLASSES:
        raise BadRow(f"a class is an integer from 0 to {MAX_CLASSES - 1}, found {label}")
    return label


def _class_names(labels: Sequence[int | str], given: Sequence[str] | None, where: str) -> Sequence[str]:
    if not labels:
        raise DataError(f"0 samples in {where}; set data.path to shards with images")
    numbers = [label for label in labels if isinstance(label, int)]
    if 0 < len(numbers) < len(labels):
        raise DataError(f"{where}: some classes are integers and some strings; write all in one way")
    if given is not None:
        unknown = sorted({str(label) for label in labels} - set(given))
        if unknown:
            raise DataError(f"{where}: {unknown[0]!r} is no class of the training data, which has {_list(given)}")
        return list(given)
    names = [str(number) for number in range(max(numbers) + 1)] if numbers else sorted({str(label) for label in labels})
    if len(names) < 2:
        raise DataError(f"{where}: a single class, {names[0]!r}; at least two are needed")
    return names


def _suffixes(suffixes: Sequence[str]) -> str:
    return _list([f".{shown(suffix)}" for suffix in suffixes])


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _REPORTED_KINDS} more" if len(names) > _REPORTED_KINDS else ""
    return ", ".join(names[:_REPORTED_KINDS]) + more


def _name_of(files: Sequence[Path]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more shards" if len(files) > 1 else "")


def _report_left_out(name: str, left_out: Counter[str], read: frozenset[str]) -> None:
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(_REPORTED_KINDS))
        wanted = " ".join(f".{suffix}" for suffix in sorted(read))
        logger.info("%s: left out %d members (%s); read are %s", name, left_out.total(), kinds, wanted)
