"""Whole runs with every optimizer but AdamW (tests/test_resume.py): stopped and resumed, bit for bit, and learning."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.test_build import build, build_small_trainer
from tests.test_resume import assert_same_run, equal, final_checkpoint, log_rows
from truthgpt.errors import ConfigError, Preempted

RUNS: dict[str, tuple[str, ...]] = {
    "lion": ("optimizer.type=lion", "training.learning_rate=3e-3"),
    "adafactor": ("optimizer.type=adafactor", "training.learning_rate=1e-1"),
    "muon": ("optimizer.type=muon", "training.learning_rate=3e-3"),
    "adamw8bit": ("optimizer.type=adamw8bit", "training.learning_rate=3e-3", "strict=true"),
}
SCHEDULE_FREE = ("optimizer.type=schedule_free", "training.scheduler=constant", "ema.enabled=false")
RUNS["schedule_free"] = (*SCHEDULE_FREE, "training.learning_rate=3e-3")
PACKAGES = {"adamw8bit": "torchao", "schedule_free": "schedulefree"}


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


def test_the_average_of_schedule_free_is_evaluated_and_exported(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    trainer = build_small_trainer(tmp_path, *RUNS["schedule_free"])
    trainer.train()
    payload = final_checkpoint(tmp_path / "runs/t", 40)
    average, weights = payload["ema"], payload["model"]
    assert average.keys() <= weights.keys() and "transformer.wpe.weight" in average
    assert not torch.equal(average["transformer.wpe.weight"], weights["transformer.wpe.weight"])
    exported = load_file(tmp_path / "runs/t/model/model.safetensors")
    assert all(torch.equal(exported[name], average[name]) for name in exported if name in average)
    assert trainer.parts.evaluator is not None
    evaluation = trainer.parts.evaluator.run(trainer.parts.engine.model, stop=lambda: False)  # holds what is exported
    logged = [row["val_loss"] for row in log_rows(tmp_path / "runs/t") if "val_loss" in row]
    assert evaluation is not None and evaluation.values["loss"] == logged[-1]


def test_evaluating_the_average_of_schedule_free_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    ends = []
    for interval in (3, 40):
        shape = (f"output_dir={tmp_path / str(interval)}", f"training.eval_interval={interval}")
        build_small_trainer(tmp_path, *shape, *RUNS["schedule_free"]).train()
        ends.append(final_checkpoint(tmp_path / str(interval), 40))
    for part in ("model", "ema", "optimizer"):
        equal(ends[0][part], ends[1][part])


def test_schedule_free_without_its_package_is_said_before_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ConfigError, match=r"optimizer.type: schedule_free: .*truthgpt\[schedule_free\]"):
        build(tmp_path, *SCHEDULE_FREE, "data.path=nowhere")
