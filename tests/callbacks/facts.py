"""The facts of a small run, as the trainer gives them to callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truthgpt.trainers.state import TrainState


def start_facts(folder: Path, resumed_step: int = 0, max_steps: int = 1100) -> dict[str, Any]:
    return {
        "run_name": "small",
        "project": "truthgpt",
        "log_dir": str(folder / "logs"),
        "run_directory": "runs/small",
        "max_steps": max_steps,
        "device": "cpu",
        "precision": "none",
        "parameters": 1_064_320,
        "trainable_parameters": 1_064_320,
        "resumed_step": resumed_step,
        "tokens_per_step": 1024,
        "full_steps": True,
        "unit": "tokens",
        "config": {"eval": {"select_best_by": "ppl"}, "seed": 7},
    }


def log_row(step: int, loss: float = 4.1234) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "lr": 1.5e-3,
        "grad_norm": 0.875,
        "tokens_per_sec": 12345.6,
        "epoch": 0.25,
        "tokens": step * 1024,
        "skipped_steps": 0,
    }


def eval_row(step: int, text: str = "foo():\n    pass", best: bool = True) -> dict[str, Any]:
    return {
        "step": step,
        "val_loss": 1.9,
        "ppl": 6.6859,
        "best_metric": 6.6859,
        "is_best": best,
        "samples": [{"prompt": "def ", "text": text}],
    }


def end_facts(step: int, status: str = "complete") -> dict[str, Any]:
    return {
        "status": status,
        "step": step,
        "best_metric": 6.6859,
        "best_step": 550,
        "wall_time_s": 112.4,
        "tokens": step * 1024,
        "skipped_steps": 0,
    }


def state_at(step: int, stop_reason: str | None = None) -> TrainState:
    return TrainState(step=step, max_steps=1100, stop_reason=stop_reason)
