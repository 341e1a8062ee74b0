"""Products of bf16 pairs: against float64, bit for bit whatever a row is batched with, at the ends of k and n.

The plain implementation rounds activations to bf16, as the kernels are to do. Judged against the float64 product of the
activations as given, that rounding is most of either error; against that of the rounded ones, summing is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.isa import ISAS
from llmc.backends.tvm.kernels import pairs
from llmc.backends.tvm.kernels.linear import gated_linear, linear
from llmc.backends.tvm.packing import pack, pack_gated
from tests.backends.tvm.machine import Array, Kernel, f32, f64, runs_here, same_bits, stored
from tests.backends.tvm.test_linear import EPILOGUES, activation, chained, rows_to_judge, run
from tests.tolerance import assert_as_good_as

ISA = ISAS["avx512-bf16"]

pytestmark = pytest.mark.skipif(not runs_here(ISA), reason="needs AVX-512 BF16: this processor does not have it")


def draw(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def judge(y: Array, x: Array, plain: Callable[[Array], Array], truth: Callable[[Array], Array]) -> None:
    """`plain` and `truth`: the results for activations, in float32 and in float64."""
    rounded = f32(stored(x, "bf16"))
    assert_as_good_as(y, plain(rounded), truth(f64(x)), "against activations as given")
    assert_as_good_as(y, plain(rounded), truth(f64(rounded)), "against activations rounded to bf16")


@settings(max_examples=6)
@given(
    n=st.integers(1, 90),
    k=st.integers(1, 150),
    rows=st.sampled_from([1, 2, 3, 5, 7, 13, 48, 49, 64, 101]),
    bias=st.booleans(),
    residual=st.booleans(),
    epilogue=st.sampled_from(EPILOGUES),
    rows_dim=st.sampled_from([0, 3]),
    tasks=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 1000),
)
@example(n=1021, k=64, rows=2, bias=False, residual=False, epilogue="none", rows_dim=3, tasks=2, seed=0)
@example(n=16, k=200, rows=1, bias=True, residual=True, epilogue="gelu_tanh", rows_dim=0, tasks=2, seed=0)
@example(n=130, k=33, rows=49, bias=True, residual=False, epilogue="gelu_erf", rows_dim=0, tasks=3, seed=1)
def test_linear(
    n: int, k: int, rows: int, bias: bool, residual: bool, epilogue: str, rows_dim: int, tasks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    many = max(rows, rows_to_judge(n))
    x, b, r = draw(rng, many, k), draw(rng, n), draw(rng, many, n)
    w = stored(draw(rng, n, k) / math.sqrt(k), "bf16")
    parameters: dict[str, Any] = {"rows_dim": rows_dim, "n": n, "k": k, "weight_dtype": "bf16"}
    kernel = Kernel(linear, ISA, bias=bias, epilogue=epilogue, residual=residual, **parameters)

    def of(which: slice, tasks: int) -> Array:
        extra = [a for a, wanted in ((b, bias), (r[which], residual)) if wanted]
        return run(kernel, [x[which], pack(w), *extra], len(x[which]), n, rows_dim, tasks)

    def plain(x: Array) -> Array:
        return chained(x, f32(w), b if bias else None, epilogue, r if residual else None)

    def truth(x: Array) -> Array:
        z = x @ f64(w).T + (f64(b) if bias else 0)
        return np.asarray(activation(epilogue, z) + (f64(r) if residual else 0))

    y = of(slice(None), tasks)
    judge(y, x, plain, truth)
    # The bits of a row: whatever it is batched with, and however the work is shared.
    assert same_bits(of(slice(0, rows), tasks), y[:rows])
    for i in {0, rows // 2, rows - 1}:
        assert same_bits(of(slice(i, i + 1), 1)[0], y[i])


@pytest.mark.parametrize("k", [1, 2, 31, 40, 2047])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_gated_linear(k: int, act: str) -> None:
    n, many = 45, 52
    rng = np.random.default_rng(k)
    x = draw(rng, many, k)
    gate, up = (stored(draw(rng, n, k) / math.sqrt(k), "bf16") for _ in range(2))
    kernel = Kernel(gated_linear, ISA, rows_dim=0, n=n, k=k, weight_dtype="bf16", activation=act)

    def plain(x: Array) -> Array:
        return chained(x, f32(gate), None, act, None) * chained(x, f32(up), None, "none", None)

    def truth(x: Array) -> Array:
        return np.asarray(activation(act, x @ f64(gate).T) * (x @ f64(up).T))

    y = run(kernel, [x, pack_gated(gate, up)], many, n, 0, 3)
    judge(y, x, plain, truth)
    assert same_bits(run(kernel, [x[:7], pack_gated(gate, up)], 7, n, 0, 2), y[:7])
    assert same_bits(run(kernel, [x[-1:], pack_gated(gate, up)], 1, n, 0, 1)[0], y[-1])


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_epilogue(epilogue: str) -> None:
    rng = np.random.default_rng(0)
    n, k, many = 83, 51, 60
    x, b, r = draw(rng, many, k), draw(rng, n), draw(rng, many, n)
    w = stored(draw(rng, n, k) / math.sqrt(k), "bf16")
    kernel = Kernel(linear, ISA, rows_dim=0, n=n, k=k, weight_dtype="bf16", bias=True, epilogue=epilogue, residual=True)
    y = run(kernel, [x, pack(w), b, r], many, n, 0, 2)
    judge(
        y,
        x,
        lambda x: chained(x, f32(w), b, epilogue, r),
        lambda x: np.asarray(activation(epilogue, x @ f64(w).T + f64(b)) + f64(r)),
    )


def test_every_number_of_rows() -> None:
    """Tiles of every height, of one panel and of two, odd numbers of panels, one chunk of rows and several."""
    rng = np.random.default_rng(0)
    n, k, most = 100, 37, 150
    x, w = draw(rng, most, k), stored(draw(rng, n, k), "bf16")
    kernel = Kernel(linear, ISA, rows_dim=0, n=n, k=k, weight_dtype="bf16")
    expected = run(kernel, [x, pack(w)], most, n, 0, 1)
    for rows in range(1, most):
        for tasks in (1, 2, 7):
            assert same_bits(run(kernel, [x[:rows], pack(w)], rows, n, 0, tasks), expected[:rows]), (rows, tasks)


def test_a_wide_row_takes_few_rows_at_once() -> None:
    """As many as the scratch holds, down to one."""
    rng = np.random.default_rng(0)
    n = 35
    for k in (20_001, pairs.SCRATCH // 2 + 2):
        x, w = draw(rng, 9, k), stored(draw(rng, n, k) / math.sqrt(k), "bf16")
        kernel = Kernel(linear, ISA, rows_dim=0, n=n, k=k, weight_dtype="bf16")
        y = run(kernel, [x, pack(w)], len(x), n, 0, 2)
        judge(y, x, partial(chained, w=f32(w), b=None, epilogue="none", r=None), partial(np.dot, b=f64(w).T))
        for i in range(len(x)):
            assert same_bits(run(kernel, [x[i : i + 1], pack(w)], 1, n, 0, 1)[0], y[i])


def test_rounding_is_to_nearest_even_and_nan_goes_through() -> None:
    step = np.float32(2.0**-7)
    one = np.float32(1)
    x = np.array([[one + step / 2], [one + 3 * step / 2], [one + step * np.float32(0.51)], [np.nan], [np.inf]], "f")
    kernel = Kernel(linear, ISA, rows_dim=0, n=17, k=1, weight_dtype="bf16")
    y = run(kernel, [x, pack(stored(np.ones((17, 1)), "bf16"))], len(x), 17, 0, 1)
    assert (y[:3] == np.array([[one], [one + 2 * step], [one + step]])).all()
    assert np.isnan(y[3]).all() and (y[4] == np.inf).all()
