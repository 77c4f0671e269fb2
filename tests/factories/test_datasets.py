from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from truthgpt.config.schema import DataConfig
from truthgpt.factories.datasets import DATASETS


def settings(path: Path | None) -> dict[str, object]:
    data = DataConfig()
    values = {name: getattr(data, name) for name in DATASETS.runtime}
    return {**values, "path": None if path is None else [str(path)]}


def test_names_and_what_each_reads() -> None:
    reads = {entry.name: list(inspect.signature(entry.build).parameters) for entry in DATASETS}
    assert reads == {
        "text": ["path"],
        "jsonl": [
            *("path", "format", "text_field", "prompt_field", "completion_field"),
            *("train_on", "on_bad_row", "max_bad_fraction"),
        ],
        "python_stdlib": [],
    }
    for entry in DATASETS:
        assert entry.summary
        assert all(p.default is p.empty for p in inspect.signature(entry.build).parameters.values())


def test_sources_are_built_from_the_data_section(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "hello"}\n')
    (row,) = DATASETS.build("jsonl", {}, **settings(file)).documents()
    assert row.text == "hello"
    (text,) = DATASETS.build("text", {}, **settings(file)).documents()
    assert text.text == '{"text": "hello"}\n'
    library = DATASETS.build("python_stdlib", {}, **settings(None))
    assert library.layout == "stream"


def test_unknown_option(tmp_path: Path) -> None:
    for name in DATASETS.names():
        with pytest.raises(ValidationError):
            DATASETS.build(name, {"shuffle": True}, **settings(tmp_path))


def test_listing_needs_no_torch() -> None:
    program = (
        "import sys; import truthgpt.factories.datasets, truthgpt.factories.collate; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
