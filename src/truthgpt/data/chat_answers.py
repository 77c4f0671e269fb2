"""The exact place of every answer in what a chat template makes of a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from truthgpt.data.base import ASSISTANT

Span = tuple[int, int]
"""Characters `text[start:end]`."""

PRIVATE_USE = range(0xE000, 0xF900)
EXPRESSION_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What the expressions in a template can raise while it renders, besides Jinja's own errors."""


class RefusedError(Exception):
    """A template raised an error while it rendered."""


class NotFoundError(Exception):
    """An answer is not found for certain in a rendered conversation."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with all it reads besides the messages."""

    source: str
    tools: list[dict[str, Any]]
    special_tokens: Mapping[str, str]

    def text(self, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        """The messages rendered. Raises RefusedError."""
        return self.render(messages, False, generation_prompt)[0]

    def attempt(self, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str | None:
        """The messages rendered, or None where the template refuses them, as it may a part of a conversation."""
        try:
            return self.text(messages, generation_prompt)
        except RefusedError:
            return None

    def render(
        self, messages: list[dict[str, Any]], marked: bool, generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The messages rendered and, if `marked`, what stands between `{% generation %}` marks. Raises RefusedError."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=self.tools or None,
                chat_template=self.source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=generation_prompt,
                **self.special_tokens,
            )
        except TemplateError as error:
            raise RefusedError(str(error)) from error
        except EXPRESSION_ERRORS as error:
            raise RefusedError(f"{type(error).__name__}: {error}") from error
        return texts[0], [(start, end) for start, end in spans[0] if start < end] if marked else []


@dataclass(frozen=True)
class _Place:
    """Where a content stands in the text, as far as it was found for certain."""

    start: int | None = None
    end: int | None = None


class AnswerFinder:
    """Finds the answers of one rendered conversation, for a template without marks.

    A text can hold the same words many times, and a template may strip, drop or move them; so contents are never
    searched for. Two renderings tell the places instead. First, every content is put between two sentinels: the
    rendering less the sentinels must be the text itself, and the sentinels' places are then those of the contents.
    Second, where that fails or does not tell enough (white space at an end, an empty content, tool calls, dropped
    thinking), a message is replaced by one whose whole content is a sentinel: what stands in front of the sentinel must
    begin the text and what stands behind it must end the text, and the answer is the rest.
    """

    def __init__(
        self, template: ChatTemplate, messages: list[dict[str, Any]], text: str, turn_end: re.Pattern[str]
    ) -> None:
        self._template = template
        self._messages = messages
        self._text = text
        self._turn_end = turn_end
        self._prompt = ""
        """The generation prompt, once one was rendered that an answer follows at once."""
        unused = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
        self._open, self._close, self._stop = next(unused), next(unused), next(unused)

    def spans(self, sought: Sequence[int]) -> dict[int, Span]:
        """The answers `sought`, each with its end-of-turn token, by their place among the messages; both ascending.

        Raises:
            NotFoundError: one that cannot be found for certain.
        """
        places = self._enclosed(sought)
        spans: dict[int, Span] = {}
        before = 0
        for index in sought:
            span = self._span(index, places.get(index, _Place()))
            if span is None and self._is_left_out(index):
                continue
            if span is None or span[0] < before:
                raise NotFoundError(
                    f"messages[{index}]: this answer cannot be found for certain in what the chat template makes of "
                    "the conversation"
                )
            spans[index], before = span, span[1]
        return spans

    def _span(self, index: int, place: _Place) -> Span | None:
        message = self._messages[index]
        content = message.get("content") or ""
        # The content of a message that calls tools does not end it.
        content_start, content_end = place.start, None if message.get("tool_calls") else place.end
        if content != content.strip():
            whole = self._replaced(index)
            content_start, content_end = _first(whole.start, content_start), _first(whole.end, content_end)
        elif content_start is None or content_end is None:
            whole = self._replaced(index)
            content_start, content_end = _first(content_start, whole.start), _first(content_end, whole.end)
        start = self._answer_start(index, content_start)
        end = self._rendered_end(index) if content_end is None else self._with_turn_end(content_end)
        if start is None or end is None or start > (end if content_end is None else content_end):
            return None
        return start, end

    def _enclosed(self, turns: Sequence[int]) -> dict[int, _Place]:
        """Places of the contents, white space at their ends left out, from one rendering with sentinels around all.

        A content lacks its start where the template drops what it begins with, and is missing where it is empty.
        """
        messages = list(self._messages)
        for index in turns:
            content = messages[index].get("content") or ""
            core = content.strip()
            if core:
                front, back = content[: content.index(core)], content[content.index(core) + len(core) :]
                enclosed = f"{self._open}{index}{self._stop}{core}{self._close}{index}{self._stop}"
                messages[index] = {**messages[index], "content": front + enclosed + back}
        rendered = self._template.attempt(messages) or ""
        sentinel = re.compile(f"([{self._open}{self._close}])([0-9]+){self._stop}")
        if sentinel.sub("", rendered) != self._text:
            return {}
        places: dict[tuple[str, int], int] = {}
        removed = 0
        for found in sentinel.finditer(rendered):
            name = (found[1], int(found[2]))
            if name in places:
                return {}
            places[name] = found.start() - removed
            removed += len(found[0])
        return {index: _Place(places.get((self._open, index)), places.get((self._close, index))) for index in turns}

    def _replaced(self, index: int) -> _Place:
        """Place of a whole content, or of all that stands in for it, from a rendering with a sentinel instead."""
        sentinel = self._open + self._stop
        messages = list(self._messages)
        messages[index] = {"role": ASSISTANT, "content": sentinel}
        rendered = self._template.attempt(messages)
        if rendered is None or rendered.count(sentinel) != 1:
            return _Place()
        front, back = rendered.split(sentinel)
        text = self._text
        return _Place(
            len(front) if text.startswith(front) else None,
            len(text) - len(back) if text.endswith(back) else None,
        )

    def _answer_start(self, index: int, content_start: int | None) -> int | None:
        """Where the model takes over: behind the generation prompt, else where the content begins.

        A template without generation prompt may still write a header between the turns; it is no answer. White space
        there is one: in generation the model has to write it.
        """
        if content_start is not None and self._prompt and self._text.endswith(self._prompt, 0, content_start):
            return content_start  # all before it is not rendered again, which would take the square of the turns
        before = self._messages[:index]
        prompt = self._template.attempt(before, generation_prompt=True) if before else None
        if prompt is None or not self._text.startswith(prompt):
            return content_start
        if content_start not in (None, len(prompt)) and not self._text[len(prompt) : content_start].strip():
            return len(prompt)
        without = self._template.attempt(before)
        grows = without is not None and prompt != without and prompt.startswith(without)
        added = prompt.removeprefix(without or "")
        if grows and content_start == len(prompt) and added.strip():
            self._prompt = added
        return len(prompt) if grows else content_start

    def _with_turn_end(self, end: int) -> int:
        """`end` moved behind the token that ends the turn, if one follows."""
        found = self._turn_end.match(self._text, end)
        return found.end() if found else end

    def _rendered_end(self, index: int) -> int | None:
        """End of the conversation up to this answer, where the text begins with it; for tool calls above all."""
        rendered = self._template.attempt(self._messages[: index + 1])
        return len(rendered.rstrip()) if rendered is not None and self._text.startswith(rendered) else None

    def _is_left_out(self, index: int) -> bool:
        """Whether the template writes nothing for an empty answer."""
        message = self._messages[index]
        if message.get("tool_calls") or (message.get("content") or "").strip():
            return False
        return self._template.attempt(self._messages[:index] + self._messages[index + 1 :]) == self._text


def trained_marks(marks: Sequence[Span], answers: Mapping[int, Span], context: Set[int]) -> list[Span]:
    """The marks that hold trained answers.

    Args:
        marks: what stands between `{% generation %}` marks.
        answers: all answers, by their place among the messages.
        context: places of those that are not trained.

    Raises:
        NotFoundError: a mark that holds no answer, or both kinds.
    """
    kept: list[Span] = []
    for start, end in marks:
        inside = {
            index in context for index, span in answers.items() if span[0] < end and start < max(span[1], span[0] + 1)
        }
        if len(inside) != 1:
            raise NotFoundError(
                "of these answers some have weight 0, and a {% generation %} mark in the chat template does not hold "
                "one answer alone"
            )
        if inside == {False}:
            kept.append((start, end))
    return kept


def _first(one: int | None, other: int | None) -> int | None:
    return other if one is None else one
