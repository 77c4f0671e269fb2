"""The static policy: exactly what the YAML says."""

from __future__ import annotations

import logging

from truthgpt.memory.base import MemoryPlan, TrainingCost

logger = logging.getLogger(__name__)


def static_plan(
    train_batch_size: int,
    grad_accum_steps: int,
    checkpointed_layers: int,
    cost: TrainingCost | None,
    budget_bytes: int | None,
) -> MemoryPlan:
    """The YAML's own numbers. One line warns when they will not fit.

    Args:
        cost: None where it is not known.
        budget_bytes: memory there is; None: not known.
    """
    plan = MemoryPlan(train_batch_size, grad_accum_steps, checkpointed_layers)
    if cost is not None and budget_bytes is not None:
        needed = cost.memory(plan).peak_bytes
        if needed > budget_bytes:
            logger.warning(
                "model.memory.policy: static: a step is predicted to take %.1f GiB, and %.1f GiB may be taken; lower "
                "training.train_batch_size and raise grad_accum_steps, set model.gradient_checkpointing=true, or "
                "model.memory.policy=adaptive, which does so by itself",
                needed / 2**30,
                budget_bytes / 2**30,
            )
    return plan
