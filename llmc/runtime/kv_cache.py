"""Which blocks of the key/value memory belong to which sequence: pure host logic, no tensors.

Layers that see the same part of a sequence are a group, and share a table and blocks. The number of blocks is fixed
when a package is loaded: enough for as many sequences of the greatest length as a batch can hold. Their memory is only
reserved (see `memory.reserve`): a block costs nothing until it is first written, and blocks that were given back are
handed out again before fresh ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .errors import ModelError
from .plan import FULL, LayerGroup


def blocks_of_window(window: int, step_tokens: int, block_size: int) -> int:
    """How many blocks hold all that the tokens of one step see, the step's own among it."""
    return (window - 1 + step_tokens + block_size - 2) // block_size + 1


def most_blocks(group: LayerGroup, sequences: int, sequence_blocks: int, step_tokens: int, block_size: int) -> int:
    """How many blocks a group of layers needs for so many sequences, each of at most `sequence_blocks` blocks.

    In a group with a window there are as many for one sequence more: what a long prefill keeps (`BlockTable.keep`).
    """
    if not group.window:
        return sequences * sequence_blocks
    return (sequences + 1) * min(sequence_blocks, blocks_of_window(group.window, step_tokens, block_size))


class BlockManager:
    """The blocks of one group of layers. A block with no reference is free; one with several is shared by forks.

    `promised` blocks are free ones that tables may still claim, so that an admitted sequence never runs out.
    `step_tokens` is how many tokens a step adds to a sequence at most.
    """

    def __init__(self, num_blocks: int, block_size: int, group: LayerGroup = FULL, step_tokens: int = 1) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.group = group
        self.step_tokens = step_tokens
        self.most = blocks_of_window(group.window, step_tokens, block_size) if group.window else None
        """Blocks that one sequence holds at most; None where it holds all of its own."""
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

    def most_for(self, tokens: int) -> int:
        """How many blocks a sequence holds at most on its way to that many tokens."""
        needed = self.blocks_for(tokens)
        return needed if self.most is None else min(needed, self.most)

    def first_seen(self, position: int) -> int:
        """The first block of a sequence that the token at a position, or any after it, can see."""
        return max(0, position - self.group.window + 1) // self.block_size if self.group.window else 0

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

    def reconcile(self, tables: Iterable[GroupTable]) -> None:
        """Count everything anew from the tables that are alive: after an interrupt, nothing is lost or held twice."""
        self.references[: self._fresh] = 0
        self.promised = 0
        for table in tables:
            np.add.at(self.references, table.held, 1)
            self.promised += table.promised
        self._released = np.flatnonzero(self.references[: self._fresh] == 0)[::-1].tolist()


class GroupTable:
    """One sequence's blocks in one group of layers. How many tokens they hold, the sequence's `BlockTable` knows.

    In a group with a window, blocks that no further token sees are given back as the sequence grows: never more than
    `manager.most` are held. They go as late as that allows, so that the sequence can be rolled back meanwhile.
    """

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.promised = 0
        self.first = 0
        """The first block that is held; entries of `blocks` before it are of no meaning."""
        self._ceiling = 0  # blocks that were promised in all, those among them that it holds included
        self._blocks: NDArray[np.int32] = np.empty(4, np.int32)
        self._count = 0

    @property
    def blocks(self) -> NDArray[np.int32]:
        """The block ids, i32[blocks], in the order of their tokens, from the first token of the sequence."""
        return self._blocks[: self._count]

    @property
    def held(self) -> NDArray[np.int32]:
        """The block ids that belong to the sequence."""
        return self._blocks[self.first : self._count]

    def missing(self, tokens: int) -> int:
        """How many blocks have to be promised still for the sequence to reach `tokens` tokens."""
        return max(0, self.manager.most_for(tokens) - len(self.held) - self.promised)

    def promise(self, tokens: int) -> None:
        """Keep free blocks back; the caller has seen that `missing` ones are available."""
        more = self.missing(tokens)
        self.promised += more
        self.manager.promised += more
        self._ceiling = len(self.held) + self.promised

    def changes(self, length: int, tokens: int) -> tuple[int, int, bool]:
        """What makes room for `tokens` tokens after the first `length`: the first block that is held then, where blocks
        end then, and whether the one with the last of the `length` tokens must be copied, as it is shared.

        Raises `ModelError` where too few blocks are free.
        """
        manager, size = self.manager, self.manager.block_size
        last, needed, keep = length // size, manager.blocks_for(length + tokens), self.first
        shared = last < self._count and length % size != 0 and bool(manager.references[self._blocks[last]] > 1)
        if manager.most is not None:
            assert tokens <= manager.step_tokens, "more tokens than a step has"
            keep = max(keep, needed - manager.most)
            assert keep <= max(self.first, manager.first_seen(length)), "a block that is still seen would be given back"
        wanted = max(0, needed - self._count) + int(shared)
        if wanted > manager.num_available + self.promised:
            dropped = self._blocks[self.first : keep]
            free = manager.num_available + self.promised + int((manager.references[dropped] == 1).sum())
            if wanted > free:
                window = f" of layers with a window of {manager.group.window}" if manager.group.window else ""
                raise ModelError(
                    f"the key/value memory{window} is full: {wanted} more blocks of {size} tokens are needed,"
                    f" {free} of {manager.num_blocks} are free; free other sequences"
                )
        return keep, needed, shared

    def extend(self, length: int, changes: tuple[int, int, bool], copy_block: Callable[[int, int], None]) -> None:
        """Make the changes that `changes` gave. See `BlockTable.extend`."""
        manager, (keep, needed, shared) = self.manager, changes
        if keep > self.first:
            self._drop(keep)
        if shared:
            last = length // manager.block_size
            source, target = self._blocks[last : last + 1].copy(), self._claim()
            copy_block(int(source[0]), target)
            self._blocks[last] = target
            manager.release(source)
        if needed > len(self._blocks):
            self._blocks = np.resize(self._blocks, max(needed, 2 * len(self._blocks)))
        while self._count < needed:
            self._blocks[self._count] = self._claim()
            self._count += 1

    def fork(self, length: int) -> GroupTable:
        """The same blocks for another sequence, up to the one that holds the last of `length` tokens."""
        other = GroupTable(self.manager)
        kept = self.manager.blocks_for(length)
        other._blocks = self._blocks[: max(kept, 1)].copy()
        self.manager.share(self._blocks[self.first : kept])
        other.first, other._count = self.first, kept
        return other

    def remembers(self, length: int) -> bool:
        """Whether a token after the first `length` would find all that it sees."""
        return length == 0 or self.manager.first_seen(length) >= self.first

    @property
    def earliest(self) -> int:
        """The shortest sequence, but for an empty one, that it remembers."""
        return self.first * self.manager.block_size + self.manager.group.window - 1 if self.first else 1

    def truncate(self, length: int) -> None:
        """Give back the blocks that hold none of the first `length` tokens."""
        kept = self.manager.blocks_for(length)
        dropped = self._blocks[max(kept, self.first) : self._count].copy()
        self._count, self.first = min(kept, self._count), min(kept, self.first)
        self.manager.release(dropped)

    def free(self) -> None:
        """Give everything back, promises included."""
        promised, self.promised = self.promised, 0
        self.manager.promised -= promised
        self.truncate(0)

    def _drop(self, keep: int) -> None:
        """Give back the blocks before `keep`; what becomes free of them stays promised where it was."""
        manager, dropped = self.manager, self._blocks[self.first : keep].copy()
        free = manager.num_free
        self.first = keep
        manager.release(dropped)
        more = min(manager.num_free - free, self._ceiling - len(self.held) - self.promised)
        if more > 0:
            self.promised += more
            manager.promised += more

    def _claim(self) -> int:
        if self.promised:
            self.promised -= 1
            self.manager.promised -= 1
        return self.manager.allocate()


