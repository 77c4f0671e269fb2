"""The environment document, the redactor, and the log handlers that use it."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from truthgpt.runtime.environment import describe_environment, package_versions, redact, utc_now
from truthgpt.runtime.run_log import attach_console, attach_run_log, detach

CANARY = "c4n4ry-0f-th3-m1n3"
LOGGER = logging.getLogger("truthgpt.test")


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    root = logging.getLogger("truthgpt")
    before = root.level
    yield
    root.setLevel(before)
    assert not root.handlers


@pytest.mark.parametrize(
    "text",
    [
        "hf_AbCdEfGhIjKlMnOpQrStUv",
        "token is sk-proj-abcdefghijklmnop1234 there",
        "0123456789abcdef0123456789abcdef01234567",
        "https://user:" + CANARY + "@host/path",
        "Authorization: Bearer " + CANARY,
        "data.api_key=" + CANARY,
        '{"password": "' + CANARY + '"}',
        "--hub-token " + CANARY,
        "WANDB_API_KEY=" + CANARY,
        "my_secret: " + CANARY,
        "AKIAABCDEFGHIJKLMNOP",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefg",
    ],
)
def test_secrets_are_hidden(text: str) -> None:
    hidden = redact(text)
    assert "[hidden]" in hidden
    secret = max(re.findall(r"[\w-]{16,}", text), key=len)
    assert secret not in hidden


@pytest.mark.parametrize(
    "text",
    [
        "truthgpt train my.yaml data.max_seq_len=128 model.tokenizer={type: byte} training.max_tokens=1000",
        "tokens 4,096 (12,345 tokens/s), loss 2.1 at step 200",
        "runs/task_secretary/checkpoints/step_00000200.pt",
        "sha256 " + "ab" * 32,
        "https://huggingface.co/gpt2:main",
        "--tokenizer gpt2 --max-new-tokens 64",
    ],
)
def test_plain_words_stay(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", CANARY)
    monkeypatch.setenv("SHORT_TOKEN", "run")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    assert redact(f"x{CANARY}y run falsefalse") == "x[hidden]y run falsefalse"


def test_the_document_is_json_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(
        sys, "argv", ["truthgpt", "train", "--hub-token", "another-secret", f"run_name={CANARY}", "a b"]
    )
    fallbacks = [{"part": "precision", "wanted": "bf16", "used": "none", "reason": "x"}]
    text = json.dumps(describe_environment(fallbacks, {"device": "cpu"}))
    document = json.loads(text)
    assert CANARY not in text and "another-secret" not in text
    assert document["command_line"] == "truthgpt train --hub-token [hidden] run_name=[hidden] 'a b'"
    assert document["fallbacks"] == fallbacks
    assert document["hardware"] == {"device": "cpu"}
    assert {"python", "truthgpt", "torch", "transformers", "numpy"} <= document["versions"].keys()


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        if name == "wandb":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    assert "wandb" not in package_versions() and package_versions()["torch"] == "1"


def test_time_is_utc() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())


# Log handlers


def test_the_run_log_has_time_and_level_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    handler = attach_run_log(tmp_path / "new" / "run.log")
    try:
        LOGGER.info("starting with %s", CANARY)
        LOGGER.debug("not this")
        try:
            raise ValueError(f"bad {CANARY}")
        except ValueError:
            LOGGER.exception("failed")
    finally:
        detach(handler)
    LOGGER.warning("not any more")
    text = (tmp_path / "new" / "run.log").read_text()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO starting with \[hidden\]\n", text)
    assert "ValueError: bad [hidden]" in text
    assert CANARY not in text and "not " not in text


def test_a_run_log_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    console = attach_console(logging.WARNING)
    handler = attach_run_log(tmp_path / "file" / "run.log")
    try:
        LOGGER.info("one")
        LOGGER.info("two")
    finally:
        detach(handler)
        detach(console)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "run.log cannot be written" in lines[0]


def test_the_console_is_plain_and_follows_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = attach_console(logging.INFO)
    bar, elsewhere, closed = io.StringIO(), io.StringIO(), io.StringIO()
    closed.close()
    try:
        LOGGER.info("plain")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", bar)
            LOGGER.info("above the bar")
        console.redirect(elsewhere)
        LOGGER.info("redirected")
        console.redirect(closed)
        LOGGER.info("nowhere, and no traceback")
        console.redirect(None)
        LOGGER.info("back")
    finally:
        detach(console)
    assert capsys.readouterr().err == "plain\nback\n"
    assert (bar.getvalue(), elsewhere.getvalue()) == ("above the bar\n", "redirected\n")
