"""`truthgpt doctor`: each check that can fail does, and says how to fix it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from truthgpt.cli import doctor as module
from truthgpt.cli.doctor import Check, check_compiler, check_disk, check_packages, check_runs_folder, doctor, run_checks
from truthgpt.errors import ConfigError

torch.set_num_threads(1)


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(doctor)
    return CliRunner().invoke(app, list(arguments))


def test_everything_works_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUTHGPT_CACHE_DIR", str(tmp_path / "mine"))
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["ok"] is True
    checks = {check["name"]: check for check in document["checks"]}
    assert {"python", "torch", "transformers", "extra wandb", "device", "bf16", "processor", "torch.compile"} <= set(
        checks
    )
    assert checks["torch"]["detail"] == torch.__version__
    assert checks["training"]["detail"].startswith("5 steps in ")
    assert all(check["fix"] for check in document["checks"] if check["status"] != "ok")
    assert not list(tmp_path.iterdir())  # nothing is left behind
    assert os.environ["TRUTHGPT_CACHE_DIR"] == str(tmp_path / "mine")


def with_training(monkeypatch: pytest.MonkeyPatch, training: Any) -> None:
    monkeypatch.setattr(module, "micro_train", training)


def test_a_failing_training_is_shown_with_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise ConfigError("hardware.device: cuda is broken")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRUTHGPT_CACHE_DIR", raising=False)
    with_training(monkeypatch, fail)
    result = invoke()
    assert result.exit_code == 1
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    (index,) = [n for n, line in enumerate(lines) if line.startswith("failed")]
    assert "training" in lines[index] and "hardware.device: cuda is broken" in lines[index]
    assert lines[index + 1].strip().startswith("-> ")
    assert lines[-1] == "Something that a run needs does not work: see above."
    assert "TRUTHGPT_CACHE_DIR" not in os.environ


def test_a_broken_torch_leaves_the_other_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "truthgpt.runtime.device", None)
    with_training(monkeypatch, lambda folder: (1.0, 0.1))
    checks = {check.name: check for check in run_checks()}
    assert checks["device"].status == "failed" and checks["device"].fix
    assert "ModuleNotFoundError" in checks["device"].detail
    assert checks["disk"].status == checks["training"].status == "ok"


def packages(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> dict[str, Check]:
    """The package checks where only `versions` are installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return {check.name: check for check in check_packages()}


def test_a_missing_or_old_core_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = packages(monkeypatch, {"torch": "2.4.0", "rich": "14.0.0", "numpy": "2.1.0"})
    assert checks["rich"].status == checks["numpy"].status == "ok"
    assert checks["torch"].status == "failed" and "2.4.0, needs" in checks["torch"].detail
    assert checks["pydantic"].status == "failed" and checks["pydantic"].detail == "not installed"
    assert (checks["pydantic"].fix or "").startswith("pip install 'pydantic")


@pytest.mark.parametrize(("extra", "package"), [("wandb", "wandb"), ("hf", "datasets"), ("lora", "peft")])
def test_an_extra_is_optional(extra: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = packages(monkeypatch, {})[f"extra {extra}"]
    assert absent == Check(f"extra {extra}", "note", f"{package} not installed", f"pip install 'truthgpt[{extra}]'")
    present = packages(monkeypatch, {package: "99.0"})[f"extra {extra}"]
    assert present == Check(f"extra {extra}", "ok", f"{package} 99.0")


def test_bundles_are_not_listed() -> None:
    names = {check.name for check in check_packages()}
    assert {"extra all", "extra dev", "pytest", "truthgpt[wandb]"}.isdisjoint(names)


def test_without_the_dependencies_it_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert check_packages()[-1].status == "failed"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = check_compiler()
    assert absent.status == "note" and "apt install g++" in (absent.fix or "")
    compiler = tmp_path / "my++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", "my++")
    assert check_compiler() == Check("torch.compile", "ok", f"C++ compiler {compiler}")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**40, 2**30))
    full = check_disk(tmp_path)
    assert full.status == "note" and "1.0 GiB free" in full.detail and full.fix


def test_a_runs_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_runs_folder(tmp_path / "new" / "runs").status == "ok"
    assert not (tmp_path / "new").exists()
    file = tmp_path / "runs"
    file.touch()
    blocked = check_runs_folder(file)
    assert blocked.status == "failed" and "output_dir" in (blocked.fix or "")
