"""An interrupt at any line leaves the model usable, and no block is lost."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import llmc.runtime.engine
from llmc.runtime.model import Model
from tests.runtime.fake import executor_of, free_blocks, greedy, tiny

RUNTIME = str(Path(llmc.runtime.engine.__file__).parent)


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th line that is run in the runtime; `fired` says whether there was one."""

    def __init__(self, line: int) -> None:
        self.left = line
        self.fired = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(RUNTIME):
            return None
        if event == "line" and not self.fired:
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise KeyboardInterrupt
        return self


def stream(model: Model) -> None:
    for _ in model.stream([1, 2, 3, 4, 5], 4):
        pass


def fork(model: Model) -> None:
    with model.sequence() as sequence:
        sequence.prefill([1, 2, 3, 4, 5])
        with sequence.fork() as other:
            other.step(1)
            sequence.step(2)
            sequence.truncate(3)
            other.prefill([6] * 20)


USES: dict[str, Callable[[Model], Any]] = {
    "generate": lambda model: model.generate([[1, 2, 3], [4, 5], [6] * 20, [7], [8]], 4, temperature=1.0),
    "stream": stream,
    "fork": fork,
    "perplexity": lambda model: model.perplexity(list(range(20)), context=8),
}


@pytest.mark.parametrize("windows", [(0,), (0, 3)])
@pytest.mark.parametrize("use", USES)
def test_an_interrupt_at_every_line(use: str, windows: tuple[int, ...]) -> None:
    model = tiny(windows=windows)
    line, expected = 1, greedy(model, [3, 1, 4, 1, 5], 6)
    while True:
        interrupt = InterruptAt(line)
        sys.settrace(interrupt)
        try:
            USES[use](model)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        if not interrupt.fired:
            break
        assert model.generate([3, 1, 4, 1, 5], 6).token_ids == expected
        if line % 50 == 0:
            gc.collect()
        line += 1 + line // 40
    assert line > 50, "the lines of the runtime were not traced"
    gc.collect()
    model._engine.reconcile()
    assert free_blocks(model) == (48, 0, 48)
    assert all(manager.num_free == manager.num_blocks for manager in model._engine.managers)


def test_an_interrupt_inside_a_step() -> None:
    model = tiny()
    for step in range(4):
        executor_of(model).fail_at = len(executor_of(model).batches) + step
        with pytest.raises(KeyboardInterrupt):
            model.generate([[1, 2, 3], [4, 5]], 8)
        assert free_blocks(model) == (48, 0, 48)
    assert model.generate([1, 2, 3], 8).token_ids == greedy(model, [1, 2, 3], 8)


def test_a_sequence_survives_the_interrupt_of_its_step() -> None:
    """It holds what it held before, and goes on as if nothing had been tried."""
    model = tiny()
    with model.sequence() as sequence:
        sequence.prefill([1, 2, 3])
        executor_of(model).fail_at = len(executor_of(model).batches) + 1
        with pytest.raises(KeyboardInterrupt):
            sequence.prefill([9] * 20)
        assert sequence.token_ids == [1, 2, 3]
        row = sequence.step(4).logits[0]
        assert (row == executor_of(model).model.logits([1, 2, 3, 4])[-1]).all()
    assert free_blocks(model) == (48, 0, 48)


@pytest.mark.parametrize("windows", [(0,), (0, 3), (5,)])
def test_a_sequence_is_whole_after_an_interrupt_at_any_line(windows: tuple[int, ...]) -> None:
    """It holds what it held before a long prefill, or, when that was done, all of it; and computes what that gives."""
    model = tiny(windows=windows)
    line, held = 1, set()
    while True:
        with model.sequence() as sequence:
            sequence.prefill([1, 2, 3, 4, 5, 6, 7])
            interrupt = InterruptAt(line)
            sys.settrace(interrupt)
            try:
                sequence.prefill([9] * 36)
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            held.add(sequence.length)
            row = sequence.step(4).logits[0]
            assert (row == executor_of(model).model.logits(sequence.token_ids)[-1]).all()
        if not interrupt.fired:
            break
        line += 1 + line // 60
    assert held == {7, 43}
    model._engine.reconcile()
    assert all(manager.num_free == manager.num_blocks for manager in model._engine.managers)
