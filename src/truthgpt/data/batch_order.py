"""Which samples make up which micro-batch of which step. Every step is computed alone: nothing is stored or replayed.

Positions are given to samples by keyed permutations, so neither loader processes nor a resume can change an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from truthgpt.data.order import EpochPermutations
from truthgpt.errors import DataError

MIX_PERIOD = 10_000
"""Samples in which every source of a mixture has its share: weights are met to one part in so many."""

Int64Array = npt.NDArray[np.int64]


class ShuffledOrder:
    """All samples once an epoch, in an order keyed by (seed, epoch).

    The last global batch of an epoch is smaller when the samples do not divide: nothing is dropped or repeated.

    Args:
        samples: number of samples.
        micro_batch_size: samples a micro-batch.
        grad_accum_steps: micro-batches a step.
        seed: seed of the run.

    Raises:
        DataError: 0 samples.
    """

    def __init__(self, samples: int, micro_batch_size: int, grad_accum_steps: int, seed: int) -> None:
        _refuse_empty(samples)
        self._samples = samples
        self._micro_batch_size = micro_batch_size
        self._global_batch = micro_batch_size * grad_accum_steps
        self._orders = EpochPermutations(samples, seed, "order")
        self.steps_per_epoch = -(-samples // self._global_batch)
        """Optimizer steps one pass takes."""

    def micro_batches(self, step: int) -> list[list[int]]:
        """Sample indices of every micro-batch of step `step`."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self._global_batch
        samples = self._orders.images(epoch, first, min(first + self._global_batch, self._samples))
        return _cut(samples, self._micro_batch_size)

    def describe(self) -> dict[str, Any]:
        """Kind, samples, and samples a step; how a step is split into micro-batches changes no order."""
        return {"kind": "shuffled", "samples": self._samples, "global_batch": self._global_batch}


