"""The load benchmark of `truthgpt serve`: its client against a server that answers anything, then the whole of it."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
Load = Callable[[str], ModuleType]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
READY = "echo 'serving model at http://127.0.0.1:9/v1; Ctrl-C ends it' >&2"
WAIT = "while :; do sleep 0.05; done"
DONE = b"data: [DONE]\n\n"
SHORT = ("--prompt-tokens", "5", "40", "--max-tokens", "3", "9")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Load]:
    """Imports a script; the working folder is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(GPU)
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in GPU.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], "usage": None}).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    said = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def test_times_are_those_of_the_read_that_completed_an_event(load: Load) -> None:
    """Cut anywhere: within a size, within an event, several in one read."""
    client = load("completion_client")
    events = [event("a"), event("b"), event("c d", "length"), usage(4), DONE]
    raw = HEAD + chunked(*events)
    first, last = raw.index(b'"a"') + 60, raw.index(b'"c d"') + 60
    for size in (1, 2, 3, 7, 50, 64, 199, len(raw)):
        cuts = range(0, len(raw), size)
        reads = [(10.0 + at + size, raw[at : at + size]) for at in cuts]  # a read's time is the place of its end
        answer = client.read_answer(client.Exchange(client.Request("x" * 7, 4), 10.0, 10.0 + len(raw), reads))
        assert (answer.prompt_tokens, answer.tokens, answer.events) == (7, 4, 3)
        assert answer.first_text_s == pytest.approx(first, abs=size + 60)
        assert answer.last_text_s == pytest.approx(last, abs=size + 60)
        assert answer.first_text_s > raw.index(b'"a"') and answer.last_text_s > raw.index(b'"c d"')
        if size == 1:
            after = len(HEAD) + len(chunked(events[0])) - len(b"0\r\n\r\n")
            assert answer.first_text_s == after, "with the last byte of its chunk"
        assert answer.between_tokens_s == (answer.last_text_s - answer.first_text_s) / 3
        assert answer.end_s == len(raw)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "^: $"),
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy", "429 Too Many Requests: busy"),
        (HEAD + chunked(event("a"), event("b", "length"), usage(2)), "not whole"),
        ((HEAD + chunked(event("a"), event("b", "length"), usage(2), DONE))[:-40], "not whole"),
        (HEAD + chunked(event("a", "length"), usage(1), DONE), "2 tokens were asked for.*'completion_tokens': 1"),
        (HEAD + chunked(event("a"), event("b", "stop"), usage(2), DONE), "finish_reason stop"),
        (HEAD + chunked(event("a"), event("b", "length"), DONE), "usage None"),
        (HEAD + chunked(event("", "length"), usage(2), DONE), "2 tokens were asked for"),
    ],
)
def test_answers_that_are_not_what_was_asked_for(load: Load, raw: bytes, why: str) -> None:
    client = load("completion_client")
    with pytest.raises(client.BadAnswerError, match=why):
        client.read_answer(client.Exchange(client.Request("x", 2), 0.0, 2.0, [(1.0, raw)] if raw else []))


def test_levels_against_a_server_that_refuses(load: Load) -> None:
    """At most as many requests at once as there are clients; all are sent once; refused ones count as failed."""
    serving = load("serving")
    prompts: list[str] = []
    at_once: list[int] = [0, 0]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at_once[0] += 1
        at_once[1] = max(at_once)
        if at_once[0] == 3:
            three.set()
        await asyncio.wait_for(three.wait(), 60)  # the first ones: a slow machine may send them one after the other
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")).split()[1])
        body = json.loads(await reader.readexactly(length))
        assert body["stream"] and body["temperature"] == 0 and body["stream_options"] == {"include_usage": True}
        prompts.append(body["prompt"])
        refused = len(prompts) % 4 == 0  # before the wait, in which others come
        await asyncio.sleep(0.01)
        at_once[0] -= 1
        if refused:
            writer.write(b"HTTP/1.1 500 No\r\n\r\nno")
        else:
            count = body["max_tokens"]
            writer.write(HEAD + chunked(event("a" * (count - 1)), event("b", "length"), usage(count), DONE))
        await writer.drain()
        writer.close()

    three = asyncio.Event()

    async def both() -> dict[str, Any]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            found: dict[str, Any] = await asyncio.to_thread(serving.measure, url, asked, 3)
            return found

    asked = serving.requests(serving._options(SHORT), "3", 12)
    found = asyncio.run(both())
    assert sorted(prompts) == sorted(request.prompt for request in asked) and at_once[1] == 3
    assert (found["requests"], found["failed"], found["failures"]) == (12, 3, {"HTTP/1.1 500 No: no": 3})
    assert found["output_tokens_per_s"] == found["output_tokens"] / found["seconds"]
    assert found["request_s"]["p95"] >= found["time_to_first_token_s"]["p50"] >= 0.01
    assert "3 failed" in serving._line(found) and "HTTP/1.1 500 No" in serving._line(found)


