"""Where a run stands: counters and bests. Loop state, apart from tensors, that any callback may read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """Immutable snapshot of a run after `step` optimizer steps; the trainer replaces it, nobody edits it."""

    step: int = 0
    max_steps: int = 0
    epoch: int = 0
    tokens: int = 0
    """Supervised tokens trained on so far."""
    samples: int = 0
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    empty_batches: int = 0
    """Global batches without a single supervised token."""
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    pending_evaluation: bool = False
    """The run was stopped inside the evaluation due at this step; a resumed run does it first."""
    stop_reason: str | None = None
    """Why the run ended before `max_steps`, if it did."""
    wall_time_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Inverse of `to_dict`; KeyError names a missing field."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})
