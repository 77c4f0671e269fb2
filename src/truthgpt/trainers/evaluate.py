"""Evaluation: sums and counts over the validation split; logits never outlive their batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from truthgpt.data.base import IGNORED_LABEL, Batch
from truthgpt.metrics.base import EvalBatch, Metric
from truthgpt.runtime.precision import Precision
from truthgpt.trainers.engine import Objective


@dataclass(frozen=True)
class Evaluation:
    """Values by metric name (`loss` always among them) over `tokens` supervised tokens."""

    values: dict[str, float]
    tokens: int


class Evaluator:
    """Runs a model over the validation batches.

    Args:
        batches: the validation split, the same batches in the same order at every iteration.
        metrics: what to compute, `loss` among them.
        select_best_by: name of the metric that ranks evaluations.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        metrics: Sequence[Metric],
        select_best_by: str,
        objective: Objective,
        precision: Precision,
    ) -> None:
        self._batches = batches
        self._metrics = metrics
        self._objective = objective
        self._precision = precision
        self._chosen = next(metric for metric in metrics if metric.name == select_best_by)

    @torch.no_grad()
    def run(self, model: nn.Module, stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """Evaluate `model`; None when `stop` asked to break off."""
        model.eval()
        device = next(model.parameters()).device
        tokens = torch.zeros((), dtype=torch.int64, device=device)
        for metric in self._metrics:
            metric.reset()
        for batch in self._batches:
            if stop():
                return None
            on_device = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
            with self._precision.autocast():
                loss_sum, logits = self._objective(model, on_device)
                labels = on_device["labels"]
                counted = (labels != IGNORED_LABEL).sum()
                tokens += counted
                evaluated = EvalBatch(loss_sum=loss_sum, tokens=counted, labels=labels, compute_logits=logits)
                for metric in self._metrics:
                    metric.update(evaluated)
        return Evaluation({metric.name: metric.compute() for metric in self._metrics}, int(tokens))

    @property
    def selected_by(self) -> str:
        """Name of the metric that ranks evaluations."""
        return self._chosen.name

    def score(self, evaluation: Evaluation) -> float:
        """The value of the metric that ranks evaluations."""
        return evaluation.values[self._chosen.name]

    def is_better(self, score: float, best: float | None) -> bool:
        """Whether `score` beats `best`; a non-finite score never does, a tie keeps the first."""
        if not torch.isfinite(torch.tensor(score)):
            return False
        if best is None:
            return True
        return score < best if self._chosen.direction == "min" else score > best
