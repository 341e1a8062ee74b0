"""The block manager: nothing leaks, nothing is freed twice, nobody sees another's tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmc.runtime.errors import ModelError
from llmc.runtime.kv_cache import BlockManager, BlockTable

BLOCKS, SIZE = 12, 4


class Tables(RuleBasedStateMachine):
    """Sequences that grow, fork, roll back and end; memory holds for each slot which token was written there."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(BLOCKS, SIZE)
        self.memory: list[list[object]] = [[None] * SIZE for _ in range(BLOCKS)]
        self.tables: list[tuple[BlockTable, list[int]]] = []
        self.next_token = 0

    def copy(self, group: int, source: int, destination: int) -> None:
        assert self.manager.references[destination] == 1
        self.memory[destination] = list(self.memory[source])

    @rule()
    def start(self) -> None:
        if len(self.tables) < 6:
            self.tables.append((BlockTable((self.manager,)), []))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), tokens=st.integers(1, 9), commit=st.booleans())
    def extend(self, which: int, tokens: int, commit: bool) -> None:
        table, held = self.tables[which % len(self.tables)]
        before = table.groups[0].blocks.tolist(), table.length, self.manager.num_free
        try:
            table.extend(tokens, self.copy)
        except ModelError:
            assert (table.groups[0].blocks.tolist(), table.length, self.manager.num_free) == before
            return
        for position in range(table.length, table.length + tokens):
            block = int(table.groups[0].blocks[position // SIZE])
            assert self.manager.references[block] == 1, "a shared block is about to be written"
            self.memory[block][position % SIZE] = self.next_token
            if commit:
                held.append(self.next_token)
            self.next_token += 1
        if commit:
            table.commit(tokens)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        table, held = self.tables[which % len(self.tables)]
        if len(self.tables) < 6:
            self.tables.append((table.fork(), list(held)))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), share=st.floats(0, 1))
    def truncate(self, which: int, share: float) -> None:
        table, held = self.tables[which % len(self.tables)]
        length = int(share * len(held))
        table.truncate(length)
        del held[length:]

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), tokens=st.integers(1, 40))
    def promise(self, which: int, tokens: int) -> None:
        table, _ = self.tables[which % len(self.tables)]
        available = self.manager.num_available + table.groups[0].promised
        assert table.promise(tokens) == (self.manager.blocks_for(tokens) - len(table.groups[0].blocks) <= available)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def free(self, which: int) -> None:
        table, _ = self.tables.pop(which % len(self.tables))
        table.free()
        table.free()
        assert len(table.groups[0].blocks) == 0

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def drop_without_free(self, which: int) -> None:
        self.tables.pop(which % len(self.tables))
        self.manager.reconcile(table.groups[0] for table, _ in self.tables)

    @invariant()
    def references_are_what_the_tables_hold(self) -> None:
        held = Counter(block for table, _ in self.tables for block in table.groups[0].blocks.tolist())
        assert self.manager.references.tolist() == [held[b] for b in range(BLOCKS)]
        assert self.manager.num_free == BLOCKS - len(held)
        assert self.manager.promised == sum(table.groups[0].promised for table, _ in self.tables)
        assert self.manager.num_available >= 0

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for table, held in self.tables:
            assert [self.memory[table.groups[0].blocks[p // SIZE]][p % SIZE] for p in range(table.length)] == held


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_every_block_can_be_used_and_comes_back() -> None:
    manager = BlockManager(BLOCKS, SIZE)
    tables = [BlockTable((manager,)) for _ in range(3)]
    for table in tables:
        table.extend(BLOCKS * SIZE // 3, no_copy)
        table.commit(BLOCKS * SIZE // 3)
    assert manager.num_free == 0
    assert sorted(np.concatenate([t.groups[0].blocks for t in tables]).tolist()) == list(range(BLOCKS))
    with pytest.raises(ModelError, match="1 more blocks of 4 tokens are needed, 0 of 12 are free"):
        tables[0].extend(1, no_copy)
    for table in tables:
        table.free()
    assert manager.num_free == BLOCKS


def test_used_blocks_are_handed_out_before_fresh_ones() -> None:
    manager = BlockManager(1000, SIZE)
    for _ in range(50):
        table = BlockTable((manager,))
        table.extend(3 * SIZE, no_copy)
        assert max(table.groups[0].blocks) < 3
        table.free()


def test_a_promise_is_kept() -> None:
    manager = BlockManager(4, SIZE)
    first, second = BlockTable((manager,)), BlockTable((manager,))
    assert first.promise(3 * SIZE)
    assert not second.promise(2 * SIZE)
    with pytest.raises(ModelError):
        second.extend(2 * SIZE, no_copy)
    second.extend(SIZE, no_copy)
    first.extend(3 * SIZE, no_copy)
    assert first.groups[0].promised == manager.promised == manager.num_free == 0


def test_an_interrupted_copy_leaves_the_table_whole() -> None:
    manager = BlockManager(4, SIZE)
    table = BlockTable((manager,))
    table.extend(2, no_copy)
    table.commit(2)
    other = table.fork()

    def interrupt(group: int, source: int, destination: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.extend(1, interrupt)
    assert other.groups[0].blocks.tolist() == table.groups[0].blocks.tolist()
    manager.reconcile([table.groups[0], other.groups[0]])
    assert manager.num_free == 3 and manager.references[table.groups[0].blocks[0]] == 2


def no_copy(group: int, source: int, destination: int) -> None:
    raise AssertionError("nothing is shared here")
