"""Conversations as text, through a chat template, and the exact place of every answer in that text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from truthgpt.data.base import Conversation
from truthgpt.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]
"""Characters `text[start:end]`."""

KEY = "data.chat_template"
ASSISTANT = "assistant"
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What marks an answer in a template, as transformers reads it."""
BUFFERED = re.compile(
    r"\{%[-+]?\s*(macro|filter|call|set(?=\s+[\w.]+\s*(?:\|[^%]*)?[-+]?%\}))\b.*?\{%[-+]?\s*end\1\b", re.DOTALL
)
"""Blocks whose output Jinja collects before it is written: transformers miscounts the marks inside them."""
PRIVATE_USE = range(0xE000, 0xF900)
EXPRESSION_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What the expressions in a template can raise while it renders, besides Jinja's own errors."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    `spans` are the trained characters, in order; None: all of them. A token with the end-of-text id should end at
    character `answered_at` or behind it. That is None where only answers are trained and the last message is none: an
    end-of-text token behind a question would teach the model not to answer.
    """

    text: str
    spans: tuple[Span, ...] | None
    answered_at: int | None


def load_chat_template(text_or_file: str) -> str:
    """The Jinja text of `data.chat_template`: the value itself, or the file (UTF-8) when it ends in `.jinja`.

    Raises:
        ConfigError: no such file, one that is not UTF-8, or a text in which nothing is filled in.
    """
    text, name = text_or_file, "the text"
    if text_or_file.endswith(".jinja"):
        name = text_or_file
        try:
            text = Path(text_or_file).expanduser().read_text(encoding="utf-8-sig")
        except OSError as error:
            raise _problem(f"{name}: cannot be read: {error.strerror}", "check the path") from error
        except UnicodeDecodeError as error:
            raise _problem(f"{name}: byte {error.start} is not UTF-8", "save the file as UTF-8") from error
    if "{{" not in text and "{%" not in text:
        raise _problem(
            f"{name} is no chat template: nothing in it is filled in, {text.strip()[:60]!r}",
            "give a Jinja template, or a file that ends in .jinja",
        )
    return text


class ChatRenderer:
    """Renders conversations with a chat template and finds the answers in them.

    Args:
        tokenizer: gives the template (unless `template` is given), the special tokens it may write, and the tokens
            that can end a turn.
        template: Jinja text; None: the tokenizer's own.

    Raises:
        ConfigError: `template` is no Jinja template, or marks answers where transformers miscounts them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._checked: set[str] = set()
        if template is not None:
            self._check_template(template)

    @cached_property
    def identity(self) -> str:
        """Text that changes whenever a conversation may be rendered or trained in another way."""
        template = self._tokenizer.chat_template if self._template is None else self._template
        return json.dumps([template, self._tokenizer.special_tokens_map], sort_keys=True)

    def render(self, conversation: Conversation, where: str) -> RenderedChat:
        """The text of a conversation and its trained characters.

        With `trained: assistant` these are, for every message with that role, its content and what the template
        itself puts between the generation prompt and it (white space, an empty thinking block), up to and with the
        token that ends the turn. `{% generation %}` marks in the template decide instead where there are any.

        Raises:
            ConfigError: there is no template, or it is no Jinja template.
            DataError: the template refuses the conversation, or an answer cannot be found for certain.
        """
        source = self._source(conversation)
        template = _Template(source, [dict(tool) for tool in conversation.tools], self._tokenizer.special_tokens_map)
        messages = [dict(message) for message in conversation.messages]
        try:
            if conversation.trained == "all":
                text = template.text(messages)
                return RenderedChat(text, None, len(text.rstrip()))
            if MARK.search(source):
                text, spans = template.marked(messages)
            else:
                text, spans = self._find_answers(template, messages, where)
        except _RefusedError as error:
            raise DataError(
                f"{where}: the chat template refuses this conversation: {error}; change the messages, or give another "
                f"template in {KEY}"
            ) from error
        answered = bool(spans) and messages[-1].get("role") == ASSISTANT
        return RenderedChat(text, tuple(spans), len(text[: spans[-1][1]].rstrip()) if answered else None)

    def _find_answers(self, template: _Template, messages: list[dict[str, Any]], where: str) -> tuple[str, list[Span]]:
        text = template.text(messages)
        try:
            return text, _AnswerFinder(template, messages, text, self._turn_end).spans(where)
        except DataError:
            again = template.text(messages)
            if again == text:
                raise
        # The template writes the date, and it has just changed.
        return again, _AnswerFinder(template, messages, again, self._turn_end).spans(where)

    def _source(self, conversation: Conversation) -> str:
        if self._template is not None:
            return self._template
        try:
            source = self._tokenizer.get_chat_template(tools=[dict(tool) for tool in conversation.tools] or None)
        except ValueError as error:
            raise _problem(
                "the data are conversations and the tokenizer has no chat template",
                "give a Jinja template, or a file that ends in .jinja",
            ) from error
        self._check_template(source)
        return str(source)

    def _check_template(self, source: str) -> None:
        """Compile a template once; transformers keeps the result."""
        if source in self._checked:
            return
        from transformers.utils.chat_template_utils import render_jinja_template

        owner = "the tokenizer's own chat template" if self._template is None else "the chat template"
        try:
            render_jinja_template(conversations=[], chat_template=source)
        except TemplateSyntaxError as error:
            raise _problem(
                f"{owner} is no Jinja template: line {error.lineno}: {error.message}", "correct it, or give another"
            ) from error
        except ImportError as error:
            raise _problem(f"chat templates need another jinja2: {error}", "pip install -U jinja2") from error
        if any(MARK.search(block.group()) for block in BUFFERED.finditer(source)):
            raise _problem(
                f"{owner} has a {{% generation %}} mark inside a macro, call, filter or set block, where its place is "
                "miscounted",
                "put the mark around the place that calls it",
            )
        self._checked.add(source)

    @cached_property
    def _turn_end(self) -> re.Pattern[str]:
        """White space and one added token; the begin-of-text token ends nothing, unless it is the end-of-text token."""
        tokenizer = self._tokenizer
        begins = {tokenizer.bos_token} - {tokenizer.eos_token}
        added = {token for token in tokenizer.get_added_vocab() if token.strip()}
        tokens = sorted(added - begins, key=len, reverse=True)
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, tokens))})" if tokens else r"(?!)")


