"""Accuracy against numpy, for images and for text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt.metrics.accuracy import AccuracyMetric
from truthgpt.metrics.base import EvalBatch

torch.set_num_threads(1)


def batch_of(logits: torch.Tensor, labels: torch.Tensor) -> EvalBatch:
    return EvalBatch(torch.zeros(()), (labels != -100).sum(), labels, lambda: logits)


def test_by_hand() -> None:
    metric = AccuracyMetric()
    assert (metric.name, metric.direction) == ("accuracy", "max")
    metric.update(batch_of(torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.0, 3.0]]), torch.tensor([1, 2])))
    assert metric.compute() == 0.5
    metric.update(batch_of(torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[1, -100, 1]])))
    assert metric.compute() == 0.75
    metric.reset()
    assert math.isnan(metric.compute())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_any_split_into_batches_gives_the_share_of_all(seed: int, text: bool) -> None:
    generator = np.random.default_rng(seed)
    rows = int(generator.integers(1, 9))
    shape = (rows, 4) if text else (rows,)
    labels = generator.choice([-100, 0, 1, 2], size=shape)
    labels.flat[0] = 1
    logits = generator.normal(size=(*shape, 3))
    cut = int(generator.integers(0, rows))
    metric = AccuracyMetric()
    for part in (slice(0, cut), slice(cut, rows)):
        metric.update(batch_of(torch.from_numpy(logits[part]), torch.from_numpy(labels[part])))
    supervised = labels != -100
    assert metric.compute() == (logits.argmax(-1) == labels)[supervised].sum() / supervised.sum()


@pytest.mark.parametrize("labels", [torch.full((2, 3), -100), torch.empty((0, 3), dtype=torch.int64)])
def test_nan_without_a_supervised_position(labels: torch.Tensor) -> None:
    metric = AccuracyMetric()
    metric.update(batch_of(torch.zeros(*labels.shape, 5), labels))
    assert math.isnan(metric.compute())


def test_update_reads_nothing_back() -> None:
    """Tensors on `meta` have no values: any read-back raises."""
    metric = AccuracyMetric()
    for _ in range(2):
        metric.update(
            batch_of(torch.zeros(2, 3, 5, device="meta"), torch.zeros(2, 3, dtype=torch.int64, device="meta"))
        )
    with pytest.raises((RuntimeError, NotImplementedError)):
        metric.compute()
