"""Elementwise kernels over [rows, width] float32, for what no other kernel could take in.

With `period` the second operand is a vector f32 [period], added or multiplied at every `period` elements; width is a
multiple of it.
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.math import activate
from llmc.backends.tvm.kernels.vector import at, f32, lanes_of, load, share, specialised


def add(symbol, isa, *, rows_dim, width, period=0):
    """a, b f32 [rows, width] (or b [period]), y = a + b."""
    return _with_second(symbol, isa, rows_dim, width, period, lambda a, b: a + b)


def multiply(symbol, isa, *, rows_dim, width, period=0):
    """a, b f32 [rows, width] (or b [period]), y = a · b."""
    return _with_second(symbol, isa, rows_dim, width, period, lambda a, b: a * b)


def scale(symbol, isa, *, rows_dim, width, factor):
    """x f32 [rows, width], y = x · factor."""
    return _elementwise(symbol, isa, rows_dim, width, False, lambda a, b: a * f32(factor, lanes_of(a)))


def unary(symbol, isa, *, rows_dim, width, activation):
    """x f32 [rows, width], y = activation(x)."""
    return _elementwise(symbol, isa, rows_dim, width, False, lambda a, b: activate(activation, a))


def _with_second(symbol, isa, rows_dim, width, period, function):
    if period:
        return _with_vector(symbol, isa, rows_dim, width // period, period, function)
    return _elementwise(symbol, isa, rows_dim, width, True, function)


def _with_vector(symbol, isa, rows_dim, rows, period, function):
    """Every row of `period` elements with the same vector; a token has so many rows."""
    L = isa.lanes
    whole, tail = period // L, period % L

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        a: T.handle("float32"),
        b: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        A = T.decl_buffer((1,), "float32", data=a)
        B = T.decl_buffer((1,), "float32", data=b)
        Y = T.decl_buffer((1,), "float32", data=y)
        first: T.let = share(task, tasks, D[rows_dim] * rows)
        for i in T.serial(share(task + 1, tasks, D[rows_dim] * rows) - first):
            row: T.let = (first + i) * period
            for c in T.serial(whole):
                Y[at(row + c * L, L)] = function(load(A, row + c * L, L), load(B, c * L, L))
            for c in T.serial(tail):
                Y[row + whole * L + c] = function(A[row + whole * L + c], B[whole * L + c])

    return specialised(kernel, symbol, {})


def _elementwise(symbol, isa, rows_dim, width, binary, function):
    L = isa.lanes

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        a: T.handle("float32"),
        b: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        A = T.decl_buffer((1,), "float32", data=a)
        B = T.decl_buffer((1,), "float32", data=b)
        Y = T.decl_buffer((1,), "float32", data=y)
        second = T.meta_var(B if binary else A)
        # Shares are of whole vectors, the last share has the rest: a row's width is no matter here.
        elements: T.let = D[rows_dim] * width
        vectors: T.let = T.truncdiv(elements, L)
        first: T.let = share(task, tasks, vectors)
        for i in T.serial(share(task + 1, tasks, vectors) - first):
            Y[at((first + i) * L, L)] = function(load(A, (first + i) * L, L), load(second, (first + i) * L, L))
        if task == tasks - 1:
            for i in T.serial(elements - vectors * L):
                Y[vectors * L + i] = function(A[vectors * L + i], second[vectors * L + i])

    return specialised(kernel, symbol, {"b": binary})
