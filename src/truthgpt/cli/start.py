"""Where the command starts: nothing is imported here that takes time, so that Ctrl-C is met from the beginning."""

from __future__ import annotations

import sys

from truthgpt.errors import EXIT_PREEMPTED


def main() -> None:
    """Run the process's own command line; an interrupt during its imports ends without a traceback too."""
    try:
        from truthgpt.cli.app import main as run_command_line
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_PREEMPTED)
    run_command_line()
