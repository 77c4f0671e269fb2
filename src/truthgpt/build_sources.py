"""Where the documents of a run come from: sources and their split from a Config. Layer 4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from truthgpt.config.data_section import DataConfig, MixedSource
from truthgpt.config.schema import Config
from truthgpt.config.section import Component
from truthgpt.data.base import Document, ImageFields, Layout, Source, StreamSource
from truthgpt.data.rows import BadRowPolicy, RowFields
from truthgpt.data.split import DocumentSet, split_documents
from truthgpt.data.stream import WeightedStream
from truthgpt.data.stream_holdout import held_out, hold_out
from truthgpt.data.token_store import default_cache_dir
from truthgpt.errors import ConfigError, Problem
from truthgpt.factories.datasets import DATASETS

TOKENIZER_DOCUMENTS = 10_000
"""Documents of a stream that a new tokenizer is trained on."""


@dataclass(frozen=True)
class TextPart:
    """One source, divided: what is trained on, what is held out, and how documents become samples."""

    train: DocumentSet | WeightedStream
    validation: DocumentSet | None
    layout: Layout
    weight: float | None = None


@dataclass(frozen=True)
class TextData:
    """The documents of a run, source by source."""

    parts: tuple[TextPart, ...]

    @property
    def has_rows(self) -> bool:
        """Whether any source gives rows, which differ in length, and not joined text."""
        return any(part.layout == "rows" for part in self.parts)

    def train_documents(self) -> Iterator[Document]:
        """All training documents, source after source; of a stream the first 10,000."""
        for part in self.parts:
            if isinstance(part.train, WeightedStream):
                yield from islice(training_documents(part.train), TOKENIZER_DOCUMENTS)
            else:
                yield from part.train


def build_text_data(config: Config) -> TextData:
    """Divide every source into training and validation documents; read only those not known from an earlier start.

    Raises:
        DataError: files missing, empty or malformed.
    """
    data = config.data
    make = _stream_part if data.streaming else _indexed_part
    if not data.sources:
        return TextData((make(data, "data.source", None),))
    parts = zip(_mixed(data), data.sources, strict=True)
    return TextData(tuple(make(one, f"data.sources[{n}]", item.weight) for n, (one, item) in enumerate(parts)))


def build_source(
    data: DataConfig, split: str | None, images: ImageFields | None = None, classes: Sequence[str] | None = None
) -> Any:
    """The source of `data`, a `Source` or, with `images`, an `ImageSource`.

    Args:
        split: split of the dataset, for sources that have splits.
        classes: names of the classes where they are set already.
    """
    rows = RowFields(
        data.format, data.text_field, data.prompt_field, data.completion_field, data.messages_field, data.train_on
    )
    return DATASETS.build(
        data.source.type,
        data.source.options,
        **{key: getattr(data, key) for key in DATASETS.runtime if key in DataConfig.model_fields and key != "split"},
        split=split,
        rows=rows,
        bad_rows=BadRowPolicy(data.on_bad_row, data.max_bad_fraction),
        images=images,
        classes=classes,
    )


def validation_source(
    data: DataConfig, images: ImageFields | None = None, classes: Sequence[str] | None = None
) -> Any | None:
    """The source of the validation documents or images where `data` names one, else None."""
    if data.validation_path is not None:
        # Files are no dataset with subsets and splits: all of them is read, whatever part is trained on.
        data = data.model_copy(update={"path": data.validation_path, "dataset": None, "subset": None})
        return build_source(data, None, images, classes)
    return None if data.validation_split is None else build_source(data, data.validation_split, images, classes)


def _mixed(data: DataConfig) -> list[DataConfig]:
    """`data` as each source of the mixture sees it. `data.validation_path` is read once, by the first source that has
    no validation documents of its own."""
    mixed, shared = [], data.validation_path
    for item in data.sources:
        one = _with_source(data, item)
        if data.validation_path is not None and item.validation_path is None:
            read_here = shared if item.validation_split is None else None
            one = one.model_copy(update={"validation_path": read_here, "validation_fraction": 0.0})
            shared = None if read_here is not None else shared
        mixed.append(one)
    return mixed


def _with_source(data: DataConfig, item: MixedSource) -> DataConfig:
    """`data` as one source of the mixture sees it."""
    own = {key: getattr(item, key) for key in MixedSource.model_fields if key in DataConfig.model_fields}
    given = {key: value for key, value in own.items() if value is not None}
    return data.model_copy(update={**given, "source": Component(type=item.source, **(item.model_extra or {}))})


def _indexed_part(data: DataConfig, name: str, weight: float | None) -> TextPart:
    source: Source = build_source(data, data.split)
    split = split_documents(source, data.validation_fraction, validation_source(data), default_cache_dir())
    return TextPart(split.train, split.validation, source.layout, weight)


def _stream_part(data: DataConfig, name: str, weight: float | None) -> TextPart:
    """A source that is read while training; its validation documents are read, and kept, before."""
    source = build_source(data, data.split)
    if not isinstance(source, StreamSource):
        message = f"true, and data source {data.source.type} cannot be read while training"
        raise ConfigError([Problem(key="data.streaming", message=message, suggestion="set it to false")])
    own, fraction = validation_source(data), 0.0
    if own is not None:
        documents: DocumentSet | None = split_documents(own, 0.0, None, default_cache_dir()).train
    else:
        documents = hold_out(source, data.validation_fraction, default_cache_dir())
        fraction = 0.0 if documents is None else data.validation_fraction
    stream = WeightedStream(name, source, 1.0 if weight is None else weight, fraction)
    return TextPart(stream, documents, source.layout, weight)


def training_documents(stream: WeightedStream) -> Iterator[Document]:
    """The documents of a stream in the source's own order, those held out for validation left out."""
    for shard in range(len(stream.source.shards())):
        for document, _ in stream.source.read(shard):
            if not held_out(document.key, stream.held_out):
                yield document
