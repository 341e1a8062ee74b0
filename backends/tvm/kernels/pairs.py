"""Matrix products of bf16 weights where the processor multiplies pairs of bf16 (AVX-512 BF16): two products in one
instruction, summed in float32.

Activations are rounded to bf16, which `kernels.linear` does not do: the variant is for those who ask for it. Weights
lie as there, [panel][k][16]; elements k and k + 1 of a panel are put together as they are read. An output is one chain
over the pairs in order, so its bits depend on its row of x and its row of w alone.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import (
    at,
    encode,
    f32,
    i32,
    load,
    prefetch,
    share,
    specialised,
    splat,
    wide,
)
from llmc.backends.tvm.packing import PANEL

PREFETCH = 8192
"""Bytes by which weights are asked for ahead, as in `kernels.quantized`."""

SCRATCH_WORDS = 1 << 16
"""Pairs of activations that a unit of work keeps on the stack, rounded once for all of its panels: 256 KB."""

PANEL_CHUNK = 4
"""Panels of a unit: rounding its activations costs a few per cent of them."""


def pair_matmul(symbol, isa, rows_dim, n, k, columns, result, store_panel, bias, residual):
    """x f32 [rows, k], w bf16 in panels, and the rest as in `kernels.linear`."""
    L = isa.lanes
    pairs = -(-k // 2)
    panels = -(-n // columns)
    row_chunk = max(1, min(48, SCRATCH_WORDS // pairs))
    row_tile = min(isa.row_tile, row_chunk)

    @T.inline
    def round_row(X, start, P, to):
        """P[to..] = the row at X[start..] in pairs of bf16; an odd last element is paired with zero."""
        for c in T.serial(k // L):
            P[at(to + c * (L // 2), L // 2)] = T.reinterpret(
                wide("int32", L // 2), encode(load(X, start + c * L, L), "bf16", L)
            )
        for c in T.serial(pairs - k // L * (L // 2)):
            first: T.let = k // L * L + 2 * c
            low: T.let = T.Cast("int32", encode(X[start + first], "bf16"))
            high: T.let = T.Cast("int32", encode(X[start + T.min(first + 1, k - 1)], "bf16"))
            P[to + k // L * (L // 2) + c] = T.bitwise_or(
                low, T.Select(first + 1 < k, T.shift_left(high, 16), T.int32(0))
            )

    @T.inline
    def sums(P, W, S, row, panel, R):
        """S[R, 16] = rounded rows row..row+R times the rows of w in a panel."""
        acc = T.alloc_buffer((R * PANEL,), "float32", scope="local")
        pair = T.alloc_buffer((PANEL,), "int32", scope="local")
        for r in T.unroll(R):
            acc[at(r * L, L)] = f32(0.0, L)
        base: T.let = T.Cast("int64", panel) * T.int64(k * PANEL)
        for p in T.serial(k // 2):
            place: T.let = base + T.Cast("int64", p * (2 * PANEL))
            prefetch(W, place + T.int64(PREFETCH // 2))
            low: T.let = T.Cast(wide("int32", L), load(W, place, L))
            high: T.let = T.Cast(wide("int32", L), load(W, place + T.int64(PANEL), L))
            pair[at(0, L)] = T.bitwise_or(low, T.shift_left(high, i32(16, L)))
            for r in T.unroll(R):
                acc[at(r * L, L)] = _multiply(acc[at(r * L, L)], splat(P[(row + r) * pairs + p], L), load(pair, 0, L))
        if k % 2 > 0:
            pair[at(0, L)] = T.Cast(wide("int32", L), load(W, base + T.int64((k - 1) * PANEL), L))
            for r in T.unroll(R):
                word: T.let = splat(P[(row + r) * pairs + pairs - 1], L)
                acc[at(r * L, L)] = _multiply(acc[at(r * L, L)], word, load(pair, 0, L))
        for r in T.unroll(R):
            S[at(r * L, L)] = acc[at(r * L, L)]

    def sums_of(here, *where):
        """`sums` of as many rows as `here` says: one unrolled copy for each height of a tile."""
        for height in range(1, row_tile + 1):
            with T.If(here == height), T.Then():
                sums(*where, height)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        w: T.handle("uint16"),
        b: T.handle("float32"),
        r: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        W = T.decl_buffer((1,), "uint16", data=w)
        B = T.decl_buffer((n,), "float32", data=b)
        R = T.decl_buffer((1,), "float32", data=r)
        Y = T.decl_buffer((1,), "float32", data=y)
        S = T.alloc_buffer((row_tile * PANEL,), "float32", scope="local")
        P = T.alloc_buffer((row_chunk * pairs,), "int32", scope="local")
        rows: T.let = D[rows_dim]
        chunks: T.let = T.truncdiv(rows + row_chunk - 1, row_chunk)
        units: T.let = T.truncdiv(panels + PANEL_CHUNK - 1, PANEL_CHUNK) * chunks
        begin: T.let = share(task, tasks, units)
        for u in T.serial(share(task + 1, tasks, units) - begin):
            first: T.let = T.truncdiv(begin + u, chunks) * PANEL_CHUNK
            chunk: T.let = T.truncmod(begin + u, chunks)
            top: T.let = share(chunk, chunks, rows)
            height: T.let = share(chunk + 1, chunks, rows) - top
            tiles: T.let = T.truncdiv(height + row_tile - 1, row_tile)
            for i in T.serial(height):
                round_row(X, (top + i) * k, P, i * pairs)
            for p in T.serial(T.min(PANEL_CHUNK, panels - first)):
                for t in T.serial(tiles):
                    row: T.let = share(t, tiles, height)
                    here: T.let = share(t + 1, tiles, height) - row
                    sums_of(here, P, W, S, row, first + p)
                    for i in T.serial(here):
                        place = T.meta_var((top + row + i) * n + (first + p) * columns)
                        store_panel(result, S, i * PANEL, top + row + i, first + p, B, R, Y, place, n, columns, L)

    return _with_product(specialised(kernel, symbol, {"b": bias, "r": residual}))


_PRODUCT = "llmc_bf16_pairs"

_IR = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define internal <16 x float> @{_PRODUCT}(<16 x float> %sum, <16 x i32> %x, <16 x i32> %w) alwaysinline {{
  %xs = bitcast <16 x i32> %x to <32 x bfloat>
  %ws = bitcast <16 x i32> %w to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %xs, <32 x bfloat> %ws)
  ret <16 x float> %r
}}
"""
"""The instruction on words of two bf16. TVM has no bf16 type that LLVM's intrinsic takes, so the cast is written in
LLVM's own language; the function is inlined."""


def _with_product(kernel):
    """The kernel with the definition of `_PRODUCT` in it."""
    body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", tvm.ir.StringImm(_IR), kernel.body)
    made = tirx.PrimFunc(kernel.params, body, kernel.ret_type)
    for name, value in kernel.attrs.items():
        made = made.with_attr(name, value)
    return made


def _multiply(acc, activations, weights):
    """acc + both products of each lane's pairs, int32 words of two bf16."""
    return T.call_extern("float32x16", _PRODUCT, acc, activations, weights)
