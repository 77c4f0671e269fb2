"""Who holds which block of a paged key-value cache: numbers only, no tensors.

A sequence's keys and values lie in blocks of a fixed number of positions, and its table says in which (PagedAttention,
Kwon et al. 2023). A full block can serve every sequence that begins with the same tokens. Full blocks form a tree: a
block is found by its parent in the tree and its own tokens, compared one by one, so that two pasts are never mixed up.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


class OutOfBlocks(Exception):
    """There are fewer free blocks than asked for; the engine then takes the blocks of a running request away."""


@dataclass(slots=True, eq=False)
class _Node:
    """A past that ends with a full block: its parent's past and `tokens`.

    `block` is the one to be found. `twins` hold the same (sequences that wrote it side by side); they are all held by
    tables, and then `block` is too.
    """

    parent: _Node | None
    tokens: tuple[int, ...]
    block: int
    twins: set[int] = field(default_factory=set)
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


@dataclass
class BlockTable:
    """Where one sequence's keys and values are.

    Attributes:
        blocks: numbers of the blocks that hold its positions, in order; the last ones may be reserved and empty.
        length: positions whose keys and values are written (committed).
    """

    blocks: list[int]
    length: int
    _tree: _Node | None = field(default=None, init=False, repr=False, compare=False)  # it began in; None: released


class BlockPool:
    """Gives blocks to tables and takes them back.

    A free block is either empty or unused: full, held by no table, and found again by `begin` until `reserve` needs it.
    Unused blocks are taken after all empty ones, the least recently used first. A table gives its blocks back from its
    end to its beginning, and whoever holds a block holds its parents, so a block is always taken before its parents.

    Every method costs time in proportion to the blocks and tokens it touches, times log(blocks) at most.

    Args:
        blocks: number of blocks, 1 or more; they are numbered from 0.
        block_size: positions of a block, 1 or more.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        assert blocks >= 1 and block_size >= 1
        self.blocks = blocks
        self.block_size = block_size
        self._holders = [0] * blocks  # tables that hold the block
        self._tokens: list[list[int]] = [[] for _ in range(blocks)]  # written in the block
        self._node: list[_Node | None] = [None] * blocks  # of a full block, if it can be found
        self._root = _Node(None, (), -1)
        self._unused: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._is_empty = [True] * blocks
        self._empty_count = blocks
        # Holds every empty block once. A block that was taken out of order stays in it until it comes up.
        self._heap = list(range(blocks))
        self._in_heap = [True] * blocks
        self._filled_positions = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that `reserve` could take now, unused ones that `begin` can still find among them."""
        return self._empty_count + len(self._unused)

    @property
    def used_blocks(self) -> int:
        """Blocks that some table holds."""
        return self.blocks - self.free_blocks

    @property
    def filled_positions(self) -> int:
        """Positions written in the held blocks; those of a shared block count once."""
        return self._filled_positions

    @property
    def held_positions(self) -> int:
        """Positions of the held blocks, written or not: `1 - filled_positions / held_positions` of them is waste."""
        return self.used_blocks * self.block_size

    def begin(self, token_ids: Sequence[int]) -> BlockTable:
        """A table that shares the longest run of full blocks which holds the beginning of `token_ids`.

        At most `len(token_ids) - 1` tokens are found: the last one must be computed for its logits. Takes unused blocks
        out of the free ones, so ask `can_reserve` afterwards; `release` undoes it.
        """
        table = self._new_table([], 0, self._root)
        node = self._root
        while table.length + self.block_size < len(token_ids):
            child = node.children.get(tuple(token_ids[table.length : table.length + self.block_size]))
            if child is None:
                break
            if self._holders[child.block] == 0:
                del self._unused[child.block]
                self._filled_positions += self.block_size
            self._holders[child.block] += 1
            table.blocks.append(child.block)
            table.length += self.block_size
            node = child
        return table

    def can_reserve(self, table: BlockTable, tokens: int) -> bool:
        """Whether `reserve` would find enough blocks."""
        return self._missing_blocks(table, tokens) <= self.free_blocks

    def reserve(self, table: BlockTable, tokens: int) -> list[tuple[int, int]]:
        """Make room for `tokens` positions behind `table.length`, for this table alone; all of it or nothing.

        Room that it has already counts. A partly filled block that another table holds too is replaced by a copy.

        Returns:
            (source, target) blocks. Before anything is written, the contents of each source must be copied to its
            target, in the order in which they were returned if several calls return some.

        Raises:
            OutOfBlocks: not enough free blocks; nothing has changed then.
        """
        missing = self._missing_blocks(table, tokens)
        if missing > self.free_blocks:
            raise OutOfBlocks(f"{missing} more blocks are needed and {self.free_blocks} of {self.blocks} are free")
        # All at once and before the first is taken: then neighbours among them can be taken in their order.
        for _ in range(missing - self._empty_count):
            self._evict(next(iter(self._unused)))
        copies = []
        if self.writes_shared_block(table, tokens):
            index = table.length // self.block_size
            source = table.blocks[index]
            target = self._take(table.blocks[index - 1] if index else None)
            self._tokens[target] = list(self._tokens[source])
            self._filled_positions += len(self._tokens[target])
            self._holders[source] -= 1
            table.blocks[index] = target
            copies.append((source, target))
        while len(table.blocks) * self.block_size < table.length + tokens:
            table.blocks.append(self._take(table.blocks[-1] if table.blocks else None))
        return copies

    def commit(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        """Say that the keys and values of these tokens have been written behind `table.length`.

        `begin` finds the blocks that are full now from here on.
        """
        assert table._tree is not None, "released"
        assert table.length + len(token_ids) <= len(table.blocks) * self.block_size, "more than was reserved"
        done = 0
        while done < len(token_ids):
            index, offset = divmod(table.length, self.block_size)
            block = table.blocks[index]
            assert self._holders[block] == 1, "a block of two tables was written: reserve again after a fork"
            new = token_ids[done : done + self.block_size - offset]
            self._tokens[block].extend(new)
            self._filled_positions += len(new)
            table.length += len(new)
            done += len(new)
            # A sequence that began before `forget` has keys and values of the old weights.
            if table.length % self.block_size == 0 and table._tree is self._root:
                self._add_to_tree(block, self._root if index == 0 else self._node[table.blocks[index - 1]])

    def fork(self, table: BlockTable) -> BlockTable:
        """A table of another sequence with the same past. It shares every block that is written, not the reserved ones.

        While the two share a partly filled block, either must `reserve` before it writes.
        """
        assert table._tree is not None, "released"
        shared = table.blocks[: -(-table.length // self.block_size)]
        for block in shared:
            self._holders[block] += 1
        return self._new_table(shared, table.length, table._tree)

    def writes_shared_block(self, table: BlockTable, tokens: int) -> bool:
        """Whether the first of `tokens` new positions lies in a partly filled block that another table holds too."""
        index, offset = divmod(table.length, self.block_size)
        return tokens > 0 and offset > 0 and self._holders[table.blocks[index]] > 1

    def release(self, table: BlockTable) -> None:
        """Give the table's blocks back; it is empty afterwards and of no more use. Full blocks can still be found."""
        assert table._tree is not None, "released twice"
        for block in reversed(table.blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._give_up(block)
        table.blocks, table.length, table._tree = [], 0, None

    def forget(self) -> None:
        """No block written so far is found any more: the weights have changed. Tables keep what they hold."""
        while self._unused:
            self._evict(next(iter(self._unused)))
        self._root = _Node(None, (), -1)
        self._node = [None] * self.blocks

    def _new_table(self, blocks: list[int], length: int, tree: _Node | None) -> BlockTable:
        table = BlockTable(blocks, length)
        table._tree = tree
        return table

    def _missing_blocks(self, table: BlockTable, tokens: int) -> int:
        assert table._tree is not None and tokens >= 0
        behind = -(-(table.length + tokens) // self.block_size) - len(table.blocks)
        return max(behind, 0) + self.writes_shared_block(table, tokens)

    def _take(self, after: int | None) -> int:
        """An empty block, now held once: the one behind `after` if it is empty, else the lowest."""
        block = 0 if after is None else after + 1
        if block == self.blocks or not self._is_empty[block]:
            block = self._pop_lowest()
        self._is_empty[block] = False
        self._empty_count -= 1
        self._holders[block] = 1
        return block

    def _pop_lowest(self) -> int:
        while True:
            block = heapq.heappop(self._heap)
            self._in_heap[block] = False
            if self._is_empty[block]:
                return block

    def _put_empty(self, block: int) -> None:
        self._tokens[block] = []
        self._is_empty[block] = True
        self._empty_count += 1
        if not self._in_heap[block]:
            self._in_heap[block] = True
            heapq.heappush(self._heap, block)

    def _evict(self, block: int) -> None:
        """Make an unused block an empty one."""
        del self._unused[block]
        node = self._node[block]
        assert node is not None and node.parent is not None and not node.children and not node.twins
        del node.parent.children[node.tokens]
        self._node[block] = None
        self._put_empty(block)

    def _add_to_tree(self, block: int, parent: _Node | None) -> None:
        """Let a block that has become full be found."""
        assert parent is not None
        tokens = tuple(self._tokens[block])
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = _Node(parent, tokens, block)
        elif self._holders[node.block] == 0:
            del self._unused[node.block]
            self._node[node.block] = None
            self._put_empty(node.block)
            node.block = block
        else:
            node.twins.add(block)
        self._node[block] = node

    def _give_up(self, block: int) -> None:
        """Take back a block that no table holds any more: unused if it is the only one of its node, else empty."""
        node = self._node[block]
        self._filled_positions -= len(self._tokens[block])
        if node is not None and node.block == block and not node.twins:
            self._unused[block] = None
            return
        if node is not None:
            self._node[block] = None
            if node.block == block:
                node.block = node.twins.pop()
            else:
                node.twins.remove(block)
        self._put_empty(block)
