"""Signals: the first asks, the second leaves at once, handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from truthgpt.errors import Interrupted
from truthgpt.runtime.stop_signal import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered_and_said(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignal() as stop:
        assert not stop.requested and stop.name is None
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == number.name
    assert f"{number.name}: finishing the step and saving" in capfd.readouterr().err


def test_the_old_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = StopSignal()
    with pytest.raises(KeyError), stop:
        assert signal.getsignal(signal.SIGTERM) == stop._on_signal
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("pair", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGINT", "SIGINT")])
def test_the_second_signal_ends_the_process_at_once(pair: tuple[str, str]) -> None:
    program = (
        "import os, signal, time\nfrom truthgpt.runtime.stop_signal import StopSignal\n"
        "try:\n  with StopSignal() as stop:\n    "
        f"os.kill(os.getpid(), signal.{pair[0]}); assert stop.requested\n    "
        f"os.kill(os.getpid(), signal.{pair[1]}); time.sleep(9)\n"
        "finally: print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (143, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("lost", [False, True])
def test_breaking_off_needs_no_second_signal(
    number: signal.Signals, lost: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not where a library loses the interrupt either, or makes another error of it."""
    after = []
    with StopSignal() as stop:
        with pytest.raises(Interrupted), stop.breaking_off():
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                after.append("raised at once")
                if not lost:
                    raise ImportError from None
        assert after == ["raised at once"] and stop.requested
    assert capfd.readouterr().err == ""
    with StopSignal() as stop:
        with stop.breaking_off():
            pass
        os.kill(os.getpid(), number)
        assert stop.requested, "the next one is remembered alone"


def test_breaking_off_meets_a_signal_that_came_before() -> None:
    went_on = False
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted), stop.breaking_off():
            went_on = True
    assert not went_on


def test_what_can_be_saved_is_not_broken_off() -> None:
    with StopSignal() as stop, stop.breaking_off():
        stop.remember()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        stop.remember()


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
