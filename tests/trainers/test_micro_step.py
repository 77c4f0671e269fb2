"""Which micro-batches are replayed, and that gradients add up; the graphs themselves are tested on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from truthgpt.data.base import Batch
from truthgpt.errors import ConfigError
from truthgpt.runtime.cuda_graph import CaptureError
from truthgpt.trainers import micro_step
from truthgpt.trainers.micro_step import EAGER_CALLS, EagerMicroStep, GraphedMicroStep

CPU = torch.device("cpu")


class Recorded:
    """Stands for a CUDA graph: what it writes goes to the gradients that there were when it was recorded."""

    def __init__(self, compute: Callable[[], torch.Tensor], pool: Any) -> None:
        self._compute = compute
        self.pool = pool or "a pool"
        self.replays = 0
        model = compute.__closure__[0].cell_contents._parameters  # type: ignore[index]
        self._held = [parameter.grad for parameter in model]
        self._parameters = model
        values = [None if held is None else held.clone() for held in self._held]
        compute()  # a real recording computes nothing: what this changes is put back
        self._target = [parameter.grad for parameter in model]
        for held, value in zip(self._held, values, strict=True):
            if held is not None:
                held.copy_(value)

    def replay(self) -> torch.Tensor:
        self.replays += 1
        before = [parameter.grad for parameter in self._parameters]
        for parameter, held in zip(self._parameters, self._held, strict=True):
            parameter.grad = None if held is None else held
        loss = self._compute()
        for parameter, target in zip(self._parameters, self._target, strict=True):
            if target is not parameter.grad:
                target.copy_(parameter.grad)
        for parameter, grad in zip(self._parameters, before, strict=True):
            parameter.grad = grad
        return loss


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    made: list[Recorded] = []

    def make(compute: Callable[[], torch.Tensor], pool: Any) -> Recorded:
        made.append(Recorded(compute, pool))
        return made[-1]

    monkeypatch.setattr(micro_step, "_Graph", make)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return made


def batch(rows: int, seed: int) -> Batch:
    return {"x": torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))}


class Computer:
    def __init__(self) -> None:
        self.model = nn.Linear(3, 1)
        self.parameters = list(self.model.parameters())

    def backward(self, batch: Batch, tokens: int | torch.Tensor) -> torch.Tensor:
        loss = self.model(batch["x"]).square().sum()
        (loss / tokens).backward()
        return loss.detach()


def steps() -> list[list[Batch]]:
    """Micro-batches of every step: two of them, and a smaller one last, or alone."""
    full = [[batch(4, 10 * step), batch(4, 10 * step + 1)] for step in range(5)]
    return [*full, [batch(4, 90), batch(2, 91)], [batch(2, 92)], [batch(4, 93), batch(4, 94), batch(4, 95)]]


def test_replays_give_the_losses_and_gradients_of_operations(recorded: list[Recorded]) -> None:
    computer = Computer()
    eager = EagerMicroStep(computer.backward, computer.parameters, CPU)
    graphed = GraphedMicroStep(eager, computer.backward, computer.parameters, CPU)
    results = []
    for run in (eager, graphed):
        found = []
        for step, batches in enumerate(steps()):
            losses = [float(run(b, 5 + step, first=i == 0)) for i, b in enumerate(batches)]
            found.append((losses, [parameter.grad.clone() for parameter in computer.parameters]))
            run.clear()
            assert all(parameter.grad is None for parameter in computer.parameters)
        results.append(found)
    for (losses, gradients), (expected_losses, expected) in zip(results[1], results[0], strict=True):
        assert losses == pytest.approx(expected_losses)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, expected, strict=True))
    write, add = recorded
    total = sum(len(batches) for batches in steps())
    assert write.replays + add.replays == total - EAGER_CALLS - 1 - 2  # one joins an eager first one, two are smaller


def test_gradients_of_another_run_are_never_added_to(recorded: list[Recorded]) -> None:
    """A further micro-batch after a smaller first one is computed by operations."""
    computer = Computer()
    eager = EagerMicroStep(computer.backward, computer.parameters, CPU)
    graphed = GraphedMicroStep(eager, computer.backward, computer.parameters, CPU)
    for seed in range(EAGER_CALLS + 1):
        graphed(batch(4, seed), 1, first=True)
        graphed.clear()
    graphed(batch(2, 7), 1, first=True)
    graphed(batch(4, 8), 1, first=False)
    found = [parameter.grad.clone() for parameter in computer.parameters]
    graphed.clear()
    eager(batch(2, 7), 1, first=True)
    eager(batch(4, 8), 1, first=False)
    assert all(torch.allclose(a, p.grad) for a, p in zip(found, computer.parameters, strict=True))
    assert len(recorded) == 1


def test_what_cannot_be_recorded_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refuse(*arguments: object) -> Iterator[None]:
        raise CaptureError("it cannot be recorded")
        yield

    monkeypatch.setattr(micro_step, "recording", refuse)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    with pytest.raises(ConfigError, match=r"training.compile_mode: .* it cannot be recorded \(set it to default"):
        micro_step._Graph(lambda: torch.zeros(()), pool=(0, 1))
