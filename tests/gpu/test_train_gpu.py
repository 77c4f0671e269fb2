"""Training on a CUDA GPU: precisions, exact resume, compiled layers, no host sync, skipped steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sample_data import write_sources
from tests.test_resume import equal

from truthgpt import build_components, build_trainer, load_config
from truthgpt.runtime.run_directory import RunDirectory
from truthgpt.trainers.trainer import GenericTrainer

pytestmark = pytest.mark.gpu

CUDA = ["hardware.device=cuda", "training.callbacks=[print]", "data.path=corpus.txt"]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)


def trainer_for(*overrides: str) -> tuple[GenericTrainer, RunDirectory]:
    config = load_config("base.yaml", [*CUDA, *overrides])
    run = RunDirectory.claim(Path(config.run_directory), resume=config.resume.enabled, overwrite=False)
    return build_trainer(config, build_components(config), run), run


def train(*overrides: str) -> GenericTrainer:
    trainer, run = trainer_for(*overrides)
    with run:
        trainer.train()
    return trainer


def rows(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "none"])
def test_loss_falls(precision: str) -> None:
    train(f"training.mixed_precision={precision}", "output_dir=run", "training.learning_rate=3e-3")
    losses = [row["loss"] for row in rows("run") if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert rows("run")[0]["peak_memory_bytes"] > 0


@pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
def test_other_optimizers_train(optimizer: str) -> None:
    train(f"optimizer.type={optimizer}", "output_dir=run", "training.mixed_precision=bf16")
    assert rows("run")[-1]["val_loss"] < 6.0


@pytest.mark.parametrize("precision", ["none", "bf16", "fp16"])
def test_resume_is_exact_in_deterministic_mode(precision: str) -> None:
    settings = ["hardware.deterministic=true", f"training.mixed_precision={precision}"]
    train(*settings, "output_dir=straight")
    train(*settings, "output_dir=half", "training.max_steps=40", "training.max_tokens=4000")  # stops at step 16
    half = sorted(Path("half/checkpoints").glob("step_*.pt"))[-1]
    assert half.name < "step_00000040.pt"
    train(*settings, "output_dir=resumed", f"resume={{enabled: true, checkpoint_dir: {half}}}", "training.max_steps=40")
    first, second = (
        torch.load(f"{name}/checkpoints/step_00000040.pt", weights_only=True) for name in ("straight", "resumed")
    )
    for part in ("model", "ema", "optimizer", "scaler"):
        equal(first[part], second[part], part)


def test_compiled_layers_match_eager() -> None:
    dropout_off = [f"model.config.{name}_pdrop=0.0" for name in ("resid", "embd", "attn")]
    train(*dropout_off, "output_dir=eager", "training.torch_compile=false", "training.max_steps=10")
    train(*dropout_off, "output_dir=compiled", "training.torch_compile=true", "training.max_steps=10")
    eager, compiled = ([row["loss"] for row in rows(name) if "loss" in row] for name in ("eager", "compiled"))
    assert eager == pytest.approx(compiled, abs=5e-3)
    assert json.loads(Path("compiled/environment.json").read_text())["fallbacks"] == []


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_step_never_waits_for_the_device(optimizer: str) -> None:
    trainer, run = trainer_for("output_dir=run", f"optimizer.type={optimizer}", "training.mixed_precision=bf16")
    engine = trainer.parts.engine
    with run:
        batches = trainer.parts.loader.batches(0)
        for step in range(3):
            engine.train_step(next(batches), step)
        batch = next(batches)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.train_step(batch, 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        batches.close()


def test_a_nan_step_changes_nothing() -> None:
    trainer, run = trainer_for("output_dir=run", "training.mixed_precision=bf16")
    engine = trainer.parts.engine
    with run:
        batches = trainer.parts.loader.batches(0)
        engine.train_step(next(batches), 0)
        before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
        objective = engine.objective

        def poisoned(model: Any, batch: Any) -> Any:
            loss, logits = objective(model, batch)
            return loss * float("nan"), logits

        engine.objective = poisoned
        engine.train_step(next(batches), 1)
        equal(before, dict(engine.model.state_dict()))
        assert engine.guard.skipped() == 1
        batches.close()
