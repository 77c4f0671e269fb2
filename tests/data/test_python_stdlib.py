from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from truthgpt.data.base import IdentifiedSource
from truthgpt.data.python_stdlib import PythonStdlib, stdlib_files
from truthgpt.errors import DataError


def test_corpus_holds_modules_and_packages_without_tests() -> None:
    documents = list(PythonStdlib().documents())
    keys = [document.key for document in documents]
    assert keys == sorted(set(keys))
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py", "unittest/case.py"} <= set(keys)
    parts = {part for key in keys for part in key.split("/")}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "__pycache__"}
    assert not any(part.startswith("_sysconfigdata") for part in parts)
    assert sum(len(document.text) for document in documents) > 5_000_000
    root = Path(sysconfig.get_path("stdlib"))
    argparse = next(document for document in documents if document.key == "argparse.py")
    assert argparse.text == (root / "argparse.py").read_text(encoding="utf-8")


def small_library(root: Path) -> None:
    for name, data in {
        "argparse.py": b"# plain\r\n",
        "csv.py": b"# -*- coding: latin-1 -*-\n# \xe9\n",
        "ast.py": b"# \xff not utf-8\n",
        "json/__init__.py": b"",
        "json/tests/test_a.py": b"no",
        "site.py": b"pass\n",
        "foreign.py": b"no",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_coding_lines_newlines_and_broken_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_library(tmp_path)
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    assert stdlib_files(tmp_path) == ["argparse.py", "ast.py", "csv.py", "json/__init__.py", "site.py"]
    assert {document.key: document.text for document in PythonStdlib().documents()} == {
        "argparse.py": "# plain\n",
        "ast.py": "# \ufffd not utf-8\n",
        "csv.py": "# -*- coding: latin-1 -*-\n# é\n",
        "site.py": "pass\n",
    }
    assert "ast.py" in caplog.text


def test_python_without_library_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(DataError, match="0 usable documents"):
        list(PythonStdlib().documents())


def test_identity_changes_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_library(tmp_path)
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    source = PythonStdlib()
    assert isinstance(source, IdentifiedSource)
    before = source.identity()
    assert before == PythonStdlib().identity()
    (tmp_path / "foreign.py").write_text("not part of it")
    assert source.identity() == before
    (tmp_path / "site.py").write_text("changed")
    assert source.identity() != before
