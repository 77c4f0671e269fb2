"""What a data source, a collator and a batch are. Protocols only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch

IGNORED_LABEL = -100
"""Label of a position the loss does not count."""


@dataclass(frozen=True)
class Segment:
    """A piece of a document's text, and whether the loss counts it."""

    text: str
    trained: bool = True


@dataclass(frozen=True)
class Document:
    """One text of a source.

    `key` names it stably within its source (the same text keeps its key when the source is read again); the
    train/validation split hashes it. `where` is the place to show in an error, for example `train.jsonl:17`.
    `continues` marks a piece that goes on exactly where the document before it stopped: no end-of-text token is put
    between the two.
    """

    key: str
    segments: tuple[Segment, ...]
    where: str
    continues: bool = False

    @property
    def text(self) -> str:
        """All segments joined."""
        return "".join(segment.text for segment in self.segments)


class Source(Protocol):
    """Documents that can be read again and again in the same order.

    `layout` says how documents become samples: a `stream` is joined (an end-of-text token after each document) and cut
    into blocks of `max_seq_len`; of `rows`, each is a sample of its own, padded to the longest of its batch.
    """

    layout: Literal["stream", "rows"]

    def documents(self) -> Iterator[Document]:
        """All documents in order. Raises DataError with file:line for one that cannot be read."""
        ...


class Sample(TypedDict):
    """One training sample: `input_ids` and `labels`, int64 `(T,)`; `labels[t]` is the token after `input_ids[t]`."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


class SampleDataset(Protocol):
    """Samples by index; `fingerprint` changes whenever any sample does."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


Batch = dict[str, torch.Tensor]
"""A micro-batch: `input_ids` and `labels`, both int64 `(B, T)`, labels already shifted, padding labelled -100."""


class Collator(Protocol):
    """Turns samples into one micro-batch."""

    def __call__(self, samples: Sequence[Sample]) -> Batch: ...


@dataclass(frozen=True)
class GlobalBatch:
    """The micro-batches of one optimizer step.

    `tokens` counts the supervised tokens of all of them: the denominator of the loss.
    """

    micro_batches: list[Batch]
    tokens: int
    samples: int
    epoch: int
