"""Observers: dumps that can be read back, and a numeric check that sees a pass that is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from llmc.ir.errors import LlmcError, VerificationError
from llmc.ir.graph import Graph, Param
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.elementwise import MulScalar
from llmc.ir.text import parse
from llmc.ir.types import DType
from llmc.passes.base import Pass, PassContext, Pipeline
from llmc.passes.constants import ConstantFolder
from llmc.passes.observe import Dumper, NumericsCheck, Verifier, relative_error
from llmc.passes.opt import optimize_file
from llmc.passes.pipelines import COMMON, entry_pipeline, step_pipeline
from llmc.passes.trials import random_trial
from tests.passes.graphs import F32, Model, learned_model, rotary_model


@pytest.fixture
def wrong_pass() -> Iterator[Pass]:
    """A pass that changes every factor a little."""

    @dataclass(frozen=True)
    class Wrong(Pass):
        name = "test-wrong"

        def run(self, graph: Graph, context: PassContext) -> Graph:
            def emit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
                op = MulScalar(node.op.value * (1 + 1e-6)) if isinstance(node.op, MulScalar) else node.op
                return Emitter().make(op, inputs).results

            return graph.map(emit)

    yield Wrong()
    del Pass.registry["test-wrong"]


@pytest.fixture
def untyped_pass() -> Iterator[Pass]:
    """A pass that leaves a type that inference does not give."""

    @dataclass(frozen=True)
    class Untyped(Pass):
        name = "test-untyped"

        def run(self, graph: Graph, context: PassContext) -> Graph:
            return graph.map(lambda node, inputs: Node(node.op, inputs, node.inputs[0].node.types, "").results)

    yield Untyped()
    del Pass.registry["test-untyped"]


def test_dumps(tmp_path: Path) -> None:
    context = PassContext()
    pipeline = step_pipeline(DType.F16)
    start = rotary_model(width=64, rotary=64)
    end = pipeline.run(start, context, Dumper(tmp_path / "dump", context))
    names = [f"{i:03}-{p.name}" for i, p in enumerate(pipeline.passes, 1)]
    files = {p.name for p in (tmp_path / "dump").iterdir()}
    expected = {"000-input.ir", "summary.txt", "summary.json", *(f"{n}{s}" for n in names for s in (".ir", ".diff"))}
    assert expected <= files
    constants = files - expected  # 32 frequencies: a row [1, 32] in the primitive form, [32] for the fused op
    assert len(constants) == 2
    last = (tmp_path / "dump" / f"{names[-1]}.ir").read_text()
    assert parse(last, ConstantFolder(tmp_path / "dump")) == end
    assert sum(name.removesuffix(".npy") in last for name in constants) == 1
    diff = (tmp_path / "dump" / "010-fuse-attention.diff").read_text()
    assert diff.startswith("--- 009-fuse-rope\n+++ 010-fuse-attention\n")


def test_a_dump_is_read_by_opt(tmp_path: Path) -> None:
    context = PassContext()
    pipeline = Pipeline(COMMON.passes[:7])
    pipeline.run(rotary_model(width=64, rotary=64), context, Dumper(tmp_path, context))
    text, report = optimize_file(tmp_path / "007-raise-linear.ir", str(Pipeline(COMMON.passes[7:])))
    whole = COMMON.run(rotary_model(width=64, rotary=64))
    assert text == str(whole)
    assert parse(text, ConstantFolder(tmp_path)) == whole
    assert report == ""


def test_a_summary_says_what_each_pass_did(tmp_path: Path) -> None:
    context = PassContext()
    COMMON.run(rotary_model(), context, Dumper(tmp_path, context, {"tokens": 8}))
    data = json.loads((tmp_path / "summary.json").read_text())
    assert data["sizes"] == {"tokens": 8}
    rows = {row["pass"]: row for row in data["passes"]}
    assert rows["fuse-attention"]["firings"] == {"attention": 2}
    assert rows["fuse-attention"]["ops"]["attention"] == 2
    assert rows["fuse-norm"]["refusals"]["add-rms-norm"][0].startswith("want add, found embedding")
    assert rows["fuse-attention"]["bytes"] < rows["input"]["bytes"]
    assert rows["fuse-attention"]["flops"] == pytest.approx(
        rows["fuse-rope"]["flops"], rel=0.01
    )  # the mask is per layer
    text = (tmp_path / "summary.txt").read_text()
    assert "FLOPs and bytes at tokens=8" in text
    assert any(line.startswith("fuse-attention ") and "attention 2" in line for line in text.splitlines())


def test_a_wrong_pass_is_seen(wrong_pass: Pass) -> None:
    pipeline = Pipeline((COMMON.passes[1], wrong_pass))
    numerics = NumericsCheck()
    with pytest.raises(LlmcError, match=r"pass test-wrong changes 'logits': relative difference .* at most 1e-09"):
        pipeline.run(rotary_model(), observer=numerics)
    assert [name for name, _ in numerics.errors] == ["canonicalize"]


def test_an_ill_typed_pass_is_seen(untyped_pass: Pass) -> None:
    b = Model()
    graph = b.graph({"ids": b.argmax(b.input("x", F32, (b.tokens, 3)))})
    with pytest.raises(VerificationError, match=r"recorded as f32\[tokens, 3\], inferred as i32\[tokens\]"):
        Pipeline((untyped_pass,)).run(graph, observer=Verifier())


def test_given_weights_are_used() -> None:
    asked: set[str] = set()
    model = rotary_model(layers=1)
    shapes = {p.op.label: p.type.concrete({}) for p in model.params if isinstance(p.op, Param)}

    def load(label: str) -> np.ndarray:
        asked.add(label)
        return np.full(shapes[label], 0.1)

    COMMON.run(model, observer=NumericsCheck(load))
    assert asked == shapes.keys()


@pytest.mark.parametrize("entry", ["decode", "prefill", "verify"])
def test_windows_are_kept_by_every_pass(entry: str) -> None:
    check = NumericsCheck()
    pipeline = step_pipeline(DType.F16, 4) + entry_pipeline(entry)
    pipeline.run(rotary_model(layers=3, windows=(5, 0, 9)), observer=check)
    assert [name.partition("{")[0] for name, _ in check.errors][-1] == pipeline.passes[-1].name


def test_a_batch_for_trials_with_windows() -> None:
    """What lies in a block that no window shows is NaN, and its entry of the table may be anything."""
    step = step_pipeline(DType.F16, 4).run(rotary_model(windows=(0, 6)))
    seen_less = 0
    for seed in range(20):
        trial = random_trial(step, seed)
        tables, positions, starts = (trial.inputs[n] for n in ("block_tables_window_6", "positions", "query_start"))
        first, last = positions[starts[:-1]], positions[starts[1:] - 1]
        spans = [range(max(0, f - 5) // 4, n // 4 + 1) for f, n in zip(first, last, strict=True)]
        owned = [block for row, span in zip(tables, spans, strict=True) for block in row[list(span)]]
        assert len(set(owned)) == len(owned)
        seen_less += sum(span.start for span in spans)
        owner = np.repeat(np.arange(len(tables)), np.diff(starts))
        np.testing.assert_array_equal(trial.inputs["slot_mapping_window_6"] // 4, tables[owner, positions // 4])
        key = trial.states["layers.1.attention.key"]
        assert set(np.flatnonzero(np.isfinite(key).all((1, 2, 3)))) == set(owned)
    assert seen_less > 0


def test_a_batch_for_trials() -> None:
    """Slots agree with block tables, ids fit their tables, and what belongs to no sequence is NaN."""
    step = step_pipeline(DType.F16, 4).run(learned_model())
    for seed in range(20):
        trial = random_trial(step, seed)
        tables, positions, starts = (trial.inputs[n] for n in ("block_tables", "positions", "query_start"))
        owner = np.repeat(np.arange(len(tables)), np.diff(starts))
        assert positions.max() < 64
        np.testing.assert_array_equal(trial.inputs["slot_mapping"] // 4, tables[owner, positions // 4])
        assert len(set(trial.inputs["slot_mapping"])) == len(positions)
        owned = {
            block for s, last in zip(tables, positions[starts[1:] - 1], strict=True) for block in s[: last // 4 + 1]
        }
        for state in trial.states.values():
            assert {i for i, block in enumerate(state) if not np.isnan(block).any()} == owned
    decode = entry_pipeline("decode", sequences=3).run(step)
    assert len(random_trial(decode).inputs["query_start"]) == 4


def test_relative_error() -> None:
    one = np.array([1.0, np.nan, -4.0])
    assert relative_error(one, one) == 0
    assert relative_error(one, np.array([1.0, np.nan, -4.4])) == pytest.approx(0.1)
    assert relative_error(one, np.array([1.0, 2.0, -4.0])) == np.inf
    assert relative_error(one, one[:2]) == np.inf
    assert relative_error(np.zeros(2), np.array([0.0, 1e-3])) == 1e-3
    assert relative_error(np.zeros(0), np.zeros(0)) == 0


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F8E4M3, DType.I32, DType.BOOL])
def test_constants_are_stored_exactly(tmp_path: Path, dtype: DType) -> None:
    b = Model()
    array = np.random.default_rng(0).standard_normal((5, 7)) > 0 if dtype is DType.BOOL else np.arange(35) / 4
    graph = b.graph({"out": b.constant(array.reshape(5, 7), dtype)})
    context = PassContext()
    Pipeline((COMMON.passes[1],)).run(graph, context, Dumper(tmp_path, context))
    folder = ConstantFolder(tmp_path)
    assert len(folder) == 1
    assert set(folder) == set(graph.constants)
    assert parse((tmp_path / "001-canonicalize.ir").read_text(), folder) == graph


def test_a_damaged_constant_is_named(tmp_path: Path) -> None:
    b = Model()
    graph = b.graph({"out": b.constant(np.arange(40.0), F32)})
    context = PassContext()
    Pipeline((COMMON.passes[1],)).run(graph, context, Dumper(tmp_path, context))
    (path,) = tmp_path.glob("*.npy")
    np.save(path, np.zeros(40, np.float32))
    with pytest.raises(LlmcError, match=r"is damaged: its sha256"):
        parse(str(graph), ConstantFolder(tmp_path))
    path.write_bytes(b"no array")
    with pytest.raises(LlmcError, match="cannot read the constant"):
        parse(str(graph), ConstantFolder(tmp_path))
    path.unlink()
    with pytest.raises(LlmcError, match="was not given beside the text"):
        parse(str(graph), ConstantFolder(tmp_path))
