"""float8 products on a GPU that has them: what is converted, what it learns, and that it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

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

from truthgpt.runtime.float8 import LOWEST_CAPABILITY

pytest.importorskip("torchao")
pytestmark = [
    pytest.mark.gpu,
    needs_compiler,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < LOWEST_CAPABILITY,
        reason="this GPU has no float8 products",
    ),
]
BF16 = ("training.mixed_precision=bf16", "training.torch_compile=true")


@pytest.mark.parametrize("weights", ["float32", "bf16_master"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_learns_as_in_bf16(tmp_path: Path, recipe: str, weights: str) -> None:
    chosen = (*BF16, f"training.weights={weights}", f"model.config={LLAMA}")
    exact = losses(tmp_path, "bf16", *chosen)
    rough = losses(tmp_path, "float8", *chosen, f"training.float8={recipe}")
    assert json.loads((tmp_path / "float8/environment.json").read_text())["fallbacks"] == []
    assert rough == pytest.approx(exact, rel=2 * LOSS_NOISE) and rough != exact


def test_only_the_layers_are_converted_and_keys_stay(tmp_path: Path) -> None:
    chosen = (*BF16, f"model.config={LLAMA}", "training.max_steps=2")
    gpu_trainer(tmp_path, "bf16", *chosen).train()
    trainer = gpu_trainer(tmp_path, "float8", *chosen, "training.float8=tensorwise")
    model = trainer.parts.engine.model
    converted = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert len(converted) == 3 * 7 and all(".layers." in name for name in converted)
    trainer.train()
    keys = [list(final_checkpoint(tmp_path / name, 2)["model"]) for name in ("bf16", "float8")]
    assert keys[0] == keys[1]


def test_resume_is_exact(tmp_path: Path) -> None:
    shape = (*BF16, *PACKED, "training.float8=tensorwise", "hardware.deterministic=true", "training.eval_interval=20")
    train_straight_and_resumed(tmp_path, *shape)
    equal(*(final_checkpoint(tmp_path / name, 40) for name in ("straight", "resumed")))


def test_a_model_without_linear_layers_keeps_bf16(tmp_path: Path) -> None:
    gpu_trainer(tmp_path, "gpt2", *BF16, "training.float8=tensorwise")  # its projections are Conv1D
    (fallback,) = json.loads((tmp_path / "gpt2/environment.json").read_text())["fallbacks"]
    assert fallback["part"] == "training.float8" and "no linear layer" in fallback["reason"]