def test_nobody_listens(load: Load) -> None:
    serving = load("serving")
    found = serving.measure("http://127.0.0.1:9", serving.requests(serving._options(SHORT), "1", 2), 1)
    assert found["failed"] == 2 and "ConnectionRefusedError" in next(iter(found["failures"]))
    assert serving._line(found)


def test_requests_are_as_said(load: Load) -> None:
    serving = load("serving")
    options = serving._options([])
    made = serving.requests(options, "64", 300)
    assert made == serving.requests(options, "64", 300)
    lengths, counts = ({len(each.prompt) for each in made}, {each.max_tokens for each in made})
    assert 100 <= min(lengths) < 150 and 950 < max(lengths) <= 1000
    assert 100 <= min(counts) < 120 and 380 < max(counts) <= 400
    for others in (
        serving.requests(options, "16", 300),
        serving.requests(serving._options(["--seed", "1"]), "64", 300),
    ):
        assert not {each.prompt for each in made} & {each.prompt for each in others}


def test_percentiles(load: Load) -> None:
    percentiles = load("serving")._percentiles
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0}
    assert percentiles([float(value) for value in range(100, 0, -1)]) == {"p50": 50.0, "p95": 95.0}


def test_tokens_of_the_model(load: Load) -> None:
    """A character of a prompt is a token, and each token that the model can write has a text of its own."""
    module = load("random_llama")
    tokenizer = module.word_tokenizer(512)
    text = module.PRINTABLE * 2
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text and len(tokenizer) == 512
    written = {index: tokenizer.decode([5, index])[1:] for index in range(512) if index != tokenizer.eos_token_id}
    assert all(written.values()) and len(set(written.values())) == 511
    assert module._word(module.VOCABULARY) != module._word(0) and module.VOCABULARY < 26**4


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo no model >&2; exit 4", r"not ready \(exit code 4\): no model"),
        (f"trap 'exit 3' INT; {READY}; {WAIT}", "after SIGINT the server ended with exit code 3, not 0"),
        (f"trap '' INT; {READY}; {WAIT}", "after SIGINT the server ended with exit code -9, not 0"),
        (f"trap 'exit 0' INT; {READY}; {WAIT}", "^2 requests failed"),
    ],
)
def test_servers_that_do_not_do_well(load: Load, monkeypatch: pytest.MonkeyPatch, script: str, why: str) -> None:
    """Each is an exit code that is not 0, and no server is left running."""
    serving, folder = load("serving"), Path.cwd()
    (folder / "fake").write_text(f"#!/bin/sh\necho $$ > {folder}/pid\n{script}\n")
    (folder / "fake").chmod(0o755)
    if "trap ''" in script:  # the one that is waited for in vain
        monkeypatch.setattr(serving, "END_TIMEOUT_S", 0.5)
    monkeypatch.setattr(serving.sys, "executable", str(folder / "fake"))
    with pytest.raises(SystemExit, match=why):
        serving.main(["--model", str(folder), "--clients", "1", "--requests", "2"])
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


def test_the_whole_of_it(load: Load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command, with a tiny model."""
    serving = load("serving")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--size", "small", "--model", "small", *SHORT, "--clients", "1", "4", "--out", "results/serving.jsonl"]
    serving.main([*arguments, "--", "--cache-memory", "16MiB"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0].startswith("ready after ") and " 16 requests 0 failed " in said[2]
    records = [json.loads(line) for line in Path("results/serving.jsonl").read_text().splitlines()]
    assert [(record["clients"], record["requests"], record["failed"]) for record in records] == [(1, 4, 0), (4, 16, 0)]
    for record in records:
        asked = serving.requests(serving._options(SHORT), str(record["clients"]), record["requests"])
        assert record["prompt_tokens"] == sum(len(each.prompt) for each in asked)
        assert record["output_tokens"] == sum(each.max_tokens for each in asked)
        assert record["kind"] == "serving" and record["server_options"] == ["--cache-memory", "16MiB"]
        assert record["ready_s"] > 0 and record["gpu"] is None and "uvicorn" in record["versions"]
    embeddings = load_file("small/model.safetensors")["model.embed_tokens.weight"]
    end = load("random_llama").word_tokenizer(512).eos_token_id
    assert (embeddings == 0).all(dim=1).nonzero().tolist() == [[end]], "so that no answer ends before its time"
