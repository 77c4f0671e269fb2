"""Several documents in one row of fixed length that do not see each other: which ones, and how they are joined."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import IGNORED_LABEL, PackedSample, Sample
from truthgpt.data.order import KeyedPermutation
from truthgpt.runtime.seeds import derive_seed

if TYPE_CHECKING:
    from truthgpt.data.samples import RowDataset

PACKING_VERSION = 1
"""Part of the fingerprint: a change of which samples share a row raises it."""
PACKING_WINDOW = 16_384
"""Samples that are packed among themselves at least; packing takes memory and time by the window."""
ROWS_PER_WINDOW = 256
"""Rows that a window fills at least: only its last one is left with much padding."""
TOKENS_PER_DOCUMENT = 4
"""A row holds at most one document per so many positions, which bounds the length of `cu_seq_lens`."""

Int64Array = npt.NDArray[np.int64]


def max_packed_documents(max_seq_len: int) -> int:
    """Documents a row of `max_seq_len` tokens holds at most, the padding included."""
    return max(max_seq_len // TOKENS_PER_DOCUMENT + 1, 2)


def best_fit(lengths: Int64Array, capacity: int, max_items: int) -> list[list[int]]:
    """Best-fit decreasing bin packing (Johnson 1974): the longest first, each into the fullest row that still holds it.

    Deterministic; of equal lengths the first comes first. About a microsecond an item for capacities of a few thousand.

    Args:
        lengths: tokens of every item, `(items,)`, 1 to `capacity`.
        capacity: tokens a row.
        max_items: items a row at most.

    Returns:
        Indices of the items of every row.

    Raises:
        ValueError: a length outside 1 to `capacity`, or `max_items` below 1.
    """
    if max_items < 1:
        raise ValueError(f"max_items must be at least 1, not {max_items}")
    if lengths.size and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths must be 1 to {capacity}, not {lengths.min()} to {lengths.max()}")
    rows: list[list[int]] = []
    open_rows: defaultdict[int, list[list[int]]] = defaultdict(list)  # by free tokens
    free_sizes = 0  # bit n: some open row has n free tokens
    longest_first = np.argsort(-lengths, kind="stable")
    for item, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = free_sizes >> length
        if fitting:
            free = (fitting & -fitting).bit_length() - 1 + length
            candidates = open_rows[free]
            row = candidates.pop()
            if not candidates:
                free_sizes ^= 1 << free
        else:
            free = capacity
            row = []
            rows.append(row)
        row.append(item)
        free -= length
        if free and len(row) < max_items:
            open_rows[free].append(row)
            free_sizes |= 1 << free
    return rows


def join_samples(samples: Sequence[Sample], max_seq_len: int, pad_token_id: int) -> PackedSample:
    """One row of `max_seq_len` positions: the samples, each with positions from 0, and padding as one more document.

    The labels of a sample are shifted within it, so that none crosses a border; padding is labelled -100.

    Raises:
        ValueError: the samples have more than `max_seq_len` tokens together.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    padding = max_seq_len - sum(lengths)
    if padding < 0:
        raise ValueError(f"samples of {sum(lengths)} tokens do not fit into a row of {max_seq_len}")
    if padding:
        lengths.append(padding)
    input_ids = np.full(max_seq_len, pad_token_id, dtype=np.int64)
    labels = np.full(max_seq_len, IGNORED_LABEL, dtype=np.int64)
    start = 0
    for sample, length in zip(samples, lengths, strict=False):
        input_ids[start : start + length] = sample["input_ids"]
        labels[start : start + length] = sample["labels"]
        start += length
    document_lengths = np.array(lengths, dtype=np.int64)
    first_positions = np.cumsum(document_lengths) - document_lengths
    position_ids = np.arange(max_seq_len, dtype=np.int64) - np.repeat(first_positions, document_lengths)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "document_lengths": document_lengths,
    }


class PackedDataset:
    """The samples of a RowDataset, each in exactly one row of `max_seq_len` positions.

    Which samples share a row is decided once, for all epochs: they are put in an order keyed by `seed` and packed in
    windows of at least 16,384, so that the order of the file does not decide.

    Args:
        rows: the samples, none longer than `max_seq_len`.
        max_seq_len: positions a row.
        pad_token_id: fills the rest of a row.
        seed: seed of the run.
    """

    def __init__(self, rows: RowDataset, max_seq_len: int, pad_token_id: int, seed: int) -> None:
        self.fingerprint = hashlib.sha256(
            f"{rows.fingerprint} packed {PACKING_VERSION} {max_seq_len} {pad_token_id}".encode()
        ).hexdigest()
        self._rows = rows
        self._max_seq_len = max_seq_len
        self._pad_token_id = pad_token_id
        lengths = rows.lengths.astype(np.int64)
        self._members, self._borders = _pack(lengths, max_seq_len, derive_seed(seed, "packing"))
        self.fill = int(lengths.sum()) / (len(self) * max_seq_len)
        """Share of the positions that hold a token of a document."""

    def __len__(self) -> int:
        return len(self._borders) - 1

    def read(self, index: int, epoch: int = 0) -> PackedSample:
        """Row `index`, `(max_seq_len,)`."""
        samples = [self._rows.read(member, epoch) for member in self.row_documents(index)]
        return join_samples(samples, self._max_seq_len, self._pad_token_id)

    def row_documents(self, index: int) -> list[int]:
        """Indices, in the RowDataset, of the samples of row `index`, in order."""
        row = range(len(self))[index]
        members: list[int] = self._members[self._borders[row] : self._borders[row + 1]].tolist()
        return members


def _pack(lengths: Int64Array, max_seq_len: int, key: int) -> tuple[Int64Array, Int64Array]:
    """Members of all rows, one row after the other, `(samples,)`, and where each row starts, `(rows + 1,)`."""
    order = KeyedPermutation(len(lengths), key)(np.arange(len(lengths), dtype=np.int64))
    max_items = max_packed_documents(max_seq_len) - 1
    samples_per_row = max_seq_len * len(lengths) // int(lengths.sum())
    window_size = max(PACKING_WINDOW, ROWS_PER_WINDOW * samples_per_row)
    members = []
    sizes = [0]
    for first in range(0, len(order), window_size):
        window = order[first : first + window_size]
        packed = best_fit(lengths[window], max_seq_len, max_items)
        members.append(window[np.concatenate([np.array(row, dtype=np.int64) for row in packed])])
        sizes += [len(row) for row in packed]
    return np.concatenate(members), np.cumsum(np.array(sizes, dtype=np.int64))
