"""A client of `/v1/completions` that costs next to nothing: it keeps what it reads and when, and looks at it later."""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from urllib.parse import urlsplit

REQUEST_TIMEOUT_S = 300.0
_READ_BYTES = 65_536


@dataclass(frozen=True)
class Request:
    """What to continue, and by how many tokens."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Exchange:
    """A request and all that came back, with the time of every read (`time.perf_counter`)."""

    request: Request
    begin_s: float
    end_s: float
    reads: list[tuple[float, bytes]]
    error: str | None = None
    """Why it was broken off."""


@dataclass(frozen=True)
class Answer:
    """A complete answer: seconds since its request was sent, tokens by the server's count."""

    first_text_s: float
    last_text_s: float
    end_s: float
    prompt_tokens: int
    tokens: int
    events: int
    """Events with text. Tokens that came faster than they were sent are in one event."""

    @property
    def between_tokens_s(self) -> float:
        """Mean time between two tokens."""
        return (self.last_text_s - self.first_text_s) / max(self.tokens - 1, 1)


class BadAnswerError(Exception):
    """An answer that is not what was asked for."""


async def complete(url: str, request: Request) -> Exchange:
    """Ask for a greedy, streamed completion over a connection of its own, and read to its end."""
    begin_s = time.perf_counter()
    reads: list[tuple[float, bytes]] = []
    error = None
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await _exchange(url, request, reads)
    except OSError as broken:  # a TimeoutError is one
        error = f"{type(broken).__name__}: {broken}".removesuffix(": ")
    return Exchange(request, begin_s, time.perf_counter(), reads, error)


async def _exchange(url: str, request: Request, reads: list[tuple[float, bytes]]) -> None:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(_as_http(address.netloc, request))
        while data := await reader.read(_READ_BYTES):
            reads.append((time.perf_counter(), data))
    finally:
        writer.close()


def _as_http(host: str, request: Request) -> bytes:
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    asked = {"prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": 0.0, **streaming}
    body = json.dumps(asked).encode()
    lines = (
        "POST /v1/completions HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_answer(exchange: Exchange) -> Answer:
    """What came back, checked.

    Raises:
        BadAnswerError: the request was broken off or refused, the stream is not whole, or the answer has not the
            tokens asked for.
    """
    if exchange.error is not None:
        raise BadAnswerError(exchange.error)
    body, ends, times = _body(exchange.reads)
    texts, usage, place, finish = [], None, 0, None
    events = body.split(b"\n\n")
    if events[-2:] != [b"data: [DONE]", b""]:
        raise BadAnswerError(f"the stream is not whole: it ends with {body[-200:]!r}")
    for event in events[:-2]:
        place += len(event) + 2
        said = json.loads(event.removeprefix(b"data: "))
        for choice in said["choices"]:
            finish = choice["finish_reason"] or finish
            if choice["text"]:
                texts.append(times[bisect_left(ends, place)])
        usage = said["usage"] or usage
    asked = exchange.request.max_tokens
    if usage is None or usage["completion_tokens"] != asked or finish != "length" or not texts:
        raise BadAnswerError(f"{asked} tokens were asked for: finish_reason {finish}, usage {usage}")
    begin_s = exchange.begin_s
    return Answer(
        first_text_s=texts[0] - begin_s,
        last_text_s=texts[-1] - begin_s,
        end_s=exchange.end_s - begin_s,
        prompt_tokens=usage["prompt_tokens"],
        tokens=usage["completion_tokens"],
        events=len(texts),
    )


def _body(reads: Sequence[tuple[float, bytes]]) -> tuple[bytes, list[int], list[float]]:
    """The body of a chunked answer, and the place up to which it was there at which times."""
    read_ends = list(accumulate(len(data) for _, data in reads))
    head, _, rest = (raw := b"".join(data for _, data in reads)).partition(b"\r\n\r\n")
    status = head.partition(b"\r\n")[0].decode(errors="replace")
    if " 200 " not in f"{status} " or b"transfer-encoding: chunked" not in head.lower():
        raise BadAnswerError(f"{status}: {rest[:200].decode(errors='replace')}")
    body, ends, times = bytearray(), [], []
    place = len(head) + 4
    while (line_end := raw.find(b"\r\n", place)) >= 0 and (size := int(raw[place:line_end], 16)):
        body += raw[line_end + 2 : line_end + 2 + size]
        place = line_end + 2 + size + 2
        ends.append(len(body))
        times.append(reads[bisect_left(read_ends, min(place, len(raw)))][0])
    return bytes(body), ends, times
