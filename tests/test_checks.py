"""What a package is checked against, and how far from it a right package may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmc.checks import CODE_STEP, PAIR_STEP, TOLERANCE, make_checks
from llmc.importers.hf import ImportedModel, import_model
from llmc.ir.graph import Graph, StateInput
from llmc.ir.interpret import interpret
from llmc.ir.op import Array
from llmc.ir.target import Target, parse_target
from llmc.ir.types import DType
from llmc.options import KV_DTYPES, CompileOptions
from llmc.passes.pipelines import model_pipeline, step_pipeline
from llmc.passes.quantize import KEPT, Quantize

PICOCODE = Path(__file__).parents[1] / "examples" / "picocode"
GPU = Target("cuda", ())
CPU = parse_target("cpu:x86-64-v3", frozenset())


@pytest.fixture(scope="module")
def picocode() -> ImportedModel:
    return import_model(PICOCODE)


def step_logits(step: Graph, model: ImportedModel, ids: Array, block_size: int = 16) -> Array:
    """Logits [tokens, vocab] of one sequence through its cache, in float64 but for what the cache rounds."""
    count = len(ids)
    blocks = -(-count // block_size)
    inputs = {
        "token_ids": ids,
        "positions": np.arange(count),
        "slot_mapping": np.arange(count),
        "query_start": np.array([0, count]),
        "block_tables": np.arange(blocks)[None],
        "logit_rows": np.arange(count),
    }
    states = {
        v.op.state.name: np.zeros(v.type.concrete({"num_blocks": blocks}))
        for v in step.states
        if isinstance(v.op, StateInput)
    }
    return interpret(step, inputs, model.weights.load, states).outputs["logits"]


def test_every_cache_has_a_tolerance() -> None:
    assert set(KV_DTYPES.values()) == TOLERANCE.keys()


@pytest.mark.parametrize(
    ("quant", "target", "expected"),
    [
        (None, CPU, TOLERANCE[DType.F32]),
        (Quantize("q4"), CPU, CODE_STEP),
        (Quantize("q4", activations=KEPT), GPU, PAIR_STEP),
        (Quantize("fp8", "q4g64", activations=KEPT), GPU, PAIR_STEP),
    ],
)
def test_what_is_rounded_on_the_way_has_its_steps(
    quant: Quantize | None, target: Target, expected: float, picocode: ImportedModel
) -> None:
    """Weights are in the reference as their codes say; what remains is what kernels do."""
    options = CompileOptions(checks=1)
    args = (picocode.graph, picocode.weights.load, picocode.info, DType.F32, quant, target, options)
    checks = make_checks(*args)
    assert checks["tolerance"] == expected
    (case,) = checks["cases"]
    ids = np.array(case["token_ids"])
    got = step_logits(step_pipeline(DType.F64, quant=quant).run(picocode.graph), picocode, ids)[-1]
    for token, logit in case["top"]:
        assert got[token] == pytest.approx(logit, abs=1e-6)


@pytest.mark.parametrize("quant", [None, Quantize("q4g128", "fp8", activations=KEPT)])
def test_a_cache_of_8_bit_floats_passes_its_checks(quant: Quantize | None, picocode: ImportedModel) -> None:
    """With all that the tolerance leaves for other models; and the error is that of its rounding, some 2^4 times that
    of bf16's 2^-8, so that a cache which rounds more, or nothing, is told from it."""
    ids = np.random.default_rng(4).integers(0, picocode.info.vocab_size, 24)
    graph = model_pipeline(quant).run(picocode.graph)
    inputs = {"token_ids": ids, "positions": np.arange(len(ids))}
    want = interpret(graph, inputs, picocode.weights.load).outputs["logits"]
    errors = {}
    for kv in (DType.BF16, DType.F8E4M3):
        got = step_logits(step_pipeline(kv, quant=quant).run(picocode.graph), picocode, ids)
        errors[kv] = float((np.abs(got - want).max(1) / np.abs(want).max(1)).max())
    assert errors[DType.F8E4M3] < TOLERANCE[DType.F8E4M3] / 4
    assert 8 < errors[DType.F8E4M3] / errors[DType.BF16] < 32
