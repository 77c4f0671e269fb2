"""Training on a GPU: every precision and optimizer, exact resume, compiled layers, no wait for the device in a step."""

from __future__ import annotations

import json
import math
import os
from itertools import islice
from pathlib import Path

import pytest
import torch
from tests.gpu.gpu_runs import (
    LLAMA,
    LOSS_NOISE,
    PACKED,
    PACKED_ROWS,
    gpu_trainer,
    losses,
    needs_compiler,
    pretrained_llama,
    rows,
    train_straight_and_resumed,
)
from tests.test_build import build_small_trainer
from tests.test_resume import equal, final_checkpoint, log_rows
from torch import nn

from truthgpt.data.base import Batch
from truthgpt.errors import NonFiniteError
from truthgpt.models.causal_lm import causal_lm_loss
from truthgpt.runtime.flops import peak_flops

pytestmark = pytest.mark.gpu
# cuBLAS reads it once, at its first use in the process, which may be in any of these tests.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.parametrize("model", [None, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "none"])
def test_every_precision_learns(tmp_path: Path, precision: str, model: str | None) -> None:
    given = () if model is None else (f"model.config={model}",)
    trainer = gpu_trainer(tmp_path, "run", f"training.mixed_precision={precision}", "training.max_steps=20", *given)
    assert trainer.parts.engine.precision.name == precision
    trainer.train()
    found = rows(tmp_path / "run")
    log = [row for row in found if "loss" in row]
    assert len(log) == 20 and log[-1]["loss"] < log[0]["loss"] - 0.5
    assert log[-1]["skipped_steps"] <= (5 if precision == "fp16" else 0), "fp16 may find its scale first"
    assert {p.dtype for p in trainer.parts.engine.model.parameters()} == {torch.float32}
    assert found[-1]["val_loss"] < log[0]["loss"]


def test_precisions_agree(tmp_path: Path) -> None:
    exact = losses(tmp_path, "none", "training.mixed_precision=none", f"model.config={LLAMA}")
    for precision in ("bf16", "fp16"):
        rough = losses(tmp_path, precision, f"training.mixed_precision={precision}", f"model.config={LLAMA}")
        assert rough[0] == pytest.approx(exact[0], rel=0.01)
        assert rough != exact, "autocast was off"


def test_packed_rows_give_the_losses_of_a_cpu(tmp_path: Path) -> None:
    chosen = (*pretrained_llama(tmp_path), *PACKED_ROWS)
    exact = losses(tmp_path, "cpu", "training.mixed_precision=none", *chosen, "hardware.device=cpu")
    for precision in ("none", "bf16"):
        rough = losses(tmp_path, precision, f"training.mixed_precision={precision}", *chosen)
        assert rough == pytest.approx(exact, rel=LOSS_NOISE), precision


def test_gpu_agrees_with_cpu(tmp_path: Path) -> None:
    exact = ("training.mixed_precision=none", "training.allow_tf32=false", *pretrained_llama(tmp_path))
    on_gpu = losses(tmp_path, "gpu", *exact)
    assert on_gpu == pytest.approx(losses(tmp_path, "cpu", *exact, "hardware.device=cpu"), rel=2e-3)


@pytest.mark.parametrize("data", [(), PACKED], ids=["joined", "packed"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "none"])
def test_resume_is_exact_in_deterministic_mode(tmp_path: Path, precision: str, data: tuple[str, ...]) -> None:
    """40 steps at once, and 17 + 23: weights, optimizer, average, scale and the log, bit for bit. With dropout."""
    shape = (f"training.mixed_precision={precision}", "hardware.deterministic=true", "training.eval_interval=20", *data)
    train_straight_and_resumed(tmp_path, *shape)
    equal(*(final_checkpoint(tmp_path / name, 40) for name in ("straight", "resumed")))
    without_memory = [
        [{key: value for key, value in row.items() if key not in ("peak_memory_bytes", "mfu")} for row in log_rows(run)]
        for run in (tmp_path / "straight", tmp_path / "resumed")
    ]
    assert without_memory[0] == without_memory[1]


