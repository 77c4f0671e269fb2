"""Requests of the OpenAI API: which fields there are, and what is said about the others."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from truthgpt.inference.request import LEAST_PENALTY
from truthgpt.serving.api_error import ApiError

MAX_CHOICES = 128
"""Largest `n`."""
MAX_PROMPTS = 1024
MAX_STOPS = 16

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None,),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields of OpenAI's that would change the answer and that this server does not have, with the values that ask for
nothing. These values are accepted."""

_HARMLESS = {
    *("metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention"),
    *("safety_identifier", "service_tier", "store", "user"),
}
"""Fields of OpenAI's that change nothing in the answer of any server."""

_UNSUPPORTED_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "name": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}
"""The same for a message; clients send an answer's own message back with these."""

# Lists fail with their first wrong item: a million of them would be a million mistakes, and seconds for every client.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    """What a stream carries besides the text. Padding against observers (`include_obfuscation`) is never sent."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(_Strict):
    """What both kinds of requests have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=1 / LEAST_PENALTY)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS, fail_fast=True)]
        | None
    ) = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only a stream has them; add stream: true, or leave them out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A turn of a conversation. `developer` is OpenAI's newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]

    def for_template(self) -> dict[str, str]:
        """The message as chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def new_tokens(self) -> int | None:
        """New tokens at most, under either of its names; None: no limit was asked for."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: give one")
        return self


Parsed = TypeVar("Parsed", CompletionRequest, ChatRequest)


def parse_request(kind: type[Parsed], body: bytes) -> Parsed:
    """Read a request's JSON body.

    Raises:
        ApiError: 400 with the field that is wrong, unknown, or not supported.
    """
    try:
        # Decoded here: json.loads lets bytes pass that stand for half of a surrogate pair, and UTF-16.
        document = json.loads(body.decode("utf-8-sig"))
        if b"\\ud" in body.lower():
            json.dumps(document, ensure_ascii=False).encode()  # half of a surrogate pair is no text: a ValueError
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(document, dict):
        raise ApiError(400, "the body has to be a JSON object", code="invalid_json")
    fields = {key: value for key, value in document.items() if key not in _HARMLESS}
    fields = _without_unsupported(fields, _UNSUPPORTED, "")
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [
            _without_unsupported(message, _UNSUPPORTED_IN_MESSAGE, f"messages[{index}].")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(kind, error) from error


def _without_unsupported(
    fields: dict[str, Any], unsupported: Mapping[str, tuple[Any, ...]], where: str
) -> dict[str, Any]:
    for key, value in fields.items():
        if key in unsupported and not any(_same(value, each) for each in unsupported[key]):
            raise ApiError(
                400,
                f"{where}{key}: {_short(value)} is not supported by this server; leave {key} out",
                param=f"{where}{key}",
                code="unsupported_parameter",
            )
    return {key: value for key, value in fields.items() if key not in unsupported}


def _same(value: Any, other: Any) -> bool:
    """Equality in which false is not 0."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _first_problem(kind: type[BaseModel], error: ValidationError) -> ApiError:
    """The first mistake pydantic found, in words."""
    first = error.errors(include_url=False, include_context=False)[0]
    location = first["loc"]
    if not location:
        return ApiError(400, first["msg"].removeprefix("Value error, "), code="invalid_value")
    for depth, part in enumerate(location):
        if part in _SEVERAL_TYPES and first["type"] not in ("missing", "extra_forbidden"):
            # pydantic lists what each of the types expects, behind this place.
            name = _path(location[: depth + 1])
            return ApiError(400, f"{name}: give {_SEVERAL_TYPES[str(part)]}", param=name, code="invalid_value")
    name = _path(location)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        return ApiError(400, f"{name}: unknown field; {hint}", param=name, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name}: this field is required", param=name, code="missing_required_parameter")
    said = f"{first['msg'][0].lower()}{first['msg'][1:]}, found {_short(first['input'])}"
    return ApiError(400, f"{name}: {said}", param=name, code="invalid_value")


_SEVERAL_TYPES = {
    "prompt": f"a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} texts or of as many lists of token ids",
    "stop": f"a text or a list of at most {MAX_STOPS} texts, none of them empty",
    "content": 'a text or a list of parts {"type": "text", "text": ...}',
}
"""What the fields with several types take."""


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`; long names, which are a client's own, are cut."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:60]}" if path else part[:60]
    return path


def _short(value: Any) -> str:
    """The value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
