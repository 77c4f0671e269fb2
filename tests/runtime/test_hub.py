"""A hub that does not answer: models come from the cache at once, and folders need no hub at all."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from truthgpt.runtime import hub
from truthgpt.runtime.hub import cache_when_unreachable, unreachable


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._left_out.cache_clear()
    yield
    hub._left_out.cache_clear()


def test_an_unreachable_hub_is_not_asked_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda endpoint: "no route")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(KeyError), cache_when_unreachable("org/name"):
                assert constants.HF_HUB_OFFLINE is True
                raise KeyError
            assert constants.HF_HUB_OFFLINE is False
    assert [message.partition(": ")[0] for message in caplog.messages] == ["org/name"]
    assert "no route" in caplog.text and "the copy in the cache" in caplog.text


@pytest.mark.parametrize("name", ["org/name", "."])
def test_a_hub_that_answers_and_a_folder_change_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "unreachable", lambda endpoint: None if name == "org/name" else pytest.fail("was asked"))
    with cache_when_unreachable(name):
        assert constants.HF_HUB_OFFLINE is False


def test_what_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]  # taken throughout: nobody else can listen there meanwhile
        assert unreachable(f"http://127.0.0.1:{port}") is not None
        with monkeypatch.context() as patch:
            patch.setattr("urllib.request.getproxies", lambda: {"http": "proxy"})
            assert unreachable(f"http://127.0.0.1:{port}") is None
        server.listen()
        assert unreachable(f"http://127.0.0.1:{port}") is None
