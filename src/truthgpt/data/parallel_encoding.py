"""Documents to token ids in several processes: the same runs in the same order as in one."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, cycle
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import Document
from truthgpt.data.tokenization import DocumentEncoder, TokenRun
from truthgpt.errors import DataError, TruthGPTError

SMALL_CHARACTERS = 4 * 10**6
"""Less text is tokenised here: on one core that takes about a second, no longer than starting the processes pays."""
BATCH_CHARACTERS = 2**20
"""Text a process gets at once, about a third of a second of work."""
BATCH_DOCUMENTS = 2**13
HUGE_CHARACTERS = 2**23
"""A longer document is tokenised here, piece by piece on the tokenizer's own threads: sent to another process it would
be in memory several times."""
BATCHES_AHEAD = 2
"""Batches a process has at once: one it works on and one to go on with."""
DEATH_NOTICE_S = 5.0
"""How long a process that closed its pipe may take to count as dead."""


class _Packed:
    """Runs of a batch as they go through a pipe: all ids in one small array, and the rest of each run beside them."""

    def __init__(self, runs: Iterable[TokenRun]) -> None:
        taken = list(runs)
        ids = np.concatenate([run.ids for run in taken]) if taken else np.empty(0, dtype=np.int64)
        self._ids = ids.astype(np.min_scalar_type(int(ids.max(initial=0))))
        self._rest = [(run.ids.size, run.trained, run.opens, run.document, run.end, run.problems) for run in taken]

    def runs(self, documents_before: int) -> Iterator[TokenRun]:
        """The runs, numbered on from `documents_before`."""
        ids: npt.NDArray[np.int64] = self._ids.astype(np.int64)
        start = 0
        for size, trained, opens, document, end, problems in self._rest:
            yield TokenRun(ids[start : start + size], trained, opens, documents_before + document, end, problems)
            start += size


@dataclass(frozen=True)
class _Worker:
    """A tokenising process and the pipe to it."""

    number: int
    process: BaseProcess
    link: Connection[Any, Any]

    def send(self, batch: list[Document]) -> None:
        """Hand out a batch. DataError when the process is dead."""
        try:
            self.link.send(batch)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> _Packed:
        """What became of the oldest batch. DataError when the process is dead; or what tokenising raised there."""
        try:
            result = self.link.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(result, TruthGPTError):
            raise result
        assert isinstance(result, _Packed)
        return result

    def _death(self) -> DataError:
        self.process.join(DEATH_NOTICE_S)
        code = self.process.exitcode or 0
        cause = (
            f"was killed by signal {-code} ({signal.Signals(-code).name}); if memory ran out, lower data.num_workers"
            if code < 0
            else f"ended with exit code {code}; its error stands above"
        )
        return DataError(f"tokenizing process {self.number} (pid {self.process.pid}) {cause}, then start again")


def parallel_runs(
    encoder: DocumentEncoder, documents: Iterable[Document], processes: int
) -> Generator[TokenRun, None, None]:
    """`encoder.runs(documents)`, tokenised by `processes` processes, the runs in the same order.

    This process reads the documents and takes the ids. Less than about 4 MB of text is tokenised here, and so is all
    of it with fewer than two processes or where a process cannot be forked. Close the generator
    (`contextlib.closing`) to end the processes at once; they also end when this process is killed.

    Raises:
        DataError: whatever reading or tokenising raises, or a process that was killed.
        ConfigError: see `DocumentEncoder.runs`.
    """
    documents, is_small = _peek(documents)
    if is_small or processes < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from encoder.runs(documents)
        return
    # Unset, the tokenizers library would warn in every process forked after its threads were used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with _started(encoder, processes) as workers:
        yield from _runs_in_order(workers, encoder, documents)


def _runs_in_order(
    workers: Sequence[_Worker], encoder: DocumentEncoder, documents: Iterable[Document]
) -> Iterator[TokenRun]:
    """Batches go round the workers, so each batch's result is the next one of a known worker."""
    turns = cycle(workers)
    pending: deque[tuple[_Worker, int]] = deque()
    taken = 0
    for batch in _batches(documents):
        is_huge = _characters(batch[0]) > HUGE_CHARACTERS
        while pending and (is_huge or len(pending) == BATCHES_AHEAD * len(workers)):
            worker, documents_before = pending.popleft()
            yield from worker.receive().runs(documents_before)
        if is_huge:
            for run in encoder.runs(batch):
                yield replace(run, document=taken + run.document)
        else:
            worker = next(turns)
            worker.send(batch)
            pending.append((worker, taken))
        taken += len(batch)
    for worker, documents_before in pending:
        yield from worker.receive().runs(documents_before)


def _characters(document: Document) -> int:
    return sum(len(segment.text) for segment in document.segments)


def _peek(documents: Iterable[Document]) -> tuple[Iterator[Document], bool]:
    """The documents, and whether they hold less than `SMALL_CHARACTERS` together."""
    iterator = iter(documents)
    first: list[Document] = []
    characters = 0
    for document in iterator:
        first.append(document)
        characters += _characters(document)
        if characters >= SMALL_CHARACTERS:
            return chain(first, iterator), False
    return iter(first), True


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of at least one document; a huge one is alone."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        size = _characters(document)
        if batch and (characters + size > BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += size
    if batch:
        yield batch


@contextmanager
def _started(encoder: DocumentEncoder, processes: int) -> Iterator[Sequence[_Worker]]:
    """Forked processes, which the encoder's tokenizer need not be sent to; gone at the end in any case."""
    context = multiprocessing.get_context("fork")
    workers: list[_Worker] = []

    def kill() -> None:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.link.close()

    # They ignore the SIGTERM with which `multiprocessing` ends its children at exit, and it would wait for ever.
    atexit.register(kill)
    try:
        for number in range(processes):
            link, their_link = context.Pipe()
            inherited = [*(worker.link for worker in workers), link]
            process = context.Process(target=_work, args=(encoder, their_link, inherited), daemon=True)
            process.start()
            workers.append(_Worker(number, process, link))
            their_link.close()
        yield workers
    finally:
        atexit.unregister(kill)
        kill()


def _work(encoder: DocumentEncoder, link: Connection[Any, Any], inherited: Sequence[Connection[Any, Any]]) -> None:
    """Tokenise batch after batch until the other end of the pipe closes."""
    # A Ctrl-C or SIGTERM reaches the whole process group; the parent decides, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for other in inherited:
        other.close()  # else the pipes would stay open when the parent is killed
    batches: SimpleQueue[list[Document]] = SimpleQueue()
    threading.Thread(target=_receive_ahead, args=(link, batches), daemon=True).start()
    while True:
        batch = batches.get()
        try:
            result: _Packed | TruthGPTError = _Packed(encoder.runs(batch))
        except TruthGPTError as error:
            result = error
        try:
            link.send(result)
        except OSError:
            return


def _receive_ahead(link: Connection[Any, Any], batches: SimpleQueue[list[Document]]) -> None:
    """Take batches off the pipe at once: parent and worker never both wait for the other to read. Without the parent
    there is nothing left to do, whatever the worker is in the middle of."""
    try:
        while True:
            batches.put(link.recv())
    except (EOFError, OSError):
        return
    finally:
        os._exit(1)
