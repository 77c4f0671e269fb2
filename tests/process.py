"""Commands in processes of their own, forked from a server that has imported torch and transformers already.

Starting Python with torch and transformers costs five CPU seconds; a fork of the server costs a few milliseconds. The
server computes nothing, so its children inherit no thread pools.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOAD = [
    "tests.process",
    "truthgpt.build_trainer",
    "truthgpt.cli.app",
    "truthgpt.load_model",
    "transformers.generation",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
]
TIMEOUT_S = 120.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Finished:
    """How a command ended; a negative exit code is the signal that killed it."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Standard output as the one JSON document it must be."""
        return json.loads(self.stdout)


class Cli:
    """Runs `truthgpt` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs = 0

    def __call__(self, *arguments: str, env: Mapping[str, str] | None = None) -> Finished:
        """Run a command to its end."""
        running = self.start(*arguments, env=env)
        return running.wait()

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> Running:
        """Start a command and leave it running."""
        self._runs += 1
        outputs = (self.folder / f".stdout{self._runs}", self.folder / f".stderr{self._runs}")
        environment = {**os.environ, **(env or {})}
        process = _context.Process(target=_child, args=(list(arguments), str(self.folder), outputs, environment))
        process.start()
        return Running(process, outputs)


class Running:
    """A command that was started."""

    def __init__(self, process: Any, outputs: tuple[Path, Path]) -> None:
        self._process = process
        self._outputs = outputs

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._process.pid)

    def wait(self, timeout_s: float = TIMEOUT_S) -> Finished:
        """Wait for the end; a command that hangs is killed and fails the test."""
        self._process.join(timeout_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError(f"still running after {timeout_s} s; stderr so far:\n{self._outputs[1].read_text()}")
        stdout, stderr = (path.read_text() for path in self._outputs)
        return Finished(self._process.exitcode, stdout, stderr)


def _child(arguments: Sequence[str], folder: str, outputs: tuple[Path, Path], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(outputs, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    block_network()
    import torch

    torch.set_num_threads(1)
    from truthgpt.cli.app import main

    main(list(arguments))


def block_network() -> None:
    """Make every connection beyond this machine an error."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or (isinstance(address, tuple) and str(address[0]).startswith("127.")):
            connect(self, address)
            return
        raise OSError(f"the tests block the network: {address}")

    socket.socket.connect = refuse  # type: ignore[method-assign, assignment]
