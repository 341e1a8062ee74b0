"""Matrix products of bf16 weights with activations rounded to bf16: two products a lane in one instruction.

For processors with AVX-512 BF16. Weights are packed as for every variant, [panel, k, 16], and a vector of pairs, whose
lane i holds the elements k and k + 1 of row i, is made while they are read. Activations are rounded to the nearest,
ties to even, once for all panels of a unit of work; an odd k has a zero in its last pair.

Every output is one chain over pairs in order: sum = (sum + x[k+1] · w[k+1]) + x[k] · w[k] with float32 rounding of each
step, whatever the rows, the tiles and the tasks are: its bits depend on its row of x and its row of w alone. The
instruction takes denormal numbers as zero (Intel, Software Developer's Manual, VDPBF16PS).
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import StringImm
from tvm.script import tirx as T

from llmc.backends.tvm.kernels.outputs import store_panel
from llmc.backends.tvm.kernels.segments import each_segment
from llmc.backends.tvm.kernels.vector import PREFETCH, at, f32, i32, load, prefetch, share, specialised, splat
from llmc.backends.tvm.packing import PANEL

ABREAST = 2
"""Panels that a tile takes at once: the sums of few rows then hide an instruction's latency, and a pair of activations
is fetched once for both. More streams of weights are slower from memory."""

PAIR_TILE = 12
"""Rows of a tile of several panels: 24 sums, two vectors of pairs and an operand are 27 of 32 registers."""

ROW_CHUNK = 24
"""Rows that one unit of work covers, when there are many: a multiple of the tiles' height."""

PANEL_CHUNK = 8
"""Panels that one unit of work covers when rows are many: activations are rounded once for them."""

SCRATCH = 256 * 1024
"""Bytes of the stack that rounded activations may take; a unit of work has fewer rows where they would take more."""

_LINE = 16
"""Pairs that a line of the cache holds, and a vector."""

# TVM has no way to name LLVM's type of bf16 vectors: these functions take and give the same bits as integers, and are
# inlined. `llmc_pairs` is one permutation of a panel's rows at k, then at k + 1.
_LLVM = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)

define internal <16 x float> @llmc_dot(<16 x float> %sum, <16 x i32> %x, <16 x i32> %w) alwaysinline {
  %a = bitcast <16 x i32> %x to <32 x bfloat>
  %b = bitcast <16 x i32> %w to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %r
}

define internal <16 x i32> @llmc_round(<16 x float> %low, <16 x float> %high) alwaysinline {
  %r = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %bits = bitcast <32 x bfloat> %r to <16 x i32>
  ret <16 x i32> %bits
}

