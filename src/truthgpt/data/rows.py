"""What a row of a data set means: one reader for every source that has rows."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from truthgpt.data.base import ASSISTANT, Conversation, Document, Segment
from truthgpt.errors import DataError

logger = logging.getLogger(__name__)

EXCERPT_CHARACTERS = 60
"""Characters of a bad row that its error shows."""
STREAM_CHECK_ROWS = 1000
"""Rows of a stream that are read before the share of bad ones is judged."""


@dataclass(frozen=True)
class RowFields:
    """What a row holds and which of its fields are read; names as in `data.*`."""

    format: Literal["text", "prompt_completion", "chat"]
    text_field: str
    prompt_field: str
    completion_field: str
    messages_field: str
    train_on: Literal["all", "completion", "assistant"]

    def used(self) -> tuple[str, ...]:
        """Names of the fields that every row must have in this format."""
        if self.format == "text":
            return (self.text_field,)
        if self.format == "prompt_completion":
            return (self.prompt_field, self.completion_field)
        return (self.messages_field,)


@dataclass(frozen=True)
class BadRowPolicy:
    """What a malformed row does: end the run, or be skipped up to a share of all rows."""

    on_bad_row: Literal["error", "skip"]
    max_bad_fraction: float


class BadRow(ValueError):
    """A row that cannot be used.

    `field` is the field at fault, None when it is the row as a whole; `column` counts characters of the line from 1.
    """

    def __init__(self, reason: str, field: str | None = None, column: int = 1) -> None:
        super().__init__(reason)
        self.field = field
        self.column = column


@dataclass
class RowTally:
    """What a pass over rows met; `first_bad` is the message of the first malformed row."""

    usable: int = 0
    empty: int = 0
    bad: int = 0
    surrogates: int = 0
    first_bad: str = ""

    @property
    def rows(self) -> int:
        """All rows so far."""
        return self.usable + self.empty + self.bad


class RowReader:
    """Turns rows into documents, counting what it leaves out; one reader serves one pass, or one stream.

    With `format: text` a row's text is one trained segment. With `prompt_completion` it is two: the prompt, trained
    only with `train_on: all`, and the completion. With `chat` the document has a conversation, and one segment for the
    content of each message. The key of a row is a digest of its content, so that the split does not depend on the
    order of the rows; it sees no weights, so that a chat is on one side of the split whichever of its answers are
    trained. Rows whose text (completion, trained messages) is only white space are left out and counted; half of a
    surrogate pair becomes U+FFFD, counted too.

    Args:
        fields: what a row holds.
        policy: what a malformed row does.
        whole_pass: True when every row is read and `finish` follows; False for a stream without end, where the share
            of malformed rows is judged while reading, from row `STREAM_CHECK_ROWS` on.
    """

    def __init__(self, fields: RowFields, policy: BadRowPolicy, whole_pass: bool = True) -> None:
        self.tally = RowTally()
        self._fields = fields
        self._policy = policy
        self._whole_pass = whole_pass
        builders: dict[str, Callable[[Mapping[str, Any], str], Document | None]] = {
            "text": self._text_document,
            "prompt_completion": self._completion_document,
            "chat": self._chat_document,
        }
        self._build = builders[fields.format]
        reasons = " (blank, or of weight 0)" if fields.format == "chat" else ""
        self._without_text = f"without text to train on{reasons}"

    def document(self, row: Mapping[str, Any], where: str) -> Document | None:
        """The document of one row; None for a row without text to train on.

        Args:
            row: field names and plain JSON values.
            where: the place to show in an error.

        Raises:
            BadRow: a field is missing or of another type. It is not counted: hand it to `refuse`.
        """
        document = self._build(row, where)
        if document is None:
            self.tally.empty += 1
        else:
            self.tally.usable += 1
        return document

    def accept(self, row: Mapping[str, Any], where: str) -> Document | None:
        """`document`, with a malformed row already refused: None for it as for a row without text to train on.

        Raises:
            DataError: the row is malformed, and the policy does not allow it.
        """
        try:
            return self.document(row, where)
        except BadRow as error:
            value: Any = row if error.field is None or error.field not in row else {error.field: row[error.field]}
            self.refuse(where, error, json.dumps(value, ensure_ascii=False, default=str))
            return None

    def refuse(self, where: str, error: BadRow, content: str) -> None:
        """Apply the policy to a malformed row: count it, or end the run.

        Args:
            where: its place, with the column where that is known.
            error: what is wrong with it.
            content: the row as text; its first 60 characters are shown.

        Raises:
            DataError: with `on_bad_row: error`, or in a stream when too many rows are malformed.
        """
        message = f"{where}: {error}: {content.strip()[:EXCERPT_CHARACTERS]!r}"
        if self._policy.on_bad_row == "error":
            raise DataError(f"{message}; correct the row, or set data.on_bad_row: skip") from error
        self.tally.bad += 1
        self.tally.first_bad = self.tally.first_bad or message
        if self._whole_pass:
            return
        if self.tally.bad == 1:
            logger.warning("skipped a malformed row, further ones are only counted: %s", message)
        if self.tally.rows >= STREAM_CHECK_ROWS:
            self._check_bad_fraction(where)

    def finish(self, name: str, report: bool = True) -> None:
        """End of a whole pass.

        Args:
            name: what was read, for the messages.
            report: say what was left out; False when an earlier pass said it.

        Raises:
            DataError: too many rows are malformed, or none is usable.
        """
        tally = self.tally
        self._check_bad_fraction(name)
        if tally.usable == 0:
            raise DataError(
                f"0 usable documents in {name}: {tally.rows} rows, {tally.empty} {self._without_text}; set data.path "
                "to files with text in them"
            )
        if not report:
            return
        if tally.bad:
            logger.warning(
                "%s: skipped %d malformed of %d rows; the first: %s", name, tally.bad, tally.rows, tally.first_bad
            )
        if tally.empty:
            logger.warning("%s: left out %d of %d rows %s", name, tally.empty, tally.rows, self._without_text)
        if tally.surrogates:
            logger.warning("%s: unpaired surrogates in %d texts became U+FFFD", name, tally.surrogates)

    def _check_bad_fraction(self, name: str) -> None:
        tally, limit = self.tally, self._policy.max_bad_fraction
        if tally.bad > limit * tally.rows:
            raise DataError(
                f"{name}: {tally.bad} of {tally.rows} rows are malformed, more than data.max_bad_fraction {limit} "
                f"allows; correct them or raise the limit; the first: {tally.first_bad}"
            )

    def _text_document(self, row: Mapping[str, Any], where: str) -> Document | None:
        text, data = self._text_of(row, self._fields.text_field, "text_field")
        if not text or text.isspace():
            return None
        return Document(_digest(data), (Segment(text),), where)

    def _completion_document(self, row: Mapping[str, Any], where: str) -> Document | None:
        fields = self._fields
        prompt, prompt_data = self._text_of(row, fields.prompt_field, "prompt_field")
        completion, completion_data = self._text_of(row, fields.completion_field, "completion_field")
        if not completion or completion.isspace():
            return None
        segments = (Segment(prompt, trained=fields.train_on == "all"), Segment(completion))
        return Document(_digest(prompt_data, completion_data), segments, where)

    def _chat_document(self, row: Mapping[str, Any], where: str) -> Document | None:
        messages = _messages_of(row, self._fields.messages_field)
        tools = _tools_of(row)
        answers = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        weights = [message.pop("weight", 1) for message in messages]  # of other roles too, which nothing reads
        context = tuple(index for index in answers if weights[index] == 0)
        try:
            data = _canonical_json([messages, tools])
        except UnicodeEncodeError:
            self.tally.surrogates += 1
            messages, tools = _without_surrogates(messages), _without_surrogates(tools)
            data = _canonical_json([messages, tools])
        assistant_only = self._fields.train_on == "assistant"
        if assistant_only and not answers:
            raise BadRow(
                "no message with role 'assistant', which train_on: assistant needs", self._fields.messages_field
            )
        trained = set(answers if assistant_only else range(len(messages))) - set(context)
        texts = (message.get("tool_calls") or (message["content"] or "").strip() for message in messages)
        if not any(text for index, text in enumerate(texts) if index in trained):
            return None
        segments = tuple(
            Segment(message["content"], trained=index in trained)
            for index, message in enumerate(messages)
            if message["content"] is not None
        )
        conversation = Conversation(tuple(messages), tuple(tools), "assistant" if assistant_only else "all", context)
        return Document(_digest(data), segments, where, conversation=conversation)

    def _text_of(self, row: Mapping[str, Any], field: str, setting: str) -> tuple[str, bytes]:
        """The string in `field`, and the same in UTF-8."""
        try:
            text = row[field]
        except KeyError:
            raise BadRow(_missing(row, field, setting)) from None
        if not isinstance(text, str):
            raise BadRow(f"field {field!r} must be a string, found {json_type(text)}", field)
        try:
            return text, text.encode()
        except UnicodeEncodeError:
            self.tally.surrogates += 1
            text = _without_surrogates(text)
            return text, text.encode()


def json_type(value: object) -> str:
    """Name of a value's JSON type with its article, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _missing(row: Mapping[str, Any], field: str, setting: str) -> str:
    there = ", ".join(map(repr, row)) or "none"
    fix = f"set data.{setting}"
    if setting == "text_field" and any(isinstance(value, list) for value in row.values()):
        fix += ", or data.format: chat"
    elif setting == "text_field" and sum(isinstance(value, str) for value in row.values()) > 1:
        fix += ", or data.format: prompt_completion"
    return f"no field {field!r}, the row has {there} ({fix})"