@needs_compiler
@pytest.mark.parametrize("precision", ["bf16", "none"])
def test_compiled_layers_match_eager(tmp_path: Path, precision: str) -> None:
    shape = (f"training.mixed_precision={precision}", f"model.config={LLAMA}")
    eager = losses(tmp_path, "eager", *shape, "training.torch_compile=false")
    trainer = gpu_trainer(tmp_path, "compiled", *shape, "training.torch_compile=true", "training.max_steps=20")
    model = trainer.parts.engine.model
    assert sum(module._compiled_call_impl is not None for module in model.modules()) == 3
    assert json.loads((tmp_path / "compiled/environment.json").read_text())["fallbacks"] == []
    trainer.train()
    compiled = [row["loss"] for row in rows(tmp_path / "compiled") if "loss" in row]
    assert compiled == pytest.approx(eager, rel=LOSS_NOISE)
    keys = [
        list(torch.load(tmp_path / name / "checkpoints/last.pt", weights_only=True)["model"])
        for name in ("eager", "compiled")
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "none"])
@pytest.mark.parametrize("data", [(), PACKED], ids=["joined", "packed"])
def test_a_step_never_waits_for_the_device(
    tmp_path: Path, precision: str, optimizer: str, data: tuple[str, ...]
) -> None:
    chosen = (f"training.mixed_precision={precision}", f"optimizer.type={optimizer}")
    trainer = gpu_trainer(tmp_path, "run", *chosen, *data)
    engine, meter = trainer.parts.engine, trainer.parts.meter
    batches = list(islice(trainer.parts.loader.batches(), 6))
    assert all(tensor.is_pinned() for micro_batch in batches[0].micro_batches for tensor in micro_batch.values())
    for step, batch in enumerate(batches[:3]):
        meter.add(engine.train_step(batch, step), batch.tokens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, batch in enumerate(batches[3:], 3):
            meter.add(engine.train_step(batch, step), batch.tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(meter.read()["loss"])


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "none"])
def test_non_finite_step_is_skipped_on_the_device(tmp_path: Path, precision: str, optimizer: str) -> None:
    trainer = gpu_trainer(tmp_path, "run", f"training.mixed_precision={precision}", f"optimizer.type={optimizer}")
    engine, calls = trainer.parts.engine, iter(range(100))

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        loss, logits = causal_lm_loss(model, batch)
        return (loss * math.nan if next(calls) == 11 else loss), logits  # second micro-batch of the sixth step

    engine.objective = objective
    batches = list(islice(trainer.parts.loader.batches(), 8))
    for step in range(5):
        engine.train_step(batches[step], step)
    skipped = engine.guard.skipped()
    before = {name: value.detach().clone() for name, value in engine.model.state_dict().items()}
    state = [
        {key: torch.as_tensor(value).clone() for key, value in values.items()}
        for values in engine.optimizer.state_dict()["state"].values()
    ]
    engine.train_step(batches[5], 5)
    assert engine.guard.skipped() == skipped + 1
    assert all(torch.equal(value, before[name]) for name, value in engine.model.state_dict().items())
    for old, new in zip(state, engine.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], torch.as_tensor(new[key])) for key in old)
    engine.train_step(batches[6], 6)
    assert engine.guard.skipped() == skipped + 1
    assert any(not torch.equal(value, before[name]) for name, value in engine.model.state_dict().items())


def test_guard_ends_the_run_at_a_log_line(tmp_path: Path) -> None:
    trainer = gpu_trainer(tmp_path, "run", "guards.max_consecutive_skips=2", "training.log_interval=5")

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        loss, logits = causal_lm_loss(model, batch)
        return loss * math.nan, logits

    trainer.parts.engine.objective = objective
    with pytest.raises(NonFiniteError, match="more than 2 steps"):
        trainer.train()
    assert trainer.state.step == 5, "the device is asked only where a log line is due"
    assert not list((tmp_path / "run/checkpoints").glob("*.pt"))


@pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
def test_other_optimizers_learn(tmp_path: Path, optimizer: str) -> None:
    rate = "1e-3" if optimizer == "lion" else "1e-1"
    found = losses(tmp_path, optimizer, f"optimizer.type={optimizer}", f"training.learning_rate={rate}")
    assert found[-1] < found[0] - 0.3


def test_memory_and_utilisation_are_logged(tmp_path: Path) -> None:
    trainer = gpu_trainer(tmp_path, "run", "training.max_steps=3", "training.mixed_precision=bf16")
    trainer.train()
    row = rows(tmp_path / "run")[0]
    weights = sum(p.numel() * 4 for p in trainer.parts.engine.model.parameters())
    assert row["peak_memory_bytes"] > 4 * weights, "weights, gradients, two moments and the average"
    if peak_flops(torch.device("cuda", torch.cuda.current_device()), "bf16") is None:
        assert "mfu" not in row
    else:
        assert 0 < row["mfu"] < 1


def test_checkpoint_of_a_gpu_loads_on_a_cpu(tmp_path: Path) -> None:
    gpu_trainer(tmp_path, "run", "training.max_steps=3").train()
    resumed = build_small_trainer(
        tmp_path, f"output_dir={tmp_path / 'run'}", "training.max_steps=5", "resume.enabled=true"
    )
    assert resumed.state.step == 3 and resumed.parts.engine.device.type == "cpu"
    assert resumed.train().step == 5
