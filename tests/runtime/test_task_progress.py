from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import time
import timeit

import pytest

from truthgpt.runtime.task_progress import task_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands at `clock[0]`."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_a_line_every_five_seconds(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), task_progress("tokenizing", 2000, "documents") as advance:
        for _ in range(12):
            clock[0] += 1
            advance(100)
    assert caplog.messages == [
        "tokenizing: 500 of 2,000 documents, 100/s, 0:00:15 left",
        "tokenizing: 1,000 of 2,000 documents, 100/s, 0:00:10 left",
    ]


def test_unknown_total_and_slow_units(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), task_progress("reading", None, "files") as advance:
        clock[0] += 10
        advance(3)
    assert caplog.messages == ["reading: 3 files, 0.3/s"]


def test_more_than_the_total_and_nothing_done(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), task_progress("reading", 3, "files") as advance:
        clock[0] += 10
        advance(0)
        clock[0] += 10
        advance(5)
    assert caplog.messages == ["reading: 0 of 3 files, 0.0/s", "reading: 5 of 3 files, 0.2/s, 0:00:00 left"]


def test_a_short_task_says_nothing(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO), task_progress("reading", 3, "files") as advance:
        advance(3)
    assert caplog.messages == [] and capsys.readouterr() == ("", "")


TASK = """
import logging, sys, time
from truthgpt.runtime.task_progress import task_progress
from truthgpt.runtime.run_log import attach_console
attach_console(logging.INFO)
with task_progress("reading [b]", TOTAL, "files") as advance:
    for number in range(8):
        time.sleep(DELAY)
        advance(1)
        if number == 6:
            logging.getLogger("truthgpt.x").info("a line")
    FAIL
"""


def on_terminal(script: str, **environment: str) -> str:
    """What the script shows on a terminal of 100 columns."""
    control, terminal = pty.openpty()
    variables = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30", **environment}
    process = subprocess.Popen([sys.executable, "-c", script], stderr=terminal, stdout=terminal, env=variables)
    os.close(terminal)
    shown = b""
    while True:
        try:
            data = os.read(control, 65536)
        except OSError:  # the last holder of the terminal is gone
            break
        if not data:
            break
        shown += data
    process.wait()
    os.close(control)
    return shown.decode()


@pytest.mark.parametrize("failing", [False, True])
def test_bar_on_a_terminal_is_wiped_at_the_end(failing: bool) -> None:
    script = TASK.replace("TOTAL", "8").replace("DELAY", "0.12").replace("FAIL", "raise OSError" * failing)
    shown = on_terminal(script)
    assert "reading [b]" in shown and "8 of 8 files, " in shown and " left" in shown
    assert "a line\r\n" in shown
    assert "\x1b[?25l" not in shown or shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.rindex("\x1b[2K") > shown.rindex("8 of 8 files")
    assert ("OSError" in shown) == failing


def test_bar_of_unknown_length() -> None:
    assert "8 files, " in on_terminal(TASK.replace("TOTAL", "None").replace("DELAY", "0.12").replace("FAIL", ""))


def test_no_bar_for_a_short_task_or_a_dumb_terminal() -> None:
    task = TASK.replace("TOTAL", "8").replace("FAIL", "")
    # By a clock that stands: a busy machine may take long for the shortest task.
    short = f"import time\ntime.monotonic = lambda: 100.0\n{task.replace('DELAY', '0')}"
    assert on_terminal(short) == "a line\r\n"
    assert on_terminal(task.replace("DELAY", "0.12"), TERM="dumb") == "a line\r\n"


def test_advance_is_cheap() -> None:
    """A million documents call it a million times."""
    with task_progress("reading", 10**6, "documents") as advance:
        assert timeit.timeit(lambda: advance(1), timer=time.thread_time, number=100_000) < 1
