"""Matrix products with packed weights: y = epilogue(x wᵀ + bias) (+ residual), and the gated pair act(gate) · up.

Every output is one chain of fused multiply-adds over k in order, whatever the rows, the tiles and the tasks are: so its
bits depend on its row of x and its row of w alone. Registers hold a tile of rows × one panel; one or two rows take
several panels at once instead, which gives the fused multiply-add units enough independent chains.
"""

from __future__ import annotations

from functools import partial

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.outputs import experts_gated_result, gated_result, linear_result, store_panel
from llmc.backends.tvm.kernels.pairs import pair_matmul
from llmc.backends.tvm.kernels.segments import each_segment
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
from llmc.backends.tvm.packing import HALF, PANEL

CHAINS = 8
"""Independent sums that keep the multiply-add units of a core busy: two of them, four cycles of latency."""

STREAMS = 4
"""Panels that are taken at once at most: more streams of weights are slower from memory."""

ROW_CHUNK = 48
"""Rows that one unit of work covers: a panel is read from memory once for them, from the cache after that."""


def linear(symbol, isa, *, rows_dim, n, k, weight_dtype, bias=False, epilogue="none", residual=False):
    """x f32 [rows, k], w packed [ceil(n / 16), k, 16] (`packing.pack`), [bias f32 [n]], [residual f32 [rows, n]],
    y f32 [rows, n]."""

    result = linear_result(n, bias, epilogue, residual)
    return _maker(isa, weight_dtype)(symbol, isa, rows_dim, n, k, PANEL, result, bias, residual)


def gated_linear(symbol, isa, *, rows_dim, n, k, weight_dtype, activation):
    """x f32 [rows, k], w packed [ceil(n / 8), k, 16] (`packing.pack_gated`),
    y f32 [rows, n] = activation(x gateᵀ) · (x upᵀ)."""

    result = gated_result(activation)
    return _maker(isa, weight_dtype)(symbol, isa, rows_dim, n, k, HALF, result, False, False)


def experts_linear(symbol, isa, *, experts, n, k, weight_dtype, bias=False):
    """x f32 [rows, k], starts i32 [experts + 1], w [experts, ...] packed as for `linear`, [bias f32 [experts, n]],
    y f32 [rows, n]: rows starts[e] to starts[e + 1] of x times matrix e. Other rows of y are not written, matrices that
    have no rows are not read."""

    result = linear_result(n, bias, "none", False)
    return _maker(isa, weight_dtype)(symbol, isa, 0, n, k, PANEL, result, bias, False, experts)


def experts_gated_linear(
    symbol, isa, *, experts, n, k, weight_dtype, activation, gating="product", limit=0.0, bias=False
):
    """The same with w [experts, ...] packed as for `gated_linear`, bias f32 [experts, ceil(n / 8), 16] packed alike,
    and the gatings of `ir.ops.experts`."""

    result = experts_gated_result(n, activation, gating, limit, bias)
    return _maker(isa, weight_dtype)(symbol, isa, 0, n, k, HALF, result, bias, False, experts)


def _maker(isa, weight_dtype):
    """How an instruction set multiplies weights of a dtype: a function of the parameters that follow it in `_matmul`.

    Two bf16 operands at a time where it can. Plans do not depend on it: arguments and layouts are the same."""
    return pair_matmul if weight_dtype == "bf16" and isa.bf16_dot else partial(_matmul, weight_dtype)


