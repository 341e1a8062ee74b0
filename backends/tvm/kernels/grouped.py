"""Products of every group of x's columns with a weight of its own: y[g] = x[g] w[g]ᵀ, in the tiles of `kernels.linear`.

Every output is one chain of fused multiply-adds over k in order, so its bits depend on its row of x and its row of w
alone. Panels of one or two rows are taken several at once, as there; each may belong to another group, so each has an
element of x of its own.
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.linear import CHAINS, ROW_CHUNK, STREAMS
from llmc.backends.tvm.kernels.vector import (
    PREFETCH,
    STORAGE,
    at,
    decode,
    f32,
    fma,
    load,
    prefetch,
    share,
    specialised,
    splat,
)
from llmc.backends.tvm.packing import PANEL


def grouped_linear(symbol, isa, *, rows_dim, groups, n, k, weight_dtype):
    """x f32 [rows, groups · k], w packed [groups, ceil(n / 16), k, 16] (`packing.pack` of each group),
    y f32 [rows, groups · n]."""
    L, V = isa.lanes, isa.vectors
    of_group = -(-n // PANEL)
    panels = groups * of_group
    row_tile = isa.row_tile
    # Sums that hide a fused multiply-add's latency: a tile of fewer takes several panels. {rows: panels}
    several = {r: min(STREAMS, CHAINS // (r * V)) for r in range(1, row_tile + 1) if CHAINS // (r * V) > 1}
    few = max(several, default=0)
    storage = STORAGE[weight_dtype]

    @T.inline
    def sums(X, W, S, row, panel, R, P):
        """S[R, P, 16] = rows row..row+R of x times the rows of w in panels panel..panel+P."""
        acc = T.alloc_buffer((R * P * PANEL,), "float32", scope="local")
        row_of_w = T.alloc_buffer((P * PANEL,), "float32", scope="local")
        for i in T.unroll(R * P * V):
            acc[at(i * L, L)] = f32(0.0, L)
        ahead = T.meta_var(PREFETCH * 2 // max(P, 2) // (4 if weight_dtype == "f32" else 2))
        for kk in T.serial(k):
            for p in T.unroll(P):
                prefetch(W, T.Cast("int64", panel + p) * T.int64(k * PANEL) + T.Cast("int64", kk * PANEL + ahead))
            for i in T.unroll(P * V):
                column: T.let = T.Cast("int64", kk * PANEL + i % V * L)
                row_of_w[at(i * L, L)] = decode(
                    load(W, T.Cast("int64", panel + i // V) * T.int64(k * PANEL) + column, L), weight_dtype, L
                )
            for r in T.unroll(R):
                for p in T.unroll(P):
                    value: T.let = splat(X[((row + r) * groups + T.truncdiv(panel + p, of_group)) * k + kk], L)
                    for i in T.unroll(V):
                        acc[at(((r * P + p) * V + i) * L, L)] = fma(
                            value, load(row_of_w, (p * V + i) * L, L), acc[at(((r * P + p) * V + i) * L, L)]
                        )
        for i in T.unroll(R * P * V):
            S[at(i * L, L)] = acc[at(i * L, L)]

    def sums_of(tiles, here, *where):
        """`sums` of as many rows as `here` says: one unrolled copy for each of {rows: panels}."""
        for height, width in tiles.items():
            with T.If(here == height), T.Then():
                sums(*where, height, width)

    @T.inline
    def store(S, base, row, panel, Y):
        inner: T.let = T.truncmod(panel, of_group)
        place: T.let = (row * groups + T.truncdiv(panel, of_group)) * n + inner * PANEL
        if inner * PANEL + PANEL <= n:
            for i in T.serial(V):
                Y[at(place + i * L, L)] = load(S, base + i * L, L)
        else:
            for i in T.serial(n - inner * PANEL):
                Y[place + i] = S[base + i]

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        w: T.handle(storage),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        W = T.decl_buffer((1,), storage, data=w)
        Y = T.decl_buffer((1,), "float32", data=y)
        S = T.alloc_buffer((max(row_tile, CHAINS // V) * PANEL,), "float32", scope="local")
        rows: T.let = D[rows_dim]
        chunks: T.let = T.truncdiv(rows + ROW_CHUNK - 1, ROW_CHUNK)
        begin: T.let = share(task, tasks, panels * chunks)
        count: T.let = share(task + 1, tasks, panels * chunks) - begin
        # Few rows are one chunk: a unit of work is a panel, and several are taken at once.
        wide: T.let = T.min(STREAMS, T.truncdiv(CHAINS // V, T.max(rows, 1)))
        together: T.let = T.Select(T.And(rows > 0, rows <= few), T.truncdiv(count, T.max(wide, 1)), 0)
        for u in T.serial(together):
            sums_of(several, rows, X, W, S, 0, begin + u * wide)
            for i in T.serial(rows):
                for p in T.serial(wide):
                    store(S, (i * wide + p) * PANEL, i, begin + u * wide + p, Y)
        for u in T.serial(count - together * wide):
            unit: T.let = begin + together * wide + u
            panel: T.let = T.truncdiv(unit, chunks)
            top: T.let = share(T.truncmod(unit, chunks), chunks, rows)
            height: T.let = share(T.truncmod(unit, chunks) + 1, chunks, rows) - top
            tiles: T.let = T.truncdiv(height + row_tile - 1, row_tile)
            for t in T.serial(tiles):
                row: T.let = top + share(t, tiles, height)
                here: T.let = top + share(t + 1, tiles, height) - row
                sums_of(dict.fromkeys(range(1, row_tile + 1), 1), here, X, W, S, row, panel)
                for i in T.serial(here):
                    store(S, i * PANEL, row + i, panel, Y)

    return specialised(kernel, symbol, {})
