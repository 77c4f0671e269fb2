"""Contenders in processes of their own, what the GPU did meanwhile, and the file that keeps what they printed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SAID_CHARACTERS = 500
_GPU_FIGURES = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")


def run_contender(
    contender: str, arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float
) -> dict[str, Any]:
    """Run a script of this folder; its record, with `spawned_unix_s`. What it says on stderr is passed on.

    A contender that does not end well has a record too, with `failed` and the last line it said.
    """
    command = [sys.executable, str(HERE / f"{contender}.py"), *arguments]
    spawned_unix_s, started_s = time.time(), time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**offline_environment(), **environment},
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
        failed = f"exit code {process.returncode}" if process.returncode else None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its loader and compiler processes too
        stdout, stderr = process.communicate()
        failed = f"not done after {timeout_s:.0f} s"
    sys.stderr.write(stderr)
    times = {"spawned_unix_s": spawned_unix_s, "wall_s": time.perf_counter() - started_s}
    if failed is None:
        return {**json.loads(stdout.splitlines()[-1]), **times}
    said = [line for line in stderr.splitlines() if line.strip()][-1:]
    return {"contender": contender, "failed": failed, "said": _without_folders("".join(said)), **times}


def offline_environment() -> dict[str, str]:
    """Environment of a process that imports the source beside this folder, so that nothing need be installed, and loads
    nothing from the hub."""
    path = os.pathsep.join(part for part in (str(ROOT / "src"), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def compile_cache(folder: Path) -> dict[str, str]:
    """Environment that keeps compiled kernels in `folder`, so that the first run there starts cold."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}


def gpu_state() -> dict[str, str] | None:
    """Clocks, temperature and power of the first visible GPU now; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    query = ["nvidia-smi", f"--id={first}", f"--query-gpu={','.join(_GPU_FIGURES)}", "--format=csv,noheader"]
    finished = subprocess.run(query, capture_output=True, text=True)
    if finished.returncode or not finished.stdout.strip():
        return None
    values = finished.stdout.splitlines()[0].split(", ")
    return dict(zip(_GPU_FIGURES, values, strict=True))


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """One line more in `path`: the record, when it was made and by which command."""
    made = {"created_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "command": _command()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**made, **record}) + "\n")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of the `.jsonl` files in `folder`, the oldest first."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda record: str(record["created_at"]))


def _command() -> str:
    """The command line, without the machine's own folders."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/gpu/{Path(sys.argv[0]).name}", *words])


def _without_folders(text: str) -> str:
    """Text for a record that is published."""
    for folder, name in ((ROOT, "."), (Path(sys.prefix), "python"), (Path.home(), "~")):
        text = text.replace(str(folder), name)
    return text[:SAID_CHARACTERS]
