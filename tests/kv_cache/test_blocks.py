"""Block tables by hand, and random histories of requests against a model that knows what each position must hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from truthgpt.kv_cache.blocks import BlockPool, BlockTable, OutOfBlocks


def write(pool: BlockPool, table: BlockTable, token_ids: Sequence[int]) -> list[tuple[int, int]]:
    copies = pool.reserve(table, len(token_ids))
    pool.commit(table, token_ids)
    return copies


def start(pool: BlockPool, token_ids: Sequence[int]) -> BlockTable:
    """A sequence with all of `token_ids` written."""
    table = pool.begin(token_ids)
    write(pool, table, token_ids[table.length :])
    return table


def found(pool: BlockPool, token_ids: Sequence[int]) -> list[int]:
    """The blocks that a sequence with these tokens and one more would share; asking makes them recently used."""
    table = pool.begin([*token_ids, -1])
    blocks = list(table.blocks)
    pool.release(table)
    return blocks


def test_lone_sequence_gets_consecutive_blocks() -> None:
    pool = BlockPool(8, 2)
    table = start(pool, [1, 2, 3])
    for token in range(4, 14):
        write(pool, table, [token])
    assert table == BlockTable([0, 1, 2, 3, 4, 5, 6], 13)


def test_block_behind_the_last_comes_before_the_lowest() -> None:
    pool = BlockPool(6, 1)
    a, b, c = start(pool, [1]), start(pool, [2]), start(pool, [3])
    pool.release(a)
    pool.forget()
    write(pool, b, [4])
    assert b.blocks == [1, 0], "the one behind was taken, so the lowest"
    write(pool, c, [5, 6])
    assert c.blocks == [2, 3, 4]


def test_next_turn_of_a_lone_chat_stays_consecutive() -> None:
    pool = BlockPool(8, 2)
    turn = start(pool, [1, 2, 3, 4, 5])
    pool.release(turn)
    assert start(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9]).blocks == [0, 1, 2, 3, 4]


def test_long_prompt_takes_unused_blocks_in_their_order() -> None:
    pool = BlockPool(4, 2)
    pool.release(start(pool, range(8)))
    assert start(pool, range(10, 17)).blocks == [0, 1, 2, 3]


def test_last_token_is_never_found() -> None:
    pool = BlockPool(4, 2)
    start(pool, [1, 2, 3, 4])
    assert pool.begin([1, 2, 3, 4, 5]) == BlockTable([0, 1], 4)
    assert pool.begin([1, 2, 3, 4]) == BlockTable([0], 2)
    assert pool.begin([1, 2]) == BlockTable([], 0)
    assert pool.begin([]) == BlockTable([], 0)


def test_blocks_are_found_as_soon_as_they_are_full() -> None:
    pool = BlockPool(4, 2)
    table = pool.begin([1, 2, 3])
    pool.reserve(table, 3)
    assert found(pool, [1, 2, 3]) == []
    pool.commit(table, [1])
    assert found(pool, [1, 2, 3]) == []
    pool.commit(table, [2, 3])
    assert found(pool, [1, 2, 3]) == [0]


def test_equal_blocks_behind_different_pasts_are_different() -> None:
    pool = BlockPool(8, 2)
    start(pool, [1, 2, 7, 7])
    start(pool, [3, 4, 7, 7])
    assert found(pool, [1, 2, 7, 7]) == [0, 1]
    assert found(pool, [3, 4, 7, 7]) == [2, 3]
    assert found(pool, [7, 7]) == []


def test_child_of_a_taken_block_is_not_found_behind_its_successor() -> None:
    pool = BlockPool(3, 1)
    pool.release(start(pool, [1, 2, 3]))
    other = start(pool, [4, 5, 6])
    pool.release(other)
    again = start(pool, [1])
    assert found(pool, [1, 2]) == again.blocks
    assert found(pool, [1, 5]) == again.blocks


@pytest.mark.parametrize(
    ("taken", "left", "other_left"),
    [(0, [0, 1], [2, 3]), (1, [0, 1], [2, 3]), (2, [0], [2, 3]), (3, [0], [2]), (4, [0], []), (5, [], [])],
)
def test_least_recently_used_goes_first_and_from_its_end(taken: int, left: list[int], other_left: list[int]) -> None:
    pool = BlockPool(5, 1)
    pool.release(start(pool, [1, 2]))
    pool.release(start(pool, [3, 4]))
    assert found(pool, [1]) == [0], "now used last; its child is still the one used least recently"
    pool.reserve(pool.begin([9]), taken)
    assert (found(pool, [1, 2]), found(pool, [3, 4])) == (left, other_left)


def test_fork_shares_all_and_copies_the_partly_filled_block_once() -> None:
    pool = BlockPool(4, 2)
    first = start(pool, [1, 2, 3])
    second = pool.fork(first)
    assert second == BlockTable([0, 1], 3)
    assert (pool.used_blocks, pool.filled_positions) == (2, 3)
    assert write(pool, second, [4]) == [(1, 2)]
    assert (first.blocks, second.blocks) == ([0, 1], [0, 2])
    assert write(pool, first, [5]) == [], "nobody else holds it any more"
    assert found(pool, [1, 2, 3, 4]) == [0, 2]
    assert found(pool, [1, 2, 3, 5]) == [0, 1]


def test_fork_leaves_reserved_blocks_alone() -> None:
    pool = BlockPool(4, 2)
    first = start(pool, [1, 2])
    pool.reserve(first, 4)
    second = pool.fork(first)
    assert second.blocks == [0]
    pool.commit(first, [3])
    assert write(pool, second, [4]) == []
    assert (first.blocks, second.blocks) == ([0, 1, 2], [0, 3])


def test_copy_needs_a_block_too() -> None:
    pool = BlockPool(2, 2)
    first = start(pool, [1, 2, 3])
    second = pool.fork(first)
    assert pool.can_reserve(second, 0) and not pool.can_reserve(second, 1)
    with pytest.raises(OutOfBlocks, match="1 more blocks are needed and 0 of 2 are free"):
        pool.reserve(second, 1)
    assert pool.reserve(second, 0) == []
    assert second == first
    pool.release(first)
    assert write(pool, second, [4]) == []


def test_refused_reservation_changes_nothing() -> None:
    pool = BlockPool(4, 2)
    table = start(pool, [1, 2, 3])
    pool.release(start(pool, [5, 6]))
    with pytest.raises(OutOfBlocks):
        pool.reserve(table, 6)
    assert (table.blocks, table.length, pool.free_blocks) == ([0, 1], 3, 2)
    assert found(pool, [5, 6]) == [2]
    assert pool.can_reserve(table, 5)
    assert pool.reserve(table, 5) == []
    assert pool.reserve(table, 5) == [], "room that is there already counts"
    assert table.blocks == [0, 1, 2, 3]


def test_of_two_equal_blocks_one_stays_findable() -> None:
    pool = BlockPool(6, 2)
    first, second = pool.begin([1, 2, 3]), pool.begin([1, 2, 3])
    for table in (first, second):
        write(pool, table, [1, 2, 3])
    assert (first.blocks, second.blocks) == ([0, 1], [2, 3])
    write(pool, second, [4])
    assert found(pool, [1, 2, 3, 4]) == [0, 3], "equal pasts are one past"
    pool.release(first)
    assert found(pool, [1, 2, 3, 4]) == [2, 3]
    pool.release(second)
    assert found(pool, [1, 2, 3, 4]) == [2, 3]
    assert pool.free_blocks == 6


def test_block_written_again_replaces_the_unused_one() -> None:
    """A prompt of whole blocks computes its last one again, for the last token's logits."""
    pool = BlockPool(4, 2)
    pool.release(start(pool, [1, 2, 3, 4]))
    again = start(pool, [1, 2, 3, 4])
    assert again.blocks == [0, 2]
    assert found(pool, [1, 2, 3, 4]) == [0, 2]
    pool.reserve(again, 4)
    assert again.blocks == [0, 2, 3, 1], "the one written first was free and empty"


