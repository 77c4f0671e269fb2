"""A checkpoint store that keeps nothing, for runs that are only measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truthgpt.trainers.checkpoint import CheckpointStore


class NoCheckpoints(CheckpointStore):
    """Takes what it is given to save and writes no file; there is never a checkpoint to load."""

    def save(self, step: int, payload: dict[str, Any], *, best: bool) -> Path:
        """Write nothing; returns where the checkpoint of `step` would be."""
        return self.folder / f"step_{step:08d}.pt"

    def best_or_last(self) -> Path:
        """Where the last checkpoint would be, so that a run may end without one."""
        return self.folder / "last.pt"
