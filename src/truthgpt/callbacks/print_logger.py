"""The callback `print`: what a person sees of a run, on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from truthgpt.callbacks.base import StateView
from truthgpt.callbacks.progress_bar import Display, PlainLines, open_display
from truthgpt.callbacks.text_format import format_count, format_duration, format_value, printable_lines

SAMPLE_LINES = 10
SAMPLE_WIDTH = 160
_NOT_METRICS = ("step", "val_loss", "best_metric", "is_best", "samples")


class PrintLogger:
    """A progress bar on a terminal, one aligned line an event otherwise.

    Nothing reaches stdout, which belongs to the commands' results.
    """

    def __init__(self) -> None:
        self._display: Display = PlainLines()
        self._clock = Clock()
        self._max_steps = 0
        self._best_by = ""
        self._unit = "tokens"

    def on_start(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Say what is about to be trained, and open the display."""
        self._max_steps = info["max_steps"]
        self._best_by = info["config"]["eval"]["select_best_by"]
        self._unit = info["unit"]
        self._clock = Clock()
        self._display = open_display(state.step, self._max_steps)
        self._display.line(start_line(info), "bold")

    def on_step(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Move on; reads the step counter only."""
        self._clock.tick(state.step)
        self._display.advance(state.step, self._clock.text(state.step, self._max_steps))

    def on_log(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Show the newest figures: in the bar, or as a line."""
        if self._display.live:
            self._display.figures(bar_figures(info, self._unit))
        else:
            clock = self._clock.text(info["step"], self._max_steps)
            self._display.line(f"{self._label('step', info['step'])}  {log_figures(info, clock, self._unit)}")

    def on_eval(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Show loss and metrics on the validation split, and the samples."""
        metrics = {"val_loss": info["val_loss"], **{k: v for k, v in info.items() if k not in _NOT_METRICS}}
        figures = "  ".join(f"{name} {format_value(value)}" for name, value in metrics.items())
        best = "  (best so far)" if info["is_best"] else ""
        self._display.line(f"{self._label('eval', info['step'])}  {figures}{best}", "green" if best else "yellow")
        for sample in info["samples"]:
            lines = printable_lines(sample["prompt"] + sample["text"], SAMPLE_LINES, SAMPLE_WIDTH)
            for index, line in enumerate(lines):
                self._display.line(f"     {'|' if index else '>'} {line}", "dim")

    def on_checkpoint(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Say which checkpoint was written."""
        best = " (best)" if info["best"] else ""
        self._display.line(f"{self._label('save', state.step)}  {PurePath(info['path']).name}{best}", "dim")

    def on_exception(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Give the terminal back before the error is shown."""
        self._display.close()

    def on_end(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Close the display and sum the run up."""
        self._display.close()
        self._display.line(end_line(state, info, self._best_by, self._unit), "bold")

    def _label(self, event: str, step: int) -> str:
        return f"{event} {step:>{len(f'{self._max_steps:,}')},}/{self._max_steps:,}"


class Clock:
    """Elapsed and remaining time, on a clock that is never set back."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._first: tuple[int, float] | None = None

    def tick(self, step: int) -> None:
        """A step is done. The first one is where the pace is counted from: it also compiles and warms up."""
        if self._first is None:
            self._first = (step, time.monotonic())

    def remaining_s(self, step: int, max_steps: int) -> float | None:
        """Seconds left at the pace since the first step; None until there is a pace. Never negative."""
        if self._first is None or step <= self._first[0]:
            return None
        first_step, first_s = self._first
        return max(0.0, (time.monotonic() - first_s) / (step - first_step) * (max_steps - step))

    def text(self, step: int, max_steps: int) -> str:
        """Such as `1:02 eta 0:58`."""
        elapsed = format_duration(time.monotonic() - self._start_s)
        remaining_s = self.remaining_s(step, max_steps)
        return f"{elapsed} eta {'-:--' if remaining_s is None else format_duration(remaining_s)}"


def start_line(info: Mapping[str, Any]) -> str:
    """Model size, device, precision, steps, tokens a step and where the run is kept."""
    total, trainable = info["parameters"], info["trainable_parameters"]
    size = f"{format_count(total)} parameters"
    if trainable != total:
        size += f" ({format_count(trainable)} trained)"
    steps = f"{info['max_steps']:,} steps"
    if info["tokens_per_step"] is not None:
        at_most = "" if info["full_steps"] else "up to "  # padded rows are as long as the longest of them
        steps += f" of {at_most}{info['tokens_per_step']:,} {info['unit']}"
    if info["resumed_step"]:
        steps += f", resumed after step {info['resumed_step']:,}"
    precision = "fp32" if info["precision"] == "none" else info["precision"]
    return f"{info['run_name']}: {size}, {info['device']} {precision}, {steps}, in {info['run_directory']}"


def log_figures(row: Mapping[str, Any], clock: str, unit: str) -> str:
    """The columns of a plain log line; those that are not always there come last. `unit` is what the speed counts."""
    columns = [
        f"loss {format_value(row['loss']):<7}",
        f"lr {row['lr']:.2e}",
        f"grad {row['grad_norm']:<8.3g}",
        f"{format_count(row['tokens_per_sec']):>5} {_speed_unit(unit)}",
        f"epoch {row['epoch']:.2f}",
        f"{clock:<16}",
    ]
    if "mfu" in row:
        columns.append(f"mfu {row['mfu']:.1%}")
    if "peak_memory_bytes" in row:
        columns.append(f"{row['peak_memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join(columns + _skipped(row)).rstrip()


def bar_figures(row: Mapping[str, Any], unit: str) -> str:
    """The figures beside the bar: few, so that 80 columns are enough."""
    speed = f"{format_count(row['tokens_per_sec'])} {_speed_unit(unit)}"
    figures = [f"loss {row['loss']:.3f}", speed, f"lr {row['lr']:.1e}"]
    return " ".join(figures + _skipped(row))


def end_line(state: StateView, info: Mapping[str, Any], best_by: str, unit: str) -> str:
    """How the run ended: steps, tokens, time and the best evaluation."""
    done = f"{info['status']}: {info['step']:,} steps, {format_count(info['tokens'])} {unit}"
    parts = [f"{done} in {format_duration(info['wall_time_s'])}"]
    if info["best_metric"] is not None:
        parts.append(f"best {best_by} {format_value(info['best_metric'])} at step {info['best_step']:,}")
    parts += _skipped(info)
    if state.stop_reason is not None:
        parts.append(f"ended early: {state.stop_reason}")
    return ", ".join(parts)


def _speed_unit(unit: str) -> str:
    return "tok/s" if unit == "tokens" else f"{unit}/s"


def _skipped(row: Mapping[str, Any]) -> list[str]:
    """Steps skipped for a non-finite loss or gradient, where there were any."""
    return [f"{row['skipped_steps']} skipped"] if row["skipped_steps"] else []
