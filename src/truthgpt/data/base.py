"""What a data source, a sample, a collator and a batch are. Protocols and plain records only."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

IGNORED_LABEL = -100
"""Label of a position the loss does not count."""

Layout = Literal["stream", "rows"]
"""How documents become samples: a `stream` is joined (an end-of-text token after each document) and cut into blocks of
`max_seq_len`; of `rows`, each is a sample of its own."""

Cursor = tuple[int, ...]
"""A place inside a shard, in the source's own terms: plain numbers, which a checkpoint can hold."""

SHARD_START: Cursor = ()
"""The place before the first document of a shard."""


@dataclass(frozen=True)
class Segment:
    """A piece of a document's text, and whether the loss counts it."""

    text: str
    trained: bool = True


ASSISTANT = "assistant"
"""Role of the messages that are answers."""


@dataclass(frozen=True)
class Conversation:
    """Chat messages as a chat template reads them: plain JSON values, `role` and `content` in each message.

    `context` are the places of the answers that are read and not trained, whatever `trained` says.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    trained: Literal["all", "assistant"] = "all"
    context: tuple[int, ...] = ()


@dataclass(frozen=True)
class Document:
    """One text of a source.

    `key` names it stably within its source (the same text keeps its key when the source is read again); the
    train/validation split hashes it. `where` is the place to show in an error, for example `train.jsonl:17`.
    `continues` marks a piece that goes on exactly where the document before it stopped: no end-of-text token is put
    between the two. A chat has its `conversation`, which decides what is tokenised; its segments are the contents of
    the messages, for whoever only wants the words.
    """

    key: str
    segments: tuple[Segment, ...]
    where: str
    continues: bool = False
    conversation: Conversation | None = None

    @property
    def text(self) -> str:
        """All segments joined."""
        return "".join(segment.text for segment in self.segments)


class Source(Protocol):
    """Documents that can be read again and again in the same order."""

    layout: Layout

    def documents(self) -> Iterator[Document]:
        """All documents in order. Raises DataError with file:line for one that cannot be read."""
        ...


@runtime_checkable
class IdentifiedSource(Source, Protocol):
    """A source that can tell without reading its documents that they are the ones read before."""

    def identity(self) -> str | None:
        """Text that changes whenever a document may have: paths, sizes and times of the files, and every setting that
        shapes what is read from them. None when only reading can tell."""
        ...


@runtime_checkable
class StreamSource(Protocol):
    """Documents that are read while training: several shards, each of which can be entered at any cursor."""

    layout: Layout

    def shards(self) -> Sequence[str]:
        """Names of the shards, in the source's own order; the same at every call."""
        ...

    def read(self, shard: int, cursor: Cursor = SHARD_START) -> Iterator[tuple[Document, Cursor]]:
        """Documents of a shard from `cursor` on, each with the cursor behind it, in a fixed order.

        Raises DataError as `Source.documents` does.
        """
        ...

    def fingerprint(self) -> str:
        """Digest that changes when a shard does; cheap, even where the shards are large."""
        ...


@dataclass(frozen=True)
class ImageFields:
    """Which fields of a row hold an image and its class; names as in `data.*`."""

    image_field: str
    label_field: str


@dataclass(frozen=True)
class ImageExample:
    """One image and its class. `data` are the bytes of an image file; `where` is the place to show in an error."""

    data: bytes
    label: int
    where: str


class ImageSource(Protocol):
    """Labelled images by index."""

    classes: Sequence[str]
    """Names of the classes; a label is an index into it."""

    def keys(self) -> Sequence[str]:
        """Stable name of every image, in order; the train/validation split hashes them."""
        ...

    def read(self, index: int) -> ImageExample:
        """Image `index`. Raises DataError when it cannot be read."""
        ...

    def fingerprint(self) -> str:
        """Digest that changes when any image or label does."""
        ...


class Sample(TypedDict):
    """One training sample: `input_ids` and `labels`, int64 `(T,)`; `labels[t]` is the token after `input_ids[t]`."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


class PackedSample(Sample):
    """Several documents in one row of fixed length T; the rest of the row is padding, itself one more document.

    `position_ids`, int64 `(T,)`, restart at 0 with every document. `document_lengths`, int64 `(documents,)`, sum to T.
    """

    position_ids: npt.NDArray[np.int64]
    document_lengths: npt.NDArray[np.int64]


class ImageSample(TypedDict):
    """One image, float32 `(C, H, W)` and normalised, and its class, an int64 scalar."""

    pixel_values: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


AnySample = Sample | PackedSample | ImageSample


class SampleDataset(Protocol):
    """Samples by index; `fingerprint` changes whenever any sample does."""

    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: int, epoch: int = 0) -> AnySample:
        """Sample `index` as epoch `epoch` sees it: random transforms are keyed by both."""
        ...


Batch = dict[str, torch.Tensor]
"""A micro-batch.

Text: `input_ids` and `labels`, both int64 `(B, T)`, labels already shifted, padding labelled -100. Packed rows have
also `position_ids`, int64 `(B, T)`, and `cu_seq_lens`, int32 `(N + 1,)`: document n covers positions `cu_seq_lens[n]`
to `cu_seq_lens[n + 1]` of the flattened `(B * T,)` batch; the last value is repeated up to a fixed length, and no
document crosses a row. Images: `pixel_values`, float32 `(B, C, H, W)`, and `labels`, int64 `(B,)`.
"""


LossAndLogits = tuple[torch.Tensor, Callable[[], torch.Tensor]]
"""What an objective gives for a micro-batch: the loss summed over its supervised labels (0-d), and what computes the
logits when somebody asks for them."""


class Collator(Protocol):
    """Turns samples into one micro-batch."""

    def __call__(self, samples: Sequence[Any]) -> Batch: ...


@dataclass(frozen=True)
class GlobalBatch:
    """The micro-batches of one optimizer step.

    `tokens` counts the supervised tokens of all of them: the denominator of the loss.
    """

    micro_batches: list[Batch]
    tokens: int
    samples: int
    epoch: int


class BatchOrder(Protocol):
    """Which samples make up which micro-batch of which step: a pure function of seed and step, O(1) in the step."""

    steps_per_epoch: int
    """Optimizer steps one pass takes."""

    def micro_batches(self, step: int) -> list[list[int]]:
        """Sample indices of every micro-batch of optimizer step `step` (from 0, over all epochs)."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Plain values that must be equal for two runs to have the same order; kept in the checkpoint."""
        ...


class TrainLoader(Protocol):
    """Global batches of every optimizer step, from any step on."""

    steps_per_epoch: int | None
    """Optimizer steps one pass takes; None where only reading tells."""

    def batches(self, start_step: int = 0) -> Generator[GlobalBatch, None, None]:
        """Global batches of `start_step`, `start_step + 1` and so on, without end."""
        ...

    def state_dict(self, step: int) -> dict[str, Any]:
        """Plain values from which a loader of the same data goes on after `step` steps."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises DataError when the data is not what `state` was saved with."""
        ...
