"""Matrix products with packed weights: y = epilogue(x wᵀ + bias) (+ residual), and the gated pair act(gate) · up.

Every output is one chain of fused multiply-adds over k in order, whatever the rows, the tiles and the tasks are: so its
bits depend on its row of x and its row of w alone. Registers hold a tile of rows × one panel; a single row takes
several panels at once instead, which gives the fused multiply-add units enough independent chains.
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.math import activate
from llmc.backends.tvm.kernels.vector import STORAGE, at, decode, f32, fma, load, share, specialised, splat
from llmc.backends.tvm.packing import HALF, PANEL

ROW_CHUNK = 48
"""Rows that one unit of work covers: a panel is read from memory once for them, from the cache after that."""


def linear(symbol, isa, *, rows_dim, n, k, weight_dtype, bias=False, epilogue="none", residual=False):
    """x f32 [rows, k], w packed [ceil(n / 16), k, 16] (`packing.pack`), [bias f32 [n]], [residual f32 [rows, n]],
    y f32 [rows, n]."""

    def result(scratch, column, lanes, B, R, col, row):
        value = load(scratch, column, lanes)
        value = value + load(B, col, lanes) if bias else value
        value = activate(epilogue, value)
        return value + load(R, row * n + col, lanes) if residual else value

    return _matmul(symbol, isa, rows_dim, n, k, weight_dtype, PANEL, result, bias, residual)


def gated_linear(symbol, isa, *, rows_dim, n, k, weight_dtype, activation):
    """x f32 [rows, k], w packed [ceil(n / 8), k, 16] (`packing.pack_gated`),
    y f32 [rows, n] = activation(x gateᵀ) · (x upᵀ)."""

    def result(scratch, column, lanes, B, R, col, row):
        return activate(activation, load(scratch, column, lanes)) * load(scratch, column + HALF, lanes)

    return _matmul(symbol, isa, rows_dim, n, k, weight_dtype, HALF, result, False, False)


def _matmul(symbol, isa, rows_dim, n, k, weight_dtype, columns, result, bias, residual):
    """`columns`: outputs of one panel. `result(scratch, column, lanes, B, R, col, row)`: outputs of a panel's sums."""
    L, V = isa.lanes, isa.vectors
    out_lanes = min(L, columns)
    panels = -(-n // columns)
    row_tile = isa.row_tile
    group = max(1, 8 // V)
    storage = STORAGE[weight_dtype]

    @T.inline
    def sums(X, W, S, row, panel, R, P):
        """scratch[R or P, 16] = rows row..row+R of x times the rows of P panels; one of R and P is 1."""
        acc = T.alloc_buffer((R * P * PANEL,), "float32", scope="local")
        for i in T.unroll(R * P * V):
            acc[at(i * L, L)] = f32(0.0, L)
        for kk in T.serial(k):
            for p in T.unroll(P):
                for v in T.unroll(V):
                    w: T.let = decode(
                        load(
                            W, T.Cast("int64", panel + p) * T.int64(k * PANEL) + T.Cast("int64", kk * PANEL + v * L), L
                        ),
                        weight_dtype,
                        L,
                    )
                    for r in T.unroll(R):
                        acc[at(((r * P + p) * V + v) * L, L)] = fma(
                            splat(X[(row + r) * k + kk], L), w, acc[at(((r * P + p) * V + v) * L, L)]
                        )
        for i in T.unroll(R * P * V):
            S[at(i * L, L)] = acc[at(i * L, L)]

    def sums_of(here, *where):
        """`sums` of as many rows as `here` says: one unrolled copy for each height."""
        for height in range(1, row_tile + 1):
            with T.If(here == height), T.Then():
                sums(*where, height, 1)

    @T.inline
    def store(S, base, row, panel, B, R, Y):
        if panel * columns + columns <= n:
            for c in T.serial(columns // out_lanes):
                Y[at(row * n + panel * columns + c * out_lanes, out_lanes)] = result(
                    S, base + c * out_lanes, out_lanes, B, R, panel * columns + c * out_lanes, row
                )
        else:
            for c in T.serial(n - panel * columns):
                Y[row * n + panel * columns + c] = result(S, base + c, 1, B, R, panel * columns + c, row)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        w: T.handle(storage),
        b: T.handle("float32"),
        r: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        W = T.decl_buffer((1,), storage, data=w)
        B = T.decl_buffer((n,), "float32", data=b)
        R = T.decl_buffer((1,), "float32", data=r)
        Y = T.decl_buffer((1,), "float32", data=y)
        S = T.alloc_buffer((max(row_tile, group) * PANEL,), "float32", scope="local")
        rows: T.let = D[rows_dim]
        if rows == 1:
            first: T.let = share(task, tasks, panels)
            count: T.let = share(task + 1, tasks, panels) - first
            for g in T.serial(T.truncdiv(count, group)):
                sums(X, W, S, 0, first + g * group, 1, group)
                for p in T.serial(group):
                    store(S, p * PANEL, 0, first + g * group + p, B, R, Y)
            for g in T.serial(T.truncmod(count, group)):
                sums(X, W, S, 0, first + count - 1 - g, 1, 1)
                store(S, 0, 0, first + count - 1 - g, B, R, Y)
        else:
            chunks: T.let = T.truncdiv(rows + ROW_CHUNK - 1, ROW_CHUNK)
            begin: T.let = share(task, tasks, panels * chunks)
            for u in T.serial(share(task + 1, tasks, panels * chunks) - begin):
                panel: T.let = T.truncdiv(begin + u, chunks)
                chunk: T.let = T.truncmod(begin + u, chunks)
                top: T.let = share(chunk, chunks, rows)
                height: T.let = share(chunk + 1, chunks, rows) - top
                tiles: T.let = T.truncdiv(height + row_tile - 1, row_tile)
                for t in T.serial(tiles):
                    # Tiles of nearly equal height: 7 rows are 3 + 4, not 6 + 1.
                    row: T.let = top + share(t, tiles, height)
                    here: T.let = top + share(t + 1, tiles, height) - row
                    sums_of(here, X, W, S, row, panel)
                    for i in T.serial(here):
                        store(S, i * PANEL, row + i, panel, B, R, Y)

    return specialised(kernel, symbol, {"b": bias, "r": residual})
