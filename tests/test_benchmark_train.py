"""Measuring a configuration: the same training as a run's, cut short, and nothing kept."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sample_data import write_every_source
from tests.test_build import build_small_trainer, small_config
from truthgpt import benchmark_train
from truthgpt.benchmark_train import (
    Spread,
    TrainBenchmark,
    Window,
    benchmark_training,
    compare_with_ceiling,
    steady_windows,
    window_steps,
)
from truthgpt.config.schema import Config
from truthgpt.errors import NonFiniteError, OutOfMemoryError
from truthgpt.runtime import matmul_speed
from truthgpt.runtime.flops import training_flops_per_token

ROWS = ("data.source=jsonl", "data.validation_fraction=0.1")
LONG = ("training.max_steps=1000",)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(matmul_speed, "CPU_SIZE", 64)


def measure(folder: Path, *overrides: str, steps: int | None = 16) -> TrainBenchmark:
    return benchmark_training(small_config(folder, *overrides), steps, time.perf_counter())


def test_what_is_measured(tmp_path: Path) -> None:
    started_s = time.perf_counter()
    config = small_config(tmp_path, *LONG)
    called_s = time.perf_counter()
    found = benchmark_training(config, 16, started_s)
    assert [(window.first_step, window.last_step) for window in found.windows] == [
        (1, 1),
        *((step - 1 if step > 2 else 2, step) for step in range(2, 17, 2)),
    ]
    step_tokens = 4 * 2 * 32
    assert all(window.tokens == window.steps * step_tokens for window in found.windows)
    batches = found.batches
    assert (batches.samples, batches.tokens, batches.positions) == (128, 16 * step_tokens, 16 * step_tokens)
    assert not batches.packed and batches.attention_length == 32
    speeds = found.tokens_per_s
    assert 0 < speeds.lowest <= speeds.median <= speeds.highest
    assert found.step_ms.lowest == pytest.approx(1000 * step_tokens / speeds.highest)
    assert found.step_ms.highest == pytest.approx(1000 * step_tokens / speeds.lowest)
    assert found.step_ms.lowest <= found.step_ms.median <= found.step_ms.highest
    ended_s = time.perf_counter()
    start = found.start
    assert 0 < start.first_step_s < start.to_first_step_s < ended_s - started_s
    assert start.build_s > 0 and start.build_s + start.first_step_s < ended_s - called_s
    assert start.to_first_step_s > start.build_s + start.first_step_s + called_s - started_s
    assert found.memory is None and not found.compiled and found.precision == "none" and found.fallbacks == []
    assert found.hardware["device"] == "cpu" and "torch" in found.versions
    assert json.loads(json.dumps(found.to_json()))["tokens_per_s"]["median"] == speeds.median


def test_losses_are_those_of_the_run(tmp_path: Path) -> None:
    run = ("training.max_steps=16", "training.log_interval=2")
    build_small_trainer(tmp_path, *run, "checkpoint.interval_steps=16", "training.eval_interval=16").train()
    rows = [json.loads(line) for line in (tmp_path / "runs/t/metrics.jsonl").read_text().splitlines()]
    found = measure(tmp_path, *run)
    assert [(window.last_step, window.loss) for window in found.windows] == [
        (row["step"], row["loss"]) for row in rows if "loss" in row
    ]


def test_user_files_are_left_alone(tmp_path: Path) -> None:
    """A used run directory that the configuration would resume from is neither read nor written."""
    build_small_trainer(tmp_path, "training.max_steps=2").train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    found = measure(tmp_path, *LONG, "resume.enabled=true")
    assert found.windows[0].first_step == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before


def test_nothing_is_evaluated_saved_or_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("not part of a measurement")

    monkeypatch.setattr("truthgpt.trainers.evaluate.Evaluator.run", refuse)
    monkeypatch.setattr("truthgpt.trainers.checkpoint.CheckpointStore.save", refuse)
    monkeypatch.setattr("truthgpt.trainers.artefacts.ModelArtefacts.save_weights", refuse)
    monkeypatch.setattr("truthgpt.callbacks.print_logger.PrintLogger.on_start", refuse)
    every = ("training.eval_interval=1", "checkpoint.interval_steps=1", "training.callbacks=[print]")
    assert measure(tmp_path, *LONG, *every).steps == 16


def test_run_is_built_at_its_real_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch_compile: auto` and the schedule are those of the whole run; its limits do not end the measurement."""
    seen: list[int | None] = []
    build = benchmark_train.build_components

    def watch(config: Config) -> Any:
        seen.append(config.training.max_steps)
        return build(config)

    monkeypatch.setattr(benchmark_train, "build_components", watch)
    found = measure(tmp_path, *LONG, "training.max_tokens=1", "training.max_time_s=0.001")
    assert seen == [1000] and found.windows[-1].last_step == 16


