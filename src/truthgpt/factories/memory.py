"""MEMORY_POLICIES: how an optimizer step is fitted into memory.

A builder returns a `MemoryPlan`. `cost` says what a plan takes (`memory.base.TrainingCost`, None where it cannot be
told, and worked out only for a builder that names it), `budget_bytes` how much memory there is (None: not known),
`recut` which micro-batches may be tried beside the YAML's, and `previous` is the plan of the run that is resumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from truthgpt.factories.registry import NoOptions, Options, Registry

if TYPE_CHECKING:
    from truthgpt.memory.base import MemoryPlan, Recut, TrainingCost

MEMORY_POLICIES = Registry(
    "memory policy",
    runtime=(
        *("train_batch_size", "grad_accum_steps", "gradient_checkpointing"),
        *("cost", "budget_bytes", "recut", "previous"),
    ),
)


@MEMORY_POLICIES.register("adaptive", options=NoOptions)
def build_adaptive(
    train_batch_size: int,
    grad_accum_steps: int,
    gradient_checkpointing: bool | Literal["auto"],
    cost: TrainingCost | None,
    budget_bytes: int | None,
    recut: Recut,
    previous: MemoryPlan | None,
) -> MemoryPlan:
    """The fastest micro-batch, accumulation and checkpointing that fit; the samples of a step stay."""
    from truthgpt.memory.adaptive import AdvancedMemoryManager
    from truthgpt.memory.static import static_plan

    if cost is None:
        return static_plan(train_batch_size, grad_accum_steps, _layers(gradient_checkpointing), None, None)
    manager = AdvancedMemoryManager(cost, budget_bytes, recut)
    return manager.choose(train_batch_size, grad_accum_steps, gradient_checkpointing, previous)


class StaticOptions(Options):
    """Options of `static`."""

    checkpointed_layers: Annotated[int, Field(ge=0)] | None = None
    """Decoder layers, from the first on, that are computed again in the backward pass; null: all or none, as
    `model.gradient_checkpointing` says."""


@MEMORY_POLICIES.register("static", options=StaticOptions)
def build_static(
    train_batch_size: int,
    grad_accum_steps: int,
    gradient_checkpointing: bool | Literal["auto"],
    cost: TrainingCost | None,
    budget_bytes: int | None,
    checkpointed_layers: int | None = None,
) -> MemoryPlan:
    """Batch size, accumulation and checkpointing exactly as the YAML gives them."""
    from truthgpt.memory.static import static_plan

    layers = _layers(gradient_checkpointing) if checkpointed_layers is None else checkpointed_layers
    return static_plan(train_batch_size, grad_accum_steps, layers, cost, budget_bytes)


def _layers(gradient_checkpointing: bool | Literal["auto"]) -> int:
    """Layers to checkpoint where nothing else decides: all or none."""
    from truthgpt.memory.base import EVERY_LAYER

    return EVERY_LAYER if gradient_checkpointing is True else 0
