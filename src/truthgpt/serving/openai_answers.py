"""Answers of the OpenAI API, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from truthgpt.inference.request import FinishReason, Piece

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass
class Usage:
    """Tokens of one request: of its prompts, each counted once, and of all its choices."""

    prompt_tokens: int
    completion_tokens: int = 0

    def to_json(self) -> dict[str, int]:
        """As the API writes it."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass
class Choice:
    """One answer as far as it is written."""

    text: str = ""
    finish: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        """Take in what has been written."""
        self.text += piece.text
        self.finish = piece.finish


class Format(Protocol):
    """How one endpoint writes its answers."""

    prefix: str
    whole: str
    chunk: str

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A whole choice."""
        ...

    def opening(self, index: int) -> Iterator[dict[str, Any]]:
        """What a choice's chunks begin with."""
        ...

    def pieces(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a piece adds, as the choices of chunks."""
        ...


class CompletionFormat:
    """`/v1/completions`."""

    prefix = "cmpl"
    whole = chunk = "text_completion"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A whole choice."""
        return {"index": index, "text": choice.text, "logprobs": None, "finish_reason": choice.finish}

    def opening(self, index: int) -> Iterator[dict[str, Any]]:
        """Nothing."""
        return iter(())

    def pieces(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Its text with the reason of the end; nothing for a piece without either."""
        if piece.text or piece.finish is not None:
            yield {"index": index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}


class ChatFormat:
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A whole choice."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish}

    def opening(self, index: int) -> Iterator[dict[str, Any]]:
        """Who speaks."""
        yield self._chunk(index, {"role": "assistant", "content": ""}, None)

    def pieces(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Its text, then the reason of the end alone."""
        if piece.text:
            yield self._chunk(index, {"content": piece.text}, None)
        if piece.finish is not None:
            yield self._chunk(index, {}, piece.finish)

    @staticmethod
    def _chunk(index: int, delta: Mapping[str, str], finish: FinishReason | None) -> dict[str, Any]:
        return {"index": index, "delta": dict(delta), "logprobs": None, "finish_reason": finish}


@dataclass(frozen=True)
class Envelope:
    """What is the same in everything that answers one request."""

    form: Format
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    token: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The answer in one document."""
        written = [self.form.choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head(self.form.whole), "choices": written, "usage": usage.to_json()}

    def chunk(self, choice: dict[str, Any], with_usage: bool) -> bytes:
        """One event of a stream. Where it ends with its usage, the events before say null."""
        end = '],"usage":null}\n\n' if with_usage else "]}\n\n"
        return (self._chunk_opening + _in_one_line(choice) + end).encode()

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event with the usage."""
        return event({**self._head(self.form.chunk), "choices": [], "usage": usage.to_json()})

    @cached_property
    def _chunk_opening(self) -> str:
        """What all chunks begin with: with hundreds of clients, encoding it anew for every token is a notable cost."""
        head = _in_one_line(self._head(self.form.chunk))
        return f'data: {head[:-1]},"choices":['

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.form.prefix}-{self.token}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event with one JSON document."""
    return b"data: " + _in_one_line(document).encode() + b"\n\n"


def _in_one_line(document: Mapping[str, Any]) -> str:
    """As JSON, for readers too that end a line at every character that Unicode calls the end of one (httpx does)."""
    text = _JSON.encode(document)
    if not text.isascii():
        for character in "\u0085\u2028\u2029":  # JSON itself escapes the others
            text = text.replace(character, f"\\u{ord(character):04x}")
    return text
