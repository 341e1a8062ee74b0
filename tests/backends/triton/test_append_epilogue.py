"""Queries, keys and values out of one product, rotated and appended at its end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.backends.triton.blocks import block_weight
from llmc.backends.triton.ops import BlockAppend
from llmc.ir.op import Emitter, Value, run
from llmc.ir.types import DType, symbol
from tests.backends.triton.nodes import leaf, run_node, step_of

TOKENS, SLOTS = 5, [35, -1, 0, 17, 47]
F32, BF16 = DType.F32, DType.BF16


@pytest.mark.parametrize("state", [F32, DType.F16, BF16, DType.F8E4M3], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim", "layout"),
    [(2, 1, 64, 64, "half"), (3, 3, 32, 16, "half"), (2, 1, 48, 48, "interleaved"), (4, 2, 40, 0, "half")],
)
@pytest.mark.parametrize("block_size", [16, 32])
def test_rotated_and_appended(
    state: DType, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, layout: str, block_size: int
) -> None:
    dtype = F32 if state is F32 else BF16
    op = BlockAppend("none", 72, True, heads, kv_heads, head_dim, rotary_dim, layout, 1e-5, dtype, dtype)
    random = np.random.default_rng(heads)
    tokens = symbol("tokens")
    b = Emitter()
    weight = leaf("weight", dtype, (op.rows, 72))
    (blocks,) = block_weight(b, op, weight, dtype)
    bias = leaf("bias", F32, (op.rows,))
    ordered = b.one(op.order, bias)
    x, gain, slots = leaf("x", F32, (tokens, 72)), leaf("gain", F32, (72,)), leaf("slots", DType.I32, (tokens,))
    tables = [leaf(n, F32, (tokens, rotary_dim // 2)) for n in ("cos", "sin")] if rotary_dim else []
    count = 64 // block_size
    key = leaf("key", state, (count, kv_heads, head_dim, block_size))
    value = leaf("value", state, (count, kv_heads, block_size, head_dim))
    node = b.make(op, (x, gain, blocks, ordered, *tables, slots, key, value))
    angles = random.uniform(0, 6, (TOKENS, max(1, rotary_dim // 2)))
    values: dict[Value, Any] = {
        weight: (random.standard_normal((op.rows, 72)) / 8).astype(dtype.numpy),
        bias: random.standard_normal(op.rows).astype(np.float32),
        x: random.standard_normal((TOKENS, 72)).astype(np.float32),
        gain: random.uniform(0.5, 1.5, 72).astype(np.float32),
        slots: np.array(SLOTS, np.int32),
        key: np.zeros(key.type.concrete({}), state.numpy),
        value: np.zeros(value.type.concrete({}), state.numpy),
    }
    values |= dict(zip(tables, (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)), strict=False))
    oracle = {v: np.asarray(a).astype(v.type.dtype.oracle) for v, a in values.items()}
    expected = run(list(node.results), dict(oracle), {"tokens": TOKENS})
    packed, arranged = (run([v], dict(oracle), {})[0].astype(v.type.dtype.numpy) for v in (blocks, ordered))
    operands = {v: values[v] for v in node.inputs if v in values} | {blocks: packed, ordered: arranged}
    given = run_node(node, step_of(8), operands, {"tokens": TOKENS})
    rounding = {F32: 2e-6, DType.F16: 2**-9, BF16: 2**-6, DType.F8E4M3: 2**-3}
    for result, want in zip(node.results, expected, strict=True):
        have = given[result].astype(np.float64)
        coarsest = max(rounding[dtype], rounding[result.type.dtype])
        assert np.abs(have - want).max() <= coarsest * np.abs(want).max()
        # What no token's slot is was not written.
        assert np.array_equal(have == 0, want == 0) or result.type.dtype is DType.F8E4M3


@pytest.mark.parametrize("state", [BF16, DType.F8E4M3], ids=str)
def test_a_token_that_is_no_number_stays_none(state: DType) -> None:
    """Clamped into what 8-bit floats hold, it must not become a number; nor may it spoil its neighbours."""
    op = BlockAppend("none", 64, False, 2, 1, 64, 0, "half", None, BF16, BF16)
    b = Emitter()
    weight = leaf("weight", BF16, (op.rows, 64))
    (blocks,) = block_weight(b, op, weight, BF16)
    x, slots = leaf("x", BF16, (symbol("tokens"), 64)), leaf("slots", DType.I32, (symbol("tokens"),))
    key, value = leaf("key", state, (1, 1, 64, 16)), leaf("value", state, (1, 1, 16, 64))
    node = b.make(op, (x, blocks, slots, key, value))
    ones = np.ones((op.rows, 64), np.float32).astype(BF16.numpy)
    (packed,) = run([blocks], {weight: ones.astype(BF16.oracle)}, {})
    tokens = np.ones((3, 64), np.float32)
    tokens[1, 5], tokens[2] = np.nan, 1000  # 64,000 is more than 448
    operands = {
        x: tokens.astype(BF16.numpy),
        slots: np.arange(3, dtype=np.int32),
        key: np.zeros((1, 1, 64, 16), state.numpy),
        value: np.zeros((1, 1, 16, 64), state.numpy),
        blocks: packed.astype(BF16.numpy),
    }
    given = run_node(node, step_of(8), operands, {"tokens": 3})
    query, keys, values = (given[result].astype(np.float64) for result in node.results)
    most = 448 if state is DType.F8E4M3 else np.float64(np.float32(64000).astype(BF16.numpy))
    for rows, largest in ((query.reshape(3, -1), 64000), (keys[0, 0].T, most), (values[0, 0], most)):
        assert np.isnan(rows[1]).all()
        assert np.array_equal(rows[0], np.full(rows.shape[1], 64.0))
        assert np.allclose(rows[2], largest, rtol=2**-8)
