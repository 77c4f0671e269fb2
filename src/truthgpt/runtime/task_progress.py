"""How far a long task is: a bar on a terminal, a log line now and then elsewhere. No torch."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 5.0
REDRAW_INTERVAL_S = 0.1
PATIENCE_S = 0.5
"""A task that takes no longer than this shows no bar."""


@contextmanager
def task_progress(title: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show how far a task is while the body runs; the body calls what it is given with each number of units done.

    On a terminal that can redraw a line: a bar on stderr, gone when the task ends. Elsewhere a log line about every
    five seconds. Both have the speed and, where `total` is known, the time left.

    Args:
        title: what is being done, for example `tokenizing`.
        total: units of the whole task; None when only the end tells.
        unit: what is counted, in the plural: `documents`.
    """
    console = Console(stderr=True)
    if sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
        bar = _Bar(console, title, total, unit)
        try:
            yield bar.advance
        finally:
            bar.close()
    else:
        yield _Lines(title, total, unit).advance


class _Count:
    """Units done since the start, in words."""

    def __init__(self, total: int | None, unit: str) -> None:
        self._total = total
        self._unit = unit
        self._started_s = time.monotonic()
        self.done = 0

    def __str__(self) -> str:
        elapsed_s = time.monotonic() - self._started_s
        per_s = self.done / elapsed_s if elapsed_s > 0 else 0.0
        of = "" if self._total is None else f" of {self._total:,}"
        words = f"{self.done:,}{of} {self._unit}, {per_s:,.{0 if per_s >= 10 else 1}f}/s"
        if self._total is None or per_s == 0:
            return words
        left_s = max(self._total - self.done, 0) / per_s
        return f"{words}, {timedelta(seconds=round(left_s))} left"


class _Lines:
    """A log line about every `LOG_INTERVAL_S`."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self._title = title
        self._count = _Count(total, unit)
        self._next_s = time.monotonic() + LOG_INTERVAL_S

    def advance(self, units: int) -> None:
        """`units` more are done."""
        self._count.done += units
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + LOG_INTERVAL_S
            # As text: a handler may format the record when the count has moved on.
            logger.info("%s: %s", self._title, str(self._count))


class _Bar:
    """A bar that is redrawn from `advance` only, never from a thread: a process forked while a thread holds the
    console's lock could never write again. Log lines written to `sys.stderr` meanwhile appear above it."""

    def __init__(self, console: Console, title: str, total: int | None, unit: str) -> None:
        self._count = _Count(total, unit)
        self._next_s = time.monotonic() + PATIENCE_S
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._progress.add_task(title, total=total, count="")
        self._shown = False

    def advance(self, units: int) -> None:
        """`units` more are done."""
        self._count.done += units
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + REDRAW_INTERVAL_S
        if not self._shown:
            self._shown = True
            self._progress.start()
            # A run that is killed outright cannot give the cursor back, so it is never hidden.
            self._progress.console.show_cursor(True)
        self._progress.update(self._task, completed=self._count.done, count=str(self._count), refresh=True)

    def close(self) -> None:
        """Wipe the bar and give stderr back."""
        if self._shown:
            self._progress.stop()
