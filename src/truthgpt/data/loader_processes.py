"""Loader processes: how they are started, what a dead or hanging one becomes, and that none outlives its loader."""

from __future__ import annotations

import multiprocessing.connection
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess, parent_process
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from truthgpt.errors import DataError

SAMPLE_ERRORS = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What reading a sample may raise; becomes a DataError."""
DEATH_NOTICE_S = 0.5
"""A dying process closes its pipes shortly before it counts as dead: how long to wait before another cause is named."""
LOADER_TIMEOUT_S = 600.0
"""A loader process that prepares one batch for so long counts as hanging."""
POLL_S = 5.0
"""How often the processes are looked at while a batch is awaited."""
PARENT_CHECK_S = 1.0
"""How often a loader process looks whether its parent is still there, where nothing tells it at once."""
ONE_PIECE_BYTES = 2**18
"""Batches up to this size travel in one piece; a larger one is not worth one more copy of its bytes."""
_PIECE_ALIGNMENT = 16
"""Bytes of the widest element, complex128."""
_TORCH_TIMEOUT = "DataLoader timed out"

_live_workers: set[BaseProcess] = set()
"""Loader processes not known to have ended. They ignore the SIGTERM with which `multiprocessing` ends its children at
exit, and it would wait for them for ever: they are killed before that."""
_killed_at_exit_of: set[int] = set()
"""The processes (one, unless this one was forked) that will do so."""
os.register_at_fork(after_in_child=_live_workers.clear)  # they are the parent's


def _kill_at_exit() -> None:
    """Have the live workers killed at the exit of this process, once.

    By `multiprocessing` itself, before it waits: a process that it started runs none of the functions of `atexit`.
    """
    if os.getpid() not in _killed_at_exit_of:
        _killed_at_exit_of.add(os.getpid())
        multiprocessing.util.Finalize(None, _kill_live_workers, exitpriority=0)


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


def torch_loader(
    dataset: Dataset[Any],
    workers: WorkerSettings,
    *,
    pin_memory: bool,
    persistent: bool = False,
    sampler: Iterable[Any] | None = None,
    collate: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """A torch DataLoader that leaves signals and torch's global random state alone.

    Args:
        dataset: each item of `sampler` goes to its `__getitems__` whole; without a sampler, an iterable dataset.
        workers: number of processes and of batches prepared ahead.
        pin_memory: page-locked batches.
        persistent: keep the processes when a pass ends.
        sampler: what each batch is made of.
        collate: what `__getitems__` returned, to a batch; without it what an iterable dataset yields is the batch.
    """
    processes = workers.num_workers
    collate = collate or _unchanged
    return DataLoader(
        dataset,
        batch_size=None if sampler is None else 1,
        batch_sampler=sampler,
        collate_fn=_OnePieceCollate(collate) if processes else collate,
        num_workers=processes,
        prefetch_factor=workers.prefetch_factor if processes else None,
        persistent_workers=persistent and processes > 0,
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
        # Its own generator: without one every new iterator draws from torch's global random state.
        generator=torch.Generator().manual_seed(0),
    )


def read_batches(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """One pass over a loader: failures become DataErrors, and processes that should be gone at the end are.

    Raises:
        DataError: a sample cannot be read, or a loader process died or gave nothing for `LOADER_TIMEOUT_S`.
    """
    iterator = _start(loader)
    workers = _workers(iterator)
    try:
        while True:
            _check_alive(workers)
            try:
                batch = _next(iterator)
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


def _unchanged(batch: Any) -> Any:
    return batch


class _OnePieceCollate:
    """Collates in a loader process, and makes one piece of shared memory of a small batch.

    torch hands every tensor over by a file descriptor of its own, which for a small batch is nearly all it costs. The
    bytes do not go through the pipe instead: a process killed half way through a message that exceeds the pipe would
    leave the training process waiting for the rest for ever, as other processes hold the pipe open.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> Any:
        return _in_one_piece(self._collate(samples))


