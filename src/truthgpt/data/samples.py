"""Training samples over tokenised documents: blocks of a stream, or one row each."""

from __future__ import annotations

import bisect
import hashlib
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import IGNORED_LABEL, AnySample, Document, Sample, SampleDataset
from truthgpt.errors import DataError

if TYPE_CHECKING:
    from truthgpt.data.token_store import TokenStore

logger = logging.getLogger(__name__)

Overlong = Literal["truncate", "split", "drop", "error"]

Int64Array = npt.NDArray[np.int64]
_TOKENS_AT_ONCE = 2**22


class BlockDataset:
    """All documents joined and cut into blocks of `max_seq_len` tokens; the last block may be shorter.

    Block i reads tokens `i * T` to `(i + 1) * T`, the last one only as a label, so every token but the first is
    predicted exactly once.

    Raises:
        DataError: fewer than two tokens.
    """

    def __init__(self, store: TokenStore, max_seq_len: int) -> None:
        if len(store) < 2:
            raise DataError(f"the data has {len(store)} tokens; at least 2 are needed to predict one")
        self.fingerprint = _fingerprint(store, "stream", max_seq_len)
        self.documents = store.meta.documents
        """Documents that the samples are made of."""
        self.tokens = len(store)
        """Their tokens."""
        self._reader = _TokenReader(store)
        self._max_seq_len = max_seq_len

    def __len__(self) -> int:
        return -(-(self.tokens - 1) // self._max_seq_len)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Input tokens of every sample, `(samples,)`."""
        lengths = np.full(len(self), self._max_seq_len, dtype=np.int32)
        lengths[-1] = self.tokens - 1 - (len(self) - 1) * self._max_seq_len
        return lengths

    def read(self, index: int, epoch: int = 0) -> Sample:
        """Block `index`; `(T,)`, the last one `(<= T,)`; the same in every epoch."""
        start = range(len(self))[index] * self._max_seq_len
        return self._reader.sample(start, min(start + self._max_seq_len + 1, self.tokens))


class RowDataset:
    """Each document a sample of its own, at most `max_seq_len` tokens of input.

    A longer row is cut (`truncate`), becomes several samples (`split`), is left out (`drop`) or ends the run (`error`).
    Samples without a supervised token are left out. All three are counted and said in one line.

    Args:
        store: the tokenised rows.
        max_seq_len: tokens of input at most; the label of the last one may be one token further.
        overlong: what happens to longer rows.
        documents: the rows themselves, only to name one that is too long in the error.
        report: say what was cut and left out.
        called: what messages call the rows.

    Raises:
        DataError: a row that is too long, with `overlong: error`; or no sample left.
    """

    def __init__(
        self,
        store: TokenStore,
        max_seq_len: int,
        overlong: Overlong,
        documents: Iterable[Document] | None = None,
        report: bool = True,
        called: str = "rows",
    ) -> None:
        self.fingerprint = _fingerprint(store, f"rows {overlong}", max_seq_len)
        self._rows = store.meta.documents
        self._reader = _TokenReader(store)
        lengths = np.diff(store.offsets)
        too_long = lengths > max_seq_len + 1
        self.overlong_rows = int(too_long.sum())
        """Rows of more than `max_seq_len` tokens."""
        if self.overlong_rows and overlong == "error":
            _refuse(int(np.flatnonzero(too_long)[0]), lengths, max_seq_len, documents)
        starts, lengths = _windows(np.array(store.offsets), max_seq_len, overlong)
        supervised = _supervised(store, starts, lengths)
        self.unsupervised_samples = int((~supervised).sum())
        """Samples left out because the loss counts none of their tokens."""
        self._starts = starts[supervised]
        self.lengths: npt.NDArray[np.int32] = (lengths[supervised] - 1).astype(np.int32)
        """Input tokens of every sample, `(samples,)`."""
        self.documents = len(self._starts)
        """Rows that a sample is made of."""
        if overlong == "split":
            self.documents = len(np.unique(np.searchsorted(store.offsets, self._starts, side="right")))
        self.tokens = int(self.lengths.sum(dtype=np.int64)) + self.documents
        """Tokens of these rows as far as samples hold them, the last label too."""
        if report:
            self._report(max_seq_len, overlong, called)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int, epoch: int = 0) -> Sample:
        """Sample `index`, `(<= max_seq_len,)`; the same in every epoch."""
        start = int(self._starts[index])
        return self._reader.sample(start, start + int(self.lengths[index]) + 1)

    def _report(self, max_seq_len: int, overlong: Overlong, called: str) -> None:
        rows = f"{self._rows} {called}"
        if self.overlong_rows:
            done = {"truncate": "truncated", "split": "split", "drop": "dropped"}[overlong]
            level = logging.INFO if overlong == "split" else logging.WARNING
            logger.log(
                level, "%s %d of %s longer than max_seq_len %d tokens", done, self.overlong_rows, rows, max_seq_len
            )
        if self.unsupervised_samples:
            logger.warning(
                "left out %d samples without a token the loss counts, of %s (train_on, max_seq_len %d)",
                self.unsupervised_samples,
                rows,
                max_seq_len,
            )
        if len(self) == 0:
            raise DataError(
                f"0 usable {called} of {self._rows}: {self.overlong_rows} are longer than data.max_seq_len "
                f"{max_seq_len} (data.overlong: {overlong}), {self.unsupervised_samples} samples have no token the "
                "loss counts; raise data.max_seq_len or set data.train_on: all"
            )


