"""Rows and images of a dataset that the `datasets` library reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from truthgpt.data.base import SHARD_START, Cursor, Document, ImageExample, ImageFields
from truthgpt.data.hf_dataset import (
    SUFFIXES,
    HfLocation,
    dataset_fingerprint,
    dataset_identity,
    import_datasets,
    no_rows,
    open_stored,
    open_stream,
    reading,
)
from truthgpt.data.jsonl_source import JsonlSource
from truthgpt.data.rows import BadRowPolicy, RowFields, RowReader
from truthgpt.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset, IterableDataset

BATCH_ROWS = 1000
"""Rows taken out of Arrow at a time."""
STORED_SHARD_ROWS = 8192
"""Rows of one shard, when a stored dataset is read as a stream."""
FILE_PARTS = 64
"""Parts of whole row groups that a parquet file is entered at; opening one reads the file's footer (milliseconds)."""
TOOLS_FIELD = "tools"

NumberedRow = tuple[int, Mapping[str, Any], Cursor]
"""Number of a row in its shard (from 0), the row, and the cursor behind it."""


class _Rows(Protocol):
    """Rows in shards."""

    shards: int

    def read(self, shard: int, cursor: Cursor) -> Iterator[NumberedRow]: ...

    def place(self, shard: int, number: int) -> str:
        """The row as messages call it."""
        ...


def open_rows(
    dataset: str | None,
    subset: str | None,
    split: str,
    path: Sequence[str] | None,
    fields: RowFields,
    bad_rows: BadRowPolicy,
    streaming: bool,
) -> HfSource | JsonlSource:
    """The rows of one split: those of JSON Lines in `path` without the library, which is lenient, names no line of a
    mistake and takes seven times the size of a document in memory.

    Args:
        dataset, subset, split, path, fields, bad_rows, streaming: as for `HfSource`.

    Raises:
        ConfigError: as `HfSource`.
        DataError: as `HfSource`, or a path that matches no file.
    """
    if path and HfLocation(dataset, subset, split, tuple(path)).is_json_lines():
        return JsonlSource(path, fields, bad_rows, SUFFIXES)
    return HfSource(dataset, subset, split, path, fields, bad_rows, streaming)


class HfSource:
    """Rows of one split as the library reads them; what a row means is decided by `rows.RowReader`.

    A dataset with random access is converted to Arrow once, into the cache of `datasets`; with `streaming` its files
    are read as they are, each a shard. A saved folder is Arrow already, and its shards are ranges of rows. Rows are
    counted from 0, as `datasets` does. In chats, nulls inside a message that Arrow filled in (it gives every message
    all keys) are dropped.

    Args:
        dataset: name of a hub dataset; or a local folder, written by `save_to_disk` or holding data files.
        subset: configuration of the dataset.
        split: its split, for example `train` or, without streaming, `train[:10%]`.
        path: instead of `dataset`: parquet, csv, json, jsonl or arrow files of one kind, folders of them or globs.
        fields: what a row holds.
        bad_rows: what a malformed row does.
        streaming: read the files as they are.

    Raises:
        ConfigError: `datasets` is missing, or dataset and path are not one of the two.
        DataError: `dataset` is a folder that does not exist.
    """

    layout: Literal["stream", "rows"] = "rows"

    def __init__(
        self,
        dataset: str | None,
        subset: str | None,
        split: str,
        path: Sequence[str] | None,
        fields: RowFields,
        bad_rows: BadRowPolicy,
        streaming: bool,
    ) -> None:
        import_datasets()
        self._location = HfLocation(dataset, subset, split, tuple(path) if path else None, _columns(fields))
        self._location.check()
        self._fields = fields
        self._bad_rows = bad_rows
        self._streaming = streaming
        self._reported = False
        self._stream_reader = RowReader(fields, bad_rows, whole_pass=False)

    def documents(self) -> Iterator[Document]:
        """All usable rows in order.

        Raises:
            ConfigError: no such subset or split.
            DataError: the dataset is not found or not readable, lacks a field, or a row is malformed.
        """
        reader = RowReader(self._fields, self._bad_rows)
        for shard in range(self._rows.shards):
            for document, _ in self._read(shard, SHARD_START, reader):
                yield document
        reader.finish(self._location.name, report=not self._reported)
        self._reported = True

    def identity(self) -> str:
        """The files' places, sizes and times, or the hub dataset's version; and what is read from a row."""
        return f"{dataset_identity(self._location)} {self._streaming} {self._fields} {self._bad_rows}"

    def shards(self) -> Sequence[str]:
        """One name for each file that is read (for a saved folder: for each 8,192 rows)."""
        return [f"{self._location.name} shard {shard}" for shard in range(self._rows.shards)]

    def read(self, shard: int, cursor: Cursor = SHARD_START) -> Iterator[tuple[Document, Cursor]]:
        """Usable rows of a shard from `cursor` on: (part, rows before in it, rows before in the shard) of a file, (rows
        before,) of a saved folder.

        A saved folder is entered anywhere, a parquet file at any 64th of it that starts a row group; other files are
        read again up to there.

        Raises:
            ConfigError, DataError: as `documents` does.
        """
        return self._read(shard, cursor, self._stream_reader)

    def fingerprint(self) -> str:
        """Digest of the files' contents, or of the hub dataset's version, and of what is read from a row."""
        what = f"{dataset_fingerprint(self._location)} {self._location.split} {self._fields}"
        return hashlib.sha256(what.encode()).hexdigest()

    def _read(self, shard: int, cursor: Cursor, reader: RowReader) -> Iterator[tuple[Document, Cursor]]:
        for number, row, after in self._rows.read(shard, cursor):
            document = reader.accept(row, self._rows.place(shard, number))
            if document is not None:
                yield document, after

    @cached_property
    def _rows(self) -> _Rows:
        if self._streaming and self._location.saved_folder() is None:
            stream = open_stream(self._location)
            columns = _wanted_columns(self._fields, stream.column_names, self._location)
            return _StreamedRows(stream if columns is None else stream.select_columns(columns), self._location)
        stored = open_stored(self._location)
        columns = _wanted_columns(self._fields, stored.column_names, self._location)
        return _StoredRows(stored.select_columns(columns or stored.column_names), self._location.name)