def test_forget() -> None:
    pool = BlockPool(8, 2)
    pool.release(start(pool, [1, 2]))
    held, begun = start(pool, [3, 4, 5]), pool.begin([7, 8])
    write(pool, begun, [7])
    pool.forget()
    assert found(pool, [1, 2]) == found(pool, [3, 4]) == []
    write(pool, held, [6])
    write(pool, begun, [8])
    assert found(pool, [3, 4, 5, 6]) == found(pool, [7, 8]) == [], "half of it comes from the old weights"
    assert pool.used_blocks == 3
    new = start(pool, [3, 4, 5])
    pool.release(held)
    pool.release(begun)
    assert found(pool, [3, 4]) == new.blocks[:1]
    pool.release(new)
    assert (pool.free_blocks, pool.filled_positions) == (8, 0)


def test_forgotten_blocks_are_empty_once_they_are_free() -> None:
    pool = BlockPool(4, 1)
    old = start(pool, [1, 2])
    pool.forget()
    pool.release(start(pool, [3, 4]))
    pool.release(old)
    assert start(pool, [5, 6]).blocks == [0, 1]
    assert found(pool, [3, 4]) == [2, 3]


def test_books_do_not_grow() -> None:
    pool = BlockPool(4, 1)
    for turn in range(100):
        pool.release(start(pool, [turn, turn]))
        if turn % 3 == 0:
            pool.forget()
    assert len(pool._heap) <= pool.blocks


