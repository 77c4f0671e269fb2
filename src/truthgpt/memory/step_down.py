"""What a run does when a step is out of memory after all: another process took some, or the estimate was too low."""

from __future__ import annotations

import dataclasses

from truthgpt.memory.base import EVERY_LAYER, MemoryPlan


class PlanInUse:
    """The plan a run trains by, and the ones below it.

    Args:
        plan: the plan that was chosen.
        samples: samples a step, which stay.
        may_change: whether the policy lets a run go on with another plan.
        may_checkpoint: whether the model can compute layers again from now on.
    """

    def __init__(self, plan: MemoryPlan, may_change: bool, may_checkpoint: bool) -> None:
        self.plan = plan
        self._may_change = may_change
        self._may_checkpoint = may_checkpoint

    def step_down(self) -> MemoryPlan | None:
        """The next plan that takes less memory, which is the one in use from now on; None: there is none.

        First smaller micro-batches, then every layer computed again.
        """
        below = self._below() if self._may_change else None
        if below is not None:
            self.plan = below
        return below

    def _below(self) -> MemoryPlan | None:
        plan = self.plan
        size, samples = plan.micro_batch_size, plan.micro_batch_size * plan.grad_accum_steps
        smaller = max((rows for rows in range(1, size // 2 + 1) if samples % rows == 0), default=None)
        if smaller is not None:
            return dataclasses.replace(plan, micro_batch_size=smaller, grad_accum_steps=samples // smaller)
        if self._may_checkpoint and plan.checkpointed_layers < EVERY_LAYER:
            return dataclasses.replace(plan, checkpointed_layers=EVERY_LAYER)
        return None
