"""Pieces on their way from the engine's thread to who waits for them."""

from __future__ import annotations

from truthgpt.inference.request import Piece
from truthgpt.serving.piece_stream import PieceStream

Place = tuple[PieceStream, int]
"""A request: a stream, and the index in it."""


class Outbox:
    """Pieces that have not been given out yet, those of a request joined. The first and the last of a request are
    urgent: who waits for them waits for nothing else."""

    def __init__(self) -> None:
        self._held: dict[Place, Piece] = {}
        self._started: set[Place] = set()
        self._urgent: set[Place] = set()

    def add(self, place: Place, piece: Piece) -> None:
        """Take in what a request has got."""
        before = self._held.get(place)
        self._held[place] = piece if before is None else piece.after(before)
        if piece.finish is not None or place not in self._started:
            self._urgent.add(place)
        if piece.finish is not None:
            self._started.discard(place)
        elif piece.token_ids:
            self._started.add(place)

    def __len__(self) -> int:
        """Requests of which a piece is held."""
        return len(self._held)

    def take(self, everything: bool) -> list[tuple[PieceStream, int, Piece]]:
        """What is urgent, or everything."""
        places = list(self._held) if everything else [place for place in self._held if place in self._urgent]
        self._urgent.clear()
        return [(*place, self._held.pop(place)) for place in places]

    def forget(self, stream: PieceStream) -> None:
        """Nobody waits for the requests of this stream any more."""
        for places in (self._started, self._urgent):
            places.difference_update([place for place in places if place[0] is stream])
        for place in [place for place in self._held if place[0] is stream]:
            del self._held[place]
