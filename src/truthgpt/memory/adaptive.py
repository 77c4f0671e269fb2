"""The adaptive policy: of all ways to cut up a step, the fastest that fits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

from truthgpt.errors import OutOfMemoryError
from truthgpt.memory.base import EVERY_LAYER, MemoryPlan, Recut, TrainingCost

logger = logging.getLogger(__name__)

GIB = 2**30


_FOR_ALL_WEIGHTS = ["model.lora.enabled=true", "training.weights=bf16_stochastic (12 bytes a weight instead of 16)"]
"""What saves memory where all weights are trained."""


class AdvancedMemoryManager:
    """Chooses micro-batch, accumulation and checkpointed layers; the samples of a step stay what the YAML says.

    So does the result, to rounding: the loss is the sum over the supervised tokens of all micro-batches, divided once.

    Args:
        cost: what a plan takes.
        budget_bytes: memory there is; None: not known, and everything fits.
        recut: `any` size that divides the samples of a step, only `smaller` ones than the YAML's (on a CPU larger ones
            are no faster, and padded rows would be padded more), or `never` another, where micro-batches are what the
            order of the data is made of.
    """

    def __init__(self, cost: TrainingCost, budget_bytes: int | None, recut: Recut) -> None:
        self._cost = cost
        self._budget_bytes = budget_bytes
        self._recut = recut

    def choose(
        self,
        train_batch_size: int,
        grad_accum_steps: int,
        gradient_checkpointing: bool | Literal["auto"],
        previous: MemoryPlan | None = None,
    ) -> MemoryPlan:
        """The fastest plan that fits; of equally fast ones that with the fewest checkpointed layers.

        Args:
            train_batch_size, grad_accum_steps: the YAML's; their product is the samples of a step.
            gradient_checkpointing: true: every layer; false: none; auto: as many as must.
            previous: taken again where it is a plan for these samples and fits, so that a resumed run computes what it
                would have computed, to the last bit.

        Raises:
            OutOfMemoryError: none fits, with the smallest peak found.
        """
        if previous is not None and gradient_checkpointing == "auto":
            samples = previous.micro_batch_size * previous.grad_accum_steps
            if samples == train_batch_size * grad_accum_steps and self._fits(previous):
                return previous
            logger.info("memory: the plan the run had does not fit here; a new one, equal to rounding, is made")
        candidates = list(self._candidates(train_batch_size, grad_accum_steps, gradient_checkpointing))
        fitting = [plan for plan in candidates if self._fits(plan)]
        if not fitting:
            self._refuse(candidates, gradient_checkpointing)
        best = min(fitting, key=lambda plan: (self._cost.seconds(plan), plan.checkpointed_layers))
        if best != MemoryPlan(train_batch_size, grad_accum_steps, 0):
            logger.info("memory: %s", self.describe(best))
        return best

    def describe(self, plan: MemoryPlan) -> str:
        """A plan and its peak, in words."""
        layers = min(plan.checkpointed_layers, self._cost.layers)
        recomputed = f", {layers} of {self._cost.layers} layers computed again in the backward pass" if layers else ""
        limit = "" if self._budget_bytes is None else f" of {self._budget_bytes / GIB:.1f}"
        return (
            f"{plan.grad_accum_steps} x {plan.micro_batch_size} samples a step{recomputed}: predicted peak "
            f"{self._cost.memory(plan).peak_bytes / GIB:.1f}{limit} GiB"
        )

    def _candidates(
        self, train_batch_size: int, grad_accum_steps: int, checkpointing: bool | Literal["auto"]
    ) -> Iterator[MemoryPlan]:
        """Every plan there is: a few hundred at most, each worked out in microseconds."""
        samples = train_batch_size * grad_accum_steps
        layers: Sequence[int] = (
            range(self._cost.layers + 1) if checkpointing == "auto" else [EVERY_LAYER * checkpointing]
        )
        for size in range(1, samples + 1):
            if samples % size == 0 and (size == train_batch_size or self._may_be(size, train_batch_size)):
                yield from (MemoryPlan(size, samples // size, number) for number in layers)

    def _may_be(self, size: int, given: int) -> bool:
        return self._recut == "any" or (self._recut == "smaller" and size < given)

    def _fits(self, plan: MemoryPlan) -> bool:
        return self._budget_bytes is None or self._cost.memory(plan).peak_bytes <= self._budget_bytes

    def _refuse(self, candidates: list[MemoryPlan], checkpointing: bool | Literal["auto"]) -> None:
        assert self._budget_bytes is not None
        least = min((self._cost.memory(plan) for plan in candidates), key=lambda estimate: estimate.peak_bytes)
        parts = sorted(least.parts().items(), key=lambda part: -part[1])
        largest = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in parts[:3])
        settings = [
            *(["model.gradient_checkpointing=auto"] if checkpointing is False else []),
            *(["ema.on_cpu=true", "ema.enabled=false"] if least.average else []),
            *(["model.lora.quantization=nf4"] if self._cost.mostly_frozen else _FOR_ALL_WEIGHTS),
            "a smaller data.max_seq_len or model",
        ]
        raise OutOfMemoryError(
            f"no way to cut up a step fits into {self._budget_bytes / GIB:.1f} GiB: the smallest takes "
            f"{least.peak_bytes / GIB:.1f} GiB ({largest}). Try {', or '.join(settings)}"
        )
