"""Small trainings on the GPU that several tests compare: their losses, their start, and a stop on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sample_data import write_sources
from tests.test_build import build_small_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from truthgpt.errors import Preempted
from truthgpt.models.tokenizer import byte_tokenizer
from truthgpt.trainers.trainer import GenericTrainer

LLAMA = (
    "{model_type: llama, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 3, num_attention_heads: 4, "
    "num_key_value_heads: 2, max_position_embeddings: 64}"
)
GPU = (
    *("hardware.device=cuda", "training.eval_interval=1000", "checkpoint.interval_steps=1000"),
    "model.memory.policy=static",  # or the micro-batches of a step would be made one
)
PACKED_ROWS = ("data.source=jsonl", "data.packing=true")
PACKED = (*PACKED_ROWS, f"model.config={LLAMA}")
LOSS_NOISE = 0.03
"""Relative: bf16 keeps three digits, and twenty steps carry its errors on."""
needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None and shutil.which("cc") is None, reason="triton needs a C compiler"
)


def gpu_trainer(folder: Path, name: str, *overrides: str) -> GenericTrainer:
    return build_small_trainer(folder, f"output_dir={folder / name}", *GPU, *overrides)


def losses(folder: Path, name: str, *overrides: str) -> list[float]:
    gpu_trainer(folder, name, "training.max_steps=20", *overrides).train()
    return [row["loss"] for row in rows(folder / name) if "loss" in row]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def pretrained_llama(folder: Path) -> tuple[str, ...]:
    """Overrides that start from a saved model: random weights of another device are others."""
    base = folder / "base"
    if not base.exists():
        write_sources(folder)
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, vocab_size=257)
        LlamaForCausalLM(config).save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
    return ("model.init=auto", f"model.name_or_path={base}", "model.config={}", "model.tokenizer={}")


def train_straight_and_resumed(folder: Path, *overrides: str) -> None:
    """Two runs of 40 steps: `straight` at once, `resumed` stopped after step 17 and taken up again."""
    write_sources(folder)
    gpu_trainer(folder, "straight", *overrides).train()
    first = gpu_trainer(folder, "resumed", *overrides)
    train_step = first.parts.engine.train_step

    def stop_at_17(batch: Any, step: int) -> Any:
        if step == 16:
            first.parts.stop.requested, first.parts.stop.name = True, "SIGTERM"
        return train_step(batch, step)

    first.parts.engine.train_step = stop_at_17  # type: ignore[method-assign]
    with pytest.raises(Preempted, match="after step 17"):
        first.train()
    second = gpu_trainer(folder, "resumed", *overrides, "resume.enabled=true")
    assert second.state.step == 17
    second.train()
