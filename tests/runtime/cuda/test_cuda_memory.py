"""Device memory is divided before it is taken; inputs lie in one region; weights stream through two buffers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.runtime import cuda_memory
from llmc.runtime.cuda_executor import CudaExecutor
from llmc.runtime.cuda_kernels import parse_kernels
from llmc.runtime.cuda_memory import input_layout, load_weights, plan_memory
from llmc.runtime.cuda_plan import CudaPlan, parse_cuda_plan
from llmc.runtime.document import Field
from llmc.runtime.errors import ModelError
from llmc.runtime.load import load_model
from llmc.runtime.plan import StateSpec
from tests.runtime.cuda.fake import FakeCuda
from tests.runtime.cuda.packages import kernels, plan, weights_file

GB, MB = 1 << 30, 1 << 20


def parsed(**changes: Any) -> CudaPlan:
    read = parse_cuda_plan(Field(plan(), "plan.json"), 8192, parse_kernels(Field(kernels(), "kernels.json")))
    return replace(read, **changes)


def test_the_parts_of_a_gpu() -> None:
    """A model of 16 GB with a context of 32768 on a card of 80 GB, of which 70 are free."""
    states = tuple(StateSpec(f"s{i}", "bf16", (8, 128, 16)) for i in range(64))
    read = parsed(arena_bytes=300 * MB + 1, workspace_bytes=64 * MB, tickets=1000, states=states, block_size=16)
    found = plan_memory(read, 16 * GB, 150_000, 2048, (70 * GB, 80 * GB), "cuda:0 (X)")
    block = 64 * 8 * 128 * 16 * 2
    assert found.weights == 16 * GB
    assert found.arena == 300 * MB + 256, "whole multiples of the alignment"
    assert found.workspace == 64 * MB + 4096
    assert found.outputs == 3_600_128 + 512, "logits of 6 rows; greedy and chosen tokens"
    assert found.reserve == int(0.05 * 70 * GB)
    assert found.longest == 2048 * block == 4 * GB
    assert found.blocks == (4 * 2048,), "as much as a batch of the longest can need, though there is more"
    assert found.states == found.blocks[0] * block
    used = sum((found.weights, found.arena, found.workspace, found.inputs, found.outputs, found.reserve, found.states))
    assert used < found.free == 70 * GB and found.total == 80 * GB
    less = plan_memory(read, 16 * GB, 150_000, 2048, (30 * GB, 80 * GB), "cuda:0 (X)")
    assert 2048 < less.blocks[0] < 4 * 2048, "what is left of the memory"
    taken = sum((less.weights, less.arena, less.workspace, less.inputs, less.outputs, less.reserve, less.states))
    assert 0 <= 30 * GB - taken < block + 64 * 256
    with pytest.raises(ModelError) as caught:
        plan_memory(read, 16 * GB, 150_000, 2048, (20 * GB, 80 * GB), "cuda:0 (X)")
    assert str(caught.value) == (
        "cuda:0 (X): not enough memory: 21.47 GB of 85.90 GB are free, and the model needs weights 17.18 GB, "
        "arena 314.6 MB, workspace 67.1 MB, inputs 0.0 MB, outputs 3.6 MB, reserve 1073.7 MB, and 4295.0 MB for the "
        "keys and values of one sequence of the longest; free memory on the GPU, or compile with a smaller --quant or "
        "--max-sequence-length"
    )


def test_a_small_gpu_keeps_a_reserve() -> None:
    assert plan_memory(parsed(), 4096, 23, 10, (2 * GB, 4 * GB), "x").reserve == 512 * MB
    with pytest.raises(ModelError, match="not enough memory"):
        plan_memory(parsed(states=()), 4096, 23, 10, (512 * MB, 4 * GB), "x")


def test_kernels_index_states_with_int32() -> None:
    states = (StateSpec("s", "i8", (1 << 20,)),)
    assert plan_memory(parsed(states=states), 64, 23, 1500, (80 * GB, 80 * GB), "x").blocks == (2047,)


@pytest.mark.parametrize(("entry", "tokens", "rows"), [("decode", 4, (4, 4, 4)), ("prefill", 32, (32, 4, 6))])
def test_inputs_lie_one_after_another(entry: str, tokens: int, rows: tuple[int, int, int]) -> None:
    described = parsed().entries[entry]
    layout = input_layout(described, described.bucket(tokens), sequence_blocks=100)
    counted, sequences, outputs = rows
    assert {name: count for name, (_, count) in layout.places.items()} == {
        "dims": 4,
        "token_ids": counted,
        "positions": counted,
        "slot_mapping": counted,
        "query_start": sequences + 1,
        "logit_rows": outputs,
        "sampling": 8 * outputs,
        "block_tables": 100 * sequences,
    }
    end = 0
    for start, count in layout.places.values():
        assert end <= start < end + 64 and start % 64 == 0
        end = start + count
    assert 4 * end <= layout.bytes < 4 * end + 256
    assert layout.places["dims"][0] == 0


def test_weights_stream_through_two_buffers(package: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake copies as late as it may, so a buffer that is filled again too early would show in the result."""
    monkeypatch.setattr(cuda_memory, "STAGING", 500)
    with load_model(package) as model:
        copies = [x for x in cuda.log() if x.call == "cuMemcpyHtoDAsync_v2"]
        calls = [x for x in cuda.calls() if x in ("cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventSynchronize")]
        parts = -(-len(weights_file()) // 500)
        assert [x.bytes for x in copies] == [500] * (parts - 1) + [len(weights_file()) - 500 * (parts - 1)]
        assert len({x.source for x in copies}) == 2
        assert calls == ["cuEventSynchronize", "cuMemcpyHtoDAsync_v2", "cuEventRecord"] * parts
        executor = model._engine.executor
        assert isinstance(executor, CudaExecutor)
        found = executor._fetch(executor._regions["weights"], np.uint8, (len(weights_file()),))
        assert found.tobytes() == weights_file()
        assert cuda.alive[:2] == (3, 2), "weights, scratch, states; inputs and outputs, no staging"


def test_weights_that_are_too_short(package: Path, cuda: FakeCuda, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(100))
    model = load_model(package)
    executor = model._engine.executor
    assert isinstance(executor, CudaExecutor)
    with pytest.raises(ModelError, match=r"weights\.bin is too short: expected 200 bytes"):
        load_weights(executor.device, path, 200, executor._regions["weights"])
    with pytest.raises(ModelError, match=r"cannot read .*no\.bin: No such file"):
        load_weights(executor.device, tmp_path / "no.bin", 200, executor._regions["weights"])
    model.close()


def test_what_is_zero_at_load(package: Path, cuda: FakeCuda) -> None:
    """The fake's memory begins as NaN."""
    with load_model(package) as model:
        executor = model._engine.executor
        assert isinstance(executor, CudaExecutor)
        assert not executor._fetch(executor._regions["tickets"], np.int32, (executor.plan.tickets,)).any()
        assert not executor._fetch(executor._states[0], np.float32, (executor.num_blocks[0], 4)).any()
        assert executor._fetch(executor._regions["arena"], np.int32, (1,))[0] == -1
