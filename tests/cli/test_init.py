"""`truthgpt init` writes a file that works at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from truthgpt.cli.app import main
from truthgpt.config.load import load_raw, preset_names
from truthgpt.config.strict_yaml import parse_yaml
from truthgpt.validate_config import load_config


def init(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["init", *arguments])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("preset", preset_names())
def test_the_written_file_is_valid(tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my first run.yaml"
    assert init(str(path), "--preset", preset) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"truthgpt train {path}" in captured.err
    config = load_config(str(path))
    assert config.run_name == "my-first-run"
    data = load_raw(str(path)).data
    assert path.read_text().startswith("# yaml-language-server: $schema=")
    assert data["training"] == load_raw(preset).data["training"]


@pytest.mark.parametrize("preset", preset_names())
def test_every_comment_can_be_uncommented(tmp_path: Path, preset: str) -> None:
    path = tmp_path / "a.yaml"
    init(str(path), "--preset", preset)
    head, body = path.read_text().split("below as comments.", 1)
    lines = body.split("\n", 1)[1].splitlines()
    whole = parse_yaml("\n".join(re.sub(r"^# ", "", line) for line in lines), "a.yaml").data
    own = parse_yaml(head + "\n" + "\n".join(lines), "a.yaml").data
    expected = load_raw(preset).data
    del expected["run_name"]
    for section, values in own.items():
        if section in expected:
            expected[section] = {**expected[section], **values}
    for section, key in (("optimizer", "type"), ("data", "source")):  # bare names come back as mappings
        assert whole[section][key]
    assert whole == expected


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("mine")
    assert init(str(path)) == 2
    assert path.read_text() == "mine"
    assert f"error: {path} exists; --force overwrites it" in capsys.readouterr().err
    assert init(str(path), "--force") == 0
    assert load_config(str(path)).run_name == "a"


def test_the_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert init() == 0
    assert load_config("truthgpt.yaml").run_name == "truthgpt"


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(str(tmp_path / "a.yaml"), "--preset", "nope") == 2
    assert "there are: llm_default, debug, finetune" in capsys.readouterr().err
    assert init(str(tmp_path / "no" / "folder" / "a.yaml")) == 6
    assert "cannot be written" in capsys.readouterr().err
