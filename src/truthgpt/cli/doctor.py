"""`truthgpt doctor`: does everything a run needs work on this machine, and if not, what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from truthgpt.cli.output import emit_json
from truthgpt.errors import EXIT_OK, TruthGPTError
from truthgpt.runtime.compiler import cxx_candidates, cxx_compiler

if TYPE_CHECKING:
    from packaging.requirements import Requirement

MINIMUM_FREE_BYTES = 2 * 2**30
MICRO_TRAINING_STEPS = 5
RUNS_FOLDER = Path("runs")
_BUNDLES = ("all", "dev")
"""Extras that only bring other extras, or tools for working on the project."""


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    `note`: worth knowing, and the core works without it; `failed`: a run will not work. Both say how to fix it.
    """

    name: str
    status: Literal["ok", "note", "failed"]
    detail: str
    fix: str | None = None


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check this machine: versions, device, memory, compiler, extras, and a five-step training."""
    checks = run_checks()
    works = all(check.status != "failed" for check in checks)
    if json_output:
        emit_json({"ok": works, "checks": [asdict(check) for check in checks]})
    else:
        _print_table(checks, works)
    raise typer.Exit(EXIT_OK if works else 1)


def run_checks() -> list[Check]:
    """Everything `doctor` looks at, in the order it is shown. Takes a few seconds, most of it importing torch."""
    reinstall = "pip install --force-reinstall truthgpt"
    return [
        *check_packages(),
        _attempt("device", check_device, f"{reinstall}, or a torch build for this machine: https://pytorch.org"),
        _attempt("bf16", check_bf16, reinstall),
        _attempt("processor", check_processor, reinstall),
        check_compiler(),
        check_disk(Path.cwd()),
        check_runs_folder(RUNS_FOLDER),
        Check("network", "ok", "not needed: the default run works offline"),
        _attempt("training", check_training, "see the message; if it looks like a bug, report it with this table"),
    ]


def _attempt(name: str, examine: Callable[[], Check], fix: str) -> Check:
    """`examine()`, or a failed check: whatever is broken here, the other checks are still worth showing."""
    try:
        return examine()
    except Exception as error:  # noqa: BLE001 - see above
        message = str(error) if isinstance(error, TruthGPTError) else f"{type(error).__name__}: {error}"
        return Check(name, "failed", message, fix)


def check_packages() -> list[Check]:
    """Python, the core dependencies and the extras, against what the installed project asks for."""
    checks = [Check("python", "ok", f"{platform.python_version()} ({sys.executable})")]
    try:
        from packaging.requirements import Requirement  # comes with transformers, a core dependency
    except ImportError:
        return [*checks, Check("packages", "failed", "the core dependencies are not installed", "pip install truthgpt")]
    try:
        metadata = importlib.metadata.metadata("truthgpt")
    except importlib.metadata.PackageNotFoundError:
        return [*checks, Check("truthgpt", "note", "runs from a folder, not installed", "pip install -e .")]
    checks.append(Check("truthgpt", "ok", metadata["Version"]))
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    core = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    checks += [_check_requirement(requirement) for requirement in core]
    extras = [extra for extra in metadata.get_all("Provides-Extra") or [] if extra not in _BUNDLES]
    return checks + [_check_extra(extra, requirements) for extra in extras]


def _check_requirement(requirement: Requirement) -> Check:
    version = _installed_version(requirement.name)
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    if version is None:
        return Check(requirement.name, "failed", "not installed", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, "failed", f"{version}, needs {requirement.specifier}", fix)
    return Check(requirement.name, "ok", version)


def _check_extra(extra: str, requirements: list[Requirement]) -> Check:
    brings = [r for r in requirements if r.marker is not None and _is_of_extra(r, extra)]
    problems = [check for check in map(_check_requirement, brings) if check.status != "ok"]
    name = f"extra {extra}"
    if problems:
        detail = ", ".join(f"{problem.name} {problem.detail}" for problem in problems)
        return Check(name, "note", detail, f"pip install 'truthgpt[{extra}]'")
    return Check(name, "ok", ", ".join(f"{r.name} {_installed_version(r.name)}" for r in brings))


def _is_of_extra(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_device() -> Check:
    """The device `hardware.device: auto` takes, and its memory."""
    from truthgpt.runtime.device import choose_device, describe_hardware

    hardware = describe_hardware(choose_device("auto"))
    memory = hardware["memory_bytes"]
    size = "unknown memory" if memory is None else f"{_gibibytes(int(memory))} of memory"
    return Check("device", "ok", f"{hardware['device']}: {hardware['name']}, {size}")


def check_bf16() -> Check:
    """Whether `training.mixed_precision: bf16` is computed natively."""
    from truthgpt.runtime.device import choose_device
    from truthgpt.runtime.precision import has_native_bf16

    device = choose_device("auto")
    if has_native_bf16(device):
        return Check("bf16", "ok", f"native on {device.type}")
    return Check("bf16", "note", f"not native on {device.type}: runs fall back", "set training.mixed_precision: none")


def check_processor() -> Check:
    """Usable cores and the memory of the host."""
    import torch

    from truthgpt.runtime.device import describe_hardware

    host = describe_hardware(torch.device("cpu"))
    memory = host["memory_bytes"]
    size = "unknown RAM" if memory is None else f"{_gibibytes(int(memory))} RAM"
    return Check("processor", "ok", f"{host['cores']} usable cores ({host['torch_threads']} torch threads), {size}")


def check_compiler() -> Check:
    """A C++ compiler, which torch.compile needs."""
    found = cxx_compiler()
    if found is not None:
        return Check("torch.compile", "ok", f"C++ compiler {found}")
    fix = "install g++ (Debian: apt install g++), or set training.torch_compile: false"
    return Check("torch.compile", "note", f"no C++ compiler ({', '.join(cxx_candidates())})", fix)


def check_disk(folder: Path) -> Check:
    """Free space where runs are written."""
    free_bytes = shutil.disk_usage(folder).free
    detail = f"{_gibibytes(free_bytes)} free in {folder}"
    if free_bytes < MINIMUM_FREE_BYTES:
        return Check("disk", "note", detail, "free some space, or set output_dir to another disk")
    return Check("disk", "ok", detail)


def check_runs_folder(folder: Path) -> Check:
    """Whether a run directory could be made in `folder`, without leaving anything behind."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        detail = f"{folder} cannot be written: {error.strerror} ({existing})"
        return Check("run directory", "failed", detail, "go to another folder, or set output_dir to one you may write")
    return Check("run directory", "ok", f"{folder} can be written")


