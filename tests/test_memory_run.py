"""The memory plan in a run: what is chosen in little memory, that the losses stay, and that a resumed run keeps it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import truthgpt.build_memory
from tests.test_build import NO_DROPOUT, build, build_small_trainer, small_config
from tests.test_resume import final_checkpoint, log_rows
from truthgpt.build import Components
from truthgpt.data.base import Batch
from truthgpt.errors import OutOfMemoryError
from truthgpt.memory.base import EVERY_LAYER, MemoryPlan
from truthgpt.runtime.compile import decoder_layers
from truthgpt.trainers.trainer import GenericTrainer

PLAIN = (f"model.config={NO_DROPOUT}", "training.train_batch_size=4", "training.grad_accum_steps=2")
LLAMA = (
    "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, max_position_embeddings: 64}"
)
SHORT = ("training.max_steps=6", "training.eval_interval=6", "checkpoint.interval_steps=3", "training.log_interval=1")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many bytes are free."""

    def free(size: int) -> None:
        monkeypatch.setattr(truthgpt.build_memory, "free_memory_bytes", lambda device: size)

    return free


def needs(folder: Path, plan: MemoryPlan, *overrides: str) -> int:
    """Free bytes with which `plan` just fits."""
    config = small_config(folder, *PLAIN, *overrides)
    machine = truthgpt.build_memory.machine_of(torch.device("cpu"), "none")
    peak = truthgpt.build_memory.step_cost(config, machine).memory(plan).peak_bytes
    return round(peak / (1 - truthgpt.build_memory.MARGIN)) + 1


def recomputed(components: Components) -> list[bool]:
    return [bool(layer.gradient_checkpointing) for layer in decoder_layers(components.model)]


def losses(folder: Path, name: str, *overrides: str) -> list[float]:
    build_small_trainer(folder, f"output_dir={folder / name}", *PLAIN, *SHORT, *overrides).train()
    return [row["loss"] for row in log_rows(folder / name) if "loss" in row]


def test_the_yamls_numbers_where_they_fit(tmp_path: Path) -> None:
    components = build(tmp_path, *PLAIN)
    assert components.plan == MemoryPlan(4, 2, 0) and not any(recomputed(components))


