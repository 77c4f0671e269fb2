"""torchao's 8-bit AdamW on a GPU: a quarter of the state, learns as AdamW does, and is resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gpu.gpu_runs import (
    LLAMA,
    LOSS_NOISE,
    PACKED,
    gpu_trainer,
    losses,
    needs_compiler,
    train_straight_and_resumed,
)
from tests.test_resume import equal, final_checkpoint

pytest.importorskip("torchao")
pytestmark = [pytest.mark.gpu, needs_compiler]
CHOSEN = ("optimizer.type=adamw8bit",)


def test_learns_as_adamw(tmp_path: Path) -> None:
    exact = losses(tmp_path, "adamw", f"model.config={LLAMA}")
    rough = losses(tmp_path, "adamw8bit", f"model.config={LLAMA}", *CHOSEN)
    assert json.loads((tmp_path / "adamw8bit/environment.json").read_text())["fallbacks"] == []
    assert rough == pytest.approx(exact, rel=2 * LOSS_NOISE) and rough != exact


def state_bytes(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    return sum(map(state_bytes, values.values())) if isinstance(values, dict) else 0


def test_state_is_on_the_device_and_small(tmp_path: Path) -> None:
    optimizers = []
    for name in ("adamw", "adamw8bit"):
        trainer = gpu_trainer(tmp_path, name, f"model.config={LLAMA}", f"optimizer.type={name}", "training.max_steps=2")
        trainer.train()
        optimizers.append(trainer.parts.engine.optimizer)
    whole, small = (state_bytes(optimizer.state_dict()["state"]) for optimizer in optimizers)
    assert small < 0.4 * whole, "what is too small for blocks stays float32"
    states = [state for state in optimizers[1].state_dict()["state"].values() if isinstance(state["exp_avg"], dict)]
    assert states and {state["exp_avg"]["codes"].device.type for state in states} == {"cuda"}


def test_resume_is_exact(tmp_path: Path) -> None:
    shape = (*CHOSEN, "hardware.deterministic=true", "training.eval_interval=20")
    train_straight_and_resumed(tmp_path, *PACKED, *shape)
    equal(*(final_checkpoint(tmp_path / name, 40) for name in ("straight", "resumed")))
