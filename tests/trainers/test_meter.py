"""The meter: means over a window, skipped steps left out, time that does not count, a window carried over a resume."""

from __future__ import annotations

import math
import time

import pytest
import torch

from truthgpt.trainers.engine import StepScalars
from truthgpt.trainers.meter import Speed, StepMeter

CPU = torch.device("cpu")


def add(meter: StepMeter, loss_sum: float, tokens: int, norm: float = 1.0) -> None:
    meter.add(StepScalars(torch.tensor(loss_sum), torch.tensor(norm)), tokens)


def test_mean_is_over_tokens_not_steps() -> None:
    meter = StepMeter(CPU, Speed())
    add(meter, 10.0, 5)
    add(meter, 90.0, 15, norm=3.0)
    row = meter.read()
    assert row["loss"] == pytest.approx(5.0) and row["grad_norm"] == 3.0
    assert "mfu" not in row
    add(meter, 4.0, 4)
    assert meter.read()["loss"] == pytest.approx(1.0), "a new window begins at each read"


def test_skipped_steps_are_not_in_the_mean() -> None:
    meter = StepMeter(CPU, Speed())
    add(meter, 10.0, 5)
    add(meter, math.nan, 5)
    assert meter.read()["loss"] == pytest.approx(2.0)
    add(meter, math.inf, 5)
    assert math.isnan(meter.read()["loss"])


def test_speed_counts_every_token_and_no_paused_time() -> None:
    meter = StepMeter(CPU, Speed(flops_per_token=2.0, peak_flops=1e6))
    start_s = time.perf_counter()  # before the meter's own, whose time is then within this one's
    meter.restart_clock()
    with meter.paused():
        time.sleep(0.2)
    add(meter, 1.0, 1000)
    time.sleep(0.02)
    row = meter.read()
    elapsed_s = time.perf_counter() - start_s
    assert row["tokens_per_sec"] > 1000 / (elapsed_s - 0.19)
    assert row["tokens_per_sec"] < 1000 / 0.02
    assert row["mfu"] == pytest.approx(row["tokens_per_sec"] * 2.0 / 1e6)


def test_window_survives_a_resume_exactly() -> None:
    straight, first, second = (StepMeter(CPU, Speed()) for _ in range(3))
    values = [(0.1, 3), (0.7, 5), (1e8, 7), (0.3, 11)]
    for loss, tokens in values:
        add(straight, loss, tokens)
    for loss, tokens in values[:2]:
        add(first, loss, tokens)
    second.load_state_dict(first.state_dict())
    for loss, tokens in values[2:]:
        add(second, loss, tokens)
    assert straight.read()["loss"] == second.read()["loss"]


def test_saved_state_is_not_changed_by_going_on() -> None:
    meter = StepMeter(CPU, Speed())
    add(meter, 2.0, 1)
    saved = meter.state_dict()
    kept = {key: torch.as_tensor(value).clone() for key, value in saved.items()}
    other = StepMeter(CPU, Speed())
    other.load_state_dict(saved)
    add(other, 5.0, 1)
    assert all(torch.equal(torch.as_tensor(saved[key]), kept[key]) for key in kept)
