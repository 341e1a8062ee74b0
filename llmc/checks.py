"""What a package verifies itself against: logits of fixed prompts, from the float64 interpreter at compile time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmc.dtypes import compute_dtype
from llmc.importers.model_info import ModelInfo
from llmc.ir.graph import Graph
from llmc.ir.interpret import interpret
from llmc.ir.op import Array
from llmc.ir.target import Target
from llmc.ir.types import DType
from llmc.options import CompileOptions
from llmc.passes.pipelines import model_pipeline
from llmc.passes.quantize import INT8, NONE, Quantize

_LENGTHS = (5, 12, 3, 8)
_TOP = 8

TOLERANCE = {DType.F32: 1e-4, DType.F16: 5e-3, DType.BF16: 4e-2, DType.I8: 4e-2, DType.F8E4M3: 2.0**-2}
"""Largest accepted |difference| over |reference| of logits, by the KV cache's dtype: float32 kernels differ from
float64 by some 1e-6; a 16-bit cache rounds keys and values to 2^-11 (f16) or 2^-8 (bf16) each, and i8 codes to 2^-8
of the largest in their vector (1.3e-2 was the most that checks of real models differed by, with heads of 8).

f8e4m3 rounds each element to 2^-4 of itself, r = 2^-5.2 in the root mean square (3 bits of mantissa, magnitudes spread
evenly over octaves), each by itself. Through its values, attention's result errs by at most r of itself; through its
keys by s · r, where s is what the products of a score's elements add up to in squares; attention is a part of the
residual stream, and so errs the stream and then the logits by no more. 2^-2 is √(1 + s²) · r for s up to 9. In the
float64 interpreter the last logits of prompts of 3 to 200 tokens differ by 2e-2 at most with examples/picocode, and
with four smaller models by 0.1 (heads of 8): 7 to 30 times the bf16 cache's, whose roundings are 2^4 times finer.
Unrelated logits differ by about 1."""

CODE_STEP = 1 / 127
"""The same where activations are rounded to 8 bits: a small difference before the rounding can be a step after it,
1/127 of the largest activation of a group."""

PAIR_STEP = 2.0**-5
"""The same where a target's kernels round activations to bf16 (an eighth of it for f16, which has three bits more):
each errs by 2^-8 of itself at most, 2^-9 in the root mean square, and so does a product of many, relative to its
outputs. Independent errors of n products in a row add up to √n · 2^-9: 2^-5 is for 256 of them, the four of a layer in
64 layers. Measured with 6 layers: 4e-3, of √25 · 2^-9 = 1e-2."""


def make_checks(
    graph: Graph,
    load: Callable[[str], Array],
    info: ModelInfo,
    kv: DType,
    quant: Quantize | None,
    target: Target,
    options: CompileOptions,
) -> dict[str, Any]:
    """checks.json: for each prompt the largest logits after its last token, and their scale. The reference has the
    package's weights: with `quant`, as their codes say.

    The prompts are pseudo-random token ids, so that a package without a tokenizer has them too. Models too large for
    the interpreter get none, and `verify` says so.
    """
    cases = []
    graph = graph if quant is None else model_pipeline(quant).run(graph)
    lengths = _LENGTHS[: options.checks] if info.num_parameters <= options.checks_max_parameters else ()
    for i, length in enumerate(lengths):
        ids = np.random.default_rng(i).integers(0, info.vocab_size, min(length, info.max_sequence_length))
        logits = interpret(graph, {"token_ids": ids, "positions": np.arange(len(ids))}, load).outputs["logits"][-1]
        top = np.argsort(-logits, kind="stable")[:_TOP]
        cases.append(
            {
                "token_ids": [int(t) for t in ids],
                "top": [[int(t), round(float(logits[t]), 7)] for t in top],
                "greedy": [int(top[0])],
                "max_abs": round(float(np.abs(logits).max()), 7),
            }
        )
    return {
        "cases": cases,
        "tolerance": max(TOLERANCE[kv], *_steps(graph, quant, target)),
        "reference": "float64 interpreter",
    }


def _steps(graph: Graph, quant: Quantize | None, target: Target) -> list[float]:
    """How far activations may be off because kernels round them, by every reason for it; zero for none."""
    kept = quant is None or NONE in (quant.format, quant.head)
    coded = quant is not None and quant.activations == INT8
    kept = quant is None or NONE in (quant.format, quant.head)
    pairs = kept and any(v.type.dtype is DType.BF16 for v in graph.params) and target.rounds
    compute = compute_dtype(graph, quant, target)
    rounding = PAIR_STEP if pairs or compute is DType.BF16 else PAIR_STEP / 8 if compute is DType.F16 else 0.0
    return [CODE_STEP if coded else 0.0, rounding]
