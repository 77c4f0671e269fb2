"""The way down when a step is out of memory."""

from __future__ import annotations

from truthgpt.memory.base import EVERY_LAYER, MemoryPlan
from truthgpt.memory.step_down import PlanInUse


def way_down(plan: MemoryPlan, may_change: bool = True, may_checkpoint: bool = True) -> list[MemoryPlan]:
    in_use, found = PlanInUse(plan, may_change, may_checkpoint), []
    while (below := in_use.step_down()) is not None:
        assert in_use.plan == below
        found.append(below)
    return found


def test_smaller_micro_batches_then_every_layer_again() -> None:
    assert way_down(MemoryPlan(6, 2, 1)) == [
        MemoryPlan(3, 4, 1),
        MemoryPlan(1, 12, 1),
        MemoryPlan(1, 12, EVERY_LAYER),
    ]


def test_samples_of_a_step_stay() -> None:
    for plan in way_down(MemoryPlan(7, 3, 0)):
        assert plan.micro_batch_size * plan.grad_accum_steps == 21


def test_what_may_not_change_does_not() -> None:
    assert way_down(MemoryPlan(4, 1, 0), may_change=False) == []
    assert way_down(MemoryPlan(1, 4, 0), may_checkpoint=False) == []