def _matmul(weight_dtype, symbol, isa, rows_dim, n, k, columns, result, bias, residual, experts=0):
    """`columns`: outputs of one panel; `result` as `kernels.outputs` gives it; `experts`: how many matrices there are,
    each for a segment of rows; 0 is one matrix for all."""
    L, V = isa.lanes, isa.vectors
    panels = -(-n // columns)
    row_tile = isa.row_tile
    # Sums that hide a fused multiply-add's latency: a tile of fewer takes several panels. {rows: panels}
    groups = {r: min(STREAMS, CHAINS // (r * V)) for r in range(1, row_tile + 1) if CHAINS // (r * V) > 1}
    few = max(groups, default=0)
    storage = STORAGE[weight_dtype]

    @T.inline
    def sums(X, W, S, row, panel, R, P):
        """S[R, P, 16] = rows row..row+R of x times the rows of w in panels panel..panel+P."""
        acc = T.alloc_buffer((R * P * PANEL,), "float32", scope="local")
        row_of_w = T.alloc_buffer((P * PANEL,), "float32", scope="local")
        for i in T.unroll(R * P * V):
            acc[at(i * L, L)] = f32(0.0, L)
        # Streams share what is in flight. (For 16 bits every line is named twice, which costs nothing measurable.)
        ahead = T.meta_var(PREFETCH * 2 // max(P, 2) // (4 if weight_dtype == "f32" else 2))
        for kk in T.serial(k):
            for p in T.unroll(P):
                prefetch(W, T.Cast("int64", panel + p) * T.int64(k * PANEL) + T.Cast("int64", kk * PANEL + ahead))
            # Weights first, then one element of x at a time: 12 sums, 2 weights and a broadcast are 15 of 16 registers.
            for i in T.unroll(P * V):
                column: T.let = T.Cast("int64", kk * PANEL + i % V * L)
                row_of_w[at(i * L, L)] = decode(
                    load(W, T.Cast("int64", panel + i // V) * T.int64(k * PANEL) + column, L), weight_dtype, L
                )
            for r in T.unroll(R):
                value: T.let = splat(X[(row + r) * k + kk], L)
                for i in T.unroll(P * V):
                    acc[at((r * P * V + i) * L, L)] = fma(
                        value, load(row_of_w, i * L, L), acc[at((r * P * V + i) * L, L)]
                    )
        for i in T.unroll(R * P * V):
            S[at(i * L, L)] = acc[at(i * L, L)]

    def sums_of(tiles, here, *where):
        """`sums` of as many rows as `here` says: one unrolled copy for each of {rows: panels}."""
        for height, width in tiles.items():
            with T.If(here == height), T.Then():
                sums(*where, height, width)

    def units(rows):
        """Units of work of the product with one matrix."""
        return panels * T.truncdiv(rows + ROW_CHUNK - 1, ROW_CHUNK)

    @T.inline
    def work(X, W, B, R, Y, S, rows, base, which, begin, count):
        """Units begin..begin + count of the product of rows base..base + rows with matrix `which`."""
        chunks: T.let = T.truncdiv(rows + ROW_CHUNK - 1, ROW_CHUNK)
        # Few rows are one chunk: a unit of work is a panel, and several are taken at once.
        wide: T.let = T.min(STREAMS, T.truncdiv(CHAINS // V, T.max(rows, 1)))
        grouped: T.let = T.Select(T.And(rows > 0, rows <= few), T.truncdiv(count, T.max(wide, 1)), 0)
        for g in T.serial(grouped):
            sums_of(groups, rows, X, W, S, base, which * panels + begin + g * wide)
            for i in T.serial(rows):
                for p in T.serial(wide):
                    panel: T.let = begin + g * wide + p
                    place = T.meta_var((base + i) * n + panel * columns)
                    store_panel(
                        result, S, (i * wide + p) * PANEL, base + i, panel, B, R, Y, place, n, columns, L, which
                    )
        for u in T.serial(count - grouped * wide):
            unit: T.let = begin + grouped * wide + u
            panel: T.let = T.truncdiv(unit, chunks)
            chunk: T.let = T.truncmod(unit, chunks)
            top: T.let = share(chunk, chunks, rows)
            height: T.let = share(chunk + 1, chunks, rows) - top
            tiles: T.let = T.truncdiv(height + row_tile - 1, row_tile)
            for t in T.serial(tiles):
                # Tiles of nearly equal height: 7 rows are 3 + 4, not 6 + 1.
                row: T.let = base + top + share(t, tiles, height)
                here: T.let = base + top + share(t + 1, tiles, height) - row
                sums_of(dict.fromkeys(range(1, row_tile + 1), 1), here, X, W, S, row, which * panels + panel)
                for i in T.serial(here):
                    place = T.meta_var((row + i) * n + panel * columns)
                    store_panel(result, S, i * PANEL, row + i, panel, B, R, Y, place, n, columns, L, which)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        starts: T.handle("int32"),
        w: T.handle(storage),
        b: T.handle("float32"),
        r: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        E = T.decl_buffer((1,), "int32", data=starts)
        W = T.decl_buffer((1,), storage, data=w)
        B = T.decl_buffer((1,), "float32", data=b)
        R = T.decl_buffer((1,), "float32", data=r)
        Y = T.decl_buffer((1,), "float32", data=y)
        S = T.alloc_buffer((max(row_tile, CHAINS // V) * PANEL,), "float32", scope="local")
        where = T.meta_var((X, W, B, R, Y, S))
        if experts > 0:
            each_segment(E, experts, task, tasks, units, work, where)
        else:
            begin: T.let = share(task, tasks, units(D[rows_dim]))
            count: T.let = share(task + 1, tasks, units(D[rows_dim])) - begin
            work(*where, D[rows_dim], 0, 0, begin, count)

    return specialised(kernel, symbol, {"starts": experts > 0, "b": bias, "r": residual})