class ConcatenatedDataset:
    """Several datasets as one: the samples of the first, then those of the second, and so on.

    Raises:
        ValueError: no dataset.
    """

    def __init__(self, datasets: Sequence[SampleDataset]) -> None:
        if not datasets:
            raise ValueError("at least one dataset is needed")
        digests = " ".join(dataset.fingerprint for dataset in datasets)
        self.fingerprint = hashlib.sha256(f"concatenated {digests}".encode()).hexdigest()
        self._datasets = list(datasets)
        self._ends = list(accumulate(len(dataset) for dataset in datasets))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int, epoch: int = 0) -> AnySample:
        """Sample `index`, counted over all datasets."""
        place = range(len(self))[index]
        number = bisect.bisect_right(self._ends, place)
        dataset = self._datasets[number]
        return dataset.read(place - self._ends[number] + len(dataset), epoch)


class _TokenReader:
    """Samples out of a store. Keeps plain views of its arrays: slicing a memmap costs several times as much."""

    def __init__(self, store: TokenStore) -> None:
        self._store = store

    def __getstate__(self) -> dict[str, object]:
        return {"_store": self._store}

    def sample(self, start: int, end: int) -> Sample:
        """Tokens `start` to `end`: all but the last are inputs, all but the first labels."""
        tokens = self._tokens[start:end].astype(np.int64)
        trained = self._trained
        if trained is None:
            return {"input_ids": tokens[:-1], "labels": tokens[1:]}
        labels = np.where(trained[start + 1 : end], tokens[1:], IGNORED_LABEL)
        return {"input_ids": tokens[:-1], "labels": labels}

    @cached_property
    def _tokens(self) -> npt.NDArray[np.uint16 | np.uint32]:
        return np.asarray(self._store.tokens)

    @cached_property
    def _trained(self) -> npt.NDArray[np.bool_] | None:
        return None if self._store.trained is None else np.asarray(self._store.trained).view(np.bool_)


def _windows(offsets: Int64Array, max_seq_len: int, overlong: Overlong) -> tuple[Int64Array, Int64Array]:
    """First token and number of tokens of every sample, in order; a sample of n tokens predicts n - 1."""
    starts, ends = offsets[:-1], offsets[1:]
    if overlong == "drop":
        fits = ends - starts <= max_seq_len + 1
        starts, ends = starts[fits], ends[fits]
    elif overlong == "split":
        pieces = np.maximum(-(-(ends - starts - 1) // max_seq_len), 1)
        piece_in_row = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts, ends = np.repeat(starts, pieces) + piece_in_row * max_seq_len, np.repeat(ends, pieces)
    return starts, np.minimum(ends - starts, max_seq_len + 1)


def _supervised(store: TokenStore, starts: Int64Array, lengths: Int64Array) -> npt.NDArray[np.bool_]:
    """Whether the loss counts a label of the sample, `(samples,)`. Reads the mask piece by piece, to bound memory."""
    labelled = lengths > 1
    if store.trained is None:
        return labelled
    supervised = np.zeros(len(starts), dtype=np.bool_)
    samples = np.flatnonzero(labelled)
    first_labels, ends = starts[samples] + 1, starts[samples] + lengths[samples]
    first = 0
    while first < len(samples):
        low = int(first_labels[first])
        stop = int(np.searchsorted(first_labels, low + _TOKENS_AT_ONCE))
        borders = np.stack([first_labels[first:stop], ends[first:stop]], axis=1).ravel() - low
        trained = store.read_trained(low, low + int(borders[-1]))
        # Every second piece lies between two samples; the last end is the end of what was read.
        supervised[samples[first:stop]] = np.maximum.reduceat(trained, borders[:-1])[::2]
        first = stop
    return supervised


def _refuse(row: int, lengths: Int64Array, max_seq_len: int, documents: Iterable[Document] | None) -> None:
    place = f"row {row} (from 0)"
    if documents is not None:
        place = next(islice(documents, row, None)).where
    raise DataError(
        f"{place}: {lengths[row] - 1} tokens, data.max_seq_len is {max_seq_len}; raise it, or set data.overlong to "
        "truncate, split or drop"
    )


def _fingerprint(store: TokenStore, layout: str, max_seq_len: int) -> str:
    return hashlib.sha256(f"{store.digest} {layout} {max_seq_len}".encode()).hexdigest()
