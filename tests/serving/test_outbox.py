"""Pieces on their way: none is lost or out of order, and what is urgent does not wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from truthgpt.inference.request import FinishReason, Piece
from truthgpt.serving.outbox import Outbox, Place
from truthgpt.serving.piece_stream import PieceStream


def stream() -> PieceStream:
    return PieceStream(2, lambda _: None)


def piece(number: int, finish: FinishReason | None = None) -> Piece:
    return Piece(1, (number,), f"{number} ", finish)


EVENTS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["add", "add", "add", "urgent", "all", "end"])), max_size=60
)


@given(EVENTS)
def test_everything_comes_once_and_in_order(events: list[tuple[int, str]]) -> None:
    outbox, streams = Outbox(), [stream(), stream()]
    places: list[Place] = [(streams[number // 2], number % 2) for number in range(4)]
    written: dict[Place, list[int]] = {place: [] for place in places}
    arrived: dict[Place, list[int]] = {place: [] for place in places}
    ended: set[Place] = set()
    for number, (which, what) in enumerate([*events, (0, "all")]):
        place = places[which]
        if what in ("add", "end") and place not in ended:
            outbox.add(place, piece(number, "stop" if what == "end" else None))
            written[place].append(number)
            ended |= {place} if what == "end" else set()
        elif what in ("urgent", "all"):
            for owner, index, found in outbox.take(what == "all"):
                assert found.text == "".join(f"{token} " for token in found.token_ids)
                arrived[owner, index] += found.token_ids
            waiting = {place for place in places if written[place] != arrived[place]}
            assert not waiting & ended, "a last piece waits"
            assert all(arrived[place] for place in waiting), "a first piece waits"
            assert not waiting or what == "urgent"
    assert written == arrived
    assert not outbox._held and not outbox._urgent and outbox._started.isdisjoint(ended)


def test_a_piece_without_a_token_is_not_the_first() -> None:
    outbox, place = Outbox(), (stream(), 0)
    for found in (Piece(1, (), "", None), piece(1)):
        outbox.add(place, found)
        assert outbox.take(False) == [(*place, found)]
    outbox.add(place, piece(2))
    assert outbox.take(False) == []


def test_a_stream_that_is_forgotten_leaves_nothing() -> None:
    outbox, gone, other = Outbox(), stream(), stream()
    for place in ((gone, 0), (gone, 1), (other, 0)):
        outbox.add(place, piece(1))
    outbox.take(True)
    for place in ((gone, 0), (other, 0)):
        outbox.add(place, piece(2))
    outbox.add((gone, 1), piece(2, "stop"))
    outbox.forget(gone)
    assert outbox.take(True) == [(other, 0, piece(2))]
    assert outbox._started == {(other, 0)} and not outbox._urgent
