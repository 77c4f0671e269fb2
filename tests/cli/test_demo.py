"""`truthgpt demo`: the page and the API for a real model, on this machine alone, until Ctrl-C."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.inference.small_models import TOKENIZER, small_model
from tests.process import Cli
from tests.serving.served_command import served_command

from truthgpt.cli import demo as demo_module
from truthgpt.cli.demo import has_display

pytest.importorskip("starlette", reason="needs the extra demo")
pytest.importorskip("uvicorn", reason="needs the extra demo")


@pytest.fixture
def folder(cli: Cli) -> Path:
    """A Hugging Face folder with a small model."""
    folder = cli.folder / "small"
    small_model("llama").save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def fetch(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        content = response.read().decode()
    return json.loads(content) if content.startswith("{") else content


def test_page_and_api_answer_until_ctrl_c(cli: Cli, folder: Path) -> None:
    no_display = {"DISPLAY": "", "WAYLAND_DISPLAY": ""}
    with served_command(cli, "demo", str(folder), "--port", "0", env=no_display) as command:
        url = command.url
        assert url.startswith("http://127.0.0.1:")
        assert "<!doctype html>" in fetch(f"{url}/")
        about = fetch(f"{url}/api/run")
        assert about["run"] is None and about["curves"] == {}
        parameters = sum(parameter.numel() for parameter in small_model("llama").parameters())
        assert about["model"] == {
            **{"name": "small", "family": "llama", "parameters": parameters, "context_tokens": 48, "device": "cpu"},
            **{"dtype": "float32", "chat_template": False, "folder": "small"},
        }
        answer = fetch(f"{url}/v1/completions", {"prompt": "def f(", "max_tokens": 1000, "temperature": 0})
        assert answer["usage"]["completion_tokens"] <= 48 + 1 - 6  # shortened to the context, not refused
        asked = {"prompt": "def f(", "max_tokens": 20, "stream": True}
        streams = [fetch(f"{url}/v1/completions", {**asked, "seed": seed}) for seed in range(8)]
        assert max(stream.count("data: {") for stream in streams) > 5  # as it is written
    finished = command.finished
    assert finished is not None and finished.exit_code == 0
    assert finished.stderr.endswith("stopped\n")
    assert "ssh -L" in finished.stderr and "Traceback" not in finished.stderr


def test_a_port_in_use_is_one_clear_line(cli: Cli, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        finished = cli("demo", str(folder), "--port", str(port))
    assert finished.exit_code == 2
    assert finished.stderr == (
        f"error: cannot serve at 127.0.0.1, port {port}: Address already in use; give another --port (0: any)\n"
    )


def test_nothing_to_load_is_said(cli: Cli) -> None:
    finished = cli("demo", "nowhere", "--port", "0")
    assert finished.exit_code == 4
    assert finished.stderr.startswith("error: nothing to load at nowhere")


@pytest.mark.parametrize(
    ("platform", "variables", "shown"),
    [
        ("linux", {}, False),
        ("linux", {"DISPLAY": ":0"}, True),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("darwin", {}, True),
        ("win32", {}, True),
    ],
)
def test_a_browser_is_opened_where_it_can_be_seen(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], shown: bool
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert has_display() is shown


@pytest.mark.parametrize(("arguments", "opened"), [((), 1), (("--no-browser",), 0)])
def test_the_browser_gets_the_address(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], opened: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from truthgpt.cli.app import main

    class AtOnce:
        def __init__(self, target: Any, args: tuple[str, ...], daemon: bool) -> None:
            self.start = lambda: target(*args)

    urls: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(demo_module.webbrowser, "open", urls.append)
    monkeypatch.setattr(demo_module.threading, "Thread", AtOnce)
    monkeypatch.setattr(demo_module, "run_model_server", lambda *given: given[3]("http://127.0.0.1:1", "name", False))
    with pytest.raises(SystemExit) as end:
        main(["demo", "run", *arguments])
    assert end.value.code == 0
    assert urls == ["http://127.0.0.1:1"] * opened
    assert "name is at http://127.0.0.1:1; Ctrl-C ends it" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_said_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from truthgpt.cli.app import main

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as end:
        main(["demo", "run"])
    assert end.value.code == 2
    assert "pip install 'truthgpt[demo]'" in capsys.readouterr().err
