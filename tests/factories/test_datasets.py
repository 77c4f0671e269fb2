from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from truthgpt.config.data_section import DataConfig
from truthgpt.data.rows import BadRowPolicy, RowFields
from truthgpt.factories.datasets import BUNDLES, DATASETS, KEYS, reads


def settings(path: Path | None, **given: object) -> dict[str, object]:
    data = DataConfig()
    rows = RowFields("text", "text", "prompt", "completion", "messages", "all")
    bundles: dict[str, object] = {"rows": rows, "bad_rows": BadRowPolicy("error", 0.0), "images": None, "classes": None}
    values = {name: bundles[name] if name in bundles else getattr(data, name) for name in DATASETS.runtime}
    return {**values, "path": None if path is None else [str(path)], **given}


def test_names_and_what_each_reads() -> None:
    found = {entry.name: [key for key in KEYS if reads(entry, key)] for entry in DATASETS}
    rows = [*BUNDLES["rows"], *BUNDLES["bad_rows"]]
    images = list(BUNDLES["images"])
    assert found == {
        "text": ["path", "streaming"],
        "jsonl": ["path", "streaming", *rows],
        "hf": ["path", "dataset", "subset", "split", "streaming", *rows, *images],
        "webdataset": ["path", "streaming", *rows, *images],
        "image_folder": ["path", *images],
        "python_stdlib": [],
    }
    assert all(entry.summary for entry in DATASETS)
    assert set(KEYS) <= set(DataConfig.model_fields), "every key a source may read is one of `data`"


def test_sources_are_built_from_the_data_section(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "hello"}\n')
    (row,) = DATASETS.build("jsonl", {}, **settings(file)).documents()
    assert row.text == "hello"
    (text,) = DATASETS.build("text", {}, **settings(file)).documents()
    assert text.text == '{"text": "hello"}\n'
    (hub,) = DATASETS.build("hf", {}, **settings(file)).documents()
    assert hub.text == "hello"
    library = DATASETS.build("python_stdlib", {}, **settings(None))
    assert library.layout == "stream"


@pytest.mark.parametrize("name", ["hf", "webdataset", "image_folder"])
def test_a_source_without_its_package_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truthgpt.factories.datasets.package_installed", lambda package: False)
    availability = DATASETS.entry(name).probe()
    assert not availability.available and "pip install 'truthgpt[" in str(availability.reason)


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
