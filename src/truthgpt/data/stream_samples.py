"""Samples out of a window of documents that were just read, and the order in which they are given out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import IGNORED_LABEL, Document, Sample
from truthgpt.data.order import KeyedPermutation
from truthgpt.data.packing import best_fit, max_packed_documents
from truthgpt.data.samples import Overlong
from truthgpt.data.tokenization import DocumentEncoder, TokenRun, group_documents
from truthgpt.errors import DataError
from truthgpt.runtime.seeds import derive_seed

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StreamSettings:
    """How documents become samples and samples batches; names as in `data.*` and `training.*`.

    Without `packing`, the documents of a source of layout `stream` are joined and cut into blocks; all others are
    rows. `bins` are the lengths of bucketing, ascending, the last one `max_seq_len`; None without bucketing, and with
    packing. `max_tokens` counts with bins only.
    """

    max_seq_len: int
    micro_batch_size: int
    grad_accum_steps: int
    shuffle_window: int = 2048
    overlong: Overlong = "truncate"
    packing: bool = False
    pad_token_id: int = 0
    bins: tuple[int, ...] | None = None
    max_tokens: int | None = None
    mix_by: Literal["documents", "tokens"] = "documents"

    def rows_of(self, length: int) -> int:
        """Rows of a micro-batch padded to `length`."""
        return self.micro_batch_size if self.max_tokens is None else max(1, self.max_tokens // length)


@dataclass(frozen=True)
class Carry:
    """Joined text of earlier windows that fills no block yet: ids, 1 where the loss counts them, where in them
    documents begin, and the ids that close the last document unless it goes on."""

    ids: Sequence[int] = ()
    trained: Sequence[int] = ()
    begins: Sequence[int] = ()
    end: Sequence[int] = ()


@dataclass
class StreamCounts:
    """Documents given to training and held out since the run began, and what was met in them; `unsupervised` counts
    samples left out because the loss counts none of their tokens."""

    documents: int = 0
    held_out: int = 0
    overlong: int = 0
    unsupervised: int = 0
    double_bos: int = 0
    double_eos: int = 0
    missing_eos: int = 0


def cut_blocks(
    runs: Iterable[TokenRun], counts: StreamCounts, carry: Carry, max_seq_len: int, ends_pass: bool
) -> tuple[list[Sample], list[int], Carry]:
    """Blocks of the joined text as BlockDataset cuts them, the documents that begin in each, and what is left.

    A block needs `max_seq_len + 1` tokens and leaves its last one for the next; at the end of a pass nothing is left.
    """
    ids = [np.array(carry.ids, dtype=np.int64)]
    trained = [np.array(carry.trained, dtype=np.bool_)]
    begins = list(carry.begins)
    size, end, document = len(carry.ids), carry.end, 0

    def close() -> None:
        ids.append(np.array(end, dtype=np.int64))
        trained.append(np.ones(len(end), dtype=np.bool_))

    for run in _count_problems(runs, counts):
        if run.opens:
            close()
            size += len(end)
        if run.document != document:
            begins.append(size)
        ids.append(run.ids)
        trained.append(np.full(len(run.ids), run.trained) if isinstance(run.trained, bool) else run.trained)
        size, end, document = size + len(run.ids), run.end, run.document
    if ends_pass:
        close()
        size += len(end)
    text, counted = np.concatenate(ids), np.concatenate(trained)
    blocks = max(-(-(size - 1) // max_seq_len) if ends_pass else (size - 1) // max_seq_len, 0)
    starts = [block * max_seq_len for block in range(blocks)]
    samples = [
        _sample(text[start : start + max_seq_len + 1], counted[start : start + max_seq_len + 1]) for start in starts
    ]
    numbers = np.array(begins, dtype=np.int64) // max_seq_len
    if ends_pass:  # a document may begin with the very last token, which is a label only
        return (
            samples,
            np.bincount(np.minimum(numbers, blocks - 1), minlength=blocks).tolist() if blocks else [],
            Carry(),
        )
    per_block = np.bincount(numbers, minlength=blocks)[:blocks].tolist()
    rest = blocks * max_seq_len
    later = [place - rest for place in begins if place >= rest]
    left = Carry(text[rest:].tolist(), counted[rest:].astype(int).tolist(), later, list(end))
    return samples, per_block, left


def cut_rows(
    documents: Sequence[Document], encoder: DocumentEncoder, settings: StreamSettings, counts: StreamCounts
) -> tuple[list[Sample], list[int]]:
    """Samples as RowDataset cuts them, and the documents that begin in each: 1, or 0 for a later piece of a split row.

    Raises:
        DataError: a row that is too long, with `overlong: error`.
    """
    max_seq_len = settings.max_seq_len
    samples: list[Sample] = []
    begins: list[int] = []
    rows = group_documents(_count_problems(encoder.runs(documents), counts))
    for document, (ids, trained, _) in zip(documents, rows, strict=True):
        starts = range(0, max(len(ids) - 1, 1), max_seq_len)
        if len(starts) > 1:
            counts.overlong += 1
            if settings.overlong == "error":
                raise DataError(
                    f"{document.where}: {len(ids) - 1} tokens, data.max_seq_len is {max_seq_len}; raise it, or set "
                    "data.overlong to truncate, split or drop"
                )
            if settings.overlong == "drop":
                continue
            if settings.overlong == "truncate":
                starts = starts[:1]
        begun = 1
        for start in starts:
            cut = slice(start, start + max_seq_len + 1)
            if not trained[cut][1:].any():
                counts.unsupervised += 1
                continue
            # Copied, or the whole of a long row would stay in memory for its first tokens.
            samples.append(_sample(ids[cut].copy(), trained[cut]))
            begins.append(begun)
            begun = 0
    return samples, begins


def arrange(lengths: Int64Array, settings: StreamSettings, key: int) -> list[list[int]]:
    """Samples of every group of a window, in the order they are given out.

    Shuffled; packed, the samples of every row; bucketed, those of every micro-batch, the last of each bin smaller.
    """
    if len(lengths) == 0:
        return []
    order = KeyedPermutation(len(lengths), key)(np.arange(len(lengths), dtype=np.int64))
    groups: list[Int64Array]
    if settings.packing:
        max_documents = max_packed_documents(settings.max_seq_len) - 1
        rows = best_fit(lengths[order], settings.max_seq_len, max_documents)
        groups = [order[np.array(row, dtype=np.int64)] for row in rows]
    elif settings.bins is not None:
        bins = np.searchsorted(np.array(settings.bins), lengths[order])
        groups = []
        for number, length in enumerate(settings.bins):
            members, rows_each = order[bins == number], settings.rows_of(length)
            groups += [members[first : first + rows_each] for first in range(0, len(members), rows_each)]
    else:
        return [[index] for index in order.tolist()]
    mixed = KeyedPermutation(len(groups), derive_seed(key, "groups"))(np.arange(len(groups), dtype=np.int64))
    return [groups[index].tolist() for index in mixed.tolist()]


def _count_problems(runs: Iterable[TokenRun], counts: StreamCounts) -> Iterator[TokenRun]:
    for run in runs:
        counts.double_bos += "double_bos" in run.problems
        counts.double_eos += "double_eos" in run.problems
        counts.missing_eos += "missing_eos" in run.problems
        yield run


def _sample(ids: Int64Array, trained: npt.NDArray[np.bool_]) -> Sample:
    """All but the last token are inputs, all but the first labels."""
    return {"input_ids": ids[:-1], "labels": np.where(trained[1:], ids[1:], IGNORED_LABEL)}
