"""Schedule-free AdamW on a GPU: a run is resumed exactly, averages and all."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.gpu.gpu_runs import PACKED, needs_compiler, train_straight_and_resumed
from tests.test_resume import equal, final_checkpoint

pytest.importorskip("schedulefree")
pytestmark = [pytest.mark.gpu, needs_compiler]


def test_resume_is_exact(tmp_path: Path) -> None:
    chosen = ("optimizer.type=schedule_free", "training.scheduler=constant", "ema.enabled=false")
    shape = (*chosen, "hardware.deterministic=true", "training.eval_interval=20")
    train_straight_and_resumed(tmp_path, *PACKED, *shape)
    equal(*(final_checkpoint(tmp_path / name, 40) for name in ("straight", "resumed")))
