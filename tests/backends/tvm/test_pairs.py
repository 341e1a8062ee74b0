"""Products of pairs of bf16, where the processor has them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.isa import ISAS
from llmc.backends.tvm.kernels.linear import gated_linear, linear
from llmc.backends.tvm.packing import pack, pack_gated
from llmc.ir.target import CPU_VARIANTS, parse_target
from tests.backends.tvm.machine import Array, Kernel, f32, f64, runs_here, same_bits
from tests.backends.tvm.test_linear import activation, chained, rows_to_judge, run
from tests.tolerance import assert_as_good_as

ISA = ISAS["avx512-bf16"]
needs_pairs = pytest.mark.skipif(not runs_here(ISA), reason="needs AVX-512 BF16: this processor does not have it")


def rounded(x: Array) -> Array:
    """To the weights' storage dtype, as the kernels round activations."""
    return x.astype(ml_dtypes.bfloat16)


@needs_pairs
@settings(max_examples=6)
@given(
    n=st.integers(1, 90),
    k=st.integers(1, 150),
    rows=st.sampled_from([1, 2, 13, 64, 101]),
    bias=st.booleans(),
    residual=st.booleans(),
    epilogue=st.sampled_from(["none", "relu", "silu", "gelu_tanh", "gelu_erf"]),
    tasks=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
@example(n=33, k=1, rows=2, bias=False, residual=False, epilogue="none", tasks=2, seed=0)
@example(n=64, k=2001, rows=50, bias=True, residual=True, epilogue="silu", tasks=2, seed=0)
def test_linear(n: int, k: int, rows: int, bias: bool, residual: bool, epilogue: str, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    many = max(rows, rows_to_judge(n))
    x = rng.standard_normal((many, k)).astype(np.float32)
    w = rounded(rng.standard_normal((n, k)) / np.sqrt(k))
    b = rng.standard_normal(n).astype(np.float32)
    r = rng.standard_normal((many, n)).astype(np.float32)
    kernel = Kernel(
        linear, ISA, rows_dim=0, n=n, k=k, weight_dtype="bf16", bias=bias, epilogue=epilogue, residual=residual
    )

    def inputs(which: slice) -> list[Array]:
        return [x[which], pack(w), *([b] if bias else []), *([r[which]] if residual else [])]

    y = run(kernel, inputs(slice(None)), many, n, 0, tasks)
    truth = activation(epilogue, f64(rounded(x)) @ f64(w).T + (f64(b) if bias else 0)) + (f64(r) if residual else 0)
    naive = chained(f32(rounded(x)), f32(w), b if bias else None, epilogue, r if residual else None)
    assert_as_good_as(y, naive, np.asarray(truth))
    assert same_bits(run(kernel, inputs(slice(0, rows)), rows, n, 0, tasks), y[:rows])
    assert same_bits(run(kernel, inputs(slice(rows - 1, rows)), 1, n, 0, 1)[0], y[rows - 1])


@needs_pairs
def test_gated_linear() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 77)).astype(np.float32)
    gate, up = (rounded(rng.standard_normal((45, 77)) / 9) for _ in range(2))
    parameters: dict[str, Any] = {"rows_dim": 0, "n": 45, "k": 77, "weight_dtype": "bf16", "activation": "silu"}
    y = run(Kernel(gated_linear, ISA, **parameters), [x, pack_gated(gate, up)], 60, 45, 0, 2)
    truth = activation("silu", f64(rounded(x)) @ f64(gate).T) * (f64(rounded(x)) @ f64(up).T)
    small = f32(rounded(x))
    naive = chained(small, f32(gate), None, "silu", None) * chained(small, f32(up), None, "none", None)
    assert_as_good_as(y, naive, truth)


def test_it_has_to_be_asked_for() -> None:
    flags = frozenset(CPU_VARIANTS["avx512-bf16"].requires) | frozenset(CPU_VARIANTS["x86-64-v3"].requires)
    assert [v.name for v in parse_target("cpu", flags).variants] == ["avx512-vnni"]
    assert "avx512-bf16" not in [v.name for v in parse_target("cpu:portable", flags).variants]
    assert [v.name for v in parse_target("cpu:avx512-bf16", frozenset()).variants] == ["avx512-bf16"]
