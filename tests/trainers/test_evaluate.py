"""The evaluator: sums over all batches, stops when asked, and knows which score is better."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from truthgpt.data.base import Batch, LossAndLogits
from truthgpt.metrics.base import EvalBatch
from truthgpt.metrics.loss import LossMetric
from truthgpt.runtime.precision import UnscaledPrecision
from truthgpt.trainers.evaluate import Evaluator


class Accuracy:
    """A metric of which more is better."""

    name = "accuracy"
    direction = "max"

    def reset(self) -> None:
        self._right, self._all = 0, 0

    def update(self, batch: EvalBatch) -> None:
        self._right += int((batch.logits.argmax(-1) == batch.labels).sum())
        self._all += int(batch.tokens)

    def compute(self) -> float:
        return self._right / self._all


def objective(model: nn.Module, batch: Batch) -> LossAndLogits:
    logits = model(batch["input_ids"].float().unsqueeze(-1))  # (B, T, V)
    flat, labels = logits.flatten(0, 1), batch["labels"].flatten()
    return nn.functional.cross_entropy(flat, labels, ignore_index=-100, reduction="sum"), lambda: logits


def batches(sizes: tuple[int, ...]) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (sum(sizes), 6), generator=generator)
    labels = torch.randint(0, 5, (sum(sizes), 6), generator=generator)
    labels[1, 2:] = -100
    return [
        {"input_ids": i, "labels": lab}
        for i, lab in zip(ids.split(list(sizes)), labels.split(list(sizes)), strict=True)
    ]


def evaluator(given: list[Batch], by: str = "loss") -> Evaluator:
    precision = UnscaledPrecision("none", torch.device("cpu"), None)
    return Evaluator(given, [LossMetric(), Accuracy()], by, objective, precision)


def test_values_and_tokens_do_not_depend_on_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Linear(1, 5)
    results = [evaluator(batches(sizes)).run(model) for sizes in ((7,), (1, 6), (2, 2, 3))]
    for result in results:
        assert result is not None and results[0] is not None
        assert result.tokens == results[0].tokens == 7 * 6 - 4
        assert result.values == pytest.approx(results[0].values, rel=1e-6)


def test_run_twice_is_the_same_and_leaves_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(1, 5), nn.Dropout(0.5))
    tool = evaluator(batches((3, 4)))
    model.train()
    first, second = tool.run(model), tool.run(model)
    assert first == second, "dropout must be off, and metrics reset"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stops_between_batches() -> None:
    seen: list[int] = []

    class Counted(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            for number, batch in enumerate(super().__iter__()):
                seen.append(number)
                yield batch

    tool = evaluator(Counted(batches((2, 2, 3))))
    assert tool.run(nn.Linear(1, 5), stop=lambda: len(seen) >= 2) is None
    assert seen == [0, 1]


@pytest.mark.parametrize(
    ("by", "score", "best", "better"),
    [
        ("loss", 1.0, None, True),
        ("loss", 1.0, 2.0, True),
        ("loss", 2.0, 1.0, False),
        ("loss", 1.0, 1.0, False),
        ("accuracy", 0.5, 0.4, True),
        ("accuracy", 0.4, 0.5, False),
        ("accuracy", 0.5, 0.5, False),
        ("loss", math.nan, None, False),
        ("loss", math.inf, None, False),
        ("loss", -math.inf, 1.0, False),
        ("accuracy", math.inf, 0.5, False),
    ],
)
def test_is_better(by: str, score: float, best: float | None, better: bool) -> None:
    assert evaluator([], by).is_better(score, best) is better


def test_score_is_the_chosen_metric() -> None:
    tool = evaluator(batches((3,)), "accuracy")
    result = tool.run(nn.Linear(1, 5))
    assert result is not None and tool.score(result) == result.values["accuracy"]
