"""Where the lines of the logger "truthgpt" go: `run.log` and the console, both without secrets. No torch."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TextIO

from truthgpt.runtime.atomic_file import append_line
from truthgpt.runtime.environment import redact

_ROOT = logging.getLogger("truthgpt")


class _Redacted(logging.Formatter):
    """Formats a record (UTC), exception text included, and hides secrets."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class RunLogHandler(logging.Handler):
    """Appends to a file that it opens for each line: a deleted file comes back, a full disk is said once."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._failed = False
        self.setFormatter(_Redacted("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; never raises for a disk that is full or gone."""
        try:
            append_line(self.path, self.format(record))
        except OSError as error:
            if not self._failed:
                # Set first: the warning comes back to this handler.
                self._failed = True
                _ROOT.warning("%s cannot be written, its lines are lost while that lasts: %s", self.path, error)


class ConsoleHandler(logging.Handler):
    """Plain lines on standard error, looked up at each line, so that a progress bar may stand in for `sys.stderr`."""

    def __init__(self) -> None:
        super().__init__()
        self._stream: TextIO | None = None
        self.setFormatter(_Redacted("%(message)s"))

    def redirect(self, stream: TextIO | None) -> None:
        """Write to `stream` from now on; None: to whatever `sys.stderr` is."""
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a console that is closed (a broken pipe) is ignored."""
        stream = self._stream or sys.stderr
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except (OSError, ValueError):
            return


def attach_run_log(path: Path) -> logging.Handler:
    """Send the project's log lines (INFO and above) to the file `path`, with time and level; undo with `detach`."""
    return _attach(RunLogHandler(path), logging.INFO)


def attach_console(level: int) -> ConsoleHandler:
    """Send the project's log lines from `level` on to standard error, as plain text; undo with `detach`."""
    handler = ConsoleHandler()
    _attach(handler, level)
    return handler


def detach(handler: logging.Handler) -> None:
    """Stop sending log lines to `handler`."""
    _ROOT.removeHandler(handler)
    handler.close()


def _attach(handler: logging.Handler, level: int) -> logging.Handler:
    handler.setLevel(level)
    _ROOT.addHandler(handler)
    # The logger passes on what its most talkative handler wants; NOTSET would leave that to the root's WARNING.
    _ROOT.setLevel(min(each.level for each in _ROOT.handlers))
    return handler
