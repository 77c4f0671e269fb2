"""`truthgpt chat` from a pipe and at a terminal, with an engine that says what it is told."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.inference.scripted_engine import ScriptedEngine
from tests.inference.test_conversation import CHATML, NO_SYSTEM, tokenizer

import truthgpt.cli.chat
from truthgpt.cli.app import main

ROOT = Path(__file__).parents[2]
CTRL_C, CTRL_D = "\x03", "\x04"


class Piped:
    """Runs `truthgpt chat` in this process with text for standard input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.engine: ScriptedEngine

    def __call__(
        self,
        text: str | bytes,
        *arguments: str,
        answers: tuple[str, ...] = ("hello", "fine"),
        template: str | None = CHATML,
        context: int | None = None,
        exit_code: int = 0,
    ) -> Any:
        made = tokenizer(template)
        self.engine = ScriptedEngine(made, answers, context)
        opened = contextlib.nullcontext((self.engine, made))
        self._monkeypatch.setattr(truthgpt.cli.chat, "_engine", lambda target, device: opened)
        raw = text.encode() if isinstance(text, str) else text
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        with pytest.raises(SystemExit) as end:
            main(["chat", "model", *arguments])
        out, err = self._capsys.readouterr()
        assert (end.value.code or 0) == exit_code, err
        self.stderr = err
        return out

    def asked(self) -> list[str]:
        """The prompts, as text."""
        return [tokenizer(CHATML).decode(ids) for ids, _ in self.engine.asked]


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Piped:
    return Piped(monkeypatch, capsys)


def test_one_answer_a_line_with_history(piped: Piped) -> None:
    assert piped("hi\n\nhow are you?\n", "--system", "be kind", "--temperature", "0", "--seed", "3") == "hello\nfine\n"
    assert piped.stderr == ""
    opening = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    second = "hello<|im_end|>\n<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n"
    assert piped.asked() == [opening, opening + second]
    samplings = [sampling for _, sampling in piped.engine.asked]
    assert all(sampling.temperature == 0 and sampling.max_new_tokens == 512 for sampling in samplings)
    assert samplings[0].seed != samplings[1].seed, "the same question twice gives two answers"
    piped("hi\n", "--seed", "3")
    assert piped.engine.asked[0][1].seed == samplings[0].seed


def test_json_is_a_message_a_line(piped: Piped) -> None:
    out = piped("hi\nmore\n", "--json", "--max-new-tokens", "4", answers=("a\nb", "long enough"))
    assert [json.loads(line) for line in out.splitlines()] == [
        {"role": "assistant", "content": "a\nb", "finish": "stop"},
        {"role": "assistant", "content": "long", "finish": "length"},
    ]
    assert piped("", "--json") == ""


def test_without_a_template_one_line_says_so(piped: Piped) -> None:
    assert piped("once upon\n", template=None, answers=(" a time",)) == " a time\n"
    assert piped.stderr.splitlines() == [
        "this model has no chat template: it goes on with the plain text of what was said"
    ]
    assert piped.asked() == ["once upon"]


def test_commands(piped: Piped, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    typed = f"hi\n/system be brief\n/reset\n//etc is what?\n/save {saved}\n/save\n/save {tmp_path}\n/nonsense\n/help\n"
    assert piped(typed + "/exit\nnever asked\n") == "hello\nfine\n"
    assert len(piped.engine.asked) == 2
    assert piped.asked()[1].startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n/etc is what?<|im_end|>"
    )
    assert json.loads(saved.read_text()) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "/etc is what?"},
        {"role": "assistant", "content": "fine"},
    ]
    for said in (
        f"wrote 3 messages to {saved}",
        "/save needs the name of a file",
        f"{tmp_path} cannot be written: Is a directory",
        "there is no command /nonsense; /help lists them",
        "/reset        forget what was said",
    ):
        assert said in piped.stderr
    assert piped("/quit\nnever asked\n") == "" and piped.engine.asked == []
    piped("/system x\n/system\nhi\n", "--system", "y")
    assert piped.asked()[0].startswith("<|im_start|>user\nhi")


def test_long_histories_lose_their_oldest_messages(piped: Piped) -> None:
    piped("one?\ntwo?\nthree?\n/reset\nfour?\n", "--max-new-tokens", "6", context=50)
    said = [line for line in piped.stderr.splitlines() if "longer than the context" in line]
    assert said == [
        "the conversation is longer than the context: its 2 oldest messages are left out",
        "the conversation is longer than the context: its 4 oldest messages are left out",
    ]
    assert ["one?" in text for text in piped.asked()] == [True, False, False, False]
    assert all(len(ids) + 5 <= 50 for ids, _ in piped.engine.asked)


