"""Rows taken apart and put together, and rotated where no other kernel does it: float32 [tokens, .., width].

Where a value has heads, [tokens, heads, width], each head is a row: `rows` is how many rows a token has.
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.rotation import rotation
from llmc.backends.tvm.kernels.vector import at, load, share, specialised


def concat(symbol, isa, *, rows_dim, rows, widths):
    """Two to four parts f32 [tokens, rows, width] each, y f32 [tokens, rows, sum of widths]."""
    widths = [int(w) for w in widths.split(",")]
    total, count = sum(widths), len(widths)
    starts = [sum(widths[:i]) for i in range(count)]
    copy = _copier(isa.lanes)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        a: T.handle("float32"),
        b: T.handle("float32"),
        c: T.handle("float32"),
        d: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        A = T.decl_buffer((1,), "float32", data=a)
        B = T.decl_buffer((1,), "float32", data=b)
        C = T.decl_buffer((1,), "float32", data=c)
        E = T.decl_buffer((1,), "float32", data=d)
        Y = T.decl_buffer((1,), "float32", data=y)
        first: T.let = share(task, tasks, D[rows_dim] * rows)
        for i in T.serial(share(task + 1, tasks, D[rows_dim] * rows) - first):
            row: T.let = first + i
            copy(A, row * widths[0], Y, row * total + starts[0], widths[0])
            copy(B, row * widths[1], Y, row * total + starts[1], widths[1])
            if count > 2:
                copy(C, row * widths[2 % count], Y, row * total + starts[2 % count], widths[2 % count])
            if count > 3:
                copy(E, row * widths[3 % count], Y, row * total + starts[3 % count], widths[3 % count])

    return specialised(kernel, symbol, {"c": count > 2, "d": count > 3})


def columns(symbol, isa, *, rows_dim, rows, width, start, count, step=1):
    """x f32 [tokens, rows, width], y f32 [tokens, rows, count]: every `step`th element from `start` on."""
    contiguous = step == 1
    copy = _copier(isa.lanes)

    @T.prim_func(s_tir=True)
    def kernel(task: T.int32, tasks: T.int32, dims: T.handle("int32"), x: T.handle("float32"), y: T.handle("float32")):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        Y = T.decl_buffer((1,), "float32", data=y)
        first: T.let = share(task, tasks, D[rows_dim] * rows)
        for i in T.serial(share(task + 1, tasks, D[rows_dim] * rows) - first):
            row: T.let = first + i
            if contiguous:
                copy(X, row * width + start, Y, row * count, count)
            else:
                for c in T.serial(count):
                    Y[row * count + c] = X[row * width + start + c * step]

    return specialised(kernel, symbol, {})


def repeat(symbol, isa, *, rows_dim, rows, width, times):
    """x f32 [tokens, rows, width], y f32 [tokens, rows, times, width]."""
    copy = _copier(isa.lanes)

    @T.prim_func(s_tir=True)
    def kernel(task: T.int32, tasks: T.int32, dims: T.handle("int32"), x: T.handle("float32"), y: T.handle("float32")):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        Y = T.decl_buffer((1,), "float32", data=y)
        first: T.let = share(task, tasks, D[rows_dim] * rows * times)
        for i in T.serial(share(task + 1, tasks, D[rows_dim] * rows * times) - first):
            copy(X, T.truncdiv(first + i, times) * width, Y, (first + i) * width, width)

    return specialised(kernel, symbol, {})


def rope(symbol, isa, *, rows_dim, heads, head_dim, rot_dim, layout):
    """x f32 [tokens, heads · head_dim], cos and sin f32 [tokens, rot_dim / 2], y like x (see `rotation`)."""
    rotate = rotation(isa, head_dim=head_dim, rot_dim=rot_dim, layout=layout)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        cos: T.handle("float32"),
        sin: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        C = T.decl_buffer((1,), "float32", data=cos)
        S = T.decl_buffer((1,), "float32", data=sin)
        Y = T.decl_buffer((1,), "float32", data=y)
        first: T.let = share(task, tasks, D[rows_dim] * heads)
        for i in T.serial(share(task + 1, tasks, D[rows_dim] * heads) - first):
            head: T.let = (first + i) * head_dim
            rotate(X, head, C, S, T.truncdiv(first + i, heads), Y, head)

    return specialised(kernel, symbol, {})


def _copier(lanes):
    """`copy(X, x, Y, y, count)`: Y[y..y + count] = X[x..x + count]."""

    @T.inline
    def copy(X, x, Y, y, count):
        for c in T.serial(count // lanes):
            Y[at(y + c * lanes, lanes)] = load(X, x + c * lanes, lanes)
        for c in T.serial(count % lanes):
            Y[y + count // lanes * lanes + c] = X[x + count // lanes * lanes + c]

    return copy
