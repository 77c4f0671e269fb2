"""The line that compares the planned peak with the measured one."""

from __future__ import annotations

import logging

import pytest

from truthgpt.callbacks.memory_report import MemoryReport
from truthgpt.trainers.state import TrainState


def test_said_once_from_the_second_step_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report = MemoryReport(3 * 2**30)
    report.on_log(TrainState(step=1), {"peak_memory_bytes": 2**30})
    report.on_log(TrainState(step=50), {"loss": 1.0})
    assert caplog.text == ""
    for step in (50, 100):
        report.on_log(TrainState(step=step), {"peak_memory_bytes": 2 * 2**30})
    (record,) = caplog.records
    assert record.getMessage() == "memory: peak 2.00 GiB, 3.00 GiB planned (+50.0%)"
