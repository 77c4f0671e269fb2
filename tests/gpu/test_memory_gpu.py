"""The memory plan on a GPU: its peak against the measured one, and beside a tensor that leaves little room."""

from __future__ import annotations

import gc
from itertools import islice
from pathlib import Path

import pytest
import torch
from tests.gpu.gpu_runs import GPU, gpu_trainer, losses, needs_compiler
from tests.sample_data import write_sources
from tests.test_build import small_config

from truthgpt.build import build_components
from truthgpt.build_memory import MARGIN
from truthgpt.build_trainer import build_trainer
from truthgpt.memory.base import MemoryPlan
from truthgpt.runtime.device import free_memory_bytes

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
MODEL = (
    "model.config={model_type: llama, hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 8, "
    "num_attention_heads: 16, num_key_value_heads: 8, max_position_embeddings: 1024, vocab_size: 32000}"
)
RUN = (MODEL, "training.mixed_precision=bf16", "data.max_seq_len=1024", "training.train_batch_size=8")
ADAPTIVE = "model.memory.policy=adaptive"


def measured(folder: Path, *overrides: str) -> tuple[int, int]:
    """Peak of four steps above what was held before, and the planned one, in bytes."""
    write_corpus(folder)
    gc.collect()  # the last test's model
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    config = small_config(folder, f"output_dir={folder / 'measured'}", *GPU, *RUN, *overrides)
    components = build_components(config)
    trainer = build_trainer(config, components)
    torch.cuda.reset_peak_memory_stats()
    for step, batch in enumerate(islice(trainer.parts.loader.batches(), 4)):
        trainer.parts.engine.train_step(batch, step)
    assert components.memory.peak_bytes is not None
    return torch.cuda.max_memory_allocated() - before, components.memory.peak_bytes


def write_corpus(folder: Path) -> None:
    """Enough for whole batches."""
    write_sources(folder)
    (folder / "corpus.txt").write_text("the cat sat on the mat. " * 20_000)


@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=needs_compiler)])
@pytest.mark.parametrize("layers", [0, 4, 8])
@pytest.mark.parametrize("weights", ["float32", "bf16_master"])
def test_planned_peak_is_the_measured_one(tmp_path: Path, weights: str, layers: int, compiled: str) -> None:
    peak, planned = measured(
        *(tmp_path, f"training.weights={weights}", f"training.torch_compile={compiled}"),
        f"model.memory={{policy: static, checkpointed_layers: {layers}}}",
    )
    assert planned == pytest.approx(peak, rel=0.08), f"{planned / peak - 1:+.1%}"


def test_micro_batches_grow_where_there_is_room(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    trainer = gpu_trainer(tmp_path, "run", *RUN, ADAPTIVE, "training.grad_accum_steps=2")
    assert trainer.parts.plan.plan == MemoryPlan(16, 1, 0)


def test_losses_stay_beside_a_ballast(tmp_path: Path) -> None:
    """So little room that steps are cut: the run starts, ends, and learns the same."""
    chosen = (*RUN, ADAPTIVE, "training.learning_rate=1e-4", "training.torch_compile=false")
    whole, _ = measured(tmp_path, "training.torch_compile=false")
    plenty = losses(tmp_path, "plenty", *chosen)
    gc.collect()
    torch.cuda.empty_cache()
    free = free_memory_bytes(DEVICE)
    assert free is not None
    room = round(0.6 * whole / (1 - MARGIN))
    ballast = torch.empty(free - room, dtype=torch.uint8, device=DEVICE)
    little = losses(tmp_path, "little", *chosen)
    del ballast
    assert little == pytest.approx(plenty, rel=0.02)
