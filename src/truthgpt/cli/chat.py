"""`truthgpt chat`: a conversation with a trained model in the terminal, or a line at a time from a pipe."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from truthgpt.cli.output import for_terminal, say, standard_input
from truthgpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truthgpt.inference.conversation import ChatEngine, Conversation
    from truthgpt.inference.request import FinishReason, Sampling

_HELP = """/system TEXT  what stands in front of the conversation; without TEXT: nothing
/reset        forget what was said, the system message aside
/save FILE    write the messages as JSON
/exit, /quit  leave, as Ctrl-D does; Ctrl-C stops an answer
//...         a message that begins with /"""
_LEAVE = ("/exit", "/quit")
_ENDED = {"length": ", the most that were allowed", "cancelled": ", stopped", "error": ", its logits are not finite"}


def chat(
    target: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|HF_DIR", help="What to load.")],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that sum up to this; 1: all.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu or mps.")] = "auto",
    json_output: Annotated[
        bool, typer.Option("--json", help="With piped input: an answer is a JSON object on a line of its own.")
    ] = False,
) -> None:
    """Talk with a run's model, a checkpoint or a Hugging Face folder; /help says how. From a pipe: a message a line."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if json_output and terminal:
        raise ConfigError("--json is for piped input, a message a line; leave it out")
    from truthgpt.inference.conversation import Conversation
    from truthgpt.inference.request import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed=seed)
    with _engine(target, device) as (engine, tokenizer):
        conversation = Conversation(tokenizer, engine.context_tokens, system)
        if not conversation.has_template:
            say("this model has no chat template: it goes on with the plain text of what was said")
        session = _Session(engine, conversation, sampling, terminal, json_output)
        if terminal:
            say("/help lists the commands, Ctrl-D leaves")
        for line in _typed() if terminal else _piped():
            if not session.take(line.strip()):
                return


@contextmanager
def _engine(target: Path, device: str) -> Iterator[tuple[ChatEngine, PreTrainedTokenizerBase]]:
    from truthgpt.inference.open_engine import EngineOptions
    from truthgpt.serve_model import ServingOptions, open_text_model

    with open_text_model(target, ServingOptions(device, engine=EngineOptions(streaming=True))) as model:
        yield model.engine, model.tokenizer


class _Session:
    """Takes one line after the other: a message, or a command."""

    def __init__(
        self, engine: ChatEngine, conversation: Conversation, sampling: Sampling, terminal: bool, as_json: bool
    ) -> None:
        self._engine = engine
        self._conversation = conversation
        self._sampling = sampling
        self._terminal = terminal
        self._as_json = as_json
        self._answers = 0
        self._dropped = 0

    def take(self, line: str) -> bool:
        """Do what `line` asks for; False: leave."""
        if line.startswith("/") and not line.startswith("//"):
            command, _, argument = line.partition(" ")
            return self._command(command, argument.strip())
        if line:
            self._message(line[1:] if line.startswith("//") else line)
        return True

    def _command(self, command: str, argument: str) -> bool:
        if command == "/system":
            self._conversation.system = argument or None
        elif command == "/reset":
            self._conversation.messages.clear()
        elif command == "/save":
            self._save(argument)
        elif command == "/help":
            say(_HELP)
        elif command not in _LEAVE:
            say(f"there is no command {command}; /help lists them, and // begins a message with /")
        return command not in _LEAVE

    def _save(self, name: str) -> None:
        if not name:
            say("/save needs the name of a file")
            return
        text = json.dumps(self._conversation.transcript(), indent=2, ensure_ascii=False)
        try:
            Path(name).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            say(f"{name} cannot be written: {error.strerror}")
        else:
            say(f"wrote {len(self._conversation.transcript())} messages to {name}")

    def _message(self, text: str) -> None:
        """Answer `text`; a question that cannot be asked is taken back, and ends a piped conversation."""
        self._conversation.say("user", text)
        try:
            answer, finish = self._answer()
        except ConfigError as error:
            self._conversation.messages.pop()
            if not self._terminal:
                raise
            say(f"error: {error}")
            return
        self._conversation.say("assistant", answer)
        if self._as_json:
            typer.echo(json.dumps({"role": "assistant", "content": answer, "finish": finish}))
        elif not self._terminal:
            typer.echo()

    def _answer(self) -> tuple[str, FinishReason]:
        """Write an answer out as it comes; its text, and why it ended."""
        from truthgpt.runtime.seeds import derive_seed

        prompt = self._conversation.prompt(self._sampling.max_new_tokens)
        if prompt.dropped > self._dropped:
            say(f"the conversation is longer than the context: its {prompt.dropped} oldest messages are left out")
        self._dropped = prompt.dropped
        sampling = replace(self._sampling, seed=derive_seed(self._sampling.seed, "chat", self._answers))
        self._answers += 1
        text, tokens, start = "", 0, time.perf_counter()
        finish: FinishReason = "cancelled"
        pieces = self._conversation.answer(self._engine, prompt, sampling)
        with contextlib.closing(pieces), _interrupts(self._terminal) as interrupted:
            for piece in pieces:
                text += piece.text
                tokens += len(piece.token_ids)
                self._write(piece.text)
                finish = piece.finish or finish
                if interrupted:
                    break
        if self._terminal:
            rate = tokens / max(time.perf_counter() - start, 1e-9)
            typer.secho(f"\n{tokens} tokens{_ENDED.get(finish, '')}, {rate:.1f} tokens/s", dim=True, err=True)
        elif str(finish) == "error":
            say("the answer ends: the model's logits are not finite")
        return text, finish

    def _write(self, text: str) -> None:
        if not self._as_json:
            sys.stdout.write(for_terminal(text))
            sys.stdout.flush()


def _typed() -> Iterator[str]:
    """Lines from the terminal; Ctrl-C gives up the one that is being written."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets lines be edited, and earlier ones fetched
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /exit leaves)")
        except EOFError:
            say("")
            return


def _piped() -> Iterator[str]:
    try:
        yield from standard_input()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: byte {error.start} is not UTF-8") from error


@contextlib.contextmanager
def _interrupts(terminal: bool) -> Iterator[list[bool]]:
    """Ctrl-C at a terminal puts something into the list, instead of breaking off whatever is being computed."""
    seen: list[bool] = []
    if not terminal:
        yield seen
        return
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
