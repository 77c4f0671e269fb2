"""What happens between clients: many at once, too many, some that leave, and an engine that fails."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from tests.serving.fake_engine import FakeEngine, expected_text
from tests.serving.server import RunningServer, serving, wait_until
from truthgpt.inference.request import Sampling
from truthgpt.models.tokenizer import byte_tokenizer
from truthgpt.serving.engine_thread import EngineThread, TextRequest
from truthgpt.serving.openai_api import create_app
from truthgpt.serving.prompts import PromptEncoder

CHAT: list[Any] = [{"role": "user", "content": "Hi"}]


class Gate:
    """Holds an engine's steps back until it is opened; as `before_step`."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self) -> None:
        assert self.open.wait(60)


class Failing:
    """Raises in the steps whose numbers, counted from 0, are given; as `before_step`."""

    def __init__(self, *steps: int) -> None:
        self._steps = set(steps)
        self._step = -1

    def __call__(self) -> None:
        self._step += 1
        if self._step in self._steps:
            raise RuntimeError("the GPU is on fire: secret detail")


def test_200_requests_from_32_clients() -> None:
    """None is lost or mixed up with another, streamed or not, and they are written together."""

    async def one(client: openai.AsyncOpenAI, places: asyncio.Semaphore, number: int) -> tuple[str, str]:
        prompt, tokens = f"request {number}", 5 + number % 20
        want = expected_text(list(prompt.encode()), number, tokens)
        options: dict[str, Any] = {"model": "fake", "prompt": prompt, "max_tokens": tokens, "seed": number}
        async with places:
            if number % 2:
                done = await client.completions.create(**options)
                return done.choices[0].text, want
            chunks = await client.completions.create(**options, stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks]), want

    async def all_of_them(url: str) -> list[tuple[str, str]]:
        places = asyncio.Semaphore(32)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(one(client, places, number) for number in range(200)))

    gate = Gate()  # until all clients wait: a slow machine may send no faster than the engine writes
    with serving(FakeEngine(step_s=0.002, before_step=gate)) as server:

        def open_when_all_wait() -> None:
            wait_until(lambda: "truthgpt_requests_waiting 32" in httpx.get(f"{server.url}/metrics").text)
            gate.open.set()

        opener = threading.Thread(target=open_when_all_wait)
        opener.start()
        results = asyncio.run(asyncio.wait_for(all_of_them(server.url), 120))
        opener.join()
        assert all(got == want for got, want in results) and len(results) == 200
        assert len(server.engine.submitted) == 200 and server.engine.cancelled == []
        assert server.engine.largest_batch == 32
        assert 'status="200"} 200' in httpx.get(f"{server.url}/metrics").text


def start_in_background(server: RunningServer, number: int, results: list[Any], **options: Any) -> threading.Thread:
    def run() -> None:
        try:
            results.append(
                server.client.completions.create(
                    **{"model": "fake", "prompt": "x", "max_tokens": 3, "seed": number, **options}
                )
            )
        except openai.APIError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_too_many_waiting_requests_come_again_later() -> None:
    gate = Gate()
    with serving(FakeEngine(before_step=gate), max_waiting=3) as server:
        results: list[Any] = []
        threads = [start_in_background(server, number, results) for number in range(3)]
        wait_until(lambda: "truthgpt_requests_waiting 3" in httpx.get(f"{server.url}/metrics").text)
        with pytest.raises(openai.RateLimitError, match="3 of at most 3 requests are waiting") as caught:
            server.client.completions.create(model="fake", prompt="x")
        assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "too_many_requests"
        with pytest.raises(openai.BadRequestError, match="4 answers are more than the 3"):
            server.client.completions.create(model="fake", prompt="x", n=4)
        gate.open.set()
        for thread in threads:
            thread.join()
        assert [result.choices[0].finish_reason for result in results] == ["length"] * 3
        # Its own client tries again by itself.
        server.client.completions.create(model="fake", prompt="x", n=3)


