"""A command that serves, seen from outside."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.process import Cli, Finished

READY_S = 60


@dataclass
class ServedCommand:
    """A command under way; `finished` once it has ended."""

    url: str
    finished: Finished | None = None


@contextmanager
def served_command(cli: Cli, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[ServedCommand]:
    """A command, started once in the folder of `cli`, that has said its address; Ctrl-C ends it, whatever happens."""
    running = cli.start(*arguments, env=env)
    try:
        command = ServedCommand(_url_said(cli.folder / ".stderr1"))
        yield command
    finally:
        with suppress(ProcessLookupError):  # it has ended already: what it said is in the failure
            os.kill(running.pid, signal.SIGINT)
        finished = running.wait()
    command.finished = finished


def _url_said(errors: Path) -> str:
    for _ in range(READY_S * 20):
        found = re.search(r"http://\S+?(?=;)", errors.read_text()) if errors.exists() else None
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no address was said:\n{errors.read_text()}")