def _messages_of(row: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """The checked messages of a row; keys that hold null are left out, save `content`."""
    if field not in row:
        raise BadRow(_missing(row, field, "messages_field"))
    value = row[field]
    if not isinstance(value, list):
        raise BadRow(f"field {field!r} must be a list of messages, found {json_type(value)}", field)
    if not value:
        raise BadRow(f"field {field!r} must hold at least one message, found an empty list", field)
    return [_message(message, f"{field}[{index}]", field) for index, message in enumerate(value)]


def _message(message: Any, place: str, field: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow(f"{place} must be an object with 'role' and 'content', found {json_type(message)}", field)
    if "role" not in message and "from" in message and "value" in message:
        raise BadRow(
            f"{place} has 'from' and 'value'; a message is {{'role': ..., 'content': ...}}: rename 'from' to 'role' "
            "(human is user, gpt is assistant) and 'value' to 'content'",
            field,
        )
    for key in ("role", "content"):
        if key not in message and not (key == "content" and message.get("tool_calls")):
            raise BadRow(f"{place} has no {key!r}, only {', '.join(map(repr, message)) or 'nothing'}", field)
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if not isinstance(role, str):
        raise BadRow(f"{place}.role must be a string, found {json_type(role)}", field)
    if calls is not None and not isinstance(calls, list):
        raise BadRow(f"{place}.tool_calls must be a list, found {json_type(calls)}", field)
    if not isinstance(content, str) and not (content is None and calls):
        allowed = "a string (null only with tool_calls)" if content is None else "a string"
        raise BadRow(f"{place}.content must be {allowed}, found {json_type(content)}", field)
    if role == ASSISTANT and message.get("weight") is not None:
        _check_weight(message["weight"], place, field)
    return {"content": content, **{key: value for key, value in message.items() if value is not None}}


def _check_weight(weight: Any, place: str, field: str) -> None:
    """Refuse what OpenAI's fine-tuning format does not allow: there a weight only says whether an answer is trained."""
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or weight not in (0, 1):
        found = weight if is_number else json_type(weight)
        raise BadRow(f"{place}.weight must be 0 (context, not trained) or 1 (trained), found {found}", field)


def _tools_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tools a row offers to its conversation, in its optional field `tools`."""
    tools = row.get("tools")
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise BadRow(f"field 'tools' must be a list of objects, found {json_type(tools)}", "tools")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise BadRow(f"tools[{index}] must be an object, found {json_type(tool)}", "tools")
    return tools


def _without_surrogates(value: Any) -> Any:
    """`value` with every pair of surrogates joined and every half of one replaced by U+FFFD, however deep it stands."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).encode()


def _digest(*parts: bytes) -> str:
    """Digest of several texts, each with its length in front, so that no two lists of texts have the same bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]