def test_requests_whose_prompts_are_being_encoded_count(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, encoding = Gate(), threading.Event()

    def encode(self: PromptEncoder, prompts: list[str]) -> list[list[int]]:
        encoding.set()
        gate()
        return [[1] for _ in prompts]

    monkeypatch.setattr(PromptEncoder, "_encode", encode)
    with serving(max_waiting=1) as server:
        results: list[Any] = []
        thread = start_in_background(server, 0, results)
        assert encoding.wait(60)
        with pytest.raises(openai.RateLimitError):
            server.client.completions.create(model="fake", prompt="x", timeout=20)
        gate.open.set()
        thread.join()
        assert results[0].choices[0].text == expected_text([1], 0, 3)


def test_prompts_are_encoded_with_a_tokenizer_of_their_own() -> None:
    """The engine's thread decodes with the other one at the same time."""
    tokenizer = byte_tokenizer()
    encoder = PromptEncoder(tokenizer)
    tokenizer.add_tokens(["abcd"])
    assert asyncio.run(encoder.encode(["abcd"])) == [list(b"abcd")]
    encoder.close()


def test_choices_are_taken_all_or_none() -> None:
    gate = Gate()
    with serving(FakeEngine(before_step=gate), max_waiting=3) as server:
        results: list[Any] = []
        thread = start_in_background(server, 0, results, n=2)
        wait_until(lambda: len(server.engine.submitted) == 2)
        with pytest.raises(openai.RateLimitError):
            server.client.completions.create(model="fake", prompt="x", n=2)
        gate.open.set()
        thread.join()
        assert len(results[0].choices) == 2 and len(server.engine.submitted) == 2


@pytest.mark.parametrize("started", [True, False], ids=["while text comes", "before the first text"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(stream: bool, started: bool) -> None:
    gate = Gate()
    engine = FakeEngine(step_s=0.01, context_tokens=None, before_step=gate)
    if started:
        gate.open.set()
    with serving(engine) as server:
        body = {"prompt": "x", "max_tokens": 5000, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                if started:
                    next(answer.iter_lines())
        else:
            with post_unread(server.url, body):
                wait_until(lambda: engine.steps > 0 if started else engine.submitted != [])
        gate.open.set()
        wait_until(lambda: engine.cancelled == [1])
        wait_until(lambda: 'status="499"} 1' in httpx.get(f"{server.url}/metrics").text)
        metrics = httpx.get(f"{server.url}/metrics").text
        assert "truthgpt_requests_running 0" in metrics and "truthgpt_requests_waiting 0" in metrics
        # The next one is served, at once.
        server.client.completions.create(model="fake", prompt="x", max_tokens=2)


@contextmanager
def post_unread(url: str, body: dict[str, Any]) -> Iterator[None]:
    """A request for a completion is under way inside the block; at its end the client leaves."""
    address, data = url.removeprefix("http://"), json.dumps(body)
    host, _, port = address.rpartition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
        yield


def test_a_handler_that_is_cancelled_leaves_nothing_behind() -> None:
    """As the web server does at its end; here before the engine, in a long step, has even taken the request."""
    gate = Gate()
    engine = FakeEngine(before_step=gate)
    thread = EngineThread(engine)
    app = create_app(thread, byte_tokenizer())
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"prompt": "x", "max_tokens": 100}', "more_body": False}

    async def send(message: Any) -> None:
        raise AssertionError("there is nothing to say")

    async def run() -> None:
        async with app.router.lifespan_context(app):
            first = thread.stream([TextRequest([1], Sampling(max_new_tokens=3))])
            await first.accepted()
            handler = asyncio.create_task(app(scope, receive, send))
            while thread.waiting < 2:
                await asyncio.sleep(0.005)
            handler.cancel()
            await asyncio.gather(handler, return_exceptions=True)
            assert thread.waiting == 1
            gate.open.set()
            assert len([piece async for piece in first]) > 0
            while not engine.cancelled:
                await asyncio.sleep(0.005)
            assert engine.cancelled == [2]

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_other_choices_are_cancelled_with_it() -> None:
    engine = FakeEngine(step_s=0.01, context_tokens=None)
    with serving(engine) as server:
        body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 5000, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        wait_until(lambda: sorted(engine.cancelled) == [1, 2, 3, 4])


def test_a_client_that_does_not_read_holds_nobody_up() -> None:
    """What it has not taken waits as one piece a choice."""
    engine = FakeEngine("a long name " * 400, context_tokens=None)  # so that the connection is full soon
    with serving(engine) as server:
        body = {"prompt": "x", "max_tokens": 4_000, "stream": True, "seed": 0}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            wait_until(lambda: engine.steps > 0)
            assert server.client.completions.create(model=engine.model_name, prompt="y", max_tokens=2)
            wait_until(lambda: not engine.has_work)
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) < 3_900, "every token came alone"
        text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])
        assert text == expected_text([ord("x")], 0, 4_000)