define internal <16 x i32> @llmc_pairs(<32 x i16> %w) alwaysinline {
  %p = shufflevector <32 x i16> %w, <32 x i16> poison, <32 x i32> <ORDER>
  %bits = bitcast <32 x i16> %p to <16 x i32>
  ret <16 x i32> %bits
}
""".replace("ORDER", ", ".join(f"i32 {i}, i32 {i + PANEL}" for i in range(PANEL)))


def pair_matmul(symbol, isa, rows_dim, n, k, columns, result, bias, residual, experts=0):
    """The kernel with the C signature of `kernels.linear`, whose maker gives the parameters. `columns`: outputs of one
    panel; `result` as in `kernels.outputs`; `experts`: how many matrices there are, or 0."""
    L = isa.lanes
    assert L == PANEL, "a register holds the pairs of a panel"
    panels = -(-n // columns)
    row_tile = isa.row_tile
    # Whole vectors of pairs in a row; an odd number of lines, as rows at distances of 4 KB would share few sets.
    stride = (-(-k // (2 * _LINE)) | 1) * _LINE
    row_chunk = max(1, min(ROW_CHUNK, SCRATCH // (4 * stride)))
    few = min(row_tile // 2, row_chunk)

    @T.inline
    def round_rows(X, Z, first, count):
        """Z[0..count] = the pairs of rows first..first + count of x."""
        for i in T.serial(count):
            for j in T.serial(k // (2 * L)):
                x: T.let = (first + i) * k + j * (2 * L)
                Z[at(i * stride + j * L, L)] = _round(load(X, x, L), load(X, x + L, L))
            if k % (2 * L) > 0:
                rest = T.alloc_buffer((2 * L,), "float32", scope="local")
                for h in T.unroll(2):
                    rest[at(h * L, L)] = f32(0.0, L)
                for j in T.serial(k % (2 * L)):
                    rest[j] = X[(first + i) * k + k // (2 * L) * (2 * L) + j]
                Z[at(i * stride + k // (2 * L) * L, L)] = _round(load(rest, 0, L), load(rest, L, L))

    @T.inline
    def sums(Z, W, S, row, panel, R, P):
        """S[R, P, 16] = rows row..row + R of the scratch times the rows of w in panels panel..panel + P."""
        acc = T.alloc_buffer((R * P * L,), "float32", scope="local")
        pairs = T.alloc_buffer((P * L,), "int32", scope="local")
        for i in T.unroll(R * P):
            acc[at(i * L, L)] = f32(0.0, L)
        weights: T.let = T.Cast("int64", panel) * T.int64(k * L)
        for kk in T.serial(k // 2):
            for p in T.unroll(P):
                place: T.let = weights + T.Cast("int64", p * (k * L) + kk * (2 * L))
                prefetch(W, place + T.int64(PREFETCH // 2))
                pairs[at(p * L, L)] = _pairs(load(W, place, 2 * L))
            for r in T.unroll(R):
                x: T.let = splat(Z[(row + r) * stride + kk], L)
                for p in T.unroll(P):
                    acc[at((r * P + p) * L, L)] = _dot(acc[at((r * P + p) * L, L)], x, load(pairs, p * L, L))
        if k % 2 == 1:
            for p in T.unroll(P):
                place: T.let = weights + T.Cast("int64", p * (k * L) + (k - 1) * L)
                pairs[at(p * L, L)] = T.Cast(f"int32x{L}", load(W, place, L))
            for r in T.unroll(R):
                x: T.let = splat(Z[(row + r) * stride + k // 2], L)
                for p in T.unroll(P):
                    acc[at((r * P + p) * L, L)] = _dot(acc[at((r * P + p) * L, L)], x, load(pairs, p * L, L))
        for i in T.unroll(R * P):
            S[at(i * L, L)] = acc[at(i * L, L)]

    def few_sums(rows, *where):
        """`sums` of as many rows as there are, with `ABREAST` panels."""
        for height in range(1, few + 1):
            with T.If(rows == height), T.Then():
                sums(*where, height, ABREAST)

    def tile_sums(here, count, *where):
        """`sums` of as many rows as `here` and as many panels as `count` says."""
        for abreast, most in ((1, row_tile), (ABREAST, PAIR_TILE)):
            for height in range(1, min(most, row_chunk) + 1):
                with T.If(T.And(here == height, count == abreast)), T.Then():
                    sums(*where, height, abreast)

    def abreast_of(rows):
        """Panels of a unit of work. One chunk is rounded once for a whole task, so there a unit can be a panel."""
        return T.Select(rows > row_chunk, PANEL_CHUNK, 1)

    def units(rows):
        """Units of work of the product with one matrix."""
        per_chunk = T.truncdiv(panels + abreast_of(rows) - 1, abreast_of(rows))
        return per_chunk * T.truncdiv(rows + row_chunk - 1, row_chunk)

    @T.inline
    def work(X, W, B, R, Y, S, Z, rows, base, which, begin, count):
        """Units begin..begin + count of the product of rows base..base + rows with matrix `which`."""
        rounded = T.alloc_buffer((1,), "int32", scope="local")
        rounded[0] = -1
        chunks: T.let = T.truncdiv(rows + row_chunk - 1, row_chunk)
        abreast: T.let = abreast_of(rows)
        grouped: T.let = T.Select(T.And(rows > 0, rows <= few), T.truncdiv(count, ABREAST), 0)
        if grouped > 0:
            round_rows(X, Z, base, rows)
            rounded[0] = 0
        for g in T.serial(grouped):
            few_sums(rows, Z, W, S, 0, which * panels + begin + g * ABREAST)
            for i in T.serial(rows):
                for p in T.serial(ABREAST):
                    panel: T.let = begin + g * ABREAST + p
                    place = T.meta_var((base + i) * n + panel * columns)
                    store_panel(
                        result, S, (i * ABREAST + p) * PANEL, base + i, panel, B, R, Y, place, n, columns, L, which
                    )
        for u in T.serial(count - grouped * ABREAST):
            unit: T.let = begin + grouped * ABREAST + u
            first: T.let = T.truncdiv(unit, chunks) * abreast
            end: T.let = T.min(panels, first + abreast)
            chunk: T.let = T.truncmod(unit, chunks)
            top: T.let = share(chunk, chunks, rows)
            height: T.let = share(chunk + 1, chunks, rows) - top
            if chunk != rounded[0]:
                round_rows(X, Z, base + top, height)
                rounded[0] = chunk
            high: T.let = T.Select(chunks > 1, PAIR_TILE, row_tile)
            tiles: T.let = T.truncdiv(height + high - 1, high)
            for t in T.serial(tiles):
                # Tiles of nearly equal height: 13 rows are 6 + 7, not 12 + 1.
                row: T.let = share(t, tiles, height)
                here: T.let = share(t + 1, tiles, height) - row
                step: T.let = T.Select(chunks > 1, ABREAST, 1)
                for p in T.serial(T.truncdiv(end - first + step - 1, step)):
                    panel: T.let = first + p * step
                    both: T.let = T.min(step, end - panel)
                    tile_sums(here, both, Z, W, S, row, which * panels + panel)
                    for i in T.serial(here * both):
                        r: T.let = base + top + row + T.truncdiv(i, both)
                        one: T.let = panel + T.truncmod(i, both)
                        place = T.meta_var(r * n + one * columns)
                        store_panel(result, S, i * PANEL, r, one, B, R, Y, place, n, columns, L, which)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        starts: T.handle("int32"),
        w: T.handle("uint16"),
        b: T.handle("float32"),
        r: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        E = T.decl_buffer((1,), "int32", data=starts)
        W = T.decl_buffer((1,), "uint16", data=w)
        B = T.decl_buffer((1,), "float32", data=b)
        R = T.decl_buffer((1,), "float32", data=r)
        Y = T.decl_buffer((1,), "float32", data=y)
        S = T.alloc_buffer((max(row_tile, ABREAST * PAIR_TILE) * PANEL,), "float32", scope="local")
        Z = T.alloc_buffer((row_chunk * stride,), "int32", scope="local")
        where = T.meta_var((X, W, B, R, Y, S, Z))
        if experts > 0:
            each_segment(E, experts, task, tasks, units, work, where)
        else:
            begin: T.let = share(task, tasks, units(D[rows_dim]))
            count: T.let = share(task + 1, tasks, units(D[rows_dim])) - begin
            work(*where, D[rows_dim], 0, 0, begin, count)

    made = specialised(kernel, symbol, {"starts": experts > 0, "b": bias, "r": residual})
    return made.with_body(tirx.AttrStmt(i32(0), "pragma_import_llvm", StringImm(_LLVM), made.body))


def _dot(sum_, x, w):
    """f32 [16]: sums with the products of two pairs of bf16, as i32 [16] each, added."""
    return T.call_pure_extern("float32x16", "llmc_dot", sum_, x, w)


def _round(low, high):
    """32 neighbouring elements, as two f32 [16], as pairs of bf16, i32 [16]."""
    return T.call_pure_extern("int32x16", "llmc_round", low, high)


def _pairs(rows):
    """The pairs, i32 [16], of a panel's rows at k and at k + 1, bf16 [32]."""
    return T.call_pure_extern("int32x16", "llmc_pairs", rows)
