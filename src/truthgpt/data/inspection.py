"""What data is like before anything is trained on it: lengths, and how full batches would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import IGNORED_LABEL, BatchOrder, Sample

MEASURED_STEPS = 2000
"""Steps of the first epoch whose batches are looked at; a longer one is judged by its first ones."""

UTF8_CHARACTER_BYTES = 4
"""Tokens that a character is spread over at most."""
CONTEXT_BORDERS = 4
"""Ends of characters that are decoded in front of a token."""

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LengthSummary:
    """Input tokens of the samples: extremes, mean, percentiles, and how many lie in each of a few bars.

    `histogram` holds `(shortest, longest, samples)` of every bar.
    """

    shortest: int
    mean: float
    median: int
    p95: int
    p99: int
    longest: int
    histogram: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Filling:
    """How a way of batching fills an epoch: share of the positions that hold a token, and optimizer steps."""

    useful_token_share: float
    steps_per_epoch: int


def summarize_lengths(lengths: Int64Array, bars: int = 12) -> LengthSummary:
    """Summary of `lengths`, `(samples,)`, at least one; the bars are of equal width."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = -(-(longest - shortest + 1) // bars)
    counts = np.bincount((lengths - shortest) // width).tolist()
    lows = range(shortest, longest + 1, width)
    histogram = tuple((low, min(low + width - 1, longest), n) for low, n in zip(lows, counts, strict=True))
    median, p95, p99 = (int(value) for value in np.percentile(lengths, [50, 95, 99], method="higher"))
    return LengthSummary(shortest, float(lengths.mean()), median, p95, p99, longest, histogram)


def filling(lengths: Int64Array, order: BatchOrder, bins: Sequence[int] | None = None) -> Filling:
    """How full padded batches are in the first epoch.

    Args:
        lengths: input tokens of every sample, `(samples,)`.
        order: which samples share a micro-batch.
        bins: lengths that batches are padded to; None: to the longest of the micro-batch.
    """
    tokens, positions = 0, 0
    for step in range(min(order.steps_per_epoch, MEASURED_STEPS)):
        for micro_batch in order.micro_batches(step):
            batch = lengths[micro_batch]
            longest = int(batch.max())
            padded = longest if bins is None else next((size for size in sorted(bins) if size >= longest), longest)
            tokens += int(batch.sum())
            positions += padded * len(batch)
    return Filling(tokens / positions, order.steps_per_epoch)


def marked_tokens(sample: Sample) -> list[tuple[int, bool]]:
    """Every token of a sample with whether the loss counts it, in order; the first is never predicted."""
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    found = [(ids[0], False)]
    for place, label in enumerate(labels):
        counted = label != IGNORED_LABEL
        if place + 1 < len(ids):
            found.append((ids[place + 1], counted))
        elif counted:  # the last label is one token further than the inputs
            found.append((label, True))
    return found


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of every token where it stands; joined they are the text of all, unless U+FFFD stands in it.

    Decoded alone, a token would lose the space that SentencePiece tokenizers drop at the start of a text, and the bytes
    of one character would be none. A character of several tokens is the text of the last of them.
    """
    texts: list[str] = []
    borders = [0]  # places where a character ends
    for end in range(1, len(ids) + 1):
        start, context = borders[-1], borders[max(len(borders) - CONTEXT_BORDERS, 0)]
        whole = decode(ids[context:end])
        if whole.endswith("\ufffd") and end - start < UTF8_CHARACTER_BYTES and end < len(ids):
            texts.append("")
            continue
        before = decode(ids[context:start])
        texts.append(whole[len(before) :] if whole.startswith(before) else decode(ids[start:end]))
        borders.append(end)
    return texts


def packed_documents(sample: Any) -> list[Sample]:
    """The documents of a packed sample, its padding left out; another sample is its own only document."""
    if "document_lengths" not in sample:
        return [sample]
    ends = np.cumsum(sample["document_lengths"])
    pieces: list[Sample] = [
        {"input_ids": sample["input_ids"][start:end], "labels": sample["labels"][start:end]}
        for start, end in zip(ends - sample["document_lengths"], ends, strict=True)
    ]
    return [piece for piece in pieces if (piece["labels"] != IGNORED_LABEL).any()]
