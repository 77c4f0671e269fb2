"""MEMORY_POLICIES: how an optimizer step is fitted into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from truthgpt.factories.registry import NoOptions, Registry

if TYPE_CHECKING:
    from truthgpt.memory.base import MemoryPlan

MEMORY_POLICIES = Registry("memory policy", runtime=("train_batch_size", "grad_accum_steps", "gradient_checkpointing"))


@MEMORY_POLICIES.register("static", options=NoOptions)
def build_static(
    train_batch_size: int, grad_accum_steps: int, gradient_checkpointing: bool | Literal["auto"]
) -> MemoryPlan:
    """Batch size, accumulation and checkpointing exactly as the YAML gives them."""
    from truthgpt.memory.static import static_plan

    return static_plan(train_batch_size, grad_accum_steps, gradient_checkpointing)
