"""Elementwise kernels over [rows, width] float32, for what no other kernel could take in."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.math import activate
from llmc.backends.tvm.kernels.vector import at, f32, lanes_of, load, share, specialised


def add(symbol, isa, *, rows_dim, width):
    """a, b f32 [rows, width], y = a + b."""
    return _elementwise(symbol, isa, rows_dim, width, True, lambda a, b: a + b)


def multiply(symbol, isa, *, rows_dim, width):
    """a, b f32 [rows, width], y = a · b."""
    return _elementwise(symbol, isa, rows_dim, width, True, lambda a, b: a * b)


def scale(symbol, isa, *, rows_dim, width, factor):
    """x f32 [rows, width], y = x · factor."""
    return _elementwise(symbol, isa, rows_dim, width, False, lambda a, b: a * f32(factor, lanes_of(a)))


def unary(symbol, isa, *, rows_dim, width, activation):
    """x f32 [rows, width], y = activation(x)."""
    return _elementwise(symbol, isa, rows_dim, width, False, lambda a, b: activate(activation, a))


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
