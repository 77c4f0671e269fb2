"""The static policy: exactly what the YAML says."""

from __future__ import annotations

from typing import Literal

from truthgpt.memory.base import MemoryPlan


def static_plan(
    train_batch_size: int, grad_accum_steps: int, gradient_checkpointing: bool | Literal["auto"]
) -> MemoryPlan:
    """The YAML's own numbers; `gradient_checkpointing: auto` stays off."""
    return MemoryPlan(train_batch_size, grad_accum_steps, gradient_checkpointing is True)
