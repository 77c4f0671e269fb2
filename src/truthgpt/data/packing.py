"""Several documents in one row of fixed length that do not see each other: which ones, and how they are joined."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import IGNORED_LABEL, PackedSample, Sample
from truthgpt.data.cache_entry import cache_errors, exclusive_maker, new_folder, write_synced
from truthgpt.data.order import KeyedPermutation
from truthgpt.errors import RunDirectoryError
from truthgpt.runtime.seeds import derive_seed
from truthgpt.runtime.task_progress import task_progress

if TYPE_CHECKING:
    from truthgpt.data.samples import RowDataset

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of the key of a cache entry: a change of the files' layout raises it."""
PACKING_VERSION = 1
"""Part of the fingerprint: a change of which samples share a row raises it."""
PACKING_WINDOW = 16_384
"""Samples that are packed among themselves at least; packing takes memory and time by the window."""
ROWS_PER_WINDOW = 256
"""Rows that a window fills at least: only its last one is left with much padding."""
TOKENS_PER_DOCUMENT = 4
"""A row holds at most one document per so many positions, which bounds the length of `cu_seq_lens`."""
SMALL_SAMPLES = 50_000
"""Fewer samples than these are packed at every start, in about 0.1 s, and not kept in the cache."""

MEMBERS_FILE = "members.bin"
BORDERS_FILE = "borders.bin"
META_FILE = "meta.json"

Int64Array = npt.NDArray[np.int64]
IndexArray = npt.NDArray[np.int32 | np.int64]


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


def compare_filling(lengths: Int64Array, max_seq_len: int, batch_size: int) -> tuple[float, float]:
    """Share of positions that hold a token: in packed rows, and in batches padded to their longest sample.

    Judged by at most one packing window of samples, spread evenly over all; batches are drawn by a fixed key.

    Args:
        lengths: tokens of every sample, `(samples,)`, 1 to `max_seq_len`.
        max_seq_len: positions a packed row.
        batch_size: samples a padded batch.
    """
    chosen = lengths[np.linspace(0, len(lengths) - 1, min(len(lengths), PACKING_WINDOW)).astype(np.int64)]
    rows = best_fit(chosen, max_seq_len, max_packed_documents(max_seq_len) - 1)
    shuffled = chosen[KeyedPermutation(len(chosen), 0)(np.arange(len(chosen), dtype=np.int64))]
    batches = [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]
    total = int(chosen.sum())
    return total / (len(rows) * max_seq_len), total / sum(int(batch.max()) * len(batch) for batch in batches)


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
        cache_dir: folder of all caches, where the packing of 50,000 samples or more is kept; None: pack at every start.
    """

    def __init__(
        self, rows: RowDataset, max_seq_len: int, pad_token_id: int, seed: int, cache_dir: Path | None = None
    ) -> None:
        self.fingerprint = hashlib.sha256(
            f"{rows.fingerprint} packed {PACKING_VERSION} {max_seq_len} {pad_token_id}".encode()
        ).hexdigest()
        self.documents = rows.documents
        """Documents in all rows."""
        self.tokens = rows.tokens
        """Their tokens."""
        self._rows = rows
        self._max_seq_len = max_seq_len
        self._pad_token_id = pad_token_id
        self._packing = _packing_of(rows, max_seq_len, seed, cache_dir)
        self.fill = int(rows.lengths.sum(dtype=np.int64)) / (len(self) * max_seq_len)
        """Share of the positions that hold a token of a document."""

    def __len__(self) -> int:
        return len(self._packing.borders) - 1

    def read(self, index: int, epoch: int = 0) -> PackedSample:
        """Row `index`, `(max_seq_len,)`."""
        samples = [self._rows.read(member, epoch) for member in self.row_documents(index)]
        return join_samples(samples, self._max_seq_len, self._pad_token_id)

    def row_documents(self, index: int) -> list[int]:
        """Indices, in the RowDataset, of the samples of row `index`, in order."""
        row = range(len(self))[index]
        borders = self._packing.borders
        members: list[int] = self._packing.members[borders[row] : borders[row + 1]].tolist()
        return members


@dataclass(frozen=True)
class _Packing:
    """Samples of all rows, one row after the other, `(samples,)`, and where each row starts, `(rows + 1,)`."""

    members: IndexArray
    borders: IndexArray


@dataclass(frozen=True)
class _PackingMeta:
    """Contents of `meta.json`. Sizes follow from the counts; a file of another size is damaged."""

    samples: int
    rows: int

    def file_sizes(self) -> dict[str, int]:
        """Bytes each file must have."""
        index_bytes = np.dtype(_index_dtype(self.samples)).itemsize
        return {MEMBERS_FILE: self.samples * index_bytes, BORDERS_FILE: (self.rows + 1) * index_bytes}


class _StoredPacking:
    """The packing of `samples` samples in the cache entry `folder`, as a `_Packing`.

    Arrays are mapped on first use and never pickled, so a packing costs a loader process nothing. They are plain views:
    slicing a memmap costs several times as much.

    Raises:
        OSError, TypeError, ValueError: no such entry, or a damaged one.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self._folder = folder
        self._dtype = _index_dtype(samples)
        meta = _PackingMeta(**json.loads((folder / META_FILE).read_bytes()))
        sizes = {name: (folder / name).stat().st_size for name in meta.file_sizes()}
        if meta.samples != samples or meta.file_sizes() != sizes:
            raise ValueError(f"{folder}: {sizes} for {meta} and {samples} samples")

    @cached_property
    def members(self) -> IndexArray:
        """As in `_Packing`."""
        return np.asarray(np.memmap(self._folder / MEMBERS_FILE, dtype=self._dtype, mode="r"))

    @cached_property
    def borders(self) -> IndexArray:
        """As in `_Packing`."""
        return np.asarray(np.memmap(self._folder / BORDERS_FILE, dtype=self._dtype, mode="r"))

    def __getstate__(self) -> dict[str, object]:
        return {"_folder": self._folder, "_dtype": self._dtype}


