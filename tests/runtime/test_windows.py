"""Layers with a sliding window: what they hold is bounded, what they see is there, and nothing else is promised."""

from __future__ import annotations

import gc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmc.runtime.errors import ModelError
from llmc.runtime.kv_cache import BlockManager, BlockTable, GroupTable, blocks_of_window, most_blocks
from llmc.runtime.model import Model
from llmc.runtime.plan import FULL, LayerGroup, Limits
from tests.runtime.fake import executor_of, greedy, tiny

SIZE, STEP = 4, 7
GROUPS = (FULL, LayerGroup("window_6", 6), LayerGroup("window_1", 1))
BLOCKS = (24, 11, 7)


class Tables(RuleBasedStateMachine):
    """Sequences that grow, fork, roll back, return and end; memory holds for each slot which token was written there,
    and each sequence is compared with one that keeps everything."""

    def __init__(self) -> None:
        super().__init__()
        self.managers = [BlockManager(n, SIZE, g, STEP) for n, g in zip(BLOCKS, GROUPS, strict=True)]
        self.memory: list[list[list[object]]] = [[[None] * SIZE for _ in range(n)] for n in BLOCKS]
        self.tables: list[tuple[BlockTable, list[int]]] = []
        self.next_token = 0

    def copy(self, group: int, source: int, destination: int) -> None:
        assert self.managers[group].references[destination] == 1
        self.memory[group][destination] = list(self.memory[group][source])

    @rule()
    def start(self) -> None:
        if len(self.tables) < 5:
            self.tables.append((BlockTable(self.managers), []))

    def grow(self, table: BlockTable, held: list[int], tokens: int, commit: bool = True) -> bool:
        before = [(g.blocks.tolist(), g.first, g.promised, g.manager.num_free) for g in table.groups]
        try:
            table.extend(tokens, self.copy)
        except ModelError:
            assert [(g.blocks.tolist(), g.first, g.promised, g.manager.num_free) for g in table.groups] == before
            return False
        for memory, group in zip(self.memory, table.groups, strict=True):
            for i, position in enumerate(range(table.length, table.length + tokens)):
                block = int(group.blocks[position // SIZE])
                assert group.manager.references[block] == 1, "a shared block is about to be written"
                memory[block][position % SIZE] = self.next_token + i
        self.check(table, held + list(range(self.next_token, self.next_token + tokens)))
        if commit:
            held += range(self.next_token, self.next_token + tokens)
            table.commit(tokens)
        self.next_token += tokens
        return True

    def check(self, table: BlockTable, held: list[int]) -> None:
        """Every token after the committed ones finds what it sees; held may be ahead of what is committed."""
        for memory, group in zip(self.memory, table.groups, strict=True):
            window = group.manager.group.window
            start = max(0, table.length - window + 1) if window else 0
            for position in range(start, len(held)):
                assert group.first <= position // SIZE
                assert memory[group.blocks[position // SIZE]][position % SIZE] == held[position]

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), tokens=st.integers(1, STEP), commit=st.booleans())
    def extend(self, which: int, tokens: int, commit: bool) -> None:
        self.grow(*self.tables[which % len(self.tables)], tokens, commit)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        table, held = self.tables[which % len(self.tables)]
        if len(self.tables) < 5:
            self.tables.append((table.fork(), list(held)))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), back=st.integers(0, 30))
    def truncate(self, which: int, back: int) -> None:
        table, held = self.tables[which % len(self.tables)]
        length = max(0, len(held) - back)
        possible = length in (0, len(held)) or all(group.remembers(length) for group in table.groups)
        earliest = max(group.earliest for group in table.groups)
        assert possible == (length == 0 or length == len(held) or length >= earliest)
        try:
            table.truncate(length)
        except ModelError:
            assert not possible and table.length == len(held)
        else:
            assert possible
            del held[length:]

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), steps=st.lists(st.integers(1, STEP), max_size=5))
    def go_on_and_return(self, which: int, steps: list[int]) -> None:
        table, held = self.tables[which % len(self.tables)]
        kept, further = table.keep(), list(held)
        for tokens in steps:
            if not self.grow(table, further, tokens):
                break
        table.restore(kept)
        kept.free()
        assert table.length == len(held)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), tokens=st.integers(1, 60))
    def promise(self, which: int, tokens: int) -> None:
        table, _ = self.tables[which % len(self.tables)]
        before = [group.promised for group in table.groups]
        if not table.promise(tokens):
            assert [group.promised for group in table.groups] == before

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def free(self, which: int) -> None:
        table, _ = self.tables.pop(which % len(self.tables))
        table.free()
        table.free()
        assert not any(len(group.held) for group in table.groups)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def drop_without_free(self, which: int) -> None:
        self.tables.pop(which % len(self.tables))
        for i, manager in enumerate(self.managers):
            manager.reconcile(table.groups[i] for table, _ in self.tables)

    @invariant()
    def references_are_what_the_tables_hold(self) -> None:
        for i, manager in enumerate(self.managers):
            groups = [table.groups[i] for table, _ in self.tables]
            held = Counter(block for group in groups for block in group.held.tolist())
            assert manager.references.tolist() == [held[b] for b in range(manager.num_blocks)]
            assert manager.num_free == manager.num_blocks - len(held)
            assert manager.promised == sum(group.promised for group in groups)
            assert manager.num_available >= 0
            assert manager.most is None or all(len(group.held) <= manager.most for group in groups)

    @invariant()
    def every_sequence_sees_its_own_tokens(self) -> None:
        for table, held in self.tables:
            self.check(table, held)
            longest = max(group.earliest for group in table.groups)
            assert longest <= max(1, table.length), "a sequence is always where it may be"


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(window=st.integers(1, 50), tokens=st.integers(1, 50), size=st.integers(1, 20), start=st.integers(0, 99))
def test_blocks_of_a_window(window: int, tokens: int, size: int, start: int) -> None:
    """What a step sees and writes fits; and where it begins decides whether one block less would do."""
    seen = range(start, start + window - 1 + tokens)
    blocks = len({position // size for position in seen})
    most = blocks_of_window(window, tokens, size)
    assert blocks <= most
    assert most == max(len({(s + p) // size for p in range(len(seen))}) for s in range(size))


def test_a_long_sequence_in_little_memory() -> None:
    """128k tokens with a window of 4096: no more memory is ever touched than the window and a step take."""
    group = LayerGroup("window_4096", 4096)
    assert most_blocks(group, 1, 8192, 512, 16) == 2 * 289 == 2 * -(-(4095 + 512 + 15) // 16)
    manager = BlockManager(1000, 16, group, 512)
    table, used = BlockTable((manager,)), set()
    assert table.promise(128 * 1024)
    while table.length < 128 * 1024:
        table.extend(512 if table.length < 120 * 1024 else 1, no_copy)
        table.commit(512 if table.length < 120 * 1024 else 1)
        used |= set(table.groups[0].held.tolist())
    assert len(used) == manager.most == 289 and len(table.groups[0].blocks) == 8192
    assert manager.num_free == 1000 - 289 and manager.promised == 0


@pytest.mark.parametrize("steps", [[STEP] * 20, [1] * 60, [3, 7, 1, 7, 7, 2, 7, 7, 7, 1, 1, 1, 7]])
def test_a_sequence_goes_back_as_many_tokens_as_a_step_has(steps: list[int]) -> None:
    manager = BlockManager(20, SIZE, GROUPS[1], STEP)
    table = BlockTable((manager,))
    for tokens in steps:
        table.extend(tokens, no_copy)
        table.commit(tokens)
    other = table.fork()
    other.truncate(table.length - STEP)
    with pytest.raises(
        ModelError, match=f"cannot roll back from {table.length} tokens to 8: layers with a window of 6"
    ):
        table.truncate(8)
    earliest = table.groups[0].earliest
    with pytest.raises(ModelError, match=f"roll back to {earliest} or more, or to 0, or fork the sequence"):
        table.truncate(earliest - 1)
    table.truncate(earliest)
    table.truncate(0)
    assert manager.num_free == 20 - len(other.groups[0].held)


def test_a_promise_of_a_window_lasts() -> None:
    """Blocks that are given back stay promised to who gave them, however long the sequence becomes."""
    manager = BlockManager(9, SIZE, GROUPS[1], STEP)
    first, second = BlockTable((manager,)), BlockTable((manager,))
    assert manager.most == 4 and first.promise(1000) and second.promise(1000)
    third = BlockTable((manager,))
    assert not third.promise(1000) and third.promise(SIZE)
    for _ in range(50):
        for table in (first, second):
            table.extend(STEP, no_copy)
            table.commit(STEP)
            assert len(table.groups[0].held) + table.groups[0].promised == 4
        assert manager.num_available == 0
    with pytest.raises(
        ModelError, match=r"key/value memory of layers with a window of 6 is full: 2 more blocks of 4 tok"
    ):
        third.extend(STEP, no_copy)


def test_interrupted_copies_and_releases_leave_the_table_whole() -> None:
    managers = [BlockManager(n, SIZE, g, STEP) for n, g in zip(BLOCKS, GROUPS, strict=True)]
    table = BlockTable(managers)
    for tokens in (STEP, STEP, 5):
        table.extend(tokens, no_copy)
        table.commit(tokens)
    other = table.fork()
    for stop in range(1, len(GROUPS) + 1):

        def interrupt(group: int, source: int, destination: int, stop: int = stop) -> None:
            if group + 1 == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            other.extend(1, interrupt)
        assert other.length == 19
        for i, manager in enumerate(managers):
            manager.reconcile([table.groups[i], other.groups[i]])
            held = set(table.groups[i].held.tolist()) | set(other.groups[i].held.tolist())
            assert manager.num_free == BLOCKS[i] - len(held)


WINDOWED = [(0, 6), (0, 3, 9), (5,), (2, 12)]


@pytest.mark.parametrize("windows", WINDOWED)
def test_generation_across_the_window(windows: tuple[int, ...]) -> None:
    """Far more prompts than run together, each longer than any window: every one as without a cache."""
    model = tiny(windows=windows)
    prompts = [np.random.default_rng(i).integers(0, 31, n).tolist() for i, n in enumerate((3, 20, 40, 1, 17, 33, 8))]
    for prompt, completion in zip(prompts, model.generate(prompts, 8), strict=True):
        assert completion.token_ids == greedy(model, prompt, len(completion.token_ids))
    assert all(manager.num_free == manager.num_blocks and not manager.promised for manager in model._engine.managers)


@pytest.mark.parametrize("windows", WINDOWED)
def test_memory_that_generation_touches(windows: tuple[int, ...]) -> None:
    model = tiny(windows=windows, context=4000, limits=Limits(16, 2, 2))
    model.generate([[1] * 3000, [2] * 2000], 5)
    for cache, group in zip(executor_of(model).caches, executor_of(model).groups, strict=True):
        touched = int(np.isfinite(cache[0, :, 0, 0]).sum())
        assert touched == (2 * blocks_of_window(group.window, 16, 4) if group.window else 751 + 501)


def test_names_of_the_inputs() -> None:
    """The first group's are plain, even where it has a window."""
    for windows, names in (((0, 6), ["window_6"]), ((5,), []), ((2, 12), ["window_12"])):
        model = tiny(windows=windows)
        model.generate([1] * 5, 2)
        for _, batch in executor_of(model).batches:
            assert sorted(batch.others) == [f"{n}_{g}" for n in ("block_tables", "slot_mapping") for g in names]


@pytest.mark.parametrize("windows", WINDOWED)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_forks_and_rollbacks(windows: tuple[int, ...], data: st.DataObject) -> None:
    model = tiny(windows=windows, context=120, limits=Limits(10, 6, 4))
    reference = executor_of(model).model
    live = [model.sequence()]
    for _ in range(data.draw(st.integers(1, 14))):
        sequence = data.draw(st.sampled_from(live))
        action = data.draw(st.sampled_from(["grow", "grow", "grow", "fork", "truncate", "free"]))
        if action == "grow":
            tokens = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=30))
            if sequence.length + len(tokens) > 120:
                continue
            output = sequence.prefill(tokens)
            np.testing.assert_array_equal(output.logits[0], reference.logits(sequence.token_ids)[-1])
        elif action == "fork" and len(live) < 5:
            live.append(sequence.fork())
            assert live[-1].token_ids == sequence.token_ids
        elif action == "truncate":
            before = sequence.token_ids
            length = data.draw(st.integers(0, sequence.length))
            try:
                sequence.truncate(length)
                assert sequence.token_ids == before[:length]
            except ModelError:
                assert sequence.token_ids == before
        elif action == "free" and len(live) > 1:
            live.remove(sequence)
            sequence.free()
    for sequence in live:
        sequence.free()
    assert all(manager.num_free == manager.num_blocks for manager in model._engine.managers)


@pytest.mark.parametrize("windows", WINDOWED)
@pytest.mark.parametrize("fail", [0, 1, 2, 3])
def test_a_long_prefill_that_fails_leaves_what_was_there(windows: tuple[int, ...], fail: int) -> None:
    """After several of its steps, when the windows have passed what was there before."""
    model = tiny(windows=windows, context=200, limits=Limits(16, 1, 1))
    with model.sequence() as sequence:
        sequence.prefill(list(range(30)))
        executor_of(model).fail_at = len(executor_of(model).batches) + fail
        with pytest.raises(KeyboardInterrupt):
            sequence.prefill([9] * 60)
        assert sequence.token_ids == list(range(30))
        row = sequence.prefill([4] * 50).logits[0]
        np.testing.assert_array_equal(row, executor_of(model).model.logits([*range(30), *[4] * 50])[-1])
    assert all(manager.num_free == manager.num_blocks for manager in model._engine.managers)


def test_a_sequence_says_how_far_it_goes_back() -> None:
    model = tiny(windows=(0, 6), context=200)
    with model.sequence() as sequence:
        sequence.prefill([1] * 50)
        early = sequence.fork()
        sequence.prefill([2] * 50)
        with pytest.raises(
            ModelError, match=r"cannot roll back from 100 tokens to 50: .* roll back to 81 or more, or to 0"
        ):
            sequence.truncate(50)
        sequence.truncate(84)
        row = sequence.step(3).logits[0]
        np.testing.assert_array_equal(row, executor_of(model).model.logits([1] * 50 + [2] * 34 + [3])[-1])
        assert early.step(3).logits[0].tolist() == executor_of(model).model.logits([1] * 50 + [3])[-1].tolist()
        sequence.truncate(0)
        assert sequence.step(3).logits[0].tolist() == executor_of(model).model.logits([3])[-1].tolist()
        early.free()


def test_sequences_that_are_dropped_come_back_when_a_window_is_short() -> None:
    model: Model = tiny(windows=(0, 6), context=200)
    for _ in range(30):
        model.sequence().prefill([1] * 40)
    gc.collect()
    assert len(model.generate([1] * 10, 4).token_ids) == 4


def no_copy(group: int, source: int, destination: int) -> None:
    raise AssertionError("nothing is shared here")


def test_a_table_without_a_window_remembers_everything() -> None:
    table = GroupTable(BlockManager(3, SIZE))
    assert table.earliest == 1 and table.remembers(1)
