"""A conversation with a model: its messages, the prompts made of them, and answers as an engine writes them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from truthgpt.data.chat_answers import EXPRESSION_ERRORS
from truthgpt.errors import ConfigError
from truthgpt.inference.generate import encode_prompt, require_text
from truthgpt.inference.request import Piece, Sampling
from truthgpt.inference.turn_end import turn_end

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""


class ChatEngine(Protocol):
    """What a conversation asks of an engine, see `inference/engine.py`."""

    context_tokens: int | None

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        """Ask for an answer; returns the id that its pieces carry."""
        ...

    def cancel(self, request_id: int) -> None:
        """Break off a request."""
        ...

    def step(self) -> list[Piece]:
        """One forward pass; what came of it."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether any request is not answered yet."""
        ...


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue; `dropped` is how many of the oldest messages did not fit."""

    token_ids: list[int]
    dropped: int


class Conversation:
    """The messages of a chat, and how a model is asked for the next one.

    A model without a chat template continues the plain text of what was said, line by line.

    Args:
        tokenizer: the model's, with its chat template.
        context_tokens: positions the model has; None: no limit is known.
        system: what stands in front of the conversation; None: nothing.

    Attributes:
        messages: what was said, the system message aside.
        turn_end: where the template ends an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context_tokens: int | None, system: str | None = None
    ) -> None:
        self.system = system
        self.messages: list[Message] = []
        self._tokenizer = tokenizer
        self._context = context_tokens
        self.turn_end = turn_end(tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.chat_template is not None

    def say(self, role: str, content: str) -> None:
        """Append a message."""
        self.messages.append({"role": role, "content": content})

    def transcript(self) -> list[Message]:
        """All messages, the system message first."""
        return [*self._opening(), *self.messages]

    def prompt(self, max_new_tokens: int) -> Prompt:
        """The conversation so far, up to where the answer begins.

        The oldest questions, with their answers, are left out as long as there is no room for `max_new_tokens`, or half
        a context of them; the system message and the last question stay.

        Raises:
            ConfigError: these two alone are longer than the context, or the template refuses the messages.
        """
        questions = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        ids: list[int] = []
        for first in questions:
            ids = self._encode([*self._opening(), *self.messages[first:]])
            if self._context is None or len(ids) + min(max_new_tokens, self._context // 2) - 1 <= self._context:
                return Prompt(ids, first)
        if self._context is not None and len(ids) > self._context:
            what = "it and the system message have" if self.system else "it has"
            raise ConfigError(f"the message is too long: {what} {len(ids)} tokens, the model's context {self._context}")
        return Prompt(ids, questions[-1])

    def answer(self, engine: ChatEngine, prompt: Prompt, sampling: Sampling) -> Generator[Piece, None, None]:
        """The answer to `prompt` as it is written; it ends where the template ends a turn, at the latest.

        Closing the generator breaks the answer off.
        """
        if self._context is not None:
            room = self._context + 1 - len(prompt.token_ids)
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        request_id = engine.submit(prompt.token_ids, self.turn_end.ending(sampling))
        finished = False
        try:
            while not finished:
                for piece in engine.step():
                    finished = piece.finish is not None
                    yield piece
        finally:
            engine.cancel(request_id)  # which ignores one that is answered
            while engine.has_work:
                engine.step()

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _encode(self, messages: list[Message]) -> list[int]:
        if not self.has_template:
            return encode_prompt(self._tokenizer, _plain_text(messages))
        # The template has written the special tokens already.
        text = self._render(messages)
        require_text(text)
        ids = [int(index) for index in self._tokenizer(text, add_special_tokens=False)["input_ids"]]
        if not ids:
            raise ConfigError("the model's chat template makes no text of the conversation")
        return ids

    def _render(self, messages: list[Message]) -> str:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, *EXPRESSION_ERRORS) as error:
            raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error
        return str(text)


def _plain_text(messages: Sequence[Message]) -> str:
    """An answer follows its question as it was written; everything else begins on a line of its own."""
    text = ""
    for message in messages:
        if text and message["role"] != "assistant":
            text += "\n"
        text += message["content"]
    return text