def test_accounting() -> None:
    pool = BlockPool(8, 4)
    assert (pool.free_blocks, pool.used_blocks, pool.filled_positions, pool.held_positions) == (8, 0, 0, 0)
    first = start(pool, range(6))
    pool.reserve(first, 4)
    assert (pool.free_blocks, pool.used_blocks, pool.filled_positions, pool.held_positions) == (5, 3, 6, 12)
    second = pool.begin(range(6))
    pool.reserve(second, 2)
    assert (pool.free_blocks, pool.used_blocks, pool.filled_positions, pool.held_positions) == (4, 4, 6, 16)
    pool.commit(second, [4, 5])
    assert pool.filled_positions == 8
    pool.release(first)
    assert (pool.free_blocks, pool.used_blocks, pool.filled_positions, pool.held_positions) == (6, 2, 6, 8)
    pool.release(second)
    assert (pool.free_blocks, pool.used_blocks, pool.filled_positions, pool.held_positions) == (8, 0, 0, 0)
    third = pool.begin(range(6))
    assert (pool.free_blocks, pool.used_blocks, pool.filled_positions, pool.held_positions) == (7, 1, 4, 4)
    pool.release(third)


def test_misuse_is_caught() -> None:
    pool = BlockPool(4, 2)
    table = start(pool, [1, 2, 3])
    with pytest.raises(AssertionError, match="more than was reserved"):
        pool.commit(table, [4, 5])
    other = pool.fork(table)
    with pytest.raises(AssertionError, match="reserve again after a fork"):
        pool.commit(table, [4])
    pool.release(other)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(other)
    for use in (
        pool.fork,
        lambda t: pool.reserve(t, 1),
        lambda t: pool.can_reserve(t, 1),
        lambda t: pool.commit(t, []),
    ):
        with pytest.raises(AssertionError):
            use(other)
    for blocks, size in ((0, 1), (1, 0)):
        with pytest.raises(AssertionError):
            BlockPool(blocks, size)


# What a model would write for a token: it depends on all that it saw before, and on the weights.
Value = tuple[Any, int, int]
"""(the value before it, version of the weights, token)."""


@dataclass
class Request:
    """A table, and what it must hold."""

    table: BlockTable
    values: list[Value]
    weights: int
    room: int = 0
    """Tokens that may be written now."""

    @property
    def token_ids(self) -> list[int]:
        return [value[2] for value in self.values]


TOKENS = st.integers(0, 1)
PICK = st.integers(0, 7)
some_living = precondition(lambda self: self.living)