class _StoredRows:
    """A dataset with random access, in ranges of rows. Cursor: (rows before in the shard,)."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self.shards = max(1, -(-len(dataset) // STORED_SHARD_ROWS))
        self._dataset = dataset.with_format(None)
        self._name = name
        self._structs = _struct_columns(dataset.features)

    def read(self, shard: int, cursor: Cursor) -> Iterator[NumberedRow]:
        first = shard * STORED_SHARD_ROWS
        number = cursor[-1] if cursor else 0
        end = min(STORED_SHARD_ROWS, len(self._dataset) - first)
        while number < end:
            with reading(self._name):
                batch = self._dataset[first + number : first + min(number + BATCH_ROWS, end)]
            for row in _rows_of(batch, self._structs):
                number += 1
                yield number - 1, row, (number,)

    def place(self, shard: int, number: int) -> str:
        return f"{self._name} row {shard * STORED_SHARD_ROWS + number}"


class _StreamedRows:
    """A dataset read from its files. Cursor: (part of the file, rows before in the part, rows before in the shard)."""

    def __init__(self, dataset: IterableDataset, location: HfLocation) -> None:
        self.shards = max(1, dataset.num_shards)
        self._dataset = dataset.with_format("arrow")
        self._location = location

    def read(self, shard: int, cursor: Cursor) -> Iterator[NumberedRow]:
        part, done, number = cursor or (0, 0, 0)
        with reading(self._location.name, self._location):
            file = self._dataset.shard(self.shards, shard)
            if hasattr(file, "reshard"):  # newer versions: the row groups of a parquet file one by one
                file = file.reshard()
        parts = min(max(1, file.num_shards), FILE_PARTS)
        for index in range(part, parts):
            rows = file.shard(parts, index) if parts > 1 else file
            for row in self._read_part(rows.skip(done) if done else rows):
                done, number = done + 1, number + 1
                yield number - 1, row, (index, done, number)
            done = 0

    def _read_part(self, rows: IterableDataset) -> Iterator[Mapping[str, Any]]:
        from datasets import Features

        tables = rows.iter(batch_size=BATCH_ROWS)
        while True:
            with reading(self._location.name, self._location):
                table = next(tables, None)
                if table is None:
                    return
                # Of a JSON array they are not known before; values of mixed types are strings of JSON until decoded.
                features = rows.features or Features.from_arrow_schema(table.schema)
                batch = features.decode_batch(table.to_pydict())
            yield from _rows_of(batch, _struct_columns(features))

    def place(self, shard: int, number: int) -> str:
        name = self._location.name
        return f"{name} row {number}" if self.shards == 1 else f"{name} shard {shard} row {number}"


def _wanted_columns(fields: RowFields, columns: Sequence[str] | None, location: HfLocation) -> list[str] | None:
    """The columns to read; None when the dataset cannot tell before reading which it has."""
    if columns is None:
        return None
    for field in fields.used():
        if not columns:
            raise no_rows(location.name)
        if field not in columns:
            setting = next(key for key, value in vars(fields).items() if key.endswith("_field") and value == field)
            # Those that are not read too: one of them is the one that is meant.
            there = open_stream(replace(location, columns=())).column_names or columns
            raise DataError(
                f"{location.name}: no field {field!r}, the rows have {', '.join(there)} (set data.{setting})"
            )
    return [field for field in _columns(fields) if field in columns]


def _columns(fields: RowFields) -> tuple[str, ...]:
    """Fields that are read of a row, those that it need not have too."""
    return tuple(dict.fromkeys([*fields.used(), *([TOOLS_FIELD] if fields.format == "chat" else [])]))


def _struct_columns(features: Mapping[str, Any]) -> frozenset[str]:
    """Columns that are lists of objects with the same keys in each, absent ones filled with null."""
    return frozenset(name for name, feature in features.items() if isinstance(getattr(feature, "feature", None), dict))


def _rows_of(batch: Mapping[str, list[Any]], structs: frozenset[str]) -> Iterator[Mapping[str, Any]]:
    names = list(batch)
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(names, values, strict=True))
        for name in structs.intersection(names):
            row[name] = _without_nulls(row[name])
        yield row


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that hold null, save `content`: a message may say that it has none."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"}


class HfImageSource:
    """Images and classes of one split.

    The classes are the names that the dataset has for them, else the sorted distinct values of the label field. The
    key of an image is its number: what is held out for validation stays the same when rows are added at the end.

    Args:
        dataset, subset, split, path: as for `HfSource`.
        fields: the field that holds the image (bytes, or the path of an image file), and the one of its class.
        classes: names of the classes, in the order of their labels, where another source has set them. None: as above.

    Raises:
        ConfigError: `datasets` is missing, no such subset or split, or dataset and path are not one of the two.
        DataError: the dataset is not found or not readable, or lacks a field.
    """

    classes: Sequence[str]

    def __init__(
        self,
        dataset: str | None,
        subset: str | None,
        split: str,
        path: Sequence[str] | None,
        fields: ImageFields,
        classes: Sequence[str] | None = None,
    ) -> None:
        datasets = import_datasets()
        image_field, label_field = fields.image_field, fields.label_field
        self._location = HfLocation(dataset, subset, split, tuple(path) if path else None)
        self._location.check()
        name = self._location.name
        rows = open_stored(self._location)
        for setting, field in (("image_field", image_field), ("label_field", label_field)):
            if field not in rows.column_names:
                there = ", ".join(rows.column_names)
                raise DataError(f"{name}: no field {field!r}, the rows have {there} (set data.{setting})")
        with reading(name):
            self._labels = rows[label_field][:]
            self._images = rows.select_columns([image_field]).cast_column(image_field, datasets.Image(decode=False))
        self._field, self._label_field = image_field, label_field
        place = f"{name} field {label_field}"
        self._values, self.classes = _classes(rows.features[label_field], self._labels, place)
        if classes is not None:
            self._values, self.classes = _renumbered(self._values, self.classes, classes, place), list(classes)
        # Now, not when the image is read: that may be hours into a run.
        for index, label in enumerate(self._labels):
            if label not in self._values:
                raise DataError(f"{name} row {index}: its class is {label!r}; correct the row")

    def keys(self) -> Sequence[str]:
        """The images' numbers, from 0."""
        return [str(index) for index in range(len(self._labels))]

    def read(self, index: int) -> ImageExample:
        """Image `index`.

        Raises:
            DataError: the row has no image or no class, or the image's file cannot be read.
        """
        where = f"{self._location.name} row {index}"
        label = self._values[self._labels[index]]
        with reading(where):
            image = self._images[index][self._field]
            if image is None or (image["bytes"] is None and image["path"] is None):
                raise DataError(f"{where}: field {self._field!r} holds no image; correct the row")
            data = image["bytes"] if image["bytes"] is not None else _file_bytes(image["path"])
        return ImageExample(data, label, where)

    def fingerprint(self) -> str:
        """Digest of the files' contents, or of the hub dataset's version, and of the fields that are read."""
        what = [dataset_fingerprint(self._location), self._location.split, self._field, self._label_field]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _file_bytes(path: str | Path) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read()


def _classes(feature: Any, labels: Sequence[Any], place: str) -> tuple[dict[Any, int], list[str]]:
    """The index of every label value, and the names of the classes."""
    names = getattr(feature, "names", None)
    if names:
        return {index: index for index in range(len(names))}, list(names)
    values = {label for label in labels if label is not None}
    if not values or not (all(isinstance(v, str) for v in values) or all(isinstance(v, int) for v in values)):
        raise DataError(f"{place}: a class is a string or a whole number, the same in every row")
    ordered = sorted(values)
    return {value: index for index, value in enumerate(ordered)}, [str(value) for value in ordered]


def _renumbered(labels: Mapping[Any, int], found: Sequence[str], classes: Sequence[str], place: str) -> dict[Any, int]:
    """The index in `classes` of every label value; a class may have no image here."""
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(f"{place}: class {unknown[0]!r} is none of the {len(classes)} classes of the training images")
    return {value: list(classes).index(found[index]) for value, index in labels.items()}
