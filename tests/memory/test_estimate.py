"""Predicted peaks against those that a GPU reported, from the records of the benchmarks; and the parts of a step."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from truthgpt.build_data import rows_per_micro_batch
from truthgpt.build_memory import Machine, StepCost, step_cost
from truthgpt.config.schema import Config
from truthgpt.memory.base import EVERY_LAYER, MemoryPlan
from truthgpt.validate_config import load_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LARGEST_ERROR = 0.02
TINY = (
    "data={source: text, path: x, max_seq_len: 64}",
    "model.config={model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 4, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64}",
    "training.mixed_precision=bf16",
)


def levels() -> list[Any]:
    """Levels of tuning with their measured peaks; those of padded rows depend on the lengths of the documents."""
    records = [json.loads(line) for line in (BENCHMARKS / "results/levels.jsonl").read_text().splitlines()]
    known = ("float32", "bf16", "fused", "compiled", "weights", "CUDA graph", "packed", "8 layers")
    found = [
        pytest.param(record, id=f"{record['workload']}-{record['level']}")
        for record in records
        if any(word in record["level"] for word in known) and "padded" not in record["level"]
        if "max-autotune" not in record["level"] and "float8" not in record["level"]
    ]
    assert len(found) >= 12
    return found


def cost_of(config: Config, precision: str = "bf16") -> StepCost:
    return step_cost(config, Machine("cuda", precision, None, None))


@pytest.mark.parametrize("record", levels())
def test_peak_is_what_a_gpu_reported(record: dict[str, Any]) -> None:
    run = record["run"]
    config = load_config(
        str(BENCHMARKS / f"gpu/{record['workload']}.yaml"), [*run["overrides"], *needed(record["workload"])]
    )
    estimate = cost_of(config, run["precision"]).memory(MemoryPlan(rows_per_micro_batch(config), 1, 0))
    assert estimate.peak_bytes == pytest.approx(run["memory"]["peak_allocated_bytes"], rel=LARGEST_ERROR)


def grid() -> list[Any]:
    """Records of the grid, those of one configuration together."""
    records = [json.loads(line) for line in (BENCHMARKS / "results/memory.jsonl").read_text().splitlines()]
    together: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        name = f"{record['workload']}-{record['length']}-{'compiled' if record['compiled'] else 'eager'}"
        together.setdefault(name, []).append(record)
    assert len(records) >= 34
    return [pytest.param(group, id=name) for name, group in together.items()]


@pytest.mark.parametrize("records", grid())
def test_peak_with_layers_computed_again_is_what_a_gpu_reported(records: list[dict[str, Any]]) -> None:
    config = load_config(str(BENCHMARKS / f"gpu/{records[0]['workload']}.yaml"), records[0]["run"]["overrides"])
    cost = cost_of(config)
    for record in records:
        estimate = cost.memory(MemoryPlan(rows_per_micro_batch(config), 1, record["checkpointed"]))
        measured = record["run"]["memory"]["peak_allocated_bytes"]
        assert estimate.peak_bytes == pytest.approx(measured, rel=0.03), record["checkpointed"]


def needed(workload: str) -> list[str]:
    return ["data.path=x"] if workload == "w4" else []


@cache
def tiny(*overrides: str) -> StepCost:
    return cost_of(load_config("debug", [*TINY, *overrides]))


def test_activations_are_linear_in_the_rows_and_fall_with_checkpointed_layers() -> None:
    cost = tiny("training.weights=bf16_master")
    one, two = (cost.memory(MemoryPlan(rows, 1, 0)) for rows in (64, 128))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)
    peaks = [cost.memory(MemoryPlan(64, 1, layers)).peak_bytes for layers in range(5)]
    assert peaks[:4] == sorted(peaks[:4], reverse=True) and peaks[4] < 0.8 * peaks[0]
    assert cost.memory(MemoryPlan(64, 1, EVERY_LAYER)) == cost.memory(MemoryPlan(64, 1, 4))


def test_gradients_of_earlier_micro_batches_are_carried() -> None:
    cost = tiny()
    assert cost.memory(MemoryPlan(64, 1, 0)).gradients == 0, "at the loss of a step's only micro-batch"
    assert cost.memory(MemoryPlan(64, 2, 0)).gradients == 4 * cost.parameters
    half = tiny("training.weights=bf16_master")
    assert half.memory(MemoryPlan(64, 2, 0)).gradients == 4 * half.parameters, "sums are float32"
    assert half.step.held.gradients == 2 * half.parameters, "one micro-batch's are in the type of the weights"


@pytest.mark.parametrize(
    ("overrides", "part", "bytes_a_weight"),
    [
        ((), "weights", 4),
        (("training.weights=bf16_master",), "weights", 2),
        ((), "optimizer", 8),
        (("training.weights=bf16_master",), "optimizer", 12),
        (("training.weights=bf16_stochastic",), "optimizer", 8),
        (("optimizer=lion",), "optimizer", 4),
        (("ema.enabled=true",), "average", 4),
        (("ema.enabled=false",), "average", 0),
        (("ema.on_cpu=true",), "average", 0),
    ],
)
def test_bytes_a_weight(overrides: tuple[str, ...], part: str, bytes_a_weight: int) -> None:
    cost = tiny(*overrides)
    found = cost.memory(MemoryPlan(1, 1, 0)).parts()[part]
    assert found == pytest.approx(bytes_a_weight * cost.parameters, abs=4096)  # rotary frequencies among the weights


def test_adapters_train_little() -> None:
    cost = tiny("model.lora.enabled=true", "model.lora.dropout=0.0")
    estimate = cost.memory(MemoryPlan(1, 1, 0))
    assert cost.trainable_parameters < 0.3 * cost.parameters
    assert estimate.optimizer == 8 * cost.trainable_parameters
    frozen = cost.parameters - cost.trainable_parameters
    assert estimate.weights == pytest.approx(2 * frozen + 4 * cost.trainable_parameters, abs=4096)
    without = dataclasses.replace(cost.step.head, trained=True)
    assert dataclasses.replace(cost.step, head=without).estimate(MemoryPlan(1, 1, 0)).loss > estimate.loss


def test_time_grows_with_what_is_computed_again_and_with_micro_batches() -> None:
    cost = tiny()
    times = [cost.seconds(MemoryPlan(8, 1, layers)) for layers in (0, 2, 4)]
    assert times == sorted(times)
    assert cost.seconds(MemoryPlan(4, 2, 0)) > cost.seconds(MemoryPlan(8, 1, 0))
