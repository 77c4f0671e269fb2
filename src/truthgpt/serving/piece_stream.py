"""The answers of one client's request as they are written, on the side of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from truthgpt.inference.request import Piece


class PieceStream:
    """Yields `(index, piece)` of one or more requests until all of them are finished; for one consumer.

    Pieces that the consumer has not taken yet are joined, so that a slow client holds one piece a request. Everything
    here runs in the event loop.

    Args:
        count: number of requests; they have the indices from 0.
        on_close: called by `close`.
    """

    def __init__(self, count: int, on_close: Callable[[PieceStream], None]) -> None:
        self.unstarted = set(range(count))
        """Requests without a token yet."""
        self.unfinished = set(range(count))
        """Requests that have got no last piece yet."""
        self._on_close = on_close
        self._ready: dict[int, Piece] = {}
        self._error: Exception | None = None
        self._accepted = False
        self._changed = asyncio.Event()

    async def accepted(self) -> None:
        """Return once the engine has taken all the requests. Raises what the engine raised when it refused one."""
        while not self._accepted:
            self._raise_error()
            self._changed.clear()
            await self._changed.wait()

    def __aiter__(self) -> PieceStream:
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        while not self._ready:
            self._raise_error()
            if not self.unfinished:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        index = next(iter(self._ready))
        return index, self._ready.pop(index)

    def close(self) -> None:
        """Cancel what is not finished; the stream then ends."""
        self.unfinished.clear()
        self._on_close(self)
        self._changed.set()

    def accept(self) -> None:
        """All requests are with the engine."""
        self._accepted = True
        self._changed.set()

    def put(self, index: int, piece: Piece) -> None:
        """Add what request `index` has got; ignored after its end."""
        if index not in self.unfinished:
            return
        before = self._ready.pop(index, None)
        self._ready[index] = piece if before is None else piece.after(before)
        if piece.finish is not None:
            self.unfinished.discard(index)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """End every request that is not finished; the consumer gets `error` after the pieces it has not taken yet."""
        if self.unfinished:
            self.unfinished.clear()
            self._error = error
        self._changed.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