def _in_one_piece(item: Any) -> Any:
    """A large `item` itself; of another, the tensors as parts of one buffer, which are unpickled to equal tensors."""
    ends = [0]

    def measure(tensor: torch.Tensor) -> None:
        end = ends[-1] + tensor.nbytes
        ends.append(end + -end % _PIECE_ALIGNMENT)

    _replace_tensors(item, measure)
    if ends[-1] > ONE_PIECE_BYTES:
        return item
    buffer = torch.empty(ends[-1], dtype=torch.uint8)
    starts = iter(ends)
    return _replace_tensors(item, lambda tensor: _Part(buffer, next(starts), tensor))


def _replace_tensors(value: Any, replacement: Callable[[torch.Tensor], Any]) -> Any:
    """`value` with every plain tensor in its dicts, lists and tuples replaced; others (sparse, of a subclass) stay."""
    kind = type(value)
    if kind is torch.Tensor and _is_plain(value):
        return replacement(value)
    if kind is dict:
        return {name: _replace_tensors(part, replacement) for name, part in value.items()}
    if kind is list or kind is tuple:
        return kind(_replace_tensors(part, replacement) for part in value)
    return value


def _is_plain(tensor: torch.Tensor) -> bool:
    dense = tensor.layout is torch.strided and not tensor.is_quantized
    return dense and tensor.device.type == "cpu" and not tensor.requires_grad


class _Part:
    """A tensor copied into a buffer, from where unpickling takes it."""

    def __init__(self, buffer: torch.Tensor, start: int, tensor: torch.Tensor) -> None:
        self._place = (buffer, start, tensor.nbytes, tensor.dtype, tensor.shape)
        _view(*self._place).copy_(tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        return _view, self._place


def _view(buffer: torch.Tensor, start: int, size: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor whose elements are `size` bytes of a buffer."""
    return buffer[start : start + size].view(dtype).view(shape)


def _begin_worker(_worker: int) -> None:
    """Leave signals to the training process, and end with it.

    A Ctrl-C or SIGTERM reaches the whole process group; the training process decides, and ends its loaders.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="parent watch", daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Leave as soon as the parent process is gone.

    torch's own watch would end the main thread only, between two batches; the process would then wait for ever to get
    rid of what it prepared, as nobody reads the pipe that the other loader processes hold open.
    """
    process = parent_process()
    # The sentinel tells at once, unless a process forked later holds its other end; then the parent's number tells.
    sentinels = [] if process is None else [process.sentinel]
    while os.getppid() == parent and not multiprocessing.connection.wait(sentinels, PARENT_CHECK_S):
        pass
    os._exit(1)


def _start(loader: DataLoader[Any]) -> _BaseDataLoaderIter:
    """Iterator of the loader, its processes started.

    torch installs a SIGCHLD handler that raises wherever the main thread happens to be when a loader process dies, in
    the middle of an optimizer step for example. It is taken out again: a dead process is noticed at the next batch.
    """
    persistent = loader._iterator
    if isinstance(persistent, _MultiProcessingDataLoaderIter):
        _check_alive(persistent._workers)
        persistent._timeout = 0  # what is left of an unfinished pass is awaited without giving up
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        # Not the loader's own `timeout`: torch gives up when it is over, and looks for dead processes only then.
        iterator._timeout = POLL_S
    _live_workers.update(_workers(iterator))
    _kill_at_exit()
    return iterator


def _workers(iterator: Iterator[Any]) -> Sequence[BaseProcess]:
    """The processes of an iterator, in their own order."""
    return iterator._workers if isinstance(iterator, _MultiProcessingDataLoaderIter) else ()


def _next(iterator: _BaseDataLoaderIter) -> Any:
    """The next batch. A call that torch gives up is simply made again, as long as no process hangs."""
    deadline = time.monotonic() + LOADER_TIMEOUT_S
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            if not str(error).startswith(_TORCH_TIMEOUT) or not isinstance(iterator, _MultiProcessingDataLoaderIter):
                raise
            if time.monotonic() > deadline:
                number = iterator._task_info[iterator._rcvd_idx][0]
                hanging: BaseProcess = iterator._workers[number]
                hanging.kill()
                raise DataError(
                    f"data loader process {number} (pid {hanging.pid}) gave no batch for {LOADER_TIMEOUT_S:g} s: it "
                    "hangs, or the files are on a disk or network that does not answer; check them, or set "
                    "data.num_workers: 0 to see where it stops, then resume the run"
                ) from error


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
