"""`status.json`: true at the start, at every checkpoint and at the end, and no reason for a run to die."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from truthgpt.callbacks.run_status import RunStatusKeeper
from truthgpt.errors import NonFiniteError, Preempted
from truthgpt.runtime.run_directory import RunDirectory
from truthgpt.trainers.state import TrainState

STATE = TrainState(step=5, max_steps=10, best_metric=2.5, best_step=4)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.claim(tmp_path / "run", resume=False, overwrite=False) as claimed:
        yield claimed


def status(run: RunDirectory) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run.path / "status.json").read_text())
    return document


def test_a_run_that_completes(run: RunDirectory) -> None:
    keeper = RunStatusKeeper(run)
    keeper.on_start(TrainState(max_steps=10), {})
    assert (status(run)["state"], status(run)["step"], status(run)["exit_code"]) == ("running", 0, None)
    keeper.on_checkpoint(STATE, {})
    assert (status(run)["state"], status(run)["step"], status(run)["best_metric"]) == ("running", 5, 2.5)
    keeper.on_end(STATE, {"status": "complete", "stop_reason": None})
    final = status(run)
    assert (final["state"], final["exit_code"], final["message"]) == ("complete", 0, None)
    assert final["run_id"] == run.run_id


def test_a_reason_to_stop_early_is_told(run: RunDirectory) -> None:
    keeper = RunStatusKeeper(run)
    keeper.on_end(STATE, {"status": "complete", "stop_reason": "training.max_tokens reached"})
    assert (status(run)["message"], status(run)["exit_code"]) == ("training.max_tokens reached", 0)


@pytest.mark.parametrize(
    ("error", "state", "code", "message"),
    [
        (NonFiniteError("not finite"), "failed", 5, "not finite"),
        (Preempted("stopped by SIGTERM"), "preempted", 143, "stopped by SIGTERM"),
        (ValueError("odd"), "failed", 1, "odd"),
        (ValueError(), "failed", 1, "ValueError"),
    ],
)
def test_a_run_that_fails(run: RunDirectory, error: Exception, state: str, code: int, message: str) -> None:
    keeper = RunStatusKeeper(run)
    keeper.on_exception(STATE, {"error": error})
    keeper.on_end(STATE, {"status": state, "stop_reason": None})
    assert (status(run)["state"], status(run)["exit_code"], status(run)["message"]) == (state, code, message)


def test_a_status_that_cannot_be_written_is_said(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    keeper = RunStatusKeeper(run)
    shutil.rmtree(run.path)
    run.path.write_text("a file took its place")
    with caplog.at_level(logging.WARNING, "truthgpt"):
        keeper.on_checkpoint(STATE, {})
    assert "status.json is out of date" in caplog.text
    run.path.unlink()
    keeper.on_checkpoint(STATE, {})
    assert status(run)["step"] == 5, "the next checkpoint finds room again"
