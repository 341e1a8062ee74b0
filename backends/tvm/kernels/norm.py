"""Normalisations of rows, alone or after a residual addition. A row belongs to one task, so its sums have one order.

They are computed in float64 and rounded once: their cost is nothing beside the matrix products between them, and what
they lose is lost to every product that follows. With `tiles` the result y is quantized (`kernels.tiles`): instead of y
the kernel gives codes, scales and offsets. A token has `heads` rows, each of `hidden` elements.
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.tiles import quantize_row
from llmc.backends.tvm.kernels.vector import (
    at,
    f64,
    fma,
    lanes_of,
    let,
    load,
    share,
    specialised,
    splat,
    square_root,
    tree_sum,
    wide,
)

CHAINS = 2
"""Accumulators of a row's sum, each of two vector registers: they hide the latency of an addition."""


def rms_norm(symbol, isa, *, rows_dim, hidden, eps, tiles=False, heads=1):
    """x f32 [rows, hidden], w f32 [hidden], y f32 [rows, hidden] = x / sqrt(mean(x²) + eps) · w."""
    return _norm(symbol, isa, rows_dim, hidden, eps, add=False, centred=False, bias=False, tiles=tiles, heads=heads)


def add_rms_norm(symbol, isa, *, rows_dim, hidden, eps, tiles=False):
    """x, r f32 [rows, hidden], w f32 [hidden], h f32 [rows, hidden] = x + r, y = rms_norm(h)."""
    return _norm(symbol, isa, rows_dim, hidden, eps, add=True, centred=False, bias=False, tiles=tiles)


def layer_norm(symbol, isa, *, rows_dim, hidden, eps, bias=True, tiles=False, heads=1):
    """x f32 [rows, hidden], w f32 [hidden], [b f32 [hidden]], y = (x - mean) / sqrt(variance + eps) · w + b."""
    return _norm(symbol, isa, rows_dim, hidden, eps, add=False, centred=True, bias=bias, tiles=tiles, heads=heads)


def add_layer_norm(symbol, isa, *, rows_dim, hidden, eps, bias=True, tiles=False):
    """x, r f32 [rows, hidden], w f32 [hidden], [b f32 [hidden]], h = x + r, y = layer_norm(h)."""
    return _norm(symbol, isa, rows_dim, hidden, eps, add=True, centred=True, bias=bias, tiles=tiles)