class _RefusedError(Exception):
    """A template raised an error while it rendered."""


@dataclass(frozen=True)
class _Template:
    """A chat template with all it reads besides the messages."""

    source: str
    tools: list[dict[str, Any]]
    special_tokens: Mapping[str, str]

    def text(self, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        """The messages rendered. Raises _RefusedError."""
        return self._render(messages, generation_prompt, marked=False)[0]

    def attempt(self, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str | None:
        """The messages rendered, or None where the template refuses them, as it may a part of a conversation."""
        try:
            return self.text(messages, generation_prompt)
        except _RefusedError:
            return None

    def marked(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """The messages rendered and what stands between `{% generation %}` marks."""
        text, spans = self._render(messages, False, marked=True)
        return text, [(start, end) for start, end in spans if start < end]

    def _render(self, messages: list[dict[str, Any]], generation_prompt: bool, marked: bool) -> tuple[str, list[Span]]:
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
            raise _RefusedError(str(error)) from error
        except EXPRESSION_ERRORS as error:
            raise _RefusedError(f"{type(error).__name__}: {error}") from error
        return texts[0], spans[0] if marked else []


@dataclass(frozen=True)
class _Place:
    """Where a content stands in the text, as far as it was found for certain."""

    start: int | None = None
    end: int | None = None


class _AnswerFinder:
    """Finds the answers of one rendered conversation, for a template without marks.

    A text can hold the same words many times, and a template may strip, drop or move them; so contents are never
    searched for. Two renderings tell the places instead. First, every content is put between two sentinels: the
    rendering less the sentinels must be the text itself, and the sentinels' places are then those of the contents.
    Second, where that fails or does not tell enough (white space at an end, an empty content, tool calls, dropped
    thinking), a message is replaced by one whose whole content is a sentinel: what stands in front of the sentinel must
    begin the text and what stands behind it must end the text, and the answer is the rest.
    """

    def __init__(
        self, template: _Template, messages: list[dict[str, Any]], text: str, turn_end: re.Pattern[str]
    ) -> None:
        self._template = template
        self._messages = messages
        self._text = text
        self._turn_end = turn_end
        self._prompt = ""
        """The generation prompt, once one was rendered that an answer follows at once."""
        unused = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
        self._open, self._close, self._stop = next(unused), next(unused), next(unused)

    def spans(self, where: str) -> list[Span]:
        """Every answer with its end-of-turn token, in order. Raises DataError for one that cannot be found."""
        turns = [index for index, message in enumerate(self._messages) if message.get("role") == ASSISTANT]
        places = self._enclosed(turns)
        spans: list[Span] = []
        for index in turns:
            span = self._span(index, places.get(index, _Place()))
            if span is None and self._is_left_out(index):
                continue
            if span is None or (spans and span[0] < spans[-1][1]):
                raise DataError(
                    f"{where}: messages[{index}]: this answer cannot be found for certain in what the chat template "
                    f"makes of the conversation; give a template in {KEY} that marks answers with "
                    "{% generation %} and {% endgeneration %}"
                )
            spans.append(span)
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


def _first(one: int | None, other: int | None) -> int | None:
    return other if one is None else one


def _problem(message: str, suggestion: str) -> ConfigError:
    return ConfigError([Problem(key=KEY, message=message, suggestion=suggestion)])
