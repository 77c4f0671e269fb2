"""Where the command starts: nothing is imported here that takes time, so that Ctrl-C is met from the beginning."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from truthgpt.errors import EXIT_PREEMPTED, Interrupted


def main() -> None:
    """Run the process's own command line; an interrupt outside its commands, as in imports, ends in one line too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started this wants it ignored
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from truthgpt.cli.app import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_PREEMPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted
