"""Whole runs with the optimizers that keep more than plain averages: stopped and resumed, bit for bit, and learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.test_build import build_small_trainer
from tests.test_resume import assert_same_run, final_checkpoint, log_rows
from truthgpt.errors import Preempted

RUNS: dict[str, tuple[str, ...]] = {
    "muon": ("optimizer.type=muon", "training.learning_rate=3e-3"),
    "adamw8bit": ("optimizer.type=adamw8bit", "training.learning_rate=3e-3", "strict=true"),
}
PACKAGES = {"adamw8bit": "torchao"}


def train_stopped_after(folder: Path, step: int, *overrides: str) -> None:
    """A run of 40 steps that is stopped by a signal and taken up again."""
    first = build_small_trainer(folder, *overrides)
    train_step = first.parts.engine.train_step

    def stop(batch: Any, current: int) -> Any:
        first.parts.stop.requested = current == step - 1
        first.parts.stop.name = "SIGTERM"
        return train_step(batch, current)

    first.parts.engine.train_step = stop  # type: ignore[method-assign]
    with pytest.raises(Preempted, match=f"after step {step}"):
        first.train()
    build_small_trainer(folder, *overrides, "resume.enabled=true").train()


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact(tmp_path: Path, name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    build_small_trainer(tmp_path, f"output_dir={tmp_path / 'straight'}", *RUNS[name]).train()
    train_stopped_after(tmp_path, 17, f"output_dir={tmp_path / 'resumed'}", *RUNS[name])
    assert_same_run(tmp_path / "straight", tmp_path / "resumed", 40)
    losses = [row["loss"] for row in log_rows(tmp_path / "straight") if "loss" in row]
    assert losses[-1] < 0.7 * losses[0], "it learns"
    assert final_checkpoint(tmp_path / "straight", 40)["optimizer"]["state"]
