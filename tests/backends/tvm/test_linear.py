from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.kernels.linear import gated_linear, linear
from llmc.backends.tvm.packing import pack, pack_gated, unpack, unpack_gated
from tests.backends.tvm.machine import DTYPES, V3, Array, Guarded, Kernel, f32, f64, needs_v3, same_bits, stored
from tests.tolerance import assert_as_good_as

pytestmark = needs_v3


def activation(name: str, x: Array) -> Array:
    """In the dtype of x."""
    number = x.dtype.type

    def erf(z: Array) -> Array:
        return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(z).astype(x.dtype))

    def cubic(z: Array) -> Array:
        return np.asarray(number(math.sqrt(2 / math.pi)) * (z + number(0.044715) * z * z * z))

    results: dict[str, Callable[[], Any]] = {
        "none": lambda: x,
        "relu": lambda: np.maximum(x, 0),
        "relu_squared": lambda: np.maximum(x, 0) ** 2,
        "tanh": lambda: np.tanh(x),
        "sigmoid": lambda: number(1) / (number(1) + np.exp(-x)),
        "silu": lambda: x / (number(1) + np.exp(-x)),
        "gelu_sigmoid": lambda: x / (number(1) + np.exp(number(-1.702) * x)),
        "gelu_tanh": lambda: number(0.5) * x * (number(1) + np.tanh(cubic(x))),
        "gelu_erf": lambda: number(0.5) * x * (number(1) + erf(x / number(math.sqrt(2)))),
    }
    return np.asarray(results[name]())


def run(kernel: Kernel, inputs: list[Array], rows: int, n: int, rows_dim: int, tasks: int) -> Array:
    y = Guarded((rows, n), np.float32)
    dims = [7, 7, 7, 7]
    dims[rows_dim] = rows
    kernel(dims, [*inputs, y], tasks)
    return y.array


