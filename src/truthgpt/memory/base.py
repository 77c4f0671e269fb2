"""What a memory policy decides, and what it knows of a training when it does."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal, Protocol

Recut = Literal["any", "smaller", "never"]
"""Which micro-batches may take the place of the YAML's."""

EVERY_LAYER = sys.maxsize
"""As a number of layers: all there are."""


@dataclass(frozen=True)
class MemoryPlan:
    """How one optimizer step is cut up; samples a step = micro_batch_size x grad_accum_steps.

    The first `checkpointed_layers` decoder layers (or all, where there are fewer) keep their input only, and are
    computed again in the backward pass.
    """

    micro_batch_size: int
    grad_accum_steps: int
    checkpointed_layers: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what holds them at the moment of the peak."""

    weights: int
    gradients: int
    optimizer: int
    """The optimizer's state, the float32 copy of bf16 weights among it."""
    average: int
    """The moving average of the weights."""
    activations: int
    """What the forward pass keeps."""
    loss: int
    """Logits of a chunk, and gradients of the output head and the hidden states."""
    workspace: int
    """Intermediate results of the backward pass, and what libraries hold."""
    moment: str = field(default="", compare=False)
    """When the peak is."""

    @property
    def peak_bytes(self) -> int:
        """Their sum."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        names = ("weights", "gradients", "optimizer", "average", "activations", "loss", "workspace")
        return {name: getattr(self, name) for name in names}


class TrainingCost(Protocol):
    """What a plan would cost, for the model and the step of a run."""

    @property
    def layers(self) -> int:
        """Decoder layers that can be checkpointed."""
        ...

    @property
    def mostly_frozen(self) -> bool:
        """Whether less than half of the weights is trained: there are adapters."""
        ...

    def memory(self, plan: MemoryPlan) -> MemoryEstimate:
        """Bytes at the peak of a step."""
        ...

    def seconds(self, plan: MemoryPlan) -> float:
        """Time of a step; of plans for one run the smaller is the faster."""
        ...