class BucketedOrder:
    """Micro-batches of samples of like length: each holds samples of one bin only.

    A sample belongs to the smallest bin that holds it. Every epoch shuffles the samples of each bin, cuts them into
    micro-batches, and shuffles the micro-batches of all bins; `grad_accum_steps` consecutive ones are a step. Padded to
    their bin, batches have at most one length a bin; the last one of a bin may have fewer samples. The whole order of
    an epoch is made when one of its steps is first asked for: about 0.1 s for a million samples.

    Args:
        lengths: input tokens of every sample, `(samples,)`.
        bins: lengths that batches are padded to.
        micro_batch_size: samples a micro-batch.
        grad_accum_steps: micro-batches a step.
        seed: seed of the run.
        max_tokens: positions a micro-batch at most, used instead of `micro_batch_size`; at least one sample is taken.

    Raises:
        DataError: 0 samples.
        ValueError: a sample longer than the largest bin.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.integer[Any]],
        bins: Sequence[int],
        micro_batch_size: int,
        grad_accum_steps: int,
        seed: int,
        max_tokens: int | None = None,
    ) -> None:
        _refuse_empty(len(lengths))
        self._bins = sorted(set(bins))
        if int(lengths.max()) > self._bins[-1]:
            raise ValueError(f"a sample of {lengths.max()} tokens fits into none of the bins {self._bins}")
        self._grad_accum_steps = grad_accum_steps
        bin_of_sample = np.searchsorted(self._bins, lengths).astype(np.int16)
        self._by_bin = np.argsort(bin_of_sample, kind="stable")
        self._bin_starts = np.searchsorted(bin_of_sample[self._by_bin], np.arange(len(self._bins) + 1))
        self._sizes = [micro_batch_size if max_tokens is None else max(1, max_tokens // size) for size in self._bins]
        batches = [-(-int(n) // size) for n, size in zip(np.diff(self._bin_starts), self._sizes, strict=True)]
        self._batch_starts = np.concatenate([[0], np.cumsum(batches)])
        total = int(self._batch_starts[-1])
        self._bin_orders = [
            EpochPermutations(int(n), seed, "bin", number) for number, n in enumerate(np.diff(self._bin_starts))
        ]
        self._batch_orders = EpochPermutations(total, seed, "batches")
        self._epoch: tuple[int, Int64Array, Int64Array] | None = None
        self.steps_per_epoch = -(-total // grad_accum_steps)
        """Optimizer steps one pass takes."""

    def micro_batches(self, step: int) -> list[list[int]]:
        """Sample indices of every micro-batch of step `step`."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        samples, batches = self._order_of(epoch)
        first = step_in_epoch * self._grad_accum_steps
        return [self._batch(batch, samples) for batch in batches[first : first + self._grad_accum_steps].tolist()]

    def describe(self) -> dict[str, Any]:
        """Kind, samples, bins, samples a micro-batch of each bin, and micro-batches a step."""
        return {
            "kind": "bucketed",
            "samples": len(self._by_bin),
            "bins": self._bins,
            "bin_batch_sizes": self._sizes,
            "grad_accum_steps": self._grad_accum_steps,
        }

    def _order_of(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """All samples of an epoch bin by bin, and the order of its micro-batches. Keeps the last one."""
        if self._epoch is None or self._epoch[0] != epoch:
            borders = zip(self._bin_starts[:-1], self._bin_starts[1:], self._bin_orders, strict=True)
            shuffled = [self._by_bin[low:high][order.whole(epoch)] for low, high, order in borders if high > low]
            self._epoch = (epoch, np.concatenate(shuffled), self._batch_orders.whole(epoch))
        return self._epoch[1:]

    def _batch(self, batch: int, samples: Int64Array) -> list[int]:
        """Samples of one micro-batch, numbered over all bins."""
        number = int(np.searchsorted(self._batch_starts, batch, side="right")) - 1
        size = self._sizes[number]
        first = self._bin_starts[number] + (batch - self._batch_starts[number]) * size
        members: list[int] = samples[first : min(first + size, self._bin_starts[number + 1])].tolist()
        return members


@dataclass(frozen=True)
class SourceShare:
    """One source of a mixture: how many samples it has, and its share of the samples relative to the others'."""

    samples: int
    weight: float


class MixedOrder:
    """Samples of several sources by weight; indices count through all sources, as in a ConcatenatedDataset.

    Every 10,000 consecutive samples hold each source in its share, spread evenly with a keyed jitter (stratified
    sampling), so that short runs keep the shares too. Each source is read in an order of its own, keyed by (seed,
    source, pass): all its samples once before any comes again, whatever the weights. An epoch is as many samples as
    all sources have together; steps are always full, and flow across epochs.

    Args:
        shares: size and weight of every source.
        micro_batch_size: samples a micro-batch.
        grad_accum_steps: micro-batches a step.
        seed: seed of the run.

    Raises:
        DataError: a source without samples.
        ValueError: a weight that is not positive, or more sources than the period has places.
    """

    def __init__(self, shares: Sequence[SourceShare], micro_batch_size: int, grad_accum_steps: int, seed: int) -> None:
        for number, share in enumerate(shares):
            if share.samples == 0:
                raise DataError(f"data.sources[{number}]: 0 training samples; a source with a weight must have some")
        self._sizes = np.array([share.samples for share in shares], dtype=np.int64)
        self._first_samples = np.cumsum(self._sizes) - self._sizes
        self._slots = np.array(_apportion([share.weight for share in shares], MIX_PERIOD), dtype=np.int64)
        self._micro_batch_size = micro_batch_size
        self._global_batch = micro_batch_size * grad_accum_steps
        self._source_orders = [
            EpochPermutations(share.samples, seed, "source", number) for number, share in enumerate(shares)
        ]
        self._jitters = EpochPermutations(MIX_PERIOD, seed, "mix")
        self._pattern: tuple[int, Int64Array, Int64Array] | None = None
        self.steps_per_epoch = -(-int(self._sizes.sum()) // self._global_batch)
        """Optimizer steps an epoch takes."""

    def micro_batches(self, step: int) -> list[list[int]]:
        """Sample indices of every micro-batch of step `step`."""
        first = step * self._global_batch
        positions = np.arange(first, first + self._global_batch, dtype=np.int64)
        samples = np.empty_like(positions)
        periods = positions // MIX_PERIOD
        for period in range(int(periods[0]), int(periods[-1]) + 1):
            here = periods == period
            samples[here] = self._samples_of(period, positions[here] % MIX_PERIOD)
        return _cut(samples, self._micro_batch_size)

    def describe(self) -> dict[str, Any]:
        """Kind, samples and places in 10,000 of every source, and samples a step."""
        return {
            "kind": "mixed",
            "samples": self._sizes.tolist(),
            "shares": self._slots.tolist(),
            "global_batch": self._global_batch,
        }

    def _samples_of(self, period: int, slots: Int64Array) -> Int64Array:
        """Samples at some places of one period."""
        sources, ranks = self._pattern_of(period)
        samples = np.empty_like(slots)
        for source in np.unique(sources[slots]).tolist():
            here = sources[slots] == source
            counts = period * self._slots[source] + ranks[slots[here]]
            samples[here] = self._first_samples[source] + self._reads(source, counts)
        return samples

    def _reads(self, source: int, counts: Int64Array) -> Int64Array:
        """The samples that a source gives when it is read for the `counts`-th time (from 0), consecutive numbers."""
        size = int(self._sizes[source])
        first, stop = int(counts[0]), int(counts[-1]) + 1
        runs = []
        while first < stop:
            number, place = divmod(first, size)
            length = min(stop - first, size - place)
            runs.append(self._source_orders[source].images(number, place, place + length))
            first += length
        return np.concatenate(runs)

    def _pattern_of(self, period: int) -> tuple[Int64Array, Int64Array]:
        """Source of every place of a period, and how many places before it have the same one. Keeps the last one."""
        if self._pattern is None or self._pattern[0] != period:
            sources = np.repeat(np.arange(len(self._slots)), self._slots)
            ranks = np.arange(MIX_PERIOD) - np.repeat(np.cumsum(self._slots) - self._slots, self._slots)
            jitter = self._jitters.whole(period)
            # Read n of a source with s places falls at random within [n, n + 1) / s of the period.
            moments = (ranks * MIX_PERIOD + jitter) / self._slots[sources]
            order = np.argsort(moments, kind="stable")
            self._pattern = (period, sources[order], ranks[order])
        return self._pattern[1:]


def sample_weights(
    weights: Sequence[float],
    mix_by: Literal["documents", "tokens"],
    samples: Sequence[int],
    documents: Sequence[int],
    tokens: Sequence[int],
) -> list[float]:
    """Weights by samples that share out documents or tokens as `weights` do.

    A sample holds a part of a document, or several documents, and more or fewer tokens by source.

    Args:
        weights: wanted share of every source.
        mix_by: what the weights share out.
        samples: samples of every source.
        documents: documents of every source.
        tokens: tokens of every source.
    """
    units = documents if mix_by == "documents" else tokens
    return [weight * count / unit for weight, count, unit in zip(weights, samples, units, strict=True)]


def _apportion(weights: Sequence[float], places: int) -> list[int]:
    """Whole numbers that add up to `places` in the ratio of `weights`, each at least 1 (largest remainder method)."""
    if len(weights) > places or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"1 to {places} positive, finite weights are needed, not {list(weights)}")
    total = sum(weights)
    exact = [weight / total * places for weight in weights]
    counts = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: max(0, places - sum(counts))]:
        counts[source] += 1
    while sum(counts) > places:  # sources of less than one place were raised to one
        counts[counts.index(max(counts))] -= 1
    return counts


def _refuse_empty(samples: int) -> None:
    if samples == 0:
        raise DataError("0 training samples: the data is empty after the split and data.overlong")


def _cut(samples: Int64Array, size: int) -> list[list[int]]:
    """Samples of a step as micro-batches of `size`, the last one perhaps smaller."""
    indices = samples.tolist()
    return [indices[start : start + size] for start in range(0, len(indices), size)]
