"""Which blocks of the key/value memory belong to which sequence: pure host logic, no tensors.

The number of blocks is fixed when a package is loaded: enough for as many sequences of the greatest length as a batch
can hold. Their memory is only reserved (see `memory.reserve`): a block costs nothing until it is first written, and
blocks that were given back are handed out again before fresh ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from .errors import ModelError


class BlockManager:
    """Counts references to blocks. A block with none is free; one with several is shared by forked sequences.

    `promised` blocks are free ones that tables may still claim, so that an admitted sequence never runs out.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.promised = 0
        self.references: NDArray[np.int32] = np.zeros(num_blocks, np.int32)
        self._released: list[int] = []  # free, used before: memory that is already paid for
        self._fresh = 0  # blocks from here on were never used

    @property
    def num_free(self) -> int:
        """Blocks that belong to no sequence."""
        return len(self._released) + self.num_blocks - self._fresh

    @property
    def num_available(self) -> int:
        """Free blocks that are promised to no sequence."""
        return self.num_free - self.promised

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self) -> int:
        """A block with one reference. The caller has seen that one is free."""
        if self._released:
            block = self._released.pop()
        else:
            assert self._fresh < self.num_blocks, "allocate without a free block"
            block = self._fresh
            self._fresh += 1
        self.references[block] = 1
        return block

    def share(self, blocks: NDArray[np.int32]) -> None:
        """One more reference to each block."""
        assert (self.references[blocks] > 0).all(), "a free block cannot be shared"
        self.references[blocks] += 1

    def release(self, blocks: NDArray[np.int32]) -> None:
        """One reference less to each block; those without any become free."""
        assert (self.references[blocks] > 0).all(), "a block is given back twice"
        self.references[blocks] -= 1
        self._released.extend(blocks[self.references[blocks] == 0].tolist())

    def reconcile(self, tables: Iterable[BlockTable]) -> None:
        """Count everything anew from the tables that are alive: after an interrupt, nothing is lost or held twice."""
        self.references[: self._fresh] = 0
        self.promised = 0
        for table in tables:
            np.add.at(self.references, table.blocks, 1)
            self.promised += table.promised
        self._released = np.flatnonzero(self.references[: self._fresh] == 0)[::-1].tolist()


class BlockTable:
    """One sequence's blocks in order, and how many tokens they hold.

    The blocks at positions before `length` are filled; `extend` makes room for more, `commit` says it was filled.
    """

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.length = 0
        self.promised = 0
        self._blocks: NDArray[np.int32] = np.empty(4, np.int32)
        self._count = 0

    @property
    def blocks(self) -> NDArray[np.int32]:
        """The block ids, i32[blocks], in the order of their tokens."""
        return self._blocks[: self._count]

    def promise(self, tokens: int) -> bool:
        """Keep enough free blocks back for this sequence to reach `tokens` tokens; False where there are too few."""
        more = self.manager.blocks_for(tokens) - self._count - self.promised
        if more > self.manager.num_available:
            return False
        if more > 0:
            self.promised += more
            self.manager.promised += more
        return True

    def extend(self, tokens: int, copy_block: Callable[[int, int], None]) -> None:
        """Make room for `tokens` more tokens.

        A shared block that is about to be written is replaced by a copy (copy on write), which
        `copy_block(source, destination)` makes. Raises `ModelError`, having changed nothing, when there are too few
        blocks. An interrupt leaves the table whole: at worst a block is lost until the next `reconcile`.
        """
        manager, size = self.manager, self.manager.block_size
        first, needed = self.length // size, manager.blocks_for(self.length + tokens)
        shared = first < self._count and self.length % size != 0 and manager.references[self._blocks[first]] > 1
        wanted = max(0, needed - self._count) + int(shared)
        if wanted > manager.num_available + self.promised:
            raise ModelError(
                f"the key/value memory is full: {wanted} more blocks of {size} tokens are needed, "
                f"{manager.num_available + self.promised} of {manager.num_blocks} are free; free other sequences"
            )
        if shared:
            source, target = self._blocks[first : first + 1].copy(), self._claim()
            copy_block(int(source[0]), target)
            self._blocks[first] = target
            manager.release(source)
        if needed > len(self._blocks):
            self._blocks = np.resize(self._blocks, max(needed, 2 * len(self._blocks)))
        while self._count < needed:
            self._blocks[self._count] = self._claim()
            self._count += 1

    def commit(self, tokens: int) -> None:
        """Say that the step has filled `tokens` more positions."""
        assert self.length + tokens <= self._count * self.manager.block_size
        self.length += tokens

    def fork(self) -> BlockTable:
        """Another sequence with the same tokens so far; the blocks are shared until one of the two writes."""
        other = BlockTable(self.manager)
        kept = self.manager.blocks_for(self.length)
        other._blocks = self._blocks[: max(kept, 1)].copy()
        self.manager.share(self._blocks[:kept])
        other._count, other.length = kept, self.length
        return other

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on; blocks that become empty are given back."""
        assert 0 <= length <= self.length
        kept = self.manager.blocks_for(length)
        dropped = self._blocks[kept : self._count].copy()
        self.length, self._count = length, min(kept, self._count)
        self.manager.release(dropped)

    def free(self) -> None:
        """Give everything back, promises included. A second time does nothing."""
        promised, self.promised = self.promised, 0
        self.manager.promised -= promised
        self.truncate(0)

    def _claim(self) -> int:
        if self.promised:
            self.promised -= 1
            self.manager.promised -= 1
        return self.manager.allocate()
