"""The adaptive policy against every plan there is, on costs that are made up."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.errors import OutOfMemoryError
from truthgpt.memory.adaptive import AdvancedMemoryManager
from truthgpt.memory.base import EVERY_LAYER, MemoryEstimate, MemoryPlan


@dataclass(frozen=True)
class MadeUpCost:
    """Activations by micro-batch and layer, time by micro-batches and layers computed again."""

    layers: int = 4
    layer_bytes: int = 100
    input_bytes: int = 10
    fixed_bytes: int = 50
    average_bytes: int = 0
    mostly_frozen: bool = False

    def memory(self, plan: MemoryPlan) -> MemoryEstimate:
        recomputed = min(plan.checkpointed_layers, self.layers)
        rows = plan.micro_batch_size
        activations = rows * ((self.layers - recomputed) * self.layer_bytes + recomputed * self.input_bytes)
        return MemoryEstimate(self.fixed_bytes, 0, 0, self.average_bytes, activations, 0, 0)

    def seconds(self, plan: MemoryPlan) -> float:
        return 100 + 8 * min(plan.checkpointed_layers, self.layers) + plan.grad_accum_steps


SIZES = st.integers(1, 12)


@given(SIZES, SIZES, st.integers(40, 6000), st.integers(1, 6), st.sampled_from(["any", "smaller", "never"]))
def test_the_fastest_that_fits(size: int, steps: int, budget: int, layers: int, recut: str) -> None:
    cost, samples = MadeUpCost(layers=layers), size * steps
    allowed = [
        MemoryPlan(rows, samples // rows, k)
        for rows in range(1, samples + 1)
        for k in range(layers + 1)
        if samples % rows == 0 and (rows == size or recut == "any" or (recut == "smaller" and rows < size))
    ]
    fitting = [plan for plan in allowed if cost.memory(plan).peak_bytes <= budget]
    manager = AdvancedMemoryManager(cost, budget, recut)  # type: ignore[arg-type]
    if not fitting:
        with pytest.raises(OutOfMemoryError, match="smallest takes"):
            manager.choose(size, steps, "auto")
        return
    chosen = manager.choose(size, steps, "auto")
    assert chosen in fitting
    assert cost.seconds(chosen) == min(map(cost.seconds, fitting))
    assert chosen.micro_batch_size * chosen.grad_accum_steps == samples


@given(SIZES, SIZES, st.integers(100, 5000), st.integers(1, 500))
def test_more_memory_is_never_slower(size: int, steps: int, budget: int, more: int) -> None:
    cost = MadeUpCost()

    def best(limit: int) -> float:
        return cost.seconds(AdvancedMemoryManager(cost, limit, "any").choose(size, steps, "auto"))

    if cost.memory(MemoryPlan(1, 1, 4)).peak_bytes <= budget:
        assert best(budget + more) <= best(budget)


@pytest.mark.parametrize(("asked", "layers"), [(True, EVERY_LAYER), (False, 0)])
def test_checkpointing_that_is_asked_for_is_kept(asked: bool, layers: int) -> None:
    plan = AdvancedMemoryManager(MadeUpCost(), 10_000, "any").choose(4, 2, asked)
    assert plan == MemoryPlan(8, 1, layers)


def test_unknown_memory_takes_everything() -> None:
    assert AdvancedMemoryManager(MadeUpCost(), None, "any").choose(4, 2, "auto") == MemoryPlan(8, 1, 0)
    assert AdvancedMemoryManager(MadeUpCost(), None, "smaller").choose(4, 2, "auto") == MemoryPlan(4, 2, 0)


def test_a_resumed_run_keeps_its_plan(caplog: pytest.LogCaptureFixture) -> None:
    manager, had = AdvancedMemoryManager(MadeUpCost(), 10_000, "any"), MemoryPlan(2, 4, 3)
    assert manager.choose(4, 2, "auto", had) == had
    assert manager.choose(4, 2, False, had) == MemoryPlan(8, 1, 0), "the YAML says otherwise now"
    assert manager.choose(4, 4, "auto", had) == MemoryPlan(16, 1, 0), "for other samples"
    caplog.set_level(logging.INFO)
    smaller = AdvancedMemoryManager(MadeUpCost(), 120, "any")
    assert smaller.choose(4, 2, "auto", had) == MemoryPlan(1, 8, 4)
    assert "the plan the run had does not fit here" in caplog.text


def test_what_is_too_large_says_what_to_change() -> None:
    manager = AdvancedMemoryManager(MadeUpCost(average_bytes=500), 400, "any")
    with pytest.raises(OutOfMemoryError) as caught:
        manager.choose(4, 2, False)
    said = str(caught.value)
    assert "average" in said and "ema.enabled=false" in said and "model.gradient_checkpointing=auto" in said
    with pytest.raises(OutOfMemoryError) as caught:
        AdvancedMemoryManager(MadeUpCost(), 10, "any").choose(4, 2, "auto")
    assert "ema.enabled" not in str(caught.value) and "gradient_checkpointing" not in str(caught.value)


def test_a_plan_that_is_not_the_yamls_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    manager = AdvancedMemoryManager(MadeUpCost(), 500, "smaller")
    manager.choose(1, 2, "auto")
    assert caplog.text == ""
    manager.choose(2, 1, "auto")
    assert "2 x 1 samples a step: predicted peak" in caplog.text


@pytest.mark.parametrize("mostly_frozen", [False, True])
def test_what_saves_memory_is_nothing_the_run_does_already(mostly_frozen: bool) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        AdvancedMemoryManager(MadeUpCost(mostly_frozen=mostly_frozen), 10, "any").choose(4, 2, "auto")
    assert ("model.lora.enabled=true" in str(caught.value)) is not mostly_frozen
    assert ("nf4" in str(caught.value)) is mostly_frozen
