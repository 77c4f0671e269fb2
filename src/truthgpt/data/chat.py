"""Conversations as text, through a chat template, and what of it is trained."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from truthgpt.data.base import ASSISTANT, Conversation
from truthgpt.data.chat_answers import AnswerFinder, ChatTemplate, NotFoundError, RefusedError, Span, trained_marks
from truthgpt.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KEY = "data.chat_template"
MARK_ANSWERS = f"give a template in {KEY} that marks answers with {{% generation %}} and {{% endgeneration %}}"
LEAVE_OUT_WEIGHTS = f"give another template in {KEY}, or leave out the weights of this chat"
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What marks an answer in a template, as transformers reads it."""
BUFFERED = re.compile(
    r"\{%[-+]?\s*(macro|filter|call|set(?=\s+[\w.]+\s*(?:\|[^%]*)?[-+]?%\}))\b.*?\{%[-+]?\s*end\1\b", re.DOTALL
)
"""Blocks whose output Jinja collects before it is written: transformers miscounts the marks inside them."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    `spans` are the trained characters, in order; None: all of them but those in `untrained`. A token with the
    end-of-text id should end at character `answered_at` or behind it. That is None where the last message is not
    trained: an end-of-text token behind a question would teach the model not to answer.
    """

    text: str
    spans: tuple[Span, ...] | None
    answered_at: int | None
    untrained: tuple[Span, ...] = ()


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
        token that ends the turn. `{% generation %}` marks in the template decide instead where there are any. Answers
        that are context are left out of it; with `trained: all` nothing else is.

        Raises:
            ConfigError: there is no template, or it is no Jinja template.
            DataError: the template refuses the conversation, or an answer cannot be found for certain.
        """
        source = self._source(conversation)
        template = ChatTemplate(source, [dict(tool) for tool in conversation.tools], self._tokenizer.special_tokens_map)
        messages = [dict(message) for message in conversation.messages]
        answers = {index for index, message in enumerate(messages) if message.get("role") == ASSISTANT}
        context = set(conversation.context)
        everything = conversation.trained == "all"
        marked = not everything and MARK.search(source) is not None
        found: dict[int, Span] = {}
        try:
            if (everything or marked) and not context:
                text, marks = template.render(messages, marked)
            else:
                sought = context if everything else answers if marked else answers - context
                text, marks, found = self._find_answers(template, messages, sorted(sought), marked)
            spans = list(found.values())
            if marked:
                spans = trained_marks(marks, found, context) if context else marks
        except RefusedError as error:
            raise DataError(
                f"{where}: the chat template refuses this conversation: {error}; change the messages, or give another "
                f"template in {KEY}"
            ) from error
        except NotFoundError as error:
            fix = LEAVE_OUT_WEIGHTS if everything or marked else MARK_ANSWERS
            raise DataError(f"{where}: {error}; {fix}") from error
        last = len(messages) - 1
        if everything:
            return RenderedChat(text, None, None if last in context else len(text.rstrip()), tuple(spans))
        answered = bool(spans) and last in answers - context
        return RenderedChat(text, tuple(spans), len(text[: spans[-1][1]].rstrip()) if answered else None)

    def _find_answers(
        self, template: ChatTemplate, messages: list[dict[str, Any]], sought: Sequence[int], marked: bool
    ) -> tuple[str, list[Span], dict[int, Span]]:
        """The messages rendered, what stands between marks, and the answers sought by their place."""
        text, marks = template.render(messages, marked)
        try:
            return text, marks, AnswerFinder(template, messages, text, self._turn_end).spans(sought)
        except NotFoundError:
            again, marks = template.render(messages, marked)
            if again == text:
                raise
        # The template writes the date, and it has just changed.
        return again, marks, AnswerFinder(template, messages, again, self._turn_end).spans(sought)

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


def _problem(message: str, suggestion: str) -> ConfigError:
    return ConfigError([Problem(key=KEY, message=message, suggestion=suggestion)])