class BlockTable:
    """One sequence's blocks in every group of layers, and how many tokens they hold.

    The blocks at positions before `length` are filled; `extend` makes room for more, `commit` says it was filled.
    """

    def __init__(self, managers: Sequence[BlockManager]) -> None:
        self.length = 0
        self.groups = tuple(map(GroupTable, managers))

    def promise(self, tokens: int) -> bool:
        """Keep enough free blocks back for this sequence to reach `tokens` tokens; False where there are too few."""
        if any(group.missing(tokens) > group.manager.num_available for group in self.groups):
            return False
        for group in self.groups:
            group.promise(tokens)
        return True

    def extend(self, tokens: int, copy_block: Callable[[int, int, int], None]) -> None:
        """Make room for `tokens` more tokens, as many as a step has at most.

        A shared block that is about to be written is replaced by a copy (copy on write), which `copy_block(group's
        number, source, destination)` makes. Raises `ModelError`, having changed nothing, when there are too few blocks.
        An interrupt leaves the table whole: at worst a block is lost until the next `reconcile`.
        """
        changes = [group.changes(self.length, tokens) for group in self.groups]
        for number, (group, change) in enumerate(zip(self.groups, changes, strict=True)):
            group.extend(self.length, change, partial(copy_block, number))

    def commit(self, tokens: int) -> None:
        """Say that the step has filled `tokens` more positions."""
        assert all(self.length + tokens <= len(g.blocks) * g.manager.block_size for g in self.groups)
        self.length += tokens

    def fork(self) -> BlockTable:
        """Another sequence with the same tokens so far; the blocks are shared until one of the two writes."""
        other = BlockTable(())
        other.groups = tuple(group.fork(self.length) for group in self.groups)
        other.length = self.length
        return other

    def keep(self) -> BlockTable:
        """What `restore` needs to return to the tokens held now, however many more there will be: the blocks of groups
        with a window, shared as with a fork. It is to be freed."""
        other = BlockTable([group.manager for group in self.groups])
        other.groups = tuple(
            mine.fork(self.length) if mine.manager.group.window else empty
            for mine, empty in zip(self.groups, other.groups, strict=True)
        )
        other.length = self.length
        return other

    def restore(self, kept: BlockTable) -> None:
        """Return to the tokens held when `keep` gave `kept`."""
        windows = [group.manager.group.window > 0 for group in self.groups]
        pairs = list(zip(windows, self.groups, kept.groups, strict=True))
        old = tuple(theirs if window else mine for window, mine, theirs in pairs)
        new = tuple(mine if window else theirs for window, mine, theirs in pairs)
        self.length, self.groups, kept.groups = kept.length, old, new
        self.truncate(self.length)

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on; blocks that become empty are given back.

        Raises `ModelError`, having changed nothing, where a layer with a window has given back what it would see.
        """
        assert 0 <= length <= self.length
        if length < self.length and not all(group.remembers(length) for group in self.groups):
            worst = max(self.groups, key=lambda group: group.earliest)
            raise ModelError(
                f"cannot roll back from {self.length} tokens to {length}: layers with a window of"
                f" {worst.manager.group.window} have forgotten what a token there would see; roll back to"
                f" {worst.earliest} or more, or to 0, or fork the sequence before it goes on"
            )
        self.length = length
        for group in self.groups:
            group.truncate(length)

    def free(self) -> None:
        """Give everything back, promises included. A second time does nothing."""
        self.length = 0
        for group in self.groups:
            group.free()