def _packing_of(rows: RowDataset, max_seq_len: int, seed: int, cache_dir: Path | None) -> _Packing | _StoredPacking:
    """The packing of `rows`: from the cache, or made now and kept there unless it is small."""
    samples = len(rows)
    if cache_dir is None or samples < SMALL_SAMPLES:
        return _pack(rows.lengths, max_seq_len, seed)
    identity = f"{FORMAT_VERSION} {PACKING_VERSION} {rows.fingerprint} {max_seq_len} {seed}"
    folder = cache_dir / "packing" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    packing: _Packing | _StoredPacking | None = _open(folder, samples)
    if packing is not None:
        return packing
    try:
        with exclusive_maker(folder, "packing the same samples"):
            packing = _open(folder, samples)
            if packing is None:
                packing = _pack(rows.lengths, max_seq_len, seed)
                _write(folder, packing)
                packing = _open(folder, samples) or packing
    except RunDirectoryError as error:
        logger.warning("%s; the samples are packed at every start", error)
    return packing or _pack(rows.lengths, max_seq_len, seed)


def _open(folder: Path, samples: int) -> _StoredPacking | None:
    """The packing in `folder`; None when there is none, or one that is damaged."""
    try:
        return _StoredPacking(folder, samples)
    except (OSError, TypeError, ValueError):
        return None


def _write(folder: Path, packing: _Packing) -> None:
    with new_folder(folder) as temporary, cache_errors(folder):
        write_synced(temporary / MEMBERS_FILE, packing.members.tobytes())
        write_synced(temporary / BORDERS_FILE, packing.borders.tobytes())
        meta = _PackingMeta(len(packing.members), len(packing.borders) - 1)
        write_synced(temporary / META_FILE, json.dumps(asdict(meta)).encode())


def _index_dtype(samples: int) -> type[np.int32 | np.int64]:
    """The smaller type that counts to `samples`."""
    return np.int32 if samples <= np.iinfo(np.int32).max else np.int64


def _pack(lengths: npt.NDArray[np.int32], max_seq_len: int, seed: int) -> _Packing:
    """Put the samples in an order keyed by `seed` and pack them window by window."""
    samples = len(lengths)
    dtype = _index_dtype(samples)
    permutation = KeyedPermutation(samples, derive_seed(seed, "packing"))
    order: IndexArray = permutation(np.arange(samples, dtype=np.int64)).astype(dtype)
    max_items = max_packed_documents(max_seq_len) - 1
    samples_per_row = max_seq_len * samples // int(lengths.sum(dtype=np.int64))
    window_size = max(PACKING_WINDOW, ROWS_PER_WINDOW * samples_per_row)
    members: list[IndexArray] = []
    sizes = array("q", [0])
    with task_progress("packing", samples, "samples") as advance:
        for first in range(0, samples, window_size):
            window = order[first : first + window_size]
            packed = best_fit(lengths[window].astype(np.int64), max_seq_len, max_items)
            members.append(window[np.fromiter(chain.from_iterable(packed), dtype=np.int64, count=len(window))])
            sizes.extend(len(row) for row in packed)
            advance(len(window))
    return _Packing(np.concatenate(members), np.cumsum(sizes, dtype=dtype))