class Histories(RuleBasedStateMachine):
    """Requests come, write, fork and go; the storage is simulated, and the least recently used past kept as a list."""

    @initialize(blocks=st.integers(1, 12), block_size=st.integers(1, 3))
    def create(self, blocks: int, block_size: int) -> None:
        self.pool = BlockPool(blocks, block_size)
        self.size = block_size
        self.storage: list[list[Value | None]] = [[None] * block_size for _ in range(blocks)]
        self.living: list[Request] = []
        self.texts: list[list[int]] = []
        self.unused: list[tuple[int, ...]] = []  # pasts that are found and not held, the least recently used first
        self.weights = 0

    def pasts(self, request: Request) -> list[tuple[int, ...]]:
        """Its full blocks that can be found, each as the tokens from the first to its last."""
        if request.weights != self.weights:
            return []
        ids = tuple(request.token_ids)
        return [ids[:end] for end in range(self.size, len(ids) + 1, self.size)]

    def held(self, but: Request | None = None) -> set[int]:
        return {block for each in self.living if each is not but for block in each.table.blocks}

    def held_pasts(self) -> set[tuple[int, ...]]:
        return {past for each in self.living for past in self.pasts(each)}

    def read(self, table: BlockTable) -> list[Value | None]:
        return [self.storage[table.blocks[i // self.size]][i % self.size] for i in range(table.length)]

    def pick(self, index: int) -> Request:
        return self.living[index % len(self.living)]

    @rule(token_ids=st.lists(TOKENS, max_size=8))
    def begin(self, token_ids: list[int]) -> None:
        self._begin(token_ids)

    @rule(token_ids=st.lists(TOKENS, min_size=2, max_size=12), twins=st.integers(1, 2))
    def begin_and_write(self, token_ids: list[int], twins: int) -> None:
        """Equal prompts that begin in the same step find nothing of each other."""
        for request in [self._begin(token_ids) for _ in range(twins)]:
            if any(request is each for each in self.living):
                self._go_on(request, token_ids[request.table.length :])

    @precondition(lambda self: self.texts)
    @rule(index=PICK, token_ids=st.lists(TOKENS, max_size=3), twins=st.integers(1, 2))
    def begin_next_turn(self, index: int, token_ids: list[int], twins: int) -> None:
        """A prompt that begins as the text of a request that is gone."""
        self.begin_and_write(self.texts[-1 - index % len(self.texts)] + token_ids, twins)

    @some_living
    @rule(index=PICK, token_ids=st.lists(TOKENS, min_size=1, max_size=4))
    def decode(self, index: int, token_ids: list[int]) -> None:
        self._go_on(self.pick(index), token_ids)

    @some_living
    @rule(index=PICK, token_ids=st.lists(TOKENS, min_size=2, max_size=2))
    def branch(self, index: int, token_ids: list[int]) -> None:
        """Two samples of one prompt."""
        request = self.pick(index)
        self.fork(index)
        for each, token in zip((self.living[-1], request), token_ids, strict=True):
            if any(each is one for one in self.living):
                self._go_on(each, [token])

    def _go_on(self, request: Request, token_ids: list[int]) -> None:
        """Make room as an engine does: the youngest others go, in the end the request itself."""
        while not self.pool.can_reserve(request.table, len(token_ids)):
            others = [each for each in self.living if each is not request]
            self._release(others[-1] if others else request)
            if not others:
                return
        self._reserve(request, len(token_ids))
        self._write(request, token_ids)

    def _begin(self, token_ids: list[int]) -> Request:
        there = self.held_pasts() | set(self.unused)
        length = 0
        while length + self.size < len(token_ids) and tuple(token_ids[: length + self.size]) in there:
            length += self.size
        table = self.pool.begin(token_ids)
        assert table.length == length == len(table.blocks) * self.size
        values: list[Value] = []
        for token in token_ids[:length]:
            values.append((values[-1] if values else None, self.weights, token))
        request = Request(table, values, self.weights)
        self.living.append(request)
        for past in self.pasts(request):
            if past in self.unused:
                self.unused.remove(past)
        return request

    @some_living
    @rule(index=PICK, tokens=st.integers(0, 7))
    def reserve(self, index: int, tokens: int) -> None:
        self._reserve(self.pick(index), tokens)

    def _reserve(self, request: Request, tokens: int) -> None:
        table, before, others = request.table, list(request.table.blocks), self.held(but=request)
        length, index = table.length, table.length // self.size
        end = -(-(length + tokens) // self.size)
        copy = tokens > 0 and length % self.size > 0 and before[index] in others
        missing = max(0, end - len(before)) + copy
        free = self.pool.blocks - len(others | set(before))
        assert self.pool.can_reserve(table, tokens) == (missing <= free)
        if missing > free:
            with pytest.raises(OutOfBlocks):
                self.pool.reserve(table, tokens)
            assert (table.blocks, table.length) == (before, length)
            return
        copies = self.pool.reserve(table, tokens)
        del self.unused[: max(0, missing - (free - len(self.unused)))]
        new = [block for block in table.blocks if block not in before]
        assert len(new) == missing and not set(new) & others
        contents = [list(self.storage[source]) for source, _ in copies]
        for block in new:
            self.storage[block] = [None] * self.size
        for (source, target), content in zip(copies, contents, strict=True):
            assert source == before[index] and target == table.blocks[index]
            self.storage[target] = content
        assert len(copies) == copy
        expected = before[:index] + new[:copy] + before[index + copy :] + new[copy:]
        assert table.blocks == expected and table.length == length
        request.room = max(request.room, tokens)

    @some_living
    @rule(index=PICK, token_ids=st.lists(TOKENS, max_size=7))
    def write(self, index: int, token_ids: list[int]) -> None:
        self._write(self.pick(index), token_ids)

    def _write(self, request: Request, token_ids: list[int]) -> None:
        """As many of the tokens as there is room for."""
        token_ids = token_ids[: request.room]
        table, shared = request.table, self.held(but=request)
        for token in token_ids:
            position = len(request.values)
            block = table.blocks[position // self.size]
            assert block not in shared, "written while shared"
            value = (request.values[-1] if request.values else None, self.weights, token)
            self.storage[block][position % self.size] = value
            request.values.append(value)
        self.pool.commit(table, token_ids)
        request.room -= len(token_ids)
        self.unused = [past for past in self.unused if past not in self.pasts(request)]

    @some_living
    @rule(index=PICK)
    def fork(self, index: int) -> None:
        request = self.pick(index)
        table = self.pool.fork(request.table)
        assert table.blocks == request.table.blocks[: -(-request.table.length // self.size)]
        assert table.length == request.table.length
        if table.length % self.size:
            request.room = 0
        self.living.append(Request(table, list(request.values), request.weights))

    @some_living
    @rule(index=PICK)
    def release(self, index: int) -> None:
        self._release(self.pick(index))

    def _release(self, request: Request) -> None:
        self.texts.append(request.token_ids)
        self.pool.release(request.table)
        assert request.table == BlockTable([], 0)
        self.living = [each for each in self.living if each is not request]
        kept = self.held_pasts()
        self.unused += [past for past in reversed(self.pasts(request)) if past not in kept]

    @rule(really=st.integers(0, 7))
    def forget(self, really: int) -> None:
        """Seldom, or nothing would ever be found."""
        if really == 7:
            self.pool.forget()
            self.weights += 1
            self.unused = []

    @invariant()
    def tables_read_their_own(self) -> None:
        for each in self.living:
            assert each.table.length == len(each.values)
            assert self.read(each.table) == each.values
            assert len(set(each.table.blocks)) == len(each.table.blocks)

    @invariant()
    def shared_blocks_are_written(self) -> None:
        """An empty block that two tables had reserved would be written by both."""
        written = [(set(t.blocks), set(t.blocks[: -(-t.length // self.size)])) for t in (e.table for e in self.living)]
        for i, (all_blocks, own) in enumerate(written):
            for others, theirs in written[:i]:
                assert all_blocks & others <= own & theirs

    @invariant()
    def accounts_are_exact(self) -> None:
        held = self.held()
        filled: dict[int, int] = {}
        for each in self.living:
            for i, block in enumerate(each.table.blocks):
                here = min(max(each.table.length - i * self.size, 0), self.size)
                assert filled.setdefault(block, here) == here
        assert self.pool.used_blocks == len(held)
        assert self.pool.free_blocks == self.pool.blocks - len(held)
        assert self.pool.filled_positions == sum(filled.values())
        assert self.pool.held_positions == len(held) * self.size

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for request in list(self.living):
            self._release(request)
        assert (self.pool.free_blocks, self.pool.used_blocks, self.pool.filled_positions) == (self.pool.blocks, 0, 0)
        for past in list(self.unused):
            self._release(self._begin([*past, 0]))
        table = self.pool.begin([])
        self.pool.reserve(table, self.pool.blocks * self.size)
        assert sorted(table.blocks) == list(range(self.pool.blocks)), "a block is lost or given twice"


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
