"""Muon on a GPU: nothing waits for the device, a step is skipped there, and a run is resumed exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.gpu.gpu_runs import PACKED, needs_compiler, train_straight_and_resumed
from tests.test_resume import equal, final_checkpoint

from truthgpt.factories.optimizer import OPTIMIZERS
from truthgpt.runtime.precision import OptimizerStep

pytestmark = [pytest.mark.gpu, needs_compiler]


def test_a_step_is_skipped_and_nothing_waits_for_the_device() -> None:
    weights = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in [(64, 128), (128, 64), (64,)]]
    groups = [
        {"params": weights[:2], "weight_decay": 0.1, "kind": "hidden"},
        {"params": weights[2:], "weight_decay": 0.0, "kind": "other"},
    ]
    optimizer = OPTIMIZERS.build("muon", {}, params=groups, lr=1e-2, weight_decay=0.1)
    take, skip, divisor = torch.zeros((), device="cuda"), torch.ones((), device="cuda"), torch.ones((), device="cuda")
    for decision in (take, skip, take):
        for weight in weights:
            weight.grad = torch.randn_like(weight) / (1.0 - decision)
        before = [weight.detach().clone() for weight in weights]
        torch.cuda.set_sync_debug_mode("error" if decision is not take or optimizer.state else "default")
        try:
            OptimizerStep()(optimizer, decision, divisor)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stayed = [torch.equal(weight, kept) for weight, kept in zip(weights, before, strict=True)]
        assert stayed == [decision is skip] * 3


def test_resume_is_exact(tmp_path: Path) -> None:
    shape = ("optimizer.type=muon", "hardware.deterministic=true", "training.eval_interval=20")
    train_straight_and_resumed(tmp_path, *PACKED, *shape)
    equal(*(final_checkpoint(tmp_path / name, 40) for name in ("straight", "resumed")))
