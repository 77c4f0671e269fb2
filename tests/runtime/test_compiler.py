"""Which C++ compiler is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from truthgpt.runtime.compiler import cxx_candidates, cxx_compiler


def test_first_that_is_installed_and_cxx_alone_where_it_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cxx_compiler() is None
    for name in ("clang++", "my++"):
        (tmp_path / name).touch(mode=0o755)
    assert cxx_candidates()[0] == "g++" and cxx_compiler() == str(tmp_path / "clang++")
    monkeypatch.setenv("CXX", "my++")
    assert cxx_candidates() == ["my++"] and cxx_compiler() == str(tmp_path / "my++")
    monkeypatch.setenv("CXX", "nowhere++")
    assert cxx_compiler() is None
