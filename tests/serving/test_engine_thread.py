"""The engine's thread alone."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tests.serving.fake_engine import FakeEngine, expected_text
from truthgpt.inference.request import Piece, Sampling
from truthgpt.serving.engine_thread import BusyError, EngineError, EngineThread, StoppingError, TextRequest
from truthgpt.serving.piece_stream import PieceStream


def request(tokens: int = 5, seed: int = 0) -> TextRequest:
    return TextRequest([1, 2], Sampling(max_new_tokens=tokens, seed=seed))


async def text_of(stream: PieceStream) -> str:
    return "".join([piece.text async for _, piece in stream])


def test_it_sleeps_without_work_and_steps_only_with_it() -> None:
    async def run() -> None:
        engine = FakeEngine()
        thread = EngineThread(engine)
        thread.start()
        await asyncio.sleep(0.05)
        assert engine.steps == 0
        assert await text_of(thread.stream([request(5)])) == expected_text([1, 2], 0, 5)
        await asyncio.sleep(0.05)
        assert engine.steps == 5
        await thread.stop(1)

    asyncio.run(run())


def test_waiting_and_running() -> None:
    async def run() -> None:
        gate = threading.Semaphore(0)
        thread = EngineThread(FakeEngine(before_step=lambda: bool(gate.acquire()), slots=1), max_waiting=2)
        streams = [thread.stream([request(3)]), thread.stream([request(3)])]
        thread.start()  # after both: else the first step may begin with one of them
        assert (thread.waiting, thread.running) == (2, 0)
        with pytest.raises(BusyError):
            thread.stream([request()])
        gate.release()
        await anext(streams[0])
        assert (thread.waiting, thread.running) == (1, 1)
        assert (thread.load.running, thread.load.waiting) == (1, 1)
        third = thread.stream([request(3)])
        third.close()
        streams[1].close()
        assert (thread.waiting, thread.running) == (0, 1)
        assert [item async for item in third] == []
        gate.release(20)
        await text_of(streams[0])
        assert (thread.waiting, thread.running) == (0, 0)
        await thread.stop(1)

    asyncio.run(run())


def test_closing_twice_or_after_the_end_cancels_nothing_more() -> None:
    async def run() -> None:
        engine = FakeEngine(step_s=0.005)
        thread = EngineThread(engine)
        thread.start()
        left, whole = thread.stream([request(100_000)]), thread.stream([request(3)])
        await anext(left)
        left.close()
        left.close()
        await text_of(whole)
        whole.close()
        assert thread._streams == set()
        await thread.stop(1)
        assert engine.cancelled == [1] and thread._live == {} and thread._outbox._started == set()

    asyncio.run(run())


def test_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    """No new requests; short ones end, long ones get an error at the deadline and are cancelled."""

    async def run() -> None:
        engine = FakeEngine(step_s=0.005, context_tokens=None)
        thread = EngineThread(engine)
        thread.start()
        short, long = thread.stream([request(10)]), thread.stream([request(100_000)])
        await long.accepted()
        stopping = asyncio.create_task(thread.stop(60))
        await asyncio.sleep(0)
        assert thread.state == "stopping"
        with pytest.raises(StoppingError):
            thread.stream([request()])
        assert await text_of(short) == expected_text([1, 2], 0, 10)
        assert not stopping.done()
        loop = asyncio.get_running_loop()
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + 60)
        with pytest.raises(StoppingError, match="before the answer was complete"):
            await text_of(long)
        await stopping
        assert engine.cancelled == [2]
        await thread.stop(1)

    asyncio.run(run())


def test_a_loop_that_is_gone_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    engine = FakeEngine(step_s=0.005, context_tokens=None)

    async def run() -> None:
        EngineThread.start(thread)
        await thread.stream([request(100_000)]).accepted()

    thread = EngineThread(engine)
    asyncio.run(run())
    thread._thread.join(60)
    assert not thread._thread.is_alive() and errors == []


def test_pieces_are_joined_until_they_are_taken() -> None:
    async def run() -> None:
        stream = PieceStream(2, lambda _: None)
        stream.put(0, Piece(7, (1,), "a", None))
        stream.put(1, Piece(8, (2,), "b", "stop"))
        stream.put(0, Piece(7, (3,), "c", "length"))
        stream.put(0, Piece(7, (9,), "after the end", None))
        assert sorted([item async for item in stream]) == [
            (0, Piece(7, (1, 3), "ac", "length")),
            (1, Piece(8, (2,), "b", "stop")),
        ]

    asyncio.run(run())


def test_an_error_comes_after_the_text_before_it() -> None:
    async def run() -> None:
        stream = PieceStream(1, lambda _: None)
        stream.put(0, Piece(7, (1,), "a", None))
        stream.fail(StoppingError("now"))
        assert (await anext(stream))[1].text == "a"
        with pytest.raises(StoppingError):
            await anext(stream)

    asyncio.run(run())


def test_an_event_loop_that_cannot_keep_up_gets_fewer_and_longer_pieces() -> None:
    """The engine goes on meanwhile; the first and the last token of a request do not wait."""

    async def pieces_of(thread: EngineThread, busy_s: float) -> list[Piece]:
        found = []
        async for _, piece in thread.stream([request(120)]):
            found.append(piece)
            time.sleep(busy_s)  # the event loop is what is busy
        return found

    busy_s = 0.02
    cycle_s = 6 * busy_s
    """Of events, and then five times as long of rest."""

    async def run() -> None:
        thread = EngineThread(FakeEngine(step_s=0.002))
        thread.start()
        started_s = time.monotonic()
        slow = await pieces_of(thread, busy_s)
        took_s = time.monotonic() - started_s
        quick = await pieces_of(thread, 0.0)
        for pieces in (slow, quick):
            assert "".join(piece.text for piece in pieces) == expected_text([1, 2], 0, 120)
            assert len(pieces[0].token_ids) <= 2
        assert len(slow) <= took_s / cycle_s + 3, "one a rest, however slow the engine is, and the first and the last"
        assert len(quick) > 2 * len(slow)
        await thread.stop(1)

    asyncio.run(run())


def test_what_is_held_arrives_while_the_next_step_goes_on() -> None:
    """At the end of the rest, not of a step that takes long, as one with a long prompt."""

    async def run() -> None:
        gate = threading.Semaphore(2)
        thread = EngineThread(FakeEngine(before_step=lambda: bool(gate.acquire())))
        thread.start()
        stream, text = thread.stream([request(3)]), ""
        while len(text) < 2:
            _, piece = await asyncio.wait_for(anext(stream), 20)
            text += piece.text
            time.sleep(0.1)  # of events: the second token comes in the rest after it
        assert text == expected_text([1, 2], 0, 2)
        gate.release()
        assert await text_of(stream) == expected_text([1, 2], 0, 3)[2:]
        await thread.stop(1)

    asyncio.run(run())


def test_what_is_held_arrives_before_the_end_of_the_server() -> None:
    async def run() -> None:
        gate, third = threading.Event(), threading.Event()

        def wait() -> None:
            if engine.steps == 2:
                third.set()
                gate.wait()

        engine = FakeEngine(before_step=wait)
        thread = EngineThread(engine)
        thread.start()
        stream = thread.stream([request(3)])
        _, first = await anext(stream)
        assert third.wait(20)
        time.sleep(0.1)  # of events: the second token comes in the rest after them
        stopping, text = asyncio.create_task(thread.stop(0.1)), first.text
        with pytest.raises(StoppingError):
            async for _, piece in stream:
                text += piece.text
        assert text == expected_text([1, 2], 0, 2)
        gate.set()
        await stopping

    asyncio.run(run())


def test_what_was_written_before_a_failure_arrives_before_it() -> None:
    async def run() -> None:
        def fail() -> None:
            if engine.steps == 50:
                raise RuntimeError("out of order")

        engine = FakeEngine(before_step=fail)
        thread = EngineThread(engine)
        thread.start()
        text = ""
        with pytest.raises(EngineError):
            async for _, piece in thread.stream([request(100)]):
                text += piece.text
                time.sleep(0.005)
        assert text == expected_text([1, 2], 0, engine.steps)
        await thread.stop(1)

    asyncio.run(run())
