"""Config -> Inspection: what a run would train on, without a model. Layer 4."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from truthgpt.build_data import (
    TokenizedText,
    bucket_bins,
    build_tokenizer,
    packed_dataset,
    packing_pays,
    row_dataset,
    rows_per_micro_batch,
    tokenize_text,
    wants_packing,
)
from truthgpt.build_images import build_image_data
from truthgpt.build_sources import TextData, TextPart, build_text_data, training_documents
from truthgpt.config.schema import Config
from truthgpt.data.base import Document, ImageSource, Layout, SampleDataset
from truthgpt.data.batch_order import BucketedOrder, ShuffledOrder
from truthgpt.data.inspection import (
    Filling,
    LengthSummary,
    filling,
    marked_tokens,
    packed_documents,
    summarize_lengths,
    token_texts,
)
from truthgpt.data.packing import PackedDataset
from truthgpt.data.samples import BlockDataset
from truthgpt.data.split import DocumentSet, split_documents
from truthgpt.data.stream import WeightedStream

Int64Array = npt.NDArray[np.int64]

STREAM_DOCUMENTS = 2048
"""Documents of a stream that are looked at."""


@dataclass(frozen=True)
class InspectedToken:
    """A token as it is written, and whether the loss counts it."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Inspection:
    """What the training documents are like.

    `ways` is keyed by `joined`, `padding`, `bucketing` and `packing`; `chosen` says which one the configuration asks
    for. `samples` are lists of documents, each a list of tokens: a packed sample has several documents.
    """

    documents: int
    validation_documents: int
    tokens: int
    trained_tokens: int
    samples: int
    lengths: LengthSummary
    ways: dict[str, Filling]
    chosen: str
    overlong_rows: int
    overlong: str
    unsupervised_samples: int
    problems: dict[str, int]
    first_samples: list[list[list[InspectedToken]]]
    partial: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values; `useful_token_share` by way of batching."""
        values = dataclasses.asdict(self)
        ways = values.pop("ways")
        for key in ("useful_token_share", "steps_per_epoch"):
            values[key] = {way: filled[key] for way, filled in ways.items()}
        bars = self.lengths.histogram
        values["lengths"]["histogram"] = [{"from": low, "to": high, "samples": n} for low, high, n in bars]
        return values


@dataclass(frozen=True)
class ImageInspection:
    """Images of each class, by name."""

    training_images: dict[str, int]
    validation_images: dict[str, int]


def inspect_images(config: Config) -> ImageInspection:
    """Count the images of every class; one is read for each label, none is decoded.

    Raises:
        DataError: the images cannot be read.
    """
    data = build_image_data(config)
    return ImageInspection(
        _by_class(data.source, data.train.tolist()), _by_class(data.validation_source, data.validation.tolist())
    )


def inspect_text(config: Config, first_samples: int) -> Inspection:
    """Read, tokenise and count what `config` would train on; of a stream the first 2,048 documents.

    Args:
        first_samples: how many samples to show token by token.

    Raises:
        DataError: the data cannot be read, or no sample has a token the loss counts.
    """
    data = build_text_data(config)
    tokenizer = build_tokenizer(config, data)
    streamed = any(isinstance(part.train, WeightedStream) for part in data.parts)
    parts = [(_documents(part), part.layout) for part in data.parts]
    heads = [dataclasses.replace(part, train=documents) for part, (documents, _) in zip(data.parts, parts, strict=True)]
    text = tokenize_text(TextData(tuple(heads)), tokenizer)
    stores = text.stores
    chosen = _chosen(config, text, streamed)
    rows = [
        row_dataset(config.data, store, layout, documents, report=chosen != "joined")
        for store, (documents, layout) in zip(stores, parts, strict=True)
    ]
    packed = [packed_dataset(config, dataset, tokenizer) for dataset in rows]
    joined = [
        BlockDataset(store, config.data.max_seq_len)
        for store, (_, layout) in zip(stores, parts, strict=True)
        if layout == "stream"
    ]
    datasets: dict[str, Sequence[SampleDataset]] = {"packing": packed, "joined": joined}
    shown = datasets.get(chosen, rows)
    lengths = np.concatenate([dataset.lengths for dataset in rows]).astype(np.int64)
    problems: Counter[str] = Counter()
    for store in stores:
        problems.update(store.meta.problems)
    return Inspection(
        documents=sum(store.meta.documents for store in stores),
        validation_documents=sum(len(part.validation) for part in data.parts if part.validation is not None),
        tokens=sum(store.meta.tokens for store in stores),
        trained_tokens=sum(store.meta.trained_tokens for store in stores),
        samples=sum(len(dataset) for dataset in shown),
        lengths=summarize_lengths(lengths),
        ways=_ways(config, lengths, packed, joined),
        chosen=chosen,
        overlong_rows=0 if chosen == "joined" else sum(dataset.overlong_rows for dataset in rows),
        overlong=config.data.overlong,
        unsupervised_samples=sum(dataset.unsupervised_samples for dataset in rows),
        problems=dict(problems),
        first_samples=[
            [_written(marked_tokens(piece), tokenizer) for piece in packed_documents(shown[0].read(index))]
            for index in range(min(first_samples, len(shown[0])))
        ],
        partial=streamed,
    )


def _documents(part: TextPart) -> DocumentSet:
    """The training documents of a part; of a stream the first ones."""
    if isinstance(part.train, DocumentSet):
        return part.train
    return split_documents(_Head(part.train, part.layout), validation_fraction=0.0).train


@dataclass
class _Head:
    """The first documents of a stream as a source."""

    stream: WeightedStream
    layout: Layout

    def documents(self) -> Iterator[Document]:
        return islice(training_documents(self.stream), STREAM_DOCUMENTS)


def _chosen(config: Config, text: TokenizedText, streamed: bool) -> str:
    """The way of batching that a run would take, if the model allows packing."""
    has_rows = text.data.has_rows
    if wants_packing(config.data, has_rows) and (config.data.packing is True or streamed or packing_pays(config, text)):
        return "packing"
    if not has_rows:
        return "joined"
    return "bucketing" if config.data.bucket_by_length else "padding"


def _ways(
    config: Config, lengths: Int64Array, packed: Sequence[PackedDataset], joined: Sequence[BlockDataset]
) -> dict[str, Filling]:
    accumulation, length = config.training.grad_accum_steps, config.data.max_seq_len
    rows = rows_per_micro_batch(config)
    tokens = int(lengths.sum())
    shuffled = ShuffledOrder(len(lengths), rows, accumulation, config.seed)
    bins = bucket_bins(config.data.model_copy(update={"bucket_by_length": True}))
    assert bins is not None
    bucketed = BucketedOrder(lengths, bins, rows, accumulation, config.seed, config.data.max_tokens)
    ways = {"padding": filling(lengths, shuffled), "bucketing": filling(lengths, bucketed, bins)}
    positions = sum(len(dataset) for dataset in packed) * length
    ways["packing"] = Filling(tokens / positions, -(-positions // (rows * accumulation * length)))
    if joined:
        blocks = sum(len(dataset) for dataset in joined)
        share = sum(int(dataset.lengths.sum()) for dataset in joined) / (blocks * length)
        ways["joined"] = Filling(share, -(-blocks // (rows * accumulation)))
    return ways


def _written(tokens: list[tuple[int, bool]], tokenizer: PreTrainedTokenizerFast) -> list[InspectedToken]:
    special = set(tokenizer.all_special_ids)
    texts = token_texts([token for token, _ in tokens], lambda ids: str(tokenizer.decode(list(ids))))
    return [
        InspectedToken(text, trained, token in special) for text, (token, trained) in zip(texts, tokens, strict=True)
    ]


def _by_class(source: ImageSource, indices: Sequence[int]) -> dict[str, int]:
    counts = Counter(source.read(index).label for index in indices)
    return {name: counts[label] for label, name in enumerate(source.classes)}