def test_little_memory_is_made_do_with_and_the_losses_stay(
    tmp_path: Path, memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plenty = losses(tmp_path, "plenty")
    memory(needs(tmp_path, MemoryPlan(1, 8, 1)))
    caplog.set_level(logging.INFO)
    components = build(tmp_path, *PLAIN)
    assert components.plan.micro_batch_size * components.plan.grad_accum_steps == 8
    assert components.plan != MemoryPlan(4, 2, 0) and "samples a step" in caplog.text
    assert recomputed(components) == [k < components.plan.checkpointed_layers for k in range(2)]
    assert losses(tmp_path, "little") == pytest.approx(plenty, rel=1e-5)


def test_too_little_memory_is_exit_7_before_training(tmp_path: Path, memory: Any) -> None:
    memory(2**20)
    with pytest.raises(OutOfMemoryError, match=r"no way to cut up a step fits into 0\.0 GiB") as caught:
        build(tmp_path, *PLAIN)
    assert caught.value.exit_code == 7


def test_static_warns_and_takes_the_yamls(tmp_path: Path, memory: Any, caplog: pytest.LogCaptureFixture) -> None:
    memory(2**20)
    static = build(tmp_path, *PLAIN, "model.memory={policy: static, checkpointed_layers: 1}")
    assert static.plan == MemoryPlan(4, 2, 1) and recomputed(static) == [True, False]
    assert "is predicted to take" in caplog.text


def test_a_resumed_run_keeps_its_plan(tmp_path: Path, memory: Any) -> None:
    """Little memory at first, plenty when it goes on: bit for bit as if it had stayed little."""
    little = needs(tmp_path, MemoryPlan(1, 8, 1))
    memory(little)
    straight = losses(tmp_path, "straight")
    name = f"output_dir={tmp_path / 'resumed'}"
    first = build_small_trainer(tmp_path, name, *PLAIN, *SHORT)
    plan = first.parts.plan.plan
    train_step = first.parts.engine.train_step

    def stop_at_3(batch: Any, step: int) -> Any:
        first.parts.stop.requested = first.parts.stop.requested or step == 2
        return train_step(batch, step)

    first.parts.engine.train_step = stop_at_3  # type: ignore[method-assign]
    with pytest.raises(Exception, match="after step 3"):
        first.train()
    memory(2**40)
    second = build_small_trainer(tmp_path, name, *PLAIN, *SHORT, "resume.enabled=true")
    assert second.state.step == 3 and second.parts.plan.plan == plan
    second.train()
    assert [row["loss"] for row in log_rows(tmp_path / "resumed") if "loss" in row] == straight
    saved = final_checkpoint(tmp_path / "resumed", 6)
    assert saved["state"]["plan"] == dataclasses.asdict(plan)


def test_buckets_are_never_cut_otherwise(tmp_path: Path, memory: Any) -> None:
    """Their micro-batches are what the order of the data is made of."""
    rows = ("data.source=jsonl", "data.packing=false", "data.bucket_by_length=true", "data.bucket_bins=[32]")
    memory(needs(tmp_path, MemoryPlan(4, 2, 2), *rows))
    plan = build(tmp_path, *PLAIN, *rows).plan
    assert (plan.micro_batch_size, plan.grad_accum_steps) == (4, 2) and plan.checkpointed_layers > 0


def test_a_model_that_cannot_be_counted_trains_as_the_yaml_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise NotImplementedError("it looks at values")

    monkeypatch.setattr(truthgpt.build_memory, "measure_activations", fail)
    components = build(tmp_path, *PLAIN)
    assert components.plan == MemoryPlan(4, 2, 0)
    (fallback,) = components.fallbacks.to_json()
    assert fallback["part"] == "model.memory.policy" and "it looks at values" in fallback["reason"]


def short_of_memory(trainer: GenericTrainer, rows: int, layers: int = 0) -> GenericTrainer:
    """`trainer`, whose micro-batches of more than `rows` rows, or with fewer layers computed again, do not fit."""
    engine = trainer.parts.engine
    objective = engine.objective

    def fail_above(model: Any, batch: Batch) -> Any:
        again = sum(bool(layer.gradient_checkpointing) for layer in decoder_layers(model))
        loss = objective(model, batch)
        if len(batch["labels"]) > rows or again < layers:
            loss[0].backward(retain_graph=True)  # the gradients of a step that fails half-way
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return loss

    engine.objective = fail_above
    return trainer


@pytest.mark.parametrize("rows_of", [(), ("data.source=jsonl", "data.packing=true", f"model.config={LLAMA}")])
@pytest.mark.parametrize(("rows", "layers"), [(2, 0), (1, 2)])
def test_a_step_out_of_memory_is_taken_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: int, layers: int, rows_of: tuple[str, ...]
) -> None:
    straight = losses(tmp_path, "straight", *rows_of)
    trainer = build_small_trainer(tmp_path, f"output_dir={tmp_path / 'short'}", *PLAIN, *SHORT, *rows_of)
    short_of_memory(trainer, rows, layers).train()
    found = [row["loss"] for row in log_rows(tmp_path / "short") if "loss" in row]
    assert found == pytest.approx(straight, rel=1e-5)
    said = [record.getMessage() for record in caplog.records if "the step is taken again" in record.getMessage()]
    assert len(said) == (1 if rows == 2 else 3) and "out of memory in step 1" in said[0]
    plan = final_checkpoint(tmp_path / "short", 6)["state"]["plan"]
    assert plan == {
        "micro_batch_size": rows,
        "grad_accum_steps": 8 // rows,
        "checkpointed_layers": EVERY_LAYER if layers else 0,
    }


def test_a_resumed_run_begins_where_the_step_down_ended(tmp_path: Path) -> None:
    """Its loader makes the smaller micro-batches, which are those the engine cut: bit for bit."""
    name = f"output_dir={tmp_path / 'resumed'}"
    longer = (*PLAIN, *SHORT, "training.max_steps=12")
    whole = build_small_trainer(tmp_path, f"output_dir={tmp_path / 'whole'}", *longer)
    short_of_memory(whole, 1).train()
    first = build_small_trainer(tmp_path, name, *longer, "training.max_time_s=1e-9")  # over after the first step
    short_of_memory(first, 1).train()
    second = build_small_trainer(tmp_path, name, *longer, "resume.enabled=true")
    assert second.parts.plan.plan.micro_batch_size == 1 and second.state.step == 1
    second.train()
    log = [[row["loss"] for row in log_rows(tmp_path / run) if "loss" in row] for run in ("whole", "resumed")]
    assert log[0] == log[1]


@pytest.mark.parametrize("given", [("model.memory.policy=static",), ("data.source=jsonl", "data.max_tokens=256")])
def test_out_of_memory_that_nothing_can_be_done_about(tmp_path: Path, given: tuple[str, ...]) -> None:
    trainer = build_small_trainer(tmp_path, *PLAIN, *SHORT, *given)
    with pytest.raises(OutOfMemoryError, match=r"out of memory in step 1 .*Lower training\.train_batch_size"):
        short_of_memory(trainer, 0).train()
