"""Rows of tables, out of a matrix and out of blocks, against the ops' references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.backends.triton.blocks import block_weight
from llmc.backends.triton.ops import BlockEmbedding
from llmc.ir.op import Emitter, run
from llmc.ir.ops.embedding import Embedding
from llmc.ir.quant import FORMATS
from llmc.ir.types import DType, symbol
from tests.backends.triton.nodes import leaf, run_node, step_of

IDS = np.array([129, 0, 77, 5], np.int32)


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16], ids=str)
@pytest.mark.parametrize("width", [100, 1500])
def test_rows_of_a_matrix(dtype: DType, width: int) -> None:
    ids, table = leaf("ids", DType.I32, (symbol("tokens"),)), leaf("table", dtype, (130, width))
    values = dtype.store(np.random.default_rng(0).standard_normal((130, width)))
    node = Emitter().make(Embedding(DType.F32), (ids, table))
    given = run_node(node, step_of(8), {ids: IDS, table: values}, {"tokens": len(IDS)})
    assert np.array_equal(given[node.results[0]], values[IDS].astype(np.float32))


@pytest.mark.parametrize("format", ["none", *FORMATS])
def test_rows_out_of_blocks(format: str) -> None:
    ids, weight = leaf("ids", DType.I32, (symbol("tokens"),)), leaf("weight", DType.F32, (130, 300))
    b, given = Emitter(), weight
    if format != "none":
        codes, scales = b.quantize_weight(weight, format=format)
        given = b.dequantize_weight(codes, scales, format=format, width=300)
    op = BlockEmbedding(format, 130, 300)
    packed = block_weight(b, op, given, DType.BF16)
    node = b.make(op, (ids, *packed))
    values: dict[Any, Any] = {weight: np.random.default_rng(0).standard_normal((130, 300)), ids: IDS}
    stored = {v: v.type.dtype.store(run([v], dict(values), {})[0]) for v in packed}
    oracles = [IDS, *(a.astype(v.type.dtype.oracle) for v, a in stored.items())]
    (expected,) = op.evaluate([v.type for v in node.inputs], oracles, {})
    result = run_node(node, step_of(8), {ids: IDS, **stored}, {"tokens": len(IDS)})[node.results[0]]
    assert np.array_equal(result, expected.astype(np.float32))  # a code times a scale is exact in f32
