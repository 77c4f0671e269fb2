"""Global batches in the order that a BatchOrder gives, and validation batches in sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from truthgpt.data.base import (
    IGNORED_LABEL,
    AnySample,
    Batch,
    BatchOrder,
    Collator,
    GlobalBatch,
    SampleDataset,
)
from truthgpt.data.loader_processes import WorkerSettings, read_batches, torch_loader
from truthgpt.errors import DataError

__all__ = ["EvalLoader", "GlobalBatchLoader", "WorkerSettings", "supervised_tokens"]

Request = tuple[int, list[int]]
"""What one micro-batch is made of: the epoch, and indices of samples."""

ORDER_KEYS = {
    "kind": "data.packing, data.bucket_by_length, data.max_tokens, data.sources and their weights",
    "samples": "the documents",
    "global_batch": "training.train_batch_size x training.grad_accum_steps",
    "bins": "data.bucket_bins and data.max_seq_len",
    "bin_batch_sizes": "training.train_batch_size and data.max_tokens",
    "grad_accum_steps": "training.grad_accum_steps",
    "shares": "the weights of data.sources and data.mix_by",
}
"""What to keep so that a value of an order's description stays as it was."""


class GlobalBatchLoader:
    """The training batches of every optimizer step.

    Any step is reached in O(1), and neither processes nor prefetching can change what a step trains on: the order is a
    pure function of seed and step, and samples are read with their epoch.

    Args:
        dataset: samples by index.
        collate: samples to a micro-batch; runs in the loader processes.
        order: samples of every step.
        workers: loader processes.
        pin_memory: page-locked batches, for copies to a GPU that overlap with compute.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        collate: Collator,
        order: BatchOrder,
        workers: WorkerSettings,
        pin_memory: bool = False,
    ) -> None:
        self._dataset = dataset
        self._collate = collate
        self._order = order
        self._workers = workers
        self._pin_memory = pin_memory
        self.steps_per_epoch: int | None = order.steps_per_epoch
        """Optimizer steps one pass over the samples takes."""

    def batches(self, start_step: int = 0) -> Generator[GlobalBatch, None, None]:
        """Global batches of step `start_step`, `start_step + 1` and so on, without end.

        Close the generator (`contextlib.closing`) to end the loader processes.

        Raises:
            DataError: a sample cannot be read, or a loader process died or hangs.
        """
        sampler = _StepSampler(self._order, start_step)
        loader = torch_loader(
            _TorchDataset(self._dataset),
            self._workers,
            pin_memory=self._pin_memory,
            sampler=sampler,
            collate=self._collate,
        )
        with closing(read_batches(loader)) as micro_batches:
            # Loaders run ahead: when the first micro-batch of a step is there, the sampler has noted how many it has.
            for first in micro_batches:
                epoch, sizes = sampler.steps.popleft()
                batches = [first, *(next(micro_batches) for _ in sizes[1:])]
                tokens = sum(supervised_tokens(batch) for batch in batches)
                yield GlobalBatch(batches, tokens=tokens, samples=sum(sizes), epoch=epoch)

    def sample_indices(self, step: int) -> list[int]:
        """Samples of one step, in order; for tools that show or check what a step trains on."""
        return [index for micro_batch in self._order.micro_batches(step) for index in micro_batch]

    def state_dict(self, step: int) -> dict[str, Any]:
        """What the data and their order were when `step` steps were done; the position itself is the step."""
        return {
            "fingerprint": self._dataset.fingerprint,
            "samples": len(self._dataset),
            "order": dict(self._order.describe()),
            "step": step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with other data than `state` was saved with; `batches(step)` reaches any step by itself.

        Raises:
            DataError: the samples, their number or their order differ, or the data was streamed.
        """
        if "order" not in state:
            raise DataError(
                "this run was trained on streamed data: keep data.streaming: true, or start a new run in another "
                "output_dir"
            )
        if state["fingerprint"] != self._dataset.fingerprint or state["samples"] != len(self._dataset):
            raise DataError(
                f"the data is not what this run was trained on: {state['samples']} samples, fingerprint "
                f"{state['fingerprint'][:12]}, then; {len(self._dataset)} samples, {self._dataset.fingerprint[:12]}, "
                "now. The documents, their split, the tokenizer, data.max_seq_len, data.overlong or data.packing "
                "changed: restore them, or start a new run in another output_dir"
            )
        now = dict(self._order.describe())
        if state["order"] != now:
            raise DataError(_order_change(state["order"], now))


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
        self.fingerprint = dataset.fingerprint
        """That of the samples; changes when any of them does."""
        self._loader = torch_loader(
            _TorchDataset(dataset),
            workers,
            pin_memory=pin_memory,
            persistent=workers.persistent,
            sampler=sampler,
            collate=collate,
        )

    def __len__(self) -> int:
        """Number of batches."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        """The batches, from the first one.

        Raises:
            DataError: a sample cannot be read, or a loader process died or hangs.
        """
        return read_batches(self._loader)


def supervised_tokens(batch: Batch) -> int:
    """Labels of a micro-batch that the loss counts; of images, their number."""
    return int(np.count_nonzero(batch["labels"].numpy() != IGNORED_LABEL))  # twice as fast as torch for one batch


class _StepSampler:
    """Requests of all micro-batches from `start_step` on, without end.

    `steps` holds epoch and sizes of the micro-batches of every step that was begun; loaders run ahead of the trainer.
    """

    def __init__(self, order: BatchOrder, start_step: int) -> None:
        self._order = order
        self._start_step = start_step
        self.steps: deque[tuple[int, list[int]]] = deque()

    def __iter__(self) -> Iterator[Request]:
        step = self._start_step
        while True:
            epoch = step // self._order.steps_per_epoch
            micro_batches = self._order.micro_batches(step)
            self.steps.append((epoch, [len(indices) for indices in micro_batches]))
            for indices in micro_batches:
                yield epoch, indices
            step += 1


class _SequentialSampler:
    """Requests of consecutive samples."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self._samples = samples
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-self._samples // self._batch_size)

    def __iter__(self) -> Iterator[Request]:
        for start in range(0, self._samples, self._batch_size):
            yield 0, list(range(start, min(start + self._batch_size, self._samples)))


class _TorchDataset(Dataset[AnySample]):
    """A SampleDataset as torch wants it: a micro-batch is fetched at once."""

    def __init__(self, dataset: SampleDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, request: Request) -> list[AnySample]:
        epoch, indices = request
        read = self._dataset.read
        return [read(index, epoch) for index in indices]


def _order_change(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says which value of the order's description changed, and what to keep for it."""
    kinds_differ = then["kind"] != now["kind"]
    changed = ["kind"] if kinds_differ else [key for key in now if then[key] != now[key]]
    values = "; ".join(f"{key} {then[key]} then, {now[key]} now" for key in changed)
    keep = " and ".join(ORDER_KEYS[key] for key in changed)
    return (
        f"the order of the samples is not what this run was trained with: {values}. Keep {keep} as it was, or start a "
        "new run in another output_dir"
    )
