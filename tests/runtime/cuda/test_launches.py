"""What reaches the driver: every launch with all that belongs to it, one graph for each size of step, few calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmc.runtime.batch import Chunk, build_batch
from llmc.runtime.cuda_executor import CudaExecutor
from llmc.runtime.load import load_model
from llmc.runtime.model import Model
from tests.runtime.cuda.fake import Call, FakeCuda
from tests.runtime.cuda.packages import OUTPUTS, SHARED
from tests.runtime.packages import VOCAB, reference, weights

DECODE = ("gather_fn", "append_fn", "mix_decode_fn", "head_fn", "select_token_fn")
PREFILL = ("gather_fn", "append_fn", "mix_fn", "head_fn", "select_token_fn")
OFFSETS_OF_ONE = {"token_ids": 256, "positions": 512, "slot_mapping": 768, "query_start": 1024, "logit_rows": 1280}
OFFSETS_OF_ONE |= {"sampling": 1536, "block_tables": 1792}


def executor_of(model: Model) -> CudaExecutor:
    executor = model._engine.executor
    assert isinstance(executor, CudaExecutor)
    return executor


def trace(model: Model, ids: list[int], entry: str) -> list[object]:
    """Run a step launch by launch; what `CudaExecutor.trace` gives after each."""
    executor = executor_of(model)
    with model.sequence() as sequence, sequence.engine.exclusive():
        tokens = np.array(ids, np.int32)
        sequence.table.extend(len(ids), executor.copy_block)
        return list(executor.trace(entry, build_batch([Chunk(sequence.table, tokens, 1)], executor.block_size)))


def test_every_launch_of_a_decode_step(package: Path, cuda: FakeCuda) -> None:
    with load_model(package) as model:
        cuda.reset()
        trace(model, [5], "decode")
        launches = cuda.launches("eager")
        regions, states = executor_of(model)._regions, executor_of(model)._states
    inputs = {name: regions["inputs"] + offset for name, offset in OFFSETS_OF_ONE.items()}
    history, table = regions["weights"], regions["weights"] + 2176
    mixed, rows, dims = regions["arena"] + 64, regions["arena"] + 3008, regions["inputs"]
    expected = [
        ("gather_fn", (1, 1, 1), 0, False, (inputs["token_ids"], table, rows)),
        ("append_fn", (1, 1, 1), 0, False, (inputs["token_ids"], inputs["slot_mapping"], states[0])),
        (
            "mix_decode_fn",
            (3, 1, 1),
            0,
            True,
            (*(inputs[name] for name in ("positions", "query_start", "block_tables")), states[0], history, mixed),
        ),
        (
            "head_fn",
            (2, 1, 1),
            SHARED["head"],
            True,
            (inputs["logit_rows"], mixed, rows, *(regions[name] for name in ("logits", "workspace", "tickets"))),
        ),
        (
            "select_token_fn",
            (1, 1, 1),
            0,
            True,
            (regions["logits"], inputs["sampling"], regions["greedy"], regions["chosen"]),
        ),
    ]
    found = [(x.name, x.grid, x.shared, x.dependent, x.arguments) for x in launches]
    # gather may be launched early, but a copy precedes it; append is not compiled to be.
    assert found == [(*head, (*pointers, dims, 0, 0)) for *head, pointers in expected]
    assert all(x.block == (128, 1, 1) for x in launches)


def test_a_step_is_one_call(package: Path, cuda: FakeCuda) -> None:
    """Once recorded, a decode step takes the context, the graph, a wait, the context back, and nothing else."""
    with load_model(package) as model, model.sequence() as sequence:
        executor = executor_of(model)
        sequence.prefill([1, 2, 3])
        sequence.step(4)
        with sequence.engine.exclusive():
            cuda.reset()
            tokens = np.array([5], np.int32)
            sequence.begin(tokens)
            output = sequence.engine.forward([Chunk(sequence.table, tokens, 1)])
            assert cuda.calls() == ["cuCtxPushCurrent_v2", "cuGraphLaunch", "cuStreamSynchronize", "cuCtxPopCurrent_v2"]
            replayed = [x for x in cuda.log() if x.how == "replayed"]
            copies = ["cuMemcpyHtoDAsync_v2", *["cuLaunchKernelEx"] * 5, "cuMemcpyDtoHAsync_v2"]
            assert [x.call for x in replayed] == copies
            assert replayed[0].destination == executor._regions["inputs"] and replayed[0].bytes == 2048
            assert replayed[-1].source == executor._regions["greedy"] and replayed[-1].bytes == 512
            assert [x.name for x in replayed[1:-1]] == list(DECODE)
            cuda.reset()
            np.testing.assert_array_equal(output.logits[0], reference([1, 2, 3, 4, 5])[-1])
            read = [x for x in cuda.log() if x.call == "cuMemcpyDtoHAsync_v2"]
            assert [x.bytes for x in read] == [VOCAB * 4], "the rows that were asked for, when they are asked for"
            assert output.logits is output.logits


def graphs(cuda: FakeCuda) -> list[str]:
    return [x for x in cuda.calls() if x in ("cuGraphInstantiateWithFlags", "cuGraphLaunch")]


def test_one_graph_for_each_size(package: Path, cuda: FakeCuda) -> None:
    new, run = "cuGraphInstantiateWithFlags", "cuGraphLaunch"
    with load_model(package) as model:
        assert graphs(cuda) == [], "loading records nothing"
        model.generate([1, 2, 3], 4)
        assert graphs(cuda) == [new, run, new, run, run, run], "prefill of 16, then three tokens, each one launch"
        cuda.reset()
        model.generate([4, 5, 6, 7], 3)
        assert graphs(cuda) == [run] * 3
        cuda.reset()
        model.generate([[1] * 5, [2] * 6, [3] * 7], 3)
        assert graphs(cuda) == [new, run, new, run, run], "32 tokens of prompts; three sequences in the bucket of 4"
        launches = cuda.launches("captured")
        assert [x.grid[0] for x in launches if x.name == "append_fn"] == [32, 4]
        assert not cuda.launches("eager")
        assert [x.name for x in launches] == [*PREFILL, *DECODE]


def test_padding_and_strides_of_ragged_steps(package: Path, cuda: FakeCuda) -> None:
    """The fake's `append` refuses padding without a slot of -1; the results are the reference's."""
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    with load_model(package) as model:
        for completion in model.generate(prompts, 6):
            whole = completion.prompt_token_ids + completion.token_ids
            start = len(completion.prompt_token_ids) - 1
            assert completion.token_ids == [int(row.argmax()) for row in reference(whole)[start:-1]]
        inputs, layout = executor_of(model)._inputs, executor_of(model)._buckets["decode", 4].layout
        tokens, sequences, max_blocks, outputs = inputs[:4].tolist()
        assert (tokens, sequences, outputs) == (3, 3, 3)
        tables, count = layout.places["block_tables"]
        assert count == 4 * 10 and max_blocks == 3
        starts, _ = layout.places["query_start"]
        assert inputs[starts : starts + 5].tolist() == [0, 1, 2, 3, 3]
        assert tables * 4 + count * 4 <= layout.bytes


def test_a_trace_reads_what_launches_wrote(package: Path, cuda: FakeCuda) -> None:
    ids = [3, 1, 4]
    with load_model(package) as model:
        executor = executor_of(model)
        with model.sequence() as sequence, sequence.engine.exclusive():
            sequence.table.extend(len(ids), executor.copy_block)
            batch = build_batch([Chunk(sequence.table, np.array(ids, np.int32), 1)], executor.block_size)
            seen = []
            for i, read in enumerate(executor.trace("prefill", batch)):
                if i == 0:
                    np.testing.assert_array_equal(read(2, np.float32, (3, VOCAB)), weights()[1][ids])
                if i == 3:
                    np.testing.assert_array_equal(read(3, np.float32, (1, VOCAB))[0], reference(ids)[-1])
                seen.append(len(cuda.launches("eager")))
            assert seen == [1, 2, 3, 4, 5], "one launch at a time"


def test_a_profile_has_the_time_of_every_launch(package: Path, cuda: FakeCuda) -> None:
    with load_model(package) as model:
        timings = model.generate([1, 2, 3], 5, profile=True).timings
        rows = {(row.entry, row.node): row for row in timings.profile}
        nodes = ("gather", "layer.append", "layer.mix", "head", "select")
        assert set(rows) == {(e, n) for e in ("decode", "prefill") for n in nodes} and len(timings.profile) == 10
        decode = rows["decode", "head"]
        assert (decode.calls, decode.kernel) == (4, "head")
        assert decode.seconds == pytest.approx(4 * 2e-6), "the fake's clock: 2 microseconds a launch"
        assert decode.bytes == 4 * 8 + 4 * 4 + 4 * (3 + 4 + 5 + 6)
        assert rows["prefill", "layer.mix"].kernel == "mix"
        assert "cuGraphLaunch" not in cuda.calls()
        assert model.generate([1, 2, 3], 5).timings.profile == ()


def test_a_profile_keeps_sizes_of_steps_apart(package: Path, cuda: FakeCuda) -> None:
    with load_model(package) as model:
        rows = model.generate([list(range(12)), [1] * 12, [2] * 3], 2, profile=True)[0].timings.profile
        assert {(r.entry, r.calls) for r in rows} == {("prefill", 1), ("decode", 1)}
        more = model.generate([1] * (32 + 3), 1, profile=True).timings.profile
        assert len(more) == 10, "35 tokens: a step of 32 and one of 3"


def test_the_stream_is_the_one_that_torch_uses_now(
    package: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"started": False, "stream": 0x770}

    def current_stream(ordinal: int) -> SimpleNamespace:
        assert ordinal == 0
        return SimpleNamespace(cuda_stream=state["stream"])

    torch = SimpleNamespace(
        cuda=SimpleNamespace(is_initialized=lambda: state["started"], current_stream=current_stream)
    )

    def streams() -> set[int]:
        return {x.stream for x in cuda.log() if x.call == "cuGraphLaunch"}

    monkeypatch.setitem(sys.modules, "torch", torch)
    with load_model(package) as model:
        model.generate([1], 2)
        own = streams()
        assert len(own) == 1 and not own & {0, 0x770}
        state["started"] = True
        cuda.reset()
        model.generate([1], 2)
        assert streams() == {0x770}
        state["stream"] = 0  # torch's default
        cuda.reset()
        model.generate([1], 2)
        assert streams() == {0}
        cuda.reset()
        model.generate([1] * 20, 1)  # a graph is recorded in a stream of our own: the default one cannot be
        captured = [x for x in cuda.log() if x.how == "captured"]
        assert {x.stream for x in captured} == own and streams() == {0}


def test_copies_of_blocks_stay_on_the_device(package: Path, cuda: FakeCuda) -> None:
    with load_model(package) as model, model.sequence() as sequence:
        sequence.prefill([1, 2, 3, 4, 5, 6])
        with sequence.fork() as other:
            cuda.reset()
            for token in (7, 8, 9):
                np.testing.assert_array_equal(other.step(token).logits[0], reference([*other.token_ids])[-1])
            (copy,) = (x for x in cuda.log() if x.call == "cuMemcpyDtoDAsync_v2")
            state = executor_of(model)._states[0]
            assert copy.bytes == 16 and {(copy.source - state) % 16, (copy.destination - state) % 16} == {0}
            np.testing.assert_array_equal(sequence.step(2).logits[0], reference([1, 2, 3, 4, 5, 6, 2])[-1])


def test_outputs_of_every_row(package: Path, cuda: FakeCuda) -> None:
    ids = np.random.default_rng(3).integers(0, VOCAB, 40).tolist()
    with load_model(package) as model:
        np.testing.assert_array_equal(model.logits(ids), reference(ids))
        launches: list[Call] = [x for x in cuda.log() if x.name == "head_fn" and x.how == "replayed"]
        assert len(launches) == -(-len(ids) // OUTPUTS)