def test_packed_rows(tmp_path: Path) -> None:
    llama = (
        "model.config={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 2}"
    )
    packed = measure(tmp_path, *ROWS, *LONG, llama, "data.packing=true", "data.max_seq_len=256")
    padded = measure(tmp_path, *ROWS, *LONG, llama, "data.packing=false", "data.max_seq_len=256")
    assert packed.batches.packed and not padded.batches.packed
    assert packed.batches.positions == packed.batches.samples * 256, "the last rows of an epoch included"
    length, per_token = packed.batches.attention_length, packed.arithmetic.flops_per_token
    assert length is not None and 20 < length < 80, "documents of 5 to 60 bytes, and a little padding"
    in_whole_rows = training_flops_per_token(build_small_trainer(tmp_path, llama).parts.engine.model, 256)
    assert per_token is not None and per_token < in_whole_rows
    assert packed.batches.tokens / packed.batches.positions > padded.batches.tokens / padded.batches.positions


def test_arithmetic(tmp_path: Path) -> None:
    trainer = build_small_trainer(tmp_path, *LONG)
    found = measure(tmp_path, *LONG)
    arithmetic = found.arithmetic
    assert arithmetic.flops_per_token == training_flops_per_token(trainer.parts.engine.model, 32)
    assert arithmetic.flops_per_s == pytest.approx(arithmetic.flops_per_token * found.tokens_per_s.median)
    assert arithmetic.share_of_matmul == pytest.approx(arithmetic.flops_per_s / arithmetic.matmul.flops_per_s)
    assert arithmetic.peak_flops_per_s is None and arithmetic.share_of_peak is None


def test_share_of_the_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_train, "peak_flops", lambda device, precision: 1e15)
    found = compare_with_ceiling(2e6, 1e6, torch.device("cpu"), "bf16")
    assert found.matmul.dtype == "bfloat16" and found.share_of_peak == pytest.approx(2e-3)


def test_images(tmp_path: Path) -> None:
    write_every_source(tmp_path)
    vit = "{model_type: vit, image_size: 16, patch_size: 8, hidden_size: 16, num_hidden_layers: 1}"
    model = (f"model.config={vit}", "model.task=image_classification", "data.collate=cv", "eval.metrics=[accuracy]")
    data = ("data.source=image_folder", f"data.path={tmp_path / 'images'}", "eval.select_best_by=accuracy")
    found = measure(tmp_path, *LONG, *model, *data)
    assert found.unit == "images" and found.batches.tokens == found.batches.samples
    assert found.batches.attention_length is None


def test_epoch(tmp_path: Path) -> None:
    steps = build_small_trainer(tmp_path, *LONG).parts.loader.steps_per_epoch
    assert measure(tmp_path, *LONG, steps=None).steps == steps


def test_too_few_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 8 steps"):
        measure(tmp_path, *LONG, steps=7)


def test_no_memory_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: Config) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nmore")

    monkeypatch.setattr(benchmark_train, "build_components", build)
    with pytest.raises(OutOfMemoryError, match="while building the model: CUDA out of memory"):
        measure(tmp_path, *LONG)


def test_guard_is_part_of_it(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        measure(tmp_path, "training.learning_rate=1e38", "guards.max_consecutive_skips=2", "training.max_steps=20")


@pytest.mark.parametrize(
    ("steps", "full", "kept"),
    [(8, 1, [5, 6, 7, 8]), (16, 2, [9, 11, 13, 15]), (40, 5, [21, 26, 31, 36]), (44, 5, [26, 31, 36])],
)
def test_steady_windows(steps: int, full: int, kept: list[int]) -> None:
    assert window_steps(steps) == full
    ends = sorted({1, *range(full, steps + 1, full), steps})
    starts = [1, *(end + 1 for end in ends[:-1])]
    windows = [Window(start, end, 10, 1.0, 2.0) for start, end in zip(starts, ends, strict=True)]
    assert [window.first_step for window in steady_windows(windows, steps)] == kept


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_compiled_layers_are_told() -> None:
    assert not benchmark_train.is_compiled(torch.nn.Linear(1, 1))
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model[0].compile()
    assert benchmark_train.is_compiled(model)
