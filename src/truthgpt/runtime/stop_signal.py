"""SIGTERM and Ctrl-C ask a run to finish its step, save and leave. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from truthgpt.errors import EXIT_PREEMPTED, Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Context manager that remembers the first SIGTERM or SIGINT; the second one ends the process at once (exit 143).
    Within `breaking_off` the first one is raised too.

    Files are written atomically, so that leaving at once tears none. Outside the main thread, where Python allows no
    signal handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.requested = False
        """A signal arrived."""
        self.name: str | None = None
        """Which one: `SIGTERM` or `SIGINT`."""
        self._previous: dict[signal.Signals, Any] = {}
        self._breaks_off = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the old handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    @contextlib.contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Raise `Interrupted` at a signal, and for one that came before, as long as there is nothing to save: until
        `remember` is called, or the end."""
        self._breaks_off = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self.remember()

    def remember(self) -> None:
        """End `breaking_off`: what begins now can be saved. Elsewhere nothing happens.

        Raises:
            Interrupted: a signal came. Libraries that are being imported can lose it, or make another error of it.
        """
        if self._breaks_off:
            self._breaks_off = False
            if self.requested:
                raise Interrupted

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(EXIT_PREEMPTED)
        self.requested, self.name = True, signal.Signals(number).name
        if self._breaks_off:
            raise Interrupted
        # Said here and not by the loop, which may be seconds away from looking: who sees nothing happen presses Ctrl-C
        # again. Not through the logger, which may be in the middle of a line that this handler interrupted.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.name}: finishing the step and saving; once more leaves at once\n".encode())
