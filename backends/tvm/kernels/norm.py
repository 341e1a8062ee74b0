"""Normalisations of rows, alone or after a residual addition. A row belongs to one task, so its sums have one order."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import (
    at,
    f32,
    fma,
    lanes_of,
    let,
    load,
    share,
    specialised,
    splat,
    square_root,
    tree_sum,
)

CHAINS = 4
"""Vector accumulators of a row's sum: they hide the latency of an addition."""


def rms_norm(symbol, isa, *, rows_dim, hidden, eps):
    """x f32 [rows, hidden], w f32 [hidden], y f32 [rows, hidden] = x / sqrt(mean(x²) + eps) · w."""
    return _norm(symbol, isa, rows_dim, hidden, eps, add=False, centred=False, bias=False)


def add_rms_norm(symbol, isa, *, rows_dim, hidden, eps):
    """x, r f32 [rows, hidden], w f32 [hidden], h f32 [rows, hidden] = x + r, y = rms_norm(h)."""
    return _norm(symbol, isa, rows_dim, hidden, eps, add=True, centred=False, bias=False)


def layer_norm(symbol, isa, *, rows_dim, hidden, eps, bias=True):
    """x f32 [rows, hidden], w f32 [hidden], [b f32 [hidden]], y = (x - mean) / sqrt(variance + eps) · w + b."""
    return _norm(symbol, isa, rows_dim, hidden, eps, add=False, centred=True, bias=bias)


def add_layer_norm(symbol, isa, *, rows_dim, hidden, eps, bias=True):
    """x, r f32 [rows, hidden], w f32 [hidden], [b f32 [hidden]], h = x + r, y = layer_norm(h)."""
    return _norm(symbol, isa, rows_dim, hidden, eps, add=True, centred=True, bias=bias)


def _norm(symbol, isa, rows_dim, hidden, eps, add, centred, bias):
    L = isa.lanes
    vectors, tail = hidden // L, hidden % L
    done = vectors * L

    @T.inline
    def total(X, row, step, S):
        """S[0] = the row's sum; `step(accumulator, element)` is the accumulator's next value."""
        acc = T.alloc_buffer((CHAINS * L,), "float32", scope="local")
        for i in T.unroll(CHAINS):
            acc[at(i * L, L)] = f32(0.0, L)
        for c in T.serial(vectors // CHAINS):
            for i in T.unroll(CHAINS):
                acc[at(i * L, L)] = step(load(acc, i * L, L), load(X, row + (c * CHAINS + i) * L, L))
        for c in T.serial(vectors % CHAINS):
            acc[at(0, L)] = step(load(acc, 0, L), load(X, row + (vectors // CHAINS * CHAINS + c) * L, L))
        acc[at(0, L)] = (load(acc, 0, L) + load(acc, L, L)) + (load(acc, 2 * L, L) + load(acc, 3 * L, L))
        S[0] = tree_sum([acc[i] for i in range(L)])
        for c in T.serial(tail):
            S[0] = step(S[0], X[row + done + c])

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        r: T.handle("float32"),
        w: T.handle("float32"),
        b: T.handle("float32"),
        h: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        R = T.decl_buffer((1,), "float32", data=r)
        W = T.decl_buffer((hidden,), "float32", data=w)
        B = T.decl_buffer((hidden,), "float32", data=b)
        H = T.decl_buffer((1,), "float32", data=h)
        Y = T.decl_buffer((1,), "float32", data=y)
        S = T.alloc_buffer((1,), "float32", scope="local")
        first: T.let = share(task, tasks, D[rows_dim])
        for i in T.serial(share(task + 1, tasks, D[rows_dim]) - first):
            row: T.let = (first + i) * hidden
            if add:
                for c in T.serial(vectors):
                    H[at(row + c * L, L)] = load(X, row + c * L, L) + load(R, row + c * L, L)
                for c in T.serial(tail):
                    H[row + done + c] = X[row + done + c] + R[row + done + c]
            source = T.meta_var(H if add else X)
            if centred:
                total(source, row, lambda a, v: a + v, S)
                mean: T.let = S[0] / f32(hidden)
                # A mean far from zero loses digits that the deviations have: their own mean is what it lacks.
                total(source, row, _sum_of_deviations(mean, f32(0.0)), S)
                rest: T.let = S[0] / f32(hidden)
                total(source, row, _sum_of_squares(mean, rest), S)
                inverse: T.let = f32(1.0) / square_root(S[0] / f32(hidden) + f32(eps))
                for c in T.serial(vectors):
                    v: T.let = _deviation(load(source, row + c * L, L), mean, rest) * splat(inverse, L)
                    Y[at(row + c * L, L)] = _affine(v, W, B if bias else None, c * L, L)
                for c in T.serial(tail):
                    v: T.let = _deviation(source[row + done + c], mean, rest) * inverse
                    Y[row + done + c] = _affine(v, W, B if bias else None, done + c, 1)
            else:
                total(source, row, lambda a, v: fma(v, v, a), S)
                inverse: T.let = f32(1.0) / square_root(S[0] / f32(hidden) + f32(eps))
                for c in T.serial(vectors):
                    Y[at(row + c * L, L)] = load(source, row + c * L, L) * splat(inverse, L) * load(W, c * L, L)
                for c in T.serial(tail):
                    Y[row + done + c] = source[row + done + c] * inverse * W[done + c]

    return specialised(kernel, symbol, {"r": add, "h": add, "b": bias})


def _deviation(v, mean, rest):
    lanes = lanes_of(v)
    return (v - splat(mean, lanes)) - splat(rest, lanes)


def _sum_of_deviations(mean, rest):
    return lambda total, v: total + _deviation(v, mean, rest)


def _sum_of_squares(mean, rest):
    def step(total, v):
        d = let(_deviation(v, mean, rest))
        return fma(d, d, total)

    return step


def _affine(v, W, B, column, lanes):
    if B is None:
        return v * load(W, column, lanes)
    return fma(v, load(W, column, lanes), load(B, column, lanes))
