"""Activations quantized for the integer products of `kernels.quantized`: one int8 code an element, one scale a group.

A group is 32 neighbouring elements of a row. With a the largest |x| of a group, in float32: scale = a · (1/127),
inverse = 127 / a (0 where a < 1e-30), code = x · inverse rounded to the nearest, ties to even. A last group that is not
full is filled up with zeros.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import at, f32, i32, intrinsic, let, load, share, specialised, splat, wide

GROUP = 32
_SMALLEST = 1e-30


def quantize_group(X, start, C, S, F, place, lanes):
    """X[start..start + 32] into C[place], S[place], F[place]."""
    vectors = [let(load(X, start + i * lanes, lanes)) for i in range(GROUP // lanes)]
    integers = wide("int32", lanes)
    largest = None
    for v in vectors:
        # As bits, magnitudes have the order of the floats, and NaN is the greatest: it goes through to the scale.
        bits = T.bitwise_and(T.reinterpret(integers, v), i32(0x7FFFFFFF, lanes))
        largest = bits if largest is None else T.max(largest, bits)
    peak = let(T.reinterpret("float32", _reduce("smax", largest)))
    inverse = let(T.Select(peak < f32(_SMALLEST), f32(0.0), f32(127.0) / peak))
    total = None
    for i, v in enumerate(vectors):
        scaled = intrinsic("llvm.rint", v * splat(inverse, lanes), dtype=wide("float32", lanes))
        code = let(T.Cast(integers, scaled))
        total = code if total is None else total + code
        T.buffer_store(C, T.Cast(wide("int8", lanes), code), [at(place * GROUP + i * lanes, lanes)])
    T.buffer_store(S, peak * tirx.FloatImm("float32", 1.0 / 127.0), [place])
    T.buffer_store(F, _reduce("add", let(total)) * tirx.IntImm("int32", -8), [place])


def _reduce(how, vector):
    """All lanes of an int32 vector in one."""
    return intrinsic(f"llvm.vector.reduce.{how}", vector, dtype="int32")


@T.inline
def quantize_row(X, start, C, S, F, rows, row, width, lanes):
    """A whole row, from X[start] on, into place `row` of `rows`."""
    for g in T.serial(width // GROUP):
        quantize_group(X, start + g * GROUP, C, S, F, g * rows + row, lanes)
    if width % GROUP > 0:
        rest = T.alloc_buffer((GROUP,), "float32", scope="local")
        for i in T.unroll(GROUP // lanes):
            rest[at(i * lanes, lanes)] = f32(0.0, lanes)
        for i in T.serial(width % GROUP):
            rest[i] = X[start + width // GROUP * GROUP + i]
        quantize_group(rest, 0, C, S, F, width // GROUP * rows + row, lanes)


def quantize_tiles(symbol, isa, *, rows_dim, width):
    """x f32 [rows, width]; codes i8 [groups, rows, 32], scales f32 [groups, rows], offsets i32 [groups, rows]: -8 times
    the sum of a group's codes."""

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        codes: T.handle("int8"),
        scales: T.handle("float32"),
        offsets: T.handle("int32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        C = T.decl_buffer((1,), "int8", data=codes)
        S = T.decl_buffer((1,), "float32", data=scales)
        F = T.decl_buffer((1,), "int32", data=offsets)
        first: T.let = share(task, tasks, D[rows_dim])
        for i in T.serial(share(task + 1, tasks, D[rows_dim]) - first):
            quantize_row(X, (first + i) * width, C, S, F, D[rows_dim], first + i, width, isa.lanes)

    return specialised(kernel, symbol, {})
