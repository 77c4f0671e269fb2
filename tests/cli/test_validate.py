"""`truthgpt validate` for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from truthgpt.cli.app import main
from truthgpt.cli.output import split_arguments
from truthgpt.data.paths import resolve_files
from truthgpt.errors import DataError
from truthgpt.factories.datasets import DATASETS
from truthgpt.factories.registry import NoOptions


def validate(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["validate", *arguments])
    return int(caught.value.code or 0)


def errors_of(captured: str) -> list[dict[str, Any]]:
    document = json.loads(captured)
    assert set(document) == {"ok", "errors"}
    assert document["ok"] is not bool(document["errors"])
    errors: list[dict[str, Any]] = document["errors"]
    assert all(set(error) == {"file", "line", "key", "message", "suggestion"} for error in errors)
    return errors


def test_a_valid_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("extends: llm_default\n")
    assert validate(str(path)) == 0
    assert capsys.readouterr() == (f"{path}: ok\n", "")
    assert validate(str(path), "--json") == 0
    assert errors_of(capsys.readouterr().out) == []
    assert validate() == 0
    assert capsys.readouterr().out == "llm_default: ok\n"


def test_every_problem_on_a_line_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("extends: llm_default\n\nsede: 1\ntraining:\n  max_steps: 0\n")
    assert validate(str(path), "seed=x") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 3
    assert any(
        line.startswith(f"error: {path}:3: sede: unknown key") and "did you mean seed?" in line for line in lines
    )
    assert f"error: {path}:5: training.max_steps: must be at least 1; found 0" in lines


def test_json_is_one_document_with_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("extends: llm_default\nsede: 1\nseed: 1\nseed: 2\n")
    assert validate(str(path), "training.max_steps=0", "oops", "--json") == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    errors = {error["key"]: error for error in errors_of(captured.out)}
    assert {key: error["line"] for key, error in errors.items()} == {
        "sede": 2,
        "seed": 4,
        "training.max_steps": None,
        "": None,
    }
    assert errors["sede"]["file"] == str(path)
    assert errors["sede"]["suggestion"] == "did you mean seed?"


@pytest.mark.parametrize("content", ["a: [1", "- 1", "", "a: &a [*a]"])
def test_what_is_no_configuration_at_all(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert validate(str(path), "--json") == 2
    (error,) = errors_of(capsys.readouterr().out)
    assert error["file"] == str(path)


def test_listed_plugins_run_only_when_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "listed_plugin.py").write_text("from pathlib import Path\nPath('was_run').touch()\n")
    (tmp_path / "my.yaml").write_text("extends: llm_default\nplugins: [listed_plugin]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert validate("my.yaml") == 2
    assert "--allow-plugins" in capsys.readouterr().err
    assert not Path("was_run").exists()
    assert validate("my.yaml", "--allow-plugins") == 0
    assert Path("was_run").exists()
    assert validate("llm_default", "plugins=[gone_plugin]", "--allow-plugins", "--json") == 2
    (error,) = errors_of(capsys.readouterr().out.split("\n", 1)[1])
    assert "gone_plugin cannot be imported" in error["message"]


def test_plugins_of_the_wrong_kind_are_left_to_validation(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate("plugins=os", "--allow-plugins") == 2
    assert "plugins: must be a list" in capsys.readouterr().err


def test_data_that_is_not_there_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the words of training, which stops; the configuration is right where it is trained all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.txt").write_text("a")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    Path("my.yaml").write_text(
        "extends: llm_default\ndata:\n  source: text\n  path: [here, 'here/*.txt', none.txt, 'here/*.md', gone.txt]\n"
        "  validation_path: none\n"
    )
    said = []
    for pattern in ("none.txt", "here/*.md", "gone.txt", "none"):
        with pytest.raises(DataError) as caught:
            resolve_files([pattern])
        said.append(f"warning: my.yaml:{5 if pattern == 'none' else 4}: data.{{}}: {caught.value}")
    lines = [line.format("validation_path" if line.startswith("warning: my.yaml:5") else "path") for line in said]
    assert validate("my.yaml") == 0
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("my.yaml: ok\n", lines)
    assert validate("my.yaml", "--json") == 0
    out, err = capsys.readouterr()
    assert errors_of(out) == [] and err.splitlines() == lines
    mixture = "data={sources: [{source: text, path: here}, {source: jsonl, path: none.jsonl}]}"
    assert validate("llm_default", mixture) == 0
    assert "warning: data.sources[1].path: data path 'none.jsonl': no file found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        "{source: hf, dataset: some/name}",
        "{source: webdataset, path: 'shard-{000..009}.tar'}",
        "{source: elsewhere, path: 'bucket:texts'}",
    ],
)
def test_what_is_no_path_of_this_machine_is_not_looked_for(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    def build_elsewhere(path: list[str]) -> None:
        """Never called."""

    DATASETS.register("elsewhere", options=NoOptions)(build_elsewhere)
    try:
        assert validate("llm_default", f"data={data}") == 0
    finally:
        DATASETS.unregister("elsewhere")
    assert capsys.readouterr() == ("llm_default: ok\n", "")


def test_the_first_argument_without_an_equals_sign_is_the_file() -> None:
    assert split_arguments(["seed=1", "my.yaml", "a.b=c=d", "x"]) == ("my.yaml", ["seed=1", "a.b=c=d", "x"])
    assert split_arguments(["seed=1"]) == (None, ["seed=1"])


def test_validation_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys, time; from truthgpt.cli.app import main\n"
        "try: main(['validate', '--json'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = ('torch', 'transformers', 'numpy', 'rich')\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in heavy]\n"
        "print(time.process_time(), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):  # the least of three: other processes share the cores
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(float(result.stderr))
    assert min(seconds) < 2.0  # 0.4 s measured; the bound leaves room for slower and busy machines
