"""Loss, perplexity and bits per byte against hand-made values and float64 numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt.metrics.base import EvalBatch, Metric
from truthgpt.metrics.bits_per_byte import BitsPerByteMetric
from truthgpt.metrics.loss import LossMetric, sum_dtype
from truthgpt.metrics.perplexity import PerplexityMetric

torch.set_num_threads(1)

BYTE_LENGTHS = torch.tensor([1, 2, 0, 5])


def batch_of(labels: list[list[int]], losses: list[list[float]]) -> EvalBatch:
    """A batch whose token `(b, t)` lost `losses[b][t]` nats."""
    label_tensor = torch.tensor(labels)
    supervised = label_tensor != -100
    loss_sum = (torch.tensor(losses, dtype=torch.float32) * supervised).sum()
    return EvalBatch(loss_sum, supervised.sum(), label_tensor, lambda: torch.zeros(*label_tensor.shape, 4))


def metrics() -> list[Metric]:
    return [LossMetric(), PerplexityMetric(), BitsPerByteMetric(BYTE_LENGTHS)]


def test_values_by_hand() -> None:
    loss, perplexity, bits = metrics()
    for metric in (loss, perplexity, bits):
        metric.update(batch_of([[0, 1, -100]], [[1.0, 2.0, 99.0]]))  # 3 bytes
        metric.update(batch_of([[3, 2]], [[0.5, 0.5]]))  # 5 bytes, and a special token
    assert loss.compute() == pytest.approx(4.0 / 4)
    assert perplexity.compute() == pytest.approx(math.e)
    assert bits.compute() == pytest.approx(4.0 / math.log(2) / 8)


def test_names_and_directions() -> None:
    assert [(metric.name, metric.direction) for metric in metrics()] == [
        ("loss", "min"),
        ("ppl", "min"),
        ("bits_per_byte", "min"),
    ]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_split_into_batches_gives_the_float64_value(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 12))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    labels = generator.choice([-100, 0, 1, 2, 3], size=(rows, 5))
    labels[0, 0] = 1  # at least one token, of two bytes
    losses = generator.exponential(3.0, size=(rows, 5)).astype(np.float32)
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1))) if rows > 1 else [])
    supervised = labels != -100
    total = losses.astype(np.float64)[supervised].sum()
    spelled = int(BYTE_LENGTHS.numpy()[labels[supervised]].sum())
    expected = [
        total / supervised.sum(),
        math.exp(total / supervised.sum()),
        total / math.log(2) / spelled,
    ]
    for metric, value in zip(metrics(), expected, strict=True):
        for part_labels, part_losses in zip(np.split(labels, cuts), np.split(losses, cuts), strict=True):
            metric.update(batch_of(part_labels.tolist(), part_losses.tolist()))
        assert metric.compute() == pytest.approx(value, rel=1e-5)


def test_sums_are_wider_than_float32() -> None:
    metric = LossMetric()
    metric.update(batch_of([[0]], [[2.0**25]]))
    for _ in range(8):
        metric.update(batch_of([[0]], [[1.0]]))  # float32 would lose each of them
    assert metric.compute() == (2.0**25 + 8) / 9
    assert sum_dtype(torch.device("mps")) is torch.float32


@pytest.mark.parametrize("index", range(3))
def test_nan_without_a_token_and_after_reset(index: int) -> None:
    metric = metrics()[index]
    assert math.isnan(metric.compute())
    metric.update(batch_of([[-100, -100]], [[3.0, 3.0]]))
    assert math.isnan(metric.compute())
    metric.update(batch_of([[0, 1]], [[3.0, 3.0]]))
    assert math.isfinite(metric.compute())
    value = metric.compute()
    metric.reset()
    assert math.isnan(metric.compute())
    metric.update(batch_of([[0, 1]], [[3.0, 3.0]]))
    assert metric.compute() == value


@pytest.mark.parametrize(("loss", "expected"), [(800.0, math.inf), (math.inf, math.inf)])
def test_perplexity_overflows_to_infinity(loss: float, expected: float) -> None:
    metric = PerplexityMetric()
    metric.update(batch_of([[0]], [[loss]]))
    assert metric.compute() == expected


def test_a_nan_loss_stays_nan() -> None:
    for metric in metrics():
        metric.update(batch_of([[0, 1]], [[math.nan, 1.0]]))
        assert math.isnan(metric.compute())


def test_ids_beyond_the_tokenizer_spell_nothing() -> None:
    metric = BitsPerByteMetric(BYTE_LENGTHS)
    metric.update(batch_of([[4, 700, 0]], [[1.0, 1.0, 1.0]]))
    assert metric.compute() == pytest.approx(3 / math.log(2))


def test_only_special_tokens_cost_infinitely_many_bits() -> None:
    metric = BitsPerByteMetric(BYTE_LENGTHS)
    metric.update(batch_of([[2, 2]], [[1.0, 1.0]]))
    assert metric.compute() == math.inf


def test_update_reads_nothing_back() -> None:
    """Tensors on `meta` have no values: any read-back raises."""
    batch = batch_of([[0, 1]], [[1.0, 1.0]])
    on_device = (tensor.to("meta") for tensor in (batch.loss_sum, batch.tokens, batch.labels))
    on_meta = EvalBatch(*on_device, lambda: batch.logits.to("meta"))
    for metric in metrics():
        metric.update(on_meta)
        metric.update(on_meta)
        with pytest.raises((RuntimeError, NotImplementedError)):
            metric.compute()


def test_the_callers_tensors_are_not_kept() -> None:
    metric = LossMetric()
    batch = EvalBatch(
        torch.tensor(6.0, dtype=torch.float64), torch.tensor(3), torch.tensor([[0, 0, 0]]), lambda: torch.zeros(1, 3, 4)
    )
    metric.update(batch)
    batch.loss_sum.zero_()
    batch.tokens.zero_()
    assert metric.compute() == 2.0
