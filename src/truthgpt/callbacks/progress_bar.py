"""Where the lines about a run go: plainly to stderr, or above a live progress bar."""

from __future__ import annotations

import logging
import sys
import time
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

REDRAW_INTERVAL_S = 0.1


class Display(Protocol):
    """Shows lines, and how far the run is."""

    live: bool
    """Whether figures are shown between lines."""

    def line(self, text: str, style: str = "") -> None:
        """Show one line for good; `style` is a rich style, for terminals."""
        ...

    def advance(self, step: int, clock: str) -> None:
        """Step `step` is done; `clock` says elapsed and remaining time."""
        ...

    def figures(self, text: str) -> None:
        """The newest loss, speed and learning rate, in a few words."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was; further calls show nothing live."""
        ...


class PlainLines:
    """Lines on stderr and nothing live: for files, pipes and dumb terminals."""

    live: bool = False

    def line(self, text: str, style: str = "") -> None:
        """Write one line to stderr."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def advance(self, step: int, clock: str) -> None:
        """Nothing to show between lines."""

    def figures(self, text: str) -> None:
        """Nothing to show between lines."""

    def close(self) -> None:
        """Nothing to undo."""


class ProgressBar:
    """A progress bar at the bottom of the terminal; lines appear above it.

    It is redrawn from `advance` only, never from a thread: a loader process forked while a thread holds the console's
    lock could never write again. While it is live, whatever is written to `sys.stderr` (and to a terminal's
    `sys.stdout`) passes through it, handlers of the loggers included, so that nothing tears it.

    Args:
        console: the terminal.
        step: steps done already.
        max_steps: steps of the run.
    """

    live: bool = True

    def __init__(self, console: Console, step: int, max_steps: int) -> None:
        self._console = console
        self._drawn_s = 0.0
        width = len(f"{max_steps:,}")
        self._progress = Progress(
            TextColumn(f"{{task.completed:>{width},}}/{{task.total:,}}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}", style="bold"),
            TextColumn("{task.fields[clock]}", style="progress.elapsed"),
            console=console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            expand=True,
        )
        terminal = sys.stderr
        self._task = self._progress.add_task("", total=max_steps, completed=step, figures="", clock="")
        self._progress.start()
        self._handlers = _redirect_handlers(terminal, sys.stderr)
        # A run that is killed outright cannot give the cursor back, so it is never hidden.
        console.show_cursor(True)

    def line(self, text: str, style: str = "") -> None:
        """Show one line above the bar."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def advance(self, step: int, clock: str) -> None:
        """Move the bar; drawn at most every `REDRAW_INTERVAL_S`."""
        self._progress.update(self._task, completed=step, clock=clock)
        now_s = time.monotonic()
        if now_s - self._drawn_s >= REDRAW_INTERVAL_S:
            self._drawn_s = now_s
            self._progress.refresh()

    def figures(self, text: str) -> None:
        """Show the newest figures in the bar."""
        self._progress.update(self._task, figures=text, refresh=True)

    def close(self) -> None:
        """Draw the bar once more, leave it on the screen and give stderr back; twice does no harm."""
        self._progress.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []


def open_display(step: int, max_steps: int) -> Display:
    """The progress bar when stderr is a terminal that can redraw a line, plain lines otherwise."""
    if sys.stderr.isatty():
        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal:
            return ProgressBar(console, step, max_steps)
    return PlainLines()


Redirected = list[tuple["logging.StreamHandler[TextIO]", TextIO]]


def _redirect_handlers(terminal: TextIO, replacement: TextIO) -> Redirected:
    """Send handlers that hold the terminal itself to `replacement`; returns them with what they held."""
    redirected: Redirected = []
    for name in (None, "truthgpt"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is terminal:
                handler.setStream(replacement)
                redirected.append((handler, terminal))
    return redirected
