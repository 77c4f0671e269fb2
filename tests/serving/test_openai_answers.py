"""Events of a stream, byte for byte."""

from __future__ import annotations

import json

import pytest

from truthgpt.serving.openai_answers import ChatFormat, CompletionFormat, Envelope, Format, Usage


@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("form", [CompletionFormat(), ChatFormat()])
@pytest.mark.parametrize("text", ["a", 'a "quoted" \\ {name}\n\r\n\n\t\x00', "é \u2028 \U0001f600 \ufffd", ""])
def test_chunks(form: Format, text: str, with_usage: bool) -> None:
    """What is encoded once for all chunks of an answer is what would be encoded with each."""
    envelope = Envelope(form, 'a "model"\n', created=7, token="abc")
    choice = {"index": 3, "text": text, "logprobs": None, "finish_reason": None}
    document = {"id": f"{form.prefix}-abc", "object": form.chunk, "created": 7, "model": 'a "model"\n'}
    document["choices"] = [choice]
    if with_usage:
        document["usage"] = None
    expected = f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
    assert envelope.chunk(choice, with_usage) == envelope.chunk(choice, with_usage) == expected
    assert expected.count(b"\n") == 2, "an event ends with the first empty line"


def test_an_envelope_is_one_answers_own() -> None:
    first, second = (Envelope(CompletionFormat(), "model", 7, token) for token in ("abc", "def"))
    for envelope in (first, second, first):
        for data in (envelope.chunk({}, False), envelope.usage_chunk(Usage(1))):
            assert json.loads(data[6:])["id"] == f"cmpl-{envelope.token}"
