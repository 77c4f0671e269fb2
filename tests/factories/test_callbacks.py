"""The registered callbacks, and what happens without the optional packages."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from truthgpt.factories.callbacks import CALLBACKS, package_installed


@pytest.mark.parametrize("name", ["print", "tensorboard", "wandb"])
def test_builds_a_callback_with_hooks(name: str) -> None:
    if name != "print":
        pytest.importorskip(name)
    callback = CALLBACKS.build(name, {})
    assert hasattr(callback, "on_start") and hasattr(callback, "on_end")
    assert CALLBACKS.entry(name).probe().available


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_an_absent_package_names_the_pip_line_and_its_substitute(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    availability = CALLBACKS.entry(package).probe()
    assert not availability.available
    assert f"pip install 'truthgpt[{package}]'" in (availability.reason or "")
    assert availability.fallback == "print"
    assert CALLBACKS.entry("print").probe().available


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert not package_installed("some_tracker")
    assert package_installed("json")


def test_the_registry_imports_no_heavy_package() -> None:
    program = (
        "import sys; import truthgpt.factories.callbacks as c, truthgpt.factories.metrics; "
        "[entry.probe() for entry in c.CALLBACKS]; "
        "print(sorted({'torch', 'transformers', 'numpy', 'wandb', 'tensorboard', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
