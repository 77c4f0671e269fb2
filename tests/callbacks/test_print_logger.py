"""What a person sees of a run: plain lines, and the progress bar on a real pseudo-terminal."""

from __future__ import annotations

import io
import itertools
import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.callbacks.facts import end_facts, eval_row, log_row, start_facts, state_at

from truthgpt.callbacks.print_logger import Clock, PrintLogger, bar_figures, log_figures, start_line


def run_small(printer: PrintLogger, folder: Path) -> None:
    printer.on_start(state_at(0), start_facts(folder))
    for step in (1, 50, 1100):
        printer.on_step(state_at(step), {})
        printer.on_log(state_at(step), log_row(step))
    printer.on_eval(state_at(1100), eval_row(1100))
    printer.on_checkpoint(state_at(1100), {"path": "/x/y/step_00001100.pt", "best": True})
    printer.on_end(state_at(1100), end_facts(1100))


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = itertools.count(1000.0, 0.001)
    monkeypatch.setattr(time, "monotonic", lambda: next(now_s))
    run_small(PrintLogger(), tmp_path)
    output = capsys.readouterr()
    assert output.out == ""
    clock = r"0:00 eta (-:--|0:0\d)"
    expected = [
        r"small: 1\.06M parameters, cpu fp32, 1,100 steps of 1,024 tokens, in runs/small",
        rf"step     1/1,100  loss 4\.1234   lr 1\.50e-03  grad 0\.875     12\.3k tok/s  epoch 0\.25  {clock}",
        rf"step    50/1,100  loss 4\.1234   lr 1\.50e-03  grad 0\.875     12\.3k tok/s  epoch 0\.25  {clock}",
        rf"step 1,100/1,100  loss 4\.1234   lr 1\.50e-03  grad 0\.875     12\.3k tok/s  epoch 0\.25  {clock}",
        r"eval 1,100/1,100  val_loss 1\.9000  ppl 6\.6859  \(best so far\)",
        r"     > def foo\(\):",
        r"     \|     pass",
        r"save 1,100/1,100  step_00001100\.pt \(best\)",
        r"complete: 1,100 steps, 1\.13M tokens in 1:52, best ppl 6\.6859 at step 550",
    ]
    lines = output.err.splitlines()
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_what_is_not_always_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {**start_facts(tmp_path, resumed_step=200), "trainable_parameters": 4096, "tokens_per_step": None}
    assert start_line(facts) == (
        "small: 1.06M parameters (4.10k trained), cpu fp32, 1,100 steps, resumed after step 200, in runs/small"
    )
    padded = {**start_facts(tmp_path), "full_steps": False}
    assert "1,100 steps of up to 1,024 tokens, in" in start_line(padded)
    row = {**log_row(5, loss=float("nan")), "mfu": 0.4567, "peak_memory_bytes": 3 * 2**30, "skipped_steps": 2}
    assert log_figures(row, "0:01 eta 0:02", "images").endswith("mfu 45.7%  3.0 GiB  2 skipped")
    assert " tok/s " in log_figures(row, "", "tokens") and " images/s " in log_figures(row, "", "images")
    assert "loss nan" in bar_figures(row, "tokens") and "2 skipped" in bar_figures(row, "images")
    printer = PrintLogger()
    printer.on_end(state_at(7, "training.max_tokens reached"), {**end_facts(7), "best_metric": None, "best_step": None})
    assert capsys.readouterr().err == (
        "complete: 7 steps, 7.17k tokens in 1:52, ended early: training.max_tokens reached\n"
    )


def test_the_remaining_time_is_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    clock = Clock()
    assert clock.text(0, 100) == "0:00 eta -:--"
    now_s += 60  # the first step compiles
    clock.tick(1)
    assert clock.text(1, 100) == "1:00 eta -:--"
    now_s += 10
    clock.tick(11)
    assert clock.text(11, 100) == "1:10 eta 1:29"  # a step a second: the first step does not count
    assert clock.remaining_s(120, 100) == 0.0


