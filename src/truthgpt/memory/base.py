"""What a memory policy decides."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    """How one optimizer step is cut up; samples a step = micro_batch_size x grad_accum_steps."""

    micro_batch_size: int
    grad_accum_steps: int
    gradient_checkpointing: bool