def check_training() -> Check:
    """A few real optimizer steps with evaluation and checkpoint, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="truthgpt-doctor-") as folder, _token_cache_in(folder):
        loss, seconds = micro_train(Path(folder))
    return Check("training", "ok", f"{MICRO_TRAINING_STEPS} steps in {seconds:.1f} s, validation loss {loss:.2f}")


def micro_train(folder: Path) -> tuple[float, float]:
    """Train the `debug` preset for `MICRO_TRAINING_STEPS` steps on a little text.

    Returns:
        Validation loss, and seconds of training.
    """
    from truthgpt.build import build_components
    from truthgpt.build_trainer import build_trainer
    from truthgpt.runtime.run_directory import RunDirectory
    from truthgpt.validate_config import load_config

    text = folder / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(2000)), encoding="utf-8")
    overrides = [
        f"output_dir={json.dumps(str(folder / 'run'))}",
        f"training.max_steps={MICRO_TRAINING_STEPS}",
        "training.callbacks=[]",
        "data.source=text",
        f"data.path={json.dumps(str(text))}",
        "eval.metrics=[]",
        "eval.select_best_by=loss",
        "generate.prompts=[]",
    ]
    config = load_config("debug", overrides)
    components = build_components(config)
    with RunDirectory.claim(folder / "run", resume=False, overwrite=False) as run:
        state = build_trainer(config, components, run).train()
    if state.best_metric is None:
        raise RuntimeError("the validation loss is not finite")
    return state.best_metric, state.wall_time_s


@contextmanager
def _token_cache_in(folder: str) -> Iterator[None]:
    """Keep the tokenised text out of the user's cache."""
    before = os.environ.get("TRUTHGPT_CACHE_DIR")
    os.environ["TRUTHGPT_CACHE_DIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRUTHGPT_CACHE_DIR"]
        else:
            os.environ["TRUTHGPT_CACHE_DIR"] = before


def _print_table(checks: list[Check], works: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "note": "yellow", "failed": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        detail = check.detail if check.fix is None else f"{check.detail}\n-> {check.fix}"
        table.add_row(Text(check.status, style=styles[check.status]), Text(check.name), Text(detail))
    console = Console()
    console.print(table)
    verdict = "All that a run needs works here." if works else "Something that a run needs does not work: see above."
    console.print(Text(verdict, style="bold green" if works else "bold red"))


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