PROGRAM = """
import logging, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.callbacks.facts import *
from truthgpt.callbacks.print_logger import PrintLogger
handler = logging.StreamHandler(sys.stderr)
logger = logging.getLogger("truthgpt")
logger.addHandler(handler)
printer = PrintLogger()
printer.on_start(state_at(0), start_facts(Path(".")))
for step in range(1, 1101):
    printer.on_step(state_at(step), {})
    if step % 100 == 0:
        printer.on_log(state_at(step), log_row(step))
        time.sleep(0.02)
    if step == 500:
        logger.warning("a warning through a handler")
        print("a line on stdout")
        print("a line on stderr", file=sys.stderr)
    if step == 550:
        printer.on_eval(state_at(step), eval_row(step, text="[bold]x[/bold] \\x1b[2J"))
        printer.on_checkpoint(state_at(step), {"path": "step_00000550.pt", "best": False})
if sys.argv[2] == "end":
    printer.on_end(state_at(1100), end_facts(1100))
else:
    printer.on_exception(state_at(1100), {"error": ValueError()})
    assert handler.stream is sys.stderr is sys.__stderr__, "stderr was not given back before the error is shown"
    printer.on_end(state_at(1100), end_facts(1100, "failed"))
assert handler.stream is sys.stderr is sys.__stderr__, "stderr was not given back"
logger.warning("after the end")
"""


def on_terminal(ending: str, **environment: str) -> str:
    """What the program writes to a terminal of 80 columns."""
    master, slave = pty.openpty()
    variables = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "PYTHONUTF8": "1", **environment}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), ending]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=variables)
    os.close(slave)
    written = io.BytesIO()
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        written.write(chunk)
    os.close(master)
    assert process.wait() == 0, written.getvalue().decode()
    return written.getvalue().decode()


def screen(written: str) -> list[str]:
    """The lines that stay on the screen: only carriage return and erase-line move within a one-line bar."""
    lines = [""]
    for piece in re.split(r"(\r\n|\r|\x1b\[2K|\x1b\[[0-9;?]*[a-zA-Z])", written):
        if piece == "\r\n":
            lines.append("")
        elif piece in ("\x1b[2K",):
            lines[-1] = ""
        elif piece.startswith("\x1b[") or piece == "\r":
            assert "A" not in piece, "the bar took more than one line"
        else:
            lines[-1] += piece
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_the_bar_on_a_terminal() -> None:
    written = on_terminal("end")
    lines = screen(written)
    assert lines[0].startswith("small: 1.06M parameters")
    assert lines[1:4] == ["a warning through a handler", "a line on stdout", "a line on stderr"]
    assert lines[4] == "eval   550/1,100  val_loss 1.9000  ppl 6.6859  (best so far)"
    assert lines[5] == r"     > def [bold]x[/bold] \x1b[2J"
    assert lines[6] == "save   550/1,100  step_00000550.pt"
    assert re.fullmatch(r"1,100/1,100 ━+ loss 4.123 12.3k tok/s lr 1.5e-03 0:0\d eta 0:00", lines[7])
    assert lines[8].startswith("complete: 1,100 steps")
    assert lines[9:] == ["after the end"]
    assert written.count("\r\x1b[2K") > 10  # it was redrawn
    assert all(len(line) <= 80 for line in lines)
    visible, hidden = written.find("\x1b[?25h"), written.find("\x1b[?25l")
    assert hidden < visible < written.find("a warning")  # a run that is killed leaves a visible cursor


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_an_exception_gives_the_terminal_back() -> None:
    lines = screen(on_terminal("exception"))
    assert lines[-2].startswith("failed: 1,100 steps")
    assert lines[-1] == "after the end"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_dumb_terminal_gets_plain_lines() -> None:
    written = on_terminal("end", TERM="dumb")
    assert "\x1b[" not in written
    assert "step   100/1,100  loss 4.1234" in written


def test_an_ascii_stderr_shows_any_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace"))
    printer = PrintLogger()
    printer.on_start(state_at(0), start_facts(tmp_path))
    printer.on_eval(state_at(1), eval_row(1, text="日本"))
    assert b"\\u65e5\\u672c" in raw.getvalue()


def test_other_handlers_are_left_alone(tmp_path: Path) -> None:
    """Only those that write to the terminal itself are redirected, and none without a bar."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("truthgpt").addHandler(handler)
    try:
        run_small(PrintLogger(), tmp_path)
        assert handler.stream is stream
    finally:
        logging.getLogger("truthgpt").removeHandler(handler)