@pytest.mark.parametrize(
    ("text", "options", "settings", "code", "said"),
    [
        ("x" * 80 + "\nhi\n", (), {"context": 60}, 2, "error: the message is too long: it has "),
        ("hi\n", ("--system", "x"), {"template": NO_SYSTEM}, 2, "error: the model's chat template refuses"),
        ("hi\n", ("--temperature", "-1"), {}, 2, "error: temperature: -1.0 is not allowed"),
        (b"hi \xff\n", (), {}, 3, "error: standard input: byte 3 is not UTF-8"),
    ],
)
def test_what_ends_a_piped_conversation(
    piped: Piped, text: str | bytes, options: tuple[str, ...], settings: dict[str, Any], code: int, said: str
) -> None:
    assert piped(text, *options, exit_code=code, **settings) == ""
    assert said in piped.stderr and len(piped.stderr.splitlines()) == 1


PROGRAM = """
import contextlib, sys
import truthgpt.cli.chat
from tests.inference.scripted_engine import ScriptedEngine
from tests.inference.test_conversation import NO_SYSTEM, tokenizer
made = tokenizer(NO_SYSTEM)
engine = ScriptedEngine(made, ["hello\\x1b[31m", "y" * 4000, "after"], wait_s=0.01)
truthgpt.cli.chat._engine = lambda target, device: contextlib.nullcontext((engine, made))
from truthgpt.cli.app import main
main(["chat", "model", *sys.argv[1:]])
"""


class Terminal:
    """`truthgpt chat` at a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.text = ""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self._pid, self._screen = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execve(sys.executable, [sys.executable, "-c", PROGRAM, *arguments], environment)

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def see(self, text: str, timeout_s: float = 60.0) -> None:
        """Wait for `text` behind what was seen before."""
        end = time.monotonic() + timeout_s
        while text not in self.text:
            ready, _, _ = select.select([self._screen], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in\n{self.text}"
            try:
                self.text += os.read(self._screen, 4096).decode(errors="replace")
            except OSError as error:  # the other side is closed
                raise AssertionError(f"ended without {text!r}:\n{self.text}") from error
        self.text = self.text.partition(text)[2]

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C until `text` is seen: a signal that comes before readline waits is seen at the next key only."""
        for _ in range(20):
            self.type(CTRL_C)
            with contextlib.suppress(AssertionError):
                return self.see(text, timeout_s=3.0)
        raise AssertionError(f"no {text!r} in\n{self.text}")

    def wait(self) -> int:
        """The exit code."""
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self.wait()
        os.close(self._screen)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    started = Terminal(tmp_path)
    yield started
    started.close()


def test_at_a_terminal(terminal: Terminal) -> None:
    terminal.see("/help lists the commands, Ctrl-D leaves")
    terminal.see("> ")
    terminal.type("hi\n")
    terminal.see("hello\ufffd[31m")
    terminal.see("11 tokens, ")
    terminal.see(" tokens/s")
    terminal.see("> ")
    terminal.type("say much\n")
    terminal.see("yyyyyyyy")
    terminal.type(CTRL_C)
    terminal.see(" tokens, stopped, ")
    terminal.see("> ")
    terminal.interrupt_until("(Ctrl-D or /exit leaves)")
    terminal.see("> ")
    terminal.type("/system x\n")
    terminal.see("> ")
    terminal.type("what?\n")
    terminal.see("error: the model's chat template refuses this conversation: no system message")
    terminal.see("> ")
    terminal.type("/system\n")
    terminal.see("> ")
    terminal.type("what?\n")
    terminal.see("after")
    terminal.see("> ")
    terminal.type("/save saved.json\n")
    terminal.see("wrote 6 messages")
    terminal.see("> ")
    terminal.type(CTRL_D)
    assert terminal.wait() == 0


def test_saved_partial_answer_and_exit(terminal: Terminal, tmp_path: Path) -> None:
    terminal.see("> ")
    terminal.type("hi\n")
    terminal.see("tokens/s")
    terminal.see("> ")
    terminal.type("much\n")
    terminal.see("yyyy")
    terminal.type(CTRL_C)
    terminal.see("stopped")
    terminal.see("> ")
    terminal.type("/save saved.json\n")
    terminal.see("wrote 4 messages")
    messages = json.loads((tmp_path / "saved.json").read_text())
    assert set(messages[-1]["content"]) == {"y"} and 4 <= len(messages[-1]["content"]) < 4000
    terminal.see("> ")
    terminal.type("/exit\n")
    assert terminal.wait() == 0


def test_json_is_not_for_terminals(tmp_path: Path) -> None:
    started = Terminal(tmp_path, "--json")
    try:
        started.see("error: --json is for piped input, a message a line; leave it out")
        assert started.wait() == 2
    finally:
        started.close()
