"""Events of a stream, byte for byte."""

from __future__ import annotations

import json

import pytest

from truthgpt.serving.openai_answers import ChatFormat, CompletionFormat, Envelope, Format, Usage, event


@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("form", [CompletionFormat(), ChatFormat()])
@pytest.mark.parametrize("text", ["a", 'a "quoted" \\ {name}\n\r\n\n\t\x00', "é \U0001f600 \ufffd", ""])
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


def test_an_event_is_one_line_for_every_reader() -> None:
    """httpx ends lines where Python's `str.splitlines` does, which is more than the newlines of an event stream."""
    text = "".join(map(chr, range(0x3000)))
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    envelope = Envelope(CompletionFormat(), text, 7, "abc")
    for data in (envelope.chunk(choice, False), event({"error": {"message": text}})):
        lines = data.decode().splitlines()
        assert len(lines) == 2 and lines[1] == "", "an event and the empty line behind it"
        document = json.loads(lines[0].removeprefix("data: "))
        assert text in (document.get("choices", [{}])[0].get("text"), document.get("error", {}).get("message"))


def test_an_envelope_is_one_answers_own() -> None:
    first, second = (Envelope(CompletionFormat(), "model", 7, token) for token in ("abc", "def"))
    for envelope in (first, second, first):
        for data in (envelope.chunk({}, False), envelope.usage_chunk(Usage(1))):
            assert json.loads(data[6:])["id"] == f"cmpl-{envelope.token}"
