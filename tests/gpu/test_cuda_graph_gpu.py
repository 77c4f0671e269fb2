"""`compile_mode: reduce-overhead`: a run that is replayed trains like one that is not, and launches next to nothing."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gpu.gpu_runs import GPU, LLAMA, losses, rows
from tests.sample_data import write_sources
from tests.test_build import build_small_trainer

from truthgpt.trainers.micro_step import EAGER_CALLS

pytestmark = pytest.mark.gpu

GRAPHED = ("training.torch_compile=true", "training.compile_mode=reduce-overhead")
GPT2 = "{model_type: gpt2, n_embd: 64, n_layer: 2, n_head: 2, n_positions: 64, resid_pdrop: 0.2, attn_pdrop: 0.0}"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "none"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_replayed_losses_are_those_of_operations(tmp_path: Path, precision: str, accumulation: int) -> None:
    """With dropout, whose random numbers must be the same: another seed moves the losses far more."""
    settings = (
        *(f"training.mixed_precision={precision}", f"training.grad_accum_steps={accumulation}"),
        *(f"model.config={GPT2}", "hardware.deterministic=false"),
    )
    plain = losses(tmp_path, "plain", *settings, "training.torch_compile=true")
    graphed = losses(tmp_path, "graphed", *settings, *GRAPHED)
    assert len(plain) == 20
    assert graphed == pytest.approx(plain, rel=2e-3)


def test_packed_rows_and_the_last_smaller_batch_of_an_epoch(tmp_path: Path) -> None:
    write_sources(tmp_path)
    settings = ("data.source=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", f"model.config={LLAMA}")
    for name, packing in (("packed", "true"), ("padded", "false")):
        plain = losses(tmp_path, f"{name}_plain", *settings, f"data.packing={packing}")
        graphed = losses(tmp_path, f"{name}_graphed", *settings, f"data.packing={packing}", *GRAPHED)
        assert graphed == pytest.approx(plain, rel=5e-3)


def test_a_step_launches_few_kernels(tmp_path: Path) -> None:
    launches = {}
    for name, extra in (("plain", ()), ("graphed", GRAPHED)):
        trainer = build_small_trainer(tmp_path, f"output_dir={tmp_path / name}", *GPU, f"model.config={GPT2}", *extra)
        engine = trainer.parts.engine
        batches = list(islice(trainer.parts.loader.batches(), EAGER_CALLS + 4))
        for step, batch in enumerate(batches[:-1]):
            engine.train_step(batch, step)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.train_step(batches[-1], len(batches) - 1)
        counts: dict[str, Any] = {event.key: event.count for event in profile.key_averages()}
        launches[name] = sum(n for key, n in counts.items() if key.startswith("aten::"))
    assert launches["graphed"] < launches["plain"] / 3


def test_evaluation_and_samples_between_replays_change_nothing(tmp_path: Path) -> None:
    for name, interval in (("often", 2), ("never", 1000)):
        trainer = build_small_trainer(
            tmp_path, f"output_dir={tmp_path / name}", *GPU, *GRAPHED, "training.max_steps=12", "ema.enabled=true",
            f"training.eval_interval={interval}", "training.early_stopping_patience=null",
        )  # fmt: skip
        trainer.train()
    often, never = ([row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("often", "never"))
    assert often == pytest.approx(never, rel=1e-4)
