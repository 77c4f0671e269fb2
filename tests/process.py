"""Commands in processes of their own, forked from a server that has imported torch and transformers already.

Starting Python with torch and transformers costs five CPU seconds; a fork of the server costs a few milliseconds. The
server computes nothing, so its children inherit no thread pools.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOAD = [
    *("tests.process", "tests.warm_up", "torch._dynamo", "torch.utils.serialization.config"),
    *("transformers.generation", "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"),
    *("transformers.models.auto.image_processing_auto", "transformers.models.vit.modeling_vit"),
    *("datasets", "datasets.packaged_modules.json.json", "datasets.packaged_modules.csv.csv", "pandas", "webdataset"),
    *("PIL.Image", "PIL.PngImagePlugin", "zstandard"),
    *("encodings.utf_8_sig", "pydantic.type_adapter", "typer._adapters", "typer._click.decorators"),
    *("truthgpt.attention.sdpa", "truthgpt.build_trainer", "truthgpt.callbacks.print_logger", "truthgpt.cli.app"),
    *("truthgpt.callbacks.progress_bar", "truthgpt.data.hf_source", "truthgpt.data.image_collate"),
    *("truthgpt.data.image_folder", "truthgpt.data.jsonl_source", "truthgpt.data.webdataset_source"),
    *("truthgpt.inspect_data", "truthgpt.kv_cache.none", "truthgpt.kv_cache.paged", "truthgpt.memory.static"),
    *("truthgpt.load_model", "truthgpt.serve_model"),
    *("truthgpt.metrics.accuracy", "truthgpt.metrics.perplexity", "truthgpt.optim.schedules"),
    *("truthgpt.runtime.run_log", "truthgpt.validate_config"),
]
"""What commands import; one that is not installed is passed over."""
TIMEOUT_S = 120.0

_ROOT = str(Path(__file__).parents[1])
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Finished:
    """How a command ended; a negative exit code is the signal that killed it.

    `grown_bytes` is by how much it raised the peak memory of its process; 0 where that is not known.
    """

    exit_code: int
    stdout: str
    stderr: str
    grown_bytes: int = 0

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
        grown_bytes = _context.Value("q", 0, lock=False)
        arguments_of_child = (list(arguments), str(self.folder), outputs, environment, grown_bytes)
        process = _context.Process(target=_child, args=arguments_of_child)
        _start_server()
        process.start()
        return Running(process, outputs, grown_bytes)


class Running:
    """A command that was started."""

    def __init__(self, process: Any, outputs: tuple[Path, Path], grown_bytes: Any) -> None:
        self._process = process
        self._outputs = outputs
        self._grown_bytes = grown_bytes

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
        return Finished(self._process.exitcode, stdout, stderr, self._grown_bytes.value)


def _start_server() -> None:
    """Start the server if there is none; what it imports of the tests it must find from any working directory."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _ROOT if before is None else os.pathsep.join((_ROOT, before))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _child(
    arguments: Sequence[str],
    folder: str,
    outputs: tuple[Path, Path],
    environment: Mapping[str, str],
    grown_bytes: Any,
) -> None:
    # The system's own, as for a user: else loader processes would come from yet another server, which takes 3.5 s.
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]
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

    before = _peak_memory_bytes()
    try:
        main(list(arguments))
    finally:
        grown_bytes.value = _peak_memory_bytes() - before


def _peak_memory_bytes() -> int:
    """Of this process, as Linux tells it; elsewhere 0."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def block_network() -> None:
    """Make every connection beyond this machine an error."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or (isinstance(address, tuple) and str(address[0]).startswith("127.")):
            connect(self, address)
            return
        raise OSError(f"the tests block the network: {address}")

    socket.socket.connect = refuse  # type: ignore[method-assign, assignment]
