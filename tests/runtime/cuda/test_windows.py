"""Layers with a window on a GPU: inputs of each group, blocks of each group, and memory divided between them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.runtime.cuda_executor import CudaExecutor
from llmc.runtime.cuda_kernels import parse_kernels
from llmc.runtime.cuda_memory import input_layout, plan_memory
from llmc.runtime.cuda_plan import CudaPlan, parse_cuda_plan
from llmc.runtime.document import Field
from llmc.runtime.errors import ModelError
from llmc.runtime.load import load_model
from llmc.runtime.plan import FULL, LayerGroup, StateSpec
from tests.runtime.cuda.fake import FakeCuda
from tests.runtime.cuda.packages import windowed_kernels, windowed_plan, write_cuda_package
from tests.runtime.packages import CONTEXT, VOCAB, reference

GB, MB = 1 << 30, 1 << 20


@pytest.fixture(scope="module", params=["native", "ctypes"])
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, launcher_library: bytes) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "tiny_windowed_model"
    return write_cuda_package(folder, launcher_library if request.param == "native" else None, windowed=True)


def parsed(**changes: Any) -> CudaPlan:
    known = parse_kernels(Field(windowed_kernels(), "kernels.json"))
    return replace(parse_cuda_plan(Field(windowed_plan(), "plan.json"), 8192, known), **changes)


def test_generation_and_forks(windowed: Path, cuda: FakeCuda) -> None:
    """Memory begins as NaN, and padding must be what the kernels expect, in both groups."""
    ids = np.random.default_rng(2).integers(0, VOCAB, CONTEXT).tolist()
    with load_model(windowed) as model:
        np.testing.assert_array_equal(model.logits(ids), reference(ids, windowed=True))
        prompts = [ids[:n] for n in (1, 7, 20, 3, 11, 2)]
        for completion in model.generate(prompts, 15):
            whole = completion.prompt_token_ids + completion.token_ids
            rows = reference(whole, windowed=True)[len(completion.prompt_token_ids) - 1 : -1]
            assert completion.token_ids == rows.argmax(1).tolist()
        assert model.verify().ok
        with model.sequence() as sequence:
            sequence.prefill(ids[:18])
            with sequence.fork() as other:
                sequence.prefill(ids[18:])
                for token in (7, 8, 9):
                    expected = reference([*other.token_ids, token], windowed=True)[-1]
                    np.testing.assert_array_equal(other.step(token).logits[0], expected)
        executor = model._engine.executor
        assert isinstance(executor, CudaExecutor)
        # A window of 6 and a step of 32 tokens touch 11 blocks, more than the longest sequence has.
        assert executor.num_blocks == (4 * 10, 5 * 10)
        assert json.loads(json.dumps(model.info["loaded"]["memory"]))["blocks"] == [40, 50]


def test_inputs_of_both_groups() -> None:
    plan = parsed()
    entry = plan.entries["decode"]
    places = input_layout(entry, entry.bucket(4), 100, plan.groups).places
    assert {name: places[name][1] for name in places if name.endswith("window_6")} == {
        "slot_mapping_window_6": 4,
        "block_tables_window_6": 400,
    }


def model_of(windows: int, full: int, window: int = 4096) -> CudaPlan:
    """Layers of 64 KB a block in a group with a window and in one without, a context of 128k; 2048 tokens a step."""
    states = [StateSpec(f"w{i}", "bf16", (8, 256, 16), 1) for i in range(windows)]
    states += [StateSpec(f"f{i}", "bf16", (8, 256, 16), 0) for i in range(full)]
    read = parsed(groups=(FULL, LayerGroup(f"window_{window}", window)), states=tuple(states), block_size=16)
    return replace(read, limits=replace(read.limits, tokens=2048, sequences=64))


BLOCK = 8 * 256 * 16 * 2
OF_WINDOW = 385  # blocks that a window of 4096 and a step of 2048 tokens may touch


def test_memory_is_for_windows_first() -> None:
    plan = model_of(windows=10, full=10)
    found = plan_memory(plan, GB, 1000, 8192, (40 * GB, 80 * GB), "x")
    left = 40 * GB - sum((found.weights, found.arena, found.workspace, found.inputs, found.outputs, found.reserve))
    assert found.blocks[1] == 65 * OF_WINDOW, "all the sequences of a batch, and what a long prefill keeps"
    assert found.blocks[0] == (left - 20 * 256 - 65 * OF_WINDOW * 10 * BLOCK) // (10 * BLOCK)
    assert found.states == 10 * BLOCK * sum(found.blocks) <= left
    assert found.longest == 10 * BLOCK * (8192 + 2 * OF_WINDOW)


def test_windows_take_no_more_than_half_where_that_is_short() -> None:
    plan = model_of(windows=10, full=10)
    found = plan_memory(plan, GB, 1000, 8192, (12 * GB, 80 * GB), "x")
    left = 12 * GB - sum((found.weights, found.arena, found.workspace, found.inputs, found.outputs, found.reserve))
    in_windows, in_full = (blocks * 10 * BLOCK for blocks in reversed(found.blocks))
    assert in_windows <= left // 2 < in_windows + OF_WINDOW * 10 * BLOCK, "as many sequences as fit into half of it"
    assert in_full <= left - in_windows < in_full + 11 * BLOCK


def test_one_longest_sequence_comes_before_more_windows() -> None:
    plan = model_of(windows=10, full=10)
    needed = 10 * BLOCK * (8192 + 3 * OF_WINDOW) + 4 * GB
    found = plan_memory(plan, GB, 1000, 8192, (needed, 80 * GB), "x")
    assert found.blocks[0] >= 8192 and found.blocks[1] >= 2 * OF_WINDOW
    with pytest.raises(ModelError, match=r"and \d+\.\d MB for the keys and values of one sequence of the longest"):
        plan_memory(plan, GB, 1000, 8192, (6 * GB, 80 * GB), "x")


def test_windows_alone_take_what_they_can_use() -> None:
    plan = replace(model_of(windows=20, full=0), groups=(LayerGroup("window_4096", 4096),))
    plan = replace(plan, states=tuple(replace(state, group=0) for state in plan.states))
    found = plan_memory(plan, GB, 1000, 8192, (79 * GB, 80 * GB), "x")
    assert found.blocks == (65 * OF_WINDOW,) and found.states == 65 * OF_WINDOW * 20 * BLOCK
    less = plan_memory(plan, GB, 1000, 8192, (12 * GB, 80 * GB), "x")
    left = 12 * GB - sum((less.weights, less.arena, less.workspace, less.inputs, less.outputs, less.reserve))
    assert less.states <= left < less.states + OF_WINDOW * 20 * BLOCK + 20 * 256
