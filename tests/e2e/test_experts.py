"""A whole package of a model with a mixture of experts in each layer, written by hand: logits against the float64
model, every node's results, and the same bits however a sequence is cut or batched."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc import driver
from llmc.importers.hf import ImportedModel, import_model
from llmc.importers.weights import WeightMap, WeightSource
from llmc.inspection import read_graph
from llmc.ir.graph import Graph, Leaf
from llmc.ir.interpret import interpret
from llmc.ir.op import Array
from llmc.ir.types import DType
from llmc.options import CompileOptions
from llmc.packages import open_package
from llmc.passes.pipelines import model_pipeline
from llmc.passes.quantize import Quantize
from llmc.report.verification import first_divergent
from tests.e2e.test_bit_equality import cut_logits, model_folder, ragged_logits
from tests.passes.experts import mixture_model

FOLDER = "stories260K"
VOCAB, LONGEST = 512, 64


@cache
def graph(weights: DType) -> Graph:
    return mixture_model(VOCAB, weights)


def weight(label: str, type: Any) -> Array:
    """The same at any time, large enough that every part shows in the logits."""
    rng = np.random.default_rng(sum(label.encode()))
    shape = type.concrete({})
    scale = 1.0 if len(shape) == 1 or label.startswith("embed") else shape[-1] ** -0.5
    array: Array = type.dtype.store(rng.standard_normal(shape) * scale + (len(shape) == 1))
    return array


def imported(weights: DType, *given: Any, **options: Any) -> ImportedModel:
    """A model folder's tokenizer and limits, with the graph and the weights of this file."""
    found = import_model(*given, **{**options, "max_sequence_length": LONGEST})
    params = {v.op.label: v for v in graph(weights).params if isinstance(v.op, Leaf)}
    sources = {
        label: WeightSource(v.type.dtype, v.type.concrete({}), "here", partial(weight, label, v.type))
        for label, v in params.items()
    }
    assert found.info.vocab_size == VOCAB
    return replace(found, graph=graph(weights), weights=WeightMap(sources))


@pytest.mark.parametrize(
    ("weights", "quant"), [(DType.F32, "none"), (DType.BF16, "none"), (DType.F32, "q8"), (DType.F32, "q4")], ids=str
)
def test_a_package(weights: DType, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "import_model", partial(imported, weights))
    output = tmp_path / "mixture"
    driver.compile_model(model_folder(FOLDER), output, CompileOptions(quant=quant, kv_quant="none", name="mixture"))
    reference = graph(weights) if quant == "none" else model_pipeline(Quantize(quant)).run(graph(weights))
    source = {v.op.label: weight(v.op.label, v.type) for v in graph(weights).params if isinstance(v.op, Leaf)}
    prompts = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (29, 1, 17, 3)]
    expected: list[Array] = []
    for threads in (1, 2, 3):
        model = open_package(output).load(threads=threads)
        report = model.verify()
        assert report.ok, str(report)
        found = [model.logits(p) for p in prompts]
        if not expected:
            expected = found
            for prompt, got in zip(prompts, found, strict=True):
                inputs = {"token_ids": np.array(prompt), "positions": np.arange(len(prompt))}
                truth = interpret(reference, inputs, source).outputs["logits"]
                assert np.abs(got - truth).max() <= report.tolerance * np.abs(truth).max()
            lowered = read_graph(output, "prefill")
            assert first_divergent(model, lowered, source.__getitem__, report.tolerance) == ""
        for want, got in zip(expected, found, strict=True):
            assert np.array_equal(got, want)
        for want, got in zip(expected, ragged_logits(model, prompts), strict=True):
            assert np.array_equal(got, want)
        assert np.array_equal(cut_logits(model, prompts[0], [20, 1, 1, 4, 3]), expected[0])
        model.close()