def test_a_step_that_fails_once(caplog: pytest.LogCaptureFixture) -> None:
    """It ends what was running, with no word of the inside; later requests are served."""
    with serving(FakeEngine(step_s=0.002, before_step=Failing(3))) as server:
        with pytest.raises(openai.InternalServerError, match="the engine failed while it wrote") as caught:
            server.client.completions.create(model="fake", prompt="x", max_tokens=50)
        assert caught.value.code == "engine_error" and "secret" not in str(caught.value)
        assert "a step of the engine failed" in caplog.text and "secret detail" in caplog.text
        assert server.client.completions.create(model="fake", prompt="x", max_tokens=5).choices[0].text
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_step_that_fails_in_a_stream() -> None:
    with serving(FakeEngine(before_step=Failing(3))) as server:
        text = ""
        with pytest.raises(openai.APIError, match="the engine failed while it wrote"):
            for chunk in server.client.completions.create(model="fake", prompt="x", max_tokens=50, stream=True):
                text += chunk.choices[0].text
        assert len(text) == 3
        assert 'status="500"} 1' in httpx.get(f"{server.url}/metrics").text


def test_an_engine_that_keeps_failing_is_given_up() -> None:
    with serving(FakeEngine(before_step=Failing(*range(100)))) as server:
        for _ in range(3):
            with pytest.raises(openai.InternalServerError, match="the engine failed while it wrote"):
                server.client.completions.create(model="fake", prompt="x")
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="has to be started again"):
                server.client.completions.create(model="fake", prompt="x", stream=stream)
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "truthgpt_engine_up 0" in httpx.get(f"{server.url}/metrics").text
        assert server.engine.steps == 0


def test_failures_now_and_then_are_forgiven() -> None:
    with serving(FakeEngine(before_step=Failing(0, 1, 3, 4, 6, 7))) as server:
        for _ in range(3):
            for _ in range(2):
                with pytest.raises(openai.InternalServerError):
                    server.client.completions.create(model="fake", prompt="x", max_tokens=1)
            server.client.completions.create(model="fake", prompt="x", max_tokens=1)


def test_logits_that_are_not_finite() -> None:
    """They end the request they belong to, with its other choices, and no other."""
    engine = FakeEngine(step_s=0.005, context_tokens=None)
    with serving(engine) as server:
        results: list[Any] = []
        thread = start_in_background(server, 0, results, max_tokens=60)
        with pytest.raises(openai.InternalServerError, match="numbers are not finite") as caught:
            server.client.completions.create(model="fake", prompt=[[1], [999]], max_tokens=5000)
        assert caught.value.code == "engine_error"
        with pytest.raises(openai.APIError, match="numbers are not finite"):
            list(server.client.completions.create(model="fake", prompt=[999], max_tokens=100, stream=True))
        thread.join()
        assert results[0].choices[0].text == expected_text([ord("x")], 0, 60)
        wait_until(lambda: len(engine.cancelled) == 1)
        assert engine.submitted[engine.cancelled[0] - 1][0] == [1]


def test_a_submission_that_fails_ends_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    submit = engine.submit

    def failing(prompt_ids: Any, sampling: Any) -> int:
        if prompt_ids == [7]:
            raise KeyError("bug")
        return submit(prompt_ids, sampling)

    monkeypatch.setattr(engine, "submit", failing)
    with serving(engine) as server:
        with pytest.raises(openai.InternalServerError, match="could not take the request"):
            server.client.completions.create(model="fake", prompt=[[1], [7]])
        wait_until(lambda: engine.cancelled == [1])
        assert server.client.completions.create(model="fake", prompt=[1], max_tokens=2).choices[0].text


def test_the_end_lets_answers_end_or_cancels_them() -> None:
    before = set(threading.enumerate())
    engine = FakeEngine(step_s=0.01, context_tokens=None)
    results: list[Any] = []
    with serving(engine, end_s=60) as server:
        short = start_in_background(server, 0, results, max_tokens=40)
        wait_until(lambda: engine.steps > 2)
    short.join()
    assert results[0].choices[0].text == expected_text([ord("x")], 0, 40)
    left = set(threading.enumerate()) - before
    assert len(left) < 10 and not any(thread.name == "engine" for thread in left)
