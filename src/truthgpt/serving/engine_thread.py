"""The engine's own thread, and how the event loop talks with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from truthgpt.errors import TruthGPTError
from truthgpt.inference.request import Piece, Sampling
from truthgpt.serving.base import Load, TextEngine
from truthgpt.serving.outbox import Outbox, Place
from truthgpt.serving.piece_stream import PieceStream

logger = logging.getLogger(__name__)

DEFAULT_MAX_WAITING = 1024
_JOIN_S = 30.0
"""How long the end of the server waits for a step that is under way."""
_REST = 5.0
"""How long the event loop sends nothing but urgent pieces after it has sent all there were, in times of what that took.
To send an event takes it many times as long as the engine needs for a token, and only one of the two runs at a time:
when it cannot keep up, its events become fewer and longer, instead of the engine slower."""
_MAX_REST_S = 0.5
_MAX_FAILURES = 3
"""Failures in a row, without a step that worked, after which an engine is given up."""


class BusyError(TruthGPTError):
    """More requests are waiting than the server keeps; come again later."""


class StoppingError(TruthGPTError):
    """The server is being stopped."""


class EngineError(TruthGPTError):
    """The engine failed at no fault of the request."""


@dataclass(frozen=True)
class TextRequest:
    """A prompt, as token ids, and how to continue it."""

    prompt_ids: Sequence[int]
    sampling: Sampling


class EngineThread:
    """Steps a single-threaded engine in a thread of its own while there is work, and sleeps otherwise.

    `start`, `stream`, `check_room` and `stop` are called in one event loop. Every call of the engine is made in the
    thread.

    Args:
        engine: what writes the answers.
        max_waiting: requests that may wait for their first token, 1 or more.
    """

    def __init__(self, engine: TextEngine, max_waiting: int = DEFAULT_MAX_WAITING) -> None:
        self.model_name = engine.model_name
        self.context_tokens = engine.context_tokens
        self.max_waiting = max_waiting
        self.load: Load = engine.load()
        """How busy the engine was after its last step."""
        self._engine = engine
        # Of the event loop.
        self._streams: set[PieceStream] = set()
        self._outbox = Outbox()
        self._resting = False
        self.stopping = asyncio.Event()
        """Set once the server is being stopped."""
        self._hurried = False
        self._loop: asyncio.AbstractEventLoop | None = None
        # Shared, behind the condition; `_failed` is written by the thread alone.
        self._condition = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._ending = False
        self._failed = False
        # Of the thread.
        self._live: dict[int, Place] = {}
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests that have no token yet."""
        return sum(len(stream.unstarted & stream.unfinished) for stream in self._streams)

    @property
    def running(self) -> int:
        """Requests that are being written: they have a token, and not their last."""
        return sum(len(stream.unfinished - stream.unstarted) for stream in self._streams)

    @property
    def state(self) -> str:
        """`ok`, `failed` (the engine is beyond repair) or `stopping`."""
        return "stopping" if self.stopping.is_set() else "failed" if self._failed else "ok"

    def start(self) -> None:
        """Start the thread; its answers go to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def check_room(self, count: int) -> None:
        """Say whether `count` more requests would be taken.

        Raises:
            BusyError: too many are waiting.
            StoppingError: the server is being stopped.
            EngineError: the engine is beyond repair.
        """
        if self.stopping.is_set():
            raise StoppingError("the server is being stopped")
        if self._failed:
            raise EngineError("the engine has failed and cannot go on; the server has to be started again")
        waiting = self.waiting
        if waiting + count > self.max_waiting:
            raise BusyError(f"{waiting} of at most {self.max_waiting} requests are waiting; try again later")

    def stream(self, requests: Sequence[TextRequest]) -> PieceStream:
        """Submit requests, all or none. Close the stream when its consumer goes away: that cancels them.

        Raises:
            BusyError, StoppingError, EngineError: see `check_room`. What the engine itself refuses is raised by
                `PieceStream.accepted`, or while iterating.
        """
        self.check_room(len(requests))
        stream = PieceStream(len(requests), self._close)
        self._streams.add(stream)
        self._post(lambda: self._submit(stream, requests))
        return stream

    def hurry(self) -> None:
        """Have `stop` wait for no answers any more."""
        self._hurried = True

    async def stop(self, deadline_s: float) -> None:
        """Take no more requests, let those under way end, and cancel what is left after `deadline_s` seconds."""
        self.stopping.set()
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        while self._streams and loop.time() < end and not self._hurried:
            await asyncio.sleep(0.02)
        self._deliver(everything=True)
        for stream in list(self._streams):
            stream.fail(StoppingError("the server was stopped before the answer was complete"))
            self._close(stream)
        with self._condition:
            self._ending = True
            self._condition.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, _JOIN_S)
            if self._thread.is_alive():
                logger.warning("the engine's last step takes longer than %d s: leaving without it", _JOIN_S)

    def _close(self, stream: PieceStream) -> None:
        if stream in self._streams:
            self._forget(stream)
            self._post(lambda: self._cancel(stream))

    def _post(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._inbox.append(command)
            self._condition.notify()

    def _forget(self, stream: PieceStream) -> None:
        self._streams.discard(stream)
        self._outbox.forget(stream)

    def _receive(self, load: Load, written: Sequence[tuple[Place, Piece]]) -> None:
        """Take in what a step has written, and deliver what does not wait for the end of a rest."""
        self.load = load
        for (stream, index), piece in written:
            if stream in self._streams:  # else nobody waits for it any more
                self._outbox.add((stream, index), piece)
        if self._resting:
            self._deliver(everything=False)
        else:
            self._deliver_and_rest()

    def _deliver_and_rest(self) -> None:
        begin = time.monotonic()
        self._resting = True
        self._deliver(everything=True)
        loop = asyncio.get_running_loop()
        # Behind those who were woken, who send before it.
        loop.call_soon(lambda: loop.call_later(min(_REST * (time.monotonic() - begin), _MAX_REST_S), self._end_rest))

    def _end_rest(self) -> None:
        """What was held meanwhile is delivered now, however long the engine's next step takes."""
        self._resting = False
        if self._outbox:
            self._deliver_and_rest()

    def _deliver(self, everything: bool) -> None:
        for stream, index, piece in self._outbox.take(everything):
            if piece.finish == "error":
                stream.put(index, replace(piece, finish=None))  # what was written before
                stream.fail(EngineError("the model's numbers are not finite: it cannot continue this text"))
                self._close(stream)
                continue
            stream.put(index, piece)
            if piece.token_ids or piece.finish is not None:
                stream.unstarted.discard(index)
            if not stream.unfinished:
                self._streams.discard(stream)

    def _fail(self, stream: PieceStream, error: Exception) -> None:
        stream.fail(error)
        self._forget(stream)

    def _lose(self, streams: Collection[PieceStream]) -> None:
        """The engine failed: these end, after what was written before."""
        self._deliver(everything=True)
        for stream in streams:
            self._fail(stream, EngineError("the engine failed while it wrote; the server's log says why"))

    # From here on in the thread.

    @property
    def _has_work(self) -> bool:
        return self._engine.has_work and not self._failed

    def _run(self) -> None:
        # The loop is closed where a process is ended in a hurry: then nobody listens any more.
        with contextlib.suppress(_LoopClosedError):
            while self._wait_for_work():
                self._step()

    def _wait_for_work(self) -> bool:
        """Take the commands of the event loop; False: the end. Raises _LoopClosedError."""
        with self._condition:
            self._condition.wait_for(lambda: self._ending or self._inbox or self._has_work)
            commands, self._inbox = self._inbox, deque()
        for command in commands:
            command()
        return not self._ending

    def _submit(self, stream: PieceStream, requests: Sequence[TextRequest]) -> None:
        ids: list[int] = []
        error: Exception
        try:
            if self._failed:
                raise EngineError("the engine has failed and cannot go on; the server has to be started again")
            for request in requests:
                ids.append(self._engine.submit(request.prompt_ids, request.sampling))
        except TruthGPTError as refused:
            error = refused
        except Exception as unexpected:
            logger.error("the engine could not take a request", exc_info=unexpected)
            error = EngineError("the engine could not take the request; the server's log says why")
        else:
            self._live.update({request_id: (stream, index) for index, request_id in enumerate(ids)})
            self._call(stream.accept)
            return
        self._call(self._fail, stream, error)
        self._cancel_in_engine(ids)

    def _cancel(self, stream: PieceStream) -> None:
        ids = [request_id for request_id, (owner, _) in self._live.items() if owner is stream]
        for request_id in ids:
            del self._live[request_id]
        self._cancel_in_engine(ids)

    def _cancel_in_engine(self, ids: Sequence[int]) -> None:
        try:
            for request_id in ids:
                self._engine.cancel(request_id)
        except Exception as error:
            logger.error("the engine could not cancel a request: its %d requests end", len(self._live), exc_info=error)
            self._give_up_requests()

    def _step(self) -> None:
        if not self._has_work:
            return
        try:
            pieces = self._engine.step()
        except Exception as error:
            logger.error("a step of the engine failed: its %d requests end", len(self._live), exc_info=error)
            self._give_up_requests()
            return
        self._failures = 0
        written = [(self._live[piece.request_id], piece) for piece in pieces if piece.request_id in self._live]
        for piece in pieces:
            if piece.finish is not None:
                self._live.pop(piece.request_id, None)
        self._call(self._receive, self._engine.load(), written)

    def _give_up_requests(self) -> None:
        """End every request with an error and empty the engine, or say that it cannot go on."""
        self._call(self._lose, {stream for stream, _ in self._live.values()})
        self._live.clear()
        self._failures += 1
        self._failed = self._failures >= _MAX_FAILURES
        try:
            self._engine.abandon()
        except Exception as error:
            logger.error("the engine could not be emptied", exc_info=error)
            self._failed = True
        if self._failed:
            logger.error("the engine cannot go on: every request is refused until the server is started again")
            return
        self._call(self._receive, self._engine.load(), ())

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Have the event loop call `function`. Raises _LoopClosedError."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError as error:
            raise _LoopClosedError from error


class _LoopClosedError(Exception):
    """The event loop that answers go to has been closed."""
