"""Global batches in an order that depends on seed and step only, and validation batches in sequence."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from truthgpt.data.base import IGNORED_LABEL, Batch, Collator, GlobalBatch, Sample, SampleDataset
from truthgpt.data.order import KeyedPermutation
from truthgpt.errors import DataError
from truthgpt.runtime.seeds import derive_seed

SAMPLE_ERRORS = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What reading a sample may raise; becomes a DataError."""
DEATH_NOTICE_S = 0.5
"""A dying process closes its pipes shortly before it counts as dead: how long to wait before another cause is named."""

_live_workers: set[BaseProcess] = set()
"""Loader processes not known to have ended. They ignore the SIGTERM with which `multiprocessing` ends its children at
exit, and it would wait for them for ever: they are killed before that."""


@atexit.register
def _kill_live_workers() -> None:
    for worker in _live_workers:
        worker.kill()


@dataclass(frozen=True)
class WorkerSettings:
    """Loader processes: how many (0: read in the training process), batches each prepares ahead, and whether those of
    the validation loader live on between evaluations."""

    num_workers: int = 0
    prefetch_factor: int = 2
    persistent: bool = True


class GlobalBatchLoader:
    """The training batches of every optimizer step.

    Step s is in epoch `s // steps_per_epoch`, whose order is a permutation keyed by (seed, epoch). Any step is reached
    in O(1), and neither processes nor prefetching can change what a step trains on. The last global batch of an epoch
    is smaller when the samples do not divide: nothing is dropped or repeated.

    Args:
        dataset: samples by index.
        collate: samples to a micro-batch; runs in the loader processes.
        micro_batch_size: samples a micro-batch.
        grad_accum_steps: micro-batches a step.
        seed: seed of the run.
        workers: loader processes.
        pin_memory: page-locked batches, for copies to a GPU that overlap with compute.

    Raises:
        DataError: the dataset is empty.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        collate: Collator,
        *,
        micro_batch_size: int,
        grad_accum_steps: int,
        seed: int,
        workers: WorkerSettings,
        pin_memory: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise DataError("0 training samples: the data is empty after the split and data.overlong")
        self._dataset = dataset
        self._collate = collate
        self._micro_batch_size = micro_batch_size
        self._global_batch = micro_batch_size * grad_accum_steps
        self._seed = seed
        self._workers = workers
        self._pin_memory = pin_memory

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps one pass over the samples takes."""
        return -(-len(self._dataset) // self._global_batch)

    def batches(self, start_step: int = 0) -> Generator[GlobalBatch, None, None]:
        """Global batches of step `start_step`, `start_step + 1` and so on, without end.

        Close the generator (`contextlib.closing`) to end the loader processes.

        Raises:
            DataError: a sample cannot be read, or a loader process died.
        """
        sampler = _StepSampler(self._micro_batches, start_step)
        loader = _data_loader(self._dataset, self._collate, sampler, self._workers, self._pin_memory, persistent=False)
        with closing(_read(loader)) as micro_batches:
            step = start_step
            while True:
                yield self._gather(step, micro_batches)
                step += 1

    def sample_indices(self, step: int) -> list[int]:
        """Samples of one step, in order; for tools that show or check what a step trains on."""
        return [index for micro_batch in self._micro_batches(step) for index in micro_batch]

    def state_dict(self, step: int) -> dict[str, Any]:
        """What the data was when `step` steps were done; the position itself is the step."""
        return {
            "fingerprint": self._dataset.fingerprint,
            "samples_per_epoch": len(self._dataset),
            "global_batch": self._global_batch,
            "step": step,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with other data than `state` was saved with.

        Raises:
            DataError: the samples, their number or the samples a step differ.
        """
        if state["fingerprint"] != self._dataset.fingerprint or state["samples_per_epoch"] != len(self._dataset):
            raise DataError(
                f"the data is not what this run was trained on: {state['samples_per_epoch']} samples, fingerprint "
                f"{state['fingerprint'][:12]}, then; {len(self._dataset)} samples, {self._dataset.fingerprint[:12]}, "
                "now. The documents, their split, the tokenizer, data.max_seq_len or data.overlong changed: restore "
                "them, or start a new run in another output_dir"
            )
        if state["global_batch"] != self._global_batch:
            raise DataError(
                f"this run was trained with {state['global_batch']} samples a step, now it would be "
                f"{self._global_batch}: keep training.train_batch_size x training.grad_accum_steps as it was"
            )

    def _samples_in(self, step: int) -> int:
        done_in_epoch = (step % self.steps_per_epoch) * self._global_batch
        return min(self._global_batch, len(self._dataset) - done_in_epoch)

    def _micro_batches(self, step: int) -> list[list[int]]:
        """Sample indices of every micro-batch of a step: a pure function of the step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = KeyedPermutation(len(self._dataset), derive_seed(self._seed, "order", epoch))
        first = step_in_epoch * self._global_batch
        indices = order(np.arange(first, first + self._samples_in(step), dtype=np.int64)).tolist()
        size = self._micro_batch_size
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _gather(self, step: int, micro_batches: Iterator[Batch]) -> GlobalBatch:
        samples = self._samples_in(step)
        batches = [next(micro_batches) for _ in range(-(-samples // self._micro_batch_size))]
        tokens = sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches)
        return GlobalBatch(batches, tokens=tokens, samples=samples, epoch=step // self.steps_per_epoch)


class EvalLoader:
    """Validation batches in the order of the samples; can be iterated again and again.

    Args:
        dataset: samples by index.
        collate: samples to a batch.
        batch_size: samples a batch; the last batch may be smaller.
        workers: loader processes; kept between evaluations when persistent.
        pin_memory: page-locked batches.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        collate: Collator,
        batch_size: int,
        workers: WorkerSettings,
        pin_memory: bool = False,
    ) -> None:
        sampler = _SequentialSampler(len(dataset), batch_size)
        self._batches = len(sampler)
        self._loader = _data_loader(dataset, collate, sampler, workers, pin_memory, workers.persistent)

    def __len__(self) -> int:
        """Number of batches."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        """The batches, from the first one.

        Raises:
            DataError: a sample cannot be read, or a loader process died.
        """
        return _read(self._loader)


class _StepSampler:
    """Index lists of all micro-batches from `start_step` on, without end."""

    def __init__(self, micro_batches: Callable[[int], list[list[int]]], start_step: int) -> None:
        self._micro_batches = micro_batches
        self._start_step = start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self._start_step
        while True:
            yield from self._micro_batches(step)
            step += 1


class _SequentialSampler:
    """Index lists of consecutive samples."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self._samples = samples
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-self._samples // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self._samples, self._batch_size):
            yield list(range(start, min(start + self._batch_size, self._samples)))


class _TorchDataset(Dataset[Sample]):
    """A SampleDataset as torch wants it."""

    def __init__(self, dataset: SampleDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[index]


def _data_loader(
    dataset: SampleDataset,
    collate: Collator,
    sampler: _StepSampler | _SequentialSampler,
    workers: WorkerSettings,
    pin_memory: bool,
    persistent: bool,
) -> DataLoader[Sample]:
    processes = workers.num_workers
    return DataLoader(
        _TorchDataset(dataset),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=processes,
        prefetch_factor=workers.prefetch_factor if processes else None,
        persistent_workers=persistent and processes > 0,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
        # Its own generator: without one every new iterator draws from torch's global random state.
        generator=torch.Generator().manual_seed(0),
    )


def _leave_signals_to_parent(_worker: int) -> None:
    """A Ctrl-C or SIGTERM reaches the whole process group; the training process decides, and ends its loaders."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _read(loader: DataLoader[Sample]) -> Generator[Batch, None, None]:
    """One pass over a loader: failures become DataErrors, and processes that should be gone at the end are."""
    iterator, workers = _start(loader)
    try:
        while True:
            _check_alive(workers)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except SAMPLE_ERRORS as error:
                _await_death(workers)
                _check_alive(workers)
                raise DataError(f"a sample cannot be read: {type(error).__name__}: {error}") from error
            yield batch
    finally:
        if isinstance(iterator, _MultiProcessingDataLoaderIter) and not loader.persistent_workers:
            # Dropping the last reference would do the same, but the traceback of an error holds another one.
            iterator._shutdown_workers()
            _end(workers)


def _start(loader: DataLoader[Sample]) -> tuple[_BaseDataLoaderIter, Sequence[BaseProcess]]:
    """Iterator of the loader and the processes it started.

    torch installs a SIGCHLD handler that raises wherever the main thread happens to be when a loader process dies, in
    the middle of an optimizer step for example. It is taken out again: a dead process is noticed at the next batch.
    """
    before = set(multiprocessing.active_children())
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    _live_workers.update(workers)
    return iterator, workers


def _await_death(workers: Sequence[BaseProcess]) -> None:
    """Give a process that is just dying the time to count as dead, so that it is named as the cause."""
    dying = multiprocessing.connection.wait([worker.sentinel for worker in workers], DEATH_NOTICE_S)
    for worker in workers:
        if worker.sentinel in dying:
            worker.join()


def _check_alive(workers: Sequence[BaseProcess]) -> None:
    for number, worker in enumerate(workers):
        if not worker.is_alive():
            code = worker.exitcode or 0
            cause = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended ({code})"
            raise DataError(
                f"data loader process {number} (pid {worker.pid}) {cause}; if memory ran out, lower data.num_workers "
                "or data.prefetch_factor, then resume the run"
            )


def _end(workers: Sequence[BaseProcess]) -> None:
    """Kill what torch could not stop: a process that hangs ignores the SIGTERM it sends after five seconds."""
    for worker in workers:
        worker.kill()
        worker.join()
        _live_workers.discard(worker)