def rows_to_judge(n: int) -> int:
    """Rows that give 2,000 results: of a few, the naive product's error is now and then small by luck."""
    return -(-2000 // n)


EPILOGUES = ["none", "relu", "silu", "sigmoid", "tanh", "gelu_erf", "gelu_tanh", "gelu_sigmoid", "relu_squared"]


@settings(max_examples=12)
@given(
    n=st.integers(1, 90),
    k=st.integers(1, 150),
    rows=st.sampled_from([1, 2, 3, 5, 7, 13, 64, 101]),
    dtype=st.sampled_from(sorted(DTYPES)),
    bias=st.booleans(),
    residual=st.booleans(),
    epilogue=st.sampled_from(EPILOGUES),
    rows_dim=st.sampled_from([0, 3]),
    tasks=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 1000),
)
@example(n=1021, k=64, rows=2, dtype="f16", bias=False, residual=False, epilogue="none", rows_dim=3, tasks=2, seed=0)
@example(n=16, k=200, rows=1, dtype="f32", bias=True, residual=True, epilogue="gelu_tanh", rows_dim=0, tasks=2, seed=0)
@example(n=130, k=33, rows=1, dtype="bf16", bias=True, residual=False, epilogue="gelu_erf", rows_dim=0, tasks=3, seed=1)
def test_linear(
    n: int,
    k: int,
    rows: int,
    dtype: str,
    bias: bool,
    residual: bool,
    epilogue: str,
    rows_dim: int,
    tasks: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    many = max(rows, rows_to_judge(n))
    x = rng.standard_normal((many, k)).astype(np.float32)
    w = stored(rng.standard_normal((n, k)) / math.sqrt(k), dtype)
    b = rng.standard_normal(n).astype(np.float32)
    r = rng.standard_normal((many, n)).astype(np.float32)
    parameters: dict[str, Any] = {"rows_dim": rows_dim, "n": n, "k": k, "weight_dtype": dtype}
    kernel = Kernel(linear, V3, bias=bias, epilogue=epilogue, residual=residual, **parameters)
    extra = [a for a, wanted in ((b, bias), (r, residual)) if wanted]
    y = run(kernel, [x, pack(w), *extra], many, n, rows_dim, tasks)

    def plain(convert: Any) -> Array:
        z = convert(x) @ convert(w).T + (convert(b) if bias else 0)
        return np.asarray(activation(epilogue, z) + (convert(r) if residual else 0))

    assert_as_good_as(y, chained(x, f32(w), b if bias else None, epilogue, r if residual else None), plain(f64))
    # The bits of a row: whatever it is batched with, and however the work is shared.
    few = [x[:rows], pack(w), *([b] if bias else []), *([r[:rows]] if residual else [])]
    assert same_bits(run(kernel, few, rows, n, rows_dim, tasks), y[:rows])
    for i in {0, rows // 2, rows - 1}:
        alone = [x[i : i + 1], pack(w), *([b] if bias else []), *([r[i : i + 1]] if residual else [])]
        assert same_bits(run(kernel, alone, 1, n, rows_dim, 1)[0], y[i])


def chained(x: Array, w: Array, b: Array | None, epilogue: str, r: Array | None) -> Array:
    """The naive float32 product: one sum, in order."""
    z = np.zeros((len(x), len(w)), np.float32)
    for i in range(x.shape[1]):
        z += x[:, i, None] * w[None, :, i]
    z = z if b is None else z + b
    return np.asarray(activation(epilogue, z) + (np.float32(0) if r is None else r))


@settings(max_examples=8)
@given(
    n=st.integers(1, 60),
    k=st.integers(1, 100),
    rows=st.sampled_from([1, 2, 6, 17, 50]),
    dtype=st.sampled_from(sorted(DTYPES)),
    act=st.sampled_from(["silu", "gelu_tanh", "relu"]),
    tasks=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_gated_linear(n: int, k: int, rows: int, dtype: str, act: str, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    many = max(rows, rows_to_judge(n))
    x = rng.standard_normal((many, k)).astype(np.float32)
    gate, up = (stored(rng.standard_normal((n, k)) / math.sqrt(k), dtype) for _ in range(2))
    kernel = Kernel(gated_linear, V3, rows_dim=0, n=n, k=k, weight_dtype=dtype, activation=act)
    y = run(kernel, [x, pack_gated(gate, up)], many, n, 0, tasks)
    truth = activation(act, f64(x) @ f64(gate).T) * (f64(x) @ f64(up).T)
    naive = chained(x, f32(gate), None, act, None) * chained(x, f32(up), None, "none", None)
    assert_as_good_as(y, naive, truth)
    assert same_bits(run(kernel, [x[:rows], pack_gated(gate, up)], rows, n, 0, tasks), y[:rows])
    assert same_bits(run(kernel, [x[-1:], pack_gated(gate, up)], 1, n, 0, 1)[0], y[-1])


def test_epilogues_take_extreme_values() -> None:
    x = np.array(
        [[0.0], [1e-30], [50.0], [-50.0], [88.0], [-88.0], [200.0], [-200.0], [1e30], [-1e30], [np.nan]], np.float32
    )
    w = np.ones((17, 1), np.float32)
    for epilogue in EPILOGUES:
        kernel = Kernel(linear, V3, rows_dim=0, n=17, k=1, weight_dtype="f32", epilogue=epilogue)
        y = run(kernel, [x, pack(w)], len(x), 17, 0, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            truth = activation(epilogue, f64(x))
            truth = np.where(np.isnan(truth) & ~np.isnan(f64(x)), 0, truth)  # -1e30 / infinity, when squared before
        finite = np.abs(truth[:-1]) < 3e38
        assert np.isnan(y[-1]).all(), f"{epilogue} loses NaN"
        error = np.abs(y[:-1] - truth[:-1])[np.broadcast_to(finite, y[:-1].shape)]
        scale = np.broadcast_to(np.abs(truth[:-1]), y[:-1].shape)[np.broadcast_to(finite, y[:-1].shape)]
        assert (error <= 1e-6 * np.maximum(scale, 1.0)).all(), f"{epilogue}: {y[:, 0]}"
        assert same_bits(y[:, 0], y[:, 16]), f"{epilogue}: vector and tail differ"


@given(n=st.integers(1, 50), k=st.integers(1, 20), dtype=st.sampled_from(sorted(DTYPES)))
def test_packing_round_trips(n: int, k: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    gate, up = (stored(rng.standard_normal((n, k)), dtype) for _ in range(2))
    packed = pack(gate)
    assert packed.shape == (-(-n // 16), k, 16)
    assert packed[n // 16 if n % 16 else -1, 0, (n - 1) % 16] == gate[n - 1, 0]
    assert same_bits(unpack(packed, n), gate)
    both = pack_gated(gate, up)
    assert both.shape == (-(-n // 8), k, 16)
    assert (both[0, :, 0] == gate[0]).all() and (both[0, :, 8] == up[0]).all()
    back = unpack_gated(both, n)
    assert same_bits(back[0], gate) and same_bits(back[1], up)