def norm_heads(symbol, isa, *, rows_dim, width, eps, queries, query_width, keys, key_width, centred=False):
    """x f32 [tokens, width], weights f32 [query_width], [key_width], [biases], y like x: pieces of queries and keys
    normalised, the rest copied (see `llmc.ir.ops.norm.NormHeads`)."""
    of_query = _normaliser(isa, query_width, eps, centred, centred)
    of_key = _normaliser(isa, key_width, eps, centred, centred)
    first_key, rest = queries * query_width, queries * query_width + keys * key_width
    pieces = queries + keys + 1
    L = isa.lanes

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        wq: T.handle("float32"),
        wk: T.handle("float32"),
        bq: T.handle("float32"),
        bk: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        WQ = T.decl_buffer((query_width,), "float32", data=wq)
        WK = T.decl_buffer((key_width,), "float32", data=wk)
        BQ = T.decl_buffer((query_width,), "float32", data=bq)
        BK = T.decl_buffer((key_width,), "float32", data=bk)
        Y = T.decl_buffer((1,), "float32", data=y)
        S = T.alloc_buffer((1,), "float64", scope="local")
        first: T.let = share(task, tasks, D[rows_dim] * pieces)
        for i in T.serial(share(task + 1, tasks, D[rows_dim] * pieces) - first):
            piece: T.let = T.truncmod(first + i, pieces)
            row: T.let = T.truncdiv(first + i, pieces) * width
            if piece < queries:
                query: T.let = row + piece * query_width
                of_query(X, query, Y, query, WQ, BQ, S)
            else:
                if piece < pieces - 1:
                    key: T.let = row + first_key + (piece - queries) * key_width
                    of_key(X, key, Y, key, WK, BK, S)
                else:
                    for c in T.serial((width - rest) // L):
                        Y[at(row + rest + c * L, L)] = load(X, row + rest + c * L, L)
                    for c in T.serial((width - rest) % L):
                        copied: T.let = row + rest + (width - rest) // L * L + c
                        Y[copied] = X[copied]

    return specialised(kernel, symbol, {"bq": centred, "bk": centred})


def _normaliser(isa, hidden, eps, centred, bias):
    """`normalise(source, row, result, place, W, B, S)`: result[place..] = the norm of source[row..row + hidden]. S is
    scratch, f64 [1]."""
    L = isa.lanes
    vectors, tail = hidden // L, hidden % L
    done = vectors * L

    @T.inline
    def total(X, row, step, S):
        """S[0] = the row's sum; `step(accumulator, element)` is the accumulator's next value."""
        acc = T.alloc_buffer((CHAINS * L,), "float64", scope="local")
        for i in T.unroll(CHAINS):
            acc[at(i * L, L)] = f64(0.0, L)
        for c in T.serial(vectors // CHAINS):
            for i in T.unroll(CHAINS):
                acc[at(i * L, L)] = step(load(acc, i * L, L), exact(X, row + (c * CHAINS + i) * L, L))
        for c in T.serial(vectors % CHAINS):
            acc[at(0, L)] = step(load(acc, 0, L), exact(X, row + (vectors // CHAINS * CHAINS + c) * L, L))
        acc[at(0, L)] = load(acc, 0, L) + load(acc, L, L)
        S[0] = tree_sum([acc[i] for i in range(L)])
        for c in T.serial(tail):
            S[0] = step(S[0], exact(X, row + done + c, 1))

    def normal(source, row, column, mean, inverse, W, B, lanes):
        """`lanes` results."""
        v = exact(source, row + column, lanes)
        v = (v if mean is None else v - splat(mean, lanes)) * splat(inverse, lanes)
        w = exact(W, column, lanes)
        return T.Cast(wide("float32", lanes), v * w if B is None else fma(v, w, exact(B, column, lanes)))

    @T.inline
    def normalise(source, row, result, place, W, B, S):
        shift = T.meta_var(B if bias else None)
        if centred:
            total(source, row, lambda a, v: a + v, S)
            mean: T.let = S[0] / f64(hidden)
            total(source, row, _sum_of_squares(mean), S)
            inverse: T.let = f64(1.0) / square_root(S[0] / f64(hidden) + f64(eps))
            for c in T.serial(vectors):
                result[at(place + c * L, L)] = normal(source, row, c * L, mean, inverse, W, shift, L)
            for c in T.serial(tail):
                result[place + done + c] = normal(source, row, done + c, mean, inverse, W, shift, 1)
        else:
            total(source, row, lambda a, v: fma(v, v, a), S)
            inverse: T.let = f64(1.0) / square_root(S[0] / f64(hidden) + f64(eps))
            for c in T.serial(vectors):
                result[at(place + c * L, L)] = normal(source, row, c * L, None, inverse, W, None, L)
            for c in T.serial(tail):
                result[place + done + c] = normal(source, row, done + c, None, inverse, W, None, 1)

    return normalise


def _norm(symbol, isa, rows_dim, hidden, eps, add, centred, bias, tiles, heads=1):
    L = isa.lanes
    vectors, tail = hidden // L, hidden % L
    done = vectors * L
    normalise = _normaliser(isa, hidden, eps, centred, bias)

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
        codes: T.handle("int8"),
        scales: T.handle("float32"),
        offsets: T.handle("int32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        R = T.decl_buffer((1,), "float32", data=r)
        W = T.decl_buffer((hidden,), "float32", data=w)
        B = T.decl_buffer((hidden,), "float32", data=b)
        H = T.decl_buffer((1,), "float32", data=h)
        Y = T.decl_buffer((1,), "float32", data=y)
        YC = T.decl_buffer((1,), "int8", data=codes)
        YS = T.decl_buffer((1,), "float32", data=scales)
        YO = T.decl_buffer((1,), "int32", data=offsets)
        Z = T.alloc_buffer((hidden if tiles else 1,), "float32", scope="local")
        S = T.alloc_buffer((1,), "float64", scope="local")
        first: T.let = share(task, tasks, D[rows_dim] * heads)
        for i in T.serial(share(task + 1, tasks, D[rows_dim] * heads) - first):
            row: T.let = (first + i) * hidden
            if add:
                for c in T.serial(vectors):
                    H[at(row + c * L, L)] = load(X, row + c * L, L) + load(R, row + c * L, L)
                for c in T.serial(tail):
                    H[row + done + c] = X[row + done + c] + R[row + done + c]
            source = T.meta_var(H if add else X)
            normalise(source, row, Z if tiles else Y, 0 if tiles else row, W, B, S)
            if tiles:
                quantize_row(Z, 0, YC, YS, YO, D[rows_dim], first + i, hidden, L)

    present = {"r": add, "h": add, "b": bias, "y": not tiles, **dict.fromkeys(("codes", "scales", "offsets"), tiles)}
    return specialised(kernel, symbol, present)


def exact(buffer, index, lanes):
    """`lanes` float32 elements as float64."""
    return let(T.Cast(wide("float64", lanes), load(buffer, index, lanes)))


def _sum_of_squares(mean):
    def step(total, v):
        d = let(v - splat(mean, lanes_of(v)))
        return fma(d, d, total)

    return step
