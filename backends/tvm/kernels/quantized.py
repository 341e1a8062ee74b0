"""Matrix products of quantized activations with quantized weights: integers within groups of 32, float32 across them.

Operands of every kernel here, for `rows` activations of k elements in `groups` = ceil(k / 32) groups: the tiles of
`kernels.tiles`, codes i8 [groups, rows, 32] (as i32 words of four), scales f32 and offsets i32 [groups, rows]; weight
codes u8 in panels (`packing.pack_codes`) and weight scales f16 [panels, groups, 16]. A group of a row lies beside the
same group of its neighbours, so that a tile of rows reads one short run of memory.

An output is one chain over its groups in order: acc = fma(group's integer sum, weight scale · activation scale, acc).
Its bits depend on its row of x and its row of w alone, whatever the tiles, the batch and the tasks are.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from llmc.backends.tvm.kernels.dot import dot_of
from llmc.backends.tvm.kernels.outputs import experts_gated_result, gated_result, linear_result, store_panel
from llmc.backends.tvm.kernels.rows import ordered
from llmc.backends.tvm.kernels.segments import each_segment
from llmc.backends.tvm.kernels.tiles import GROUP, quantize_group
from llmc.backends.tvm.kernels.vector import (
    PREFETCH,
    at,
    f32,
    fma,
    i32,
    intrinsic,
    let,
    load,
    prefetch,
    share,
    specialised,
    splat,
    wide,
)
from llmc.backends.tvm.packing import HALF, PANEL

WORDS = GROUP // 4

ROW_CHUNK = 96
"""Rows that one unit of work covers, when there are many: a multiple of every tile's height."""

PANEL_CHUNK = 2
"""Panels that one unit of work covers when rows are many: a tile of activations is fetched once for them."""


def quantized_linear(
    symbol, isa, *, rows_dim, n, k, bits, bias=False, epilogue="none", residual=False, tiles=False, best=False
):
    """Operands as above, [bias f32 [n]], [residual f32 [rows, n]], then y f32 [rows, n], or with `tiles` y quantized in
    turn: its codes, scales and offsets. With `best` also keys i64 [rows, panels], which say of each panel what its
    largest output is and in which column: see `best_key`."""
    result = linear_result(n, bias, epilogue, residual)
    return _matmul(symbol, isa, rows_dim, n, k, bits, PANEL, result, bias, residual, tiles, best)


def quantized_gated_linear(symbol, isa, *, rows_dim, n, k, bits, activation, tiles=False):
    """Operands as above with gated panels; y = activation(x gateᵀ) · (x upᵀ), f32 [rows, n] or, with `tiles`,
    quantized."""
    return _matmul(symbol, isa, rows_dim, n, k, bits, HALF, gated_result(activation), False, False, tiles, False)


def experts_quantized_linear(symbol, isa, *, rows_dim, per_token, experts, n, k, bits, bias=False):
    """Operands as above but for `per_token` rows of each token, then starts i32 [experts + 1], weight codes and scales
    [experts, ...], [bias f32 [experts, n]], y f32 [rows, n]: rows starts[e] to starts[e + 1] times matrix e. Other rows
    of y are not written, matrices that have no rows are not read."""
    result = linear_result(n, bias, "none", False)
    segments = (experts, per_token)
    return _matmul(symbol, isa, rows_dim, n, k, bits, PANEL, result, bias, False, False, False, segments)


def experts_quantized_gated_linear(
    symbol, isa, *, rows_dim, per_token, experts, n, k, bits, activation, gating="product", limit=0.0, bias=False
):
    """The same with gated panels, bias f32 [experts, ceil(n / 8), 16] packed alike, and the gatings of
    `ir.ops.experts`; y is quantized."""
    result = experts_gated_result(n, activation, gating, limit, bias)
    segments = (experts, per_token)
    return _matmul(symbol, isa, rows_dim, n, k, bits, HALF, result, bias, False, True, False, segments)


def _matmul(symbol, isa, rows_dim, n, k, bits, columns, result, bias, residual, quantized, best, segments=(0, 1)):
    """`columns`: outputs of one panel; `result` as in `kernels.outputs`; `quantized`: whether y is; `segments`: how many
    matrices there are, each for a segment of rows, and how many rows a token has; 0 is one matrix for all."""
    experts, per_token = segments
    L, V = isa.lanes, isa.vectors
    dot = dot_of(isa, bits)
    panels = -(-n // columns)
    groups = -(-k // GROUP)
    row_tile, pair_tile = isa.code_tile, isa.pair_tile
    per_byte = 8 // bits
    stored = WORDS // per_byte  # vectors of codes of a panel's group, times V

    @T.inline
    def sums(X, XS, XO, W, WS, S, rows, row, panel, R, P):
        """S[R, P, 16] = rows row..row+R of x times the rows of w in panels panel..panel+P."""
        acc = T.alloc_buffer((R * P * PANEL,), "float32", scope="local")
        running = T.alloc_buffer((R * P * V * dot.width,), dot.kind, scope="local")
        codes = T.alloc_buffer((per_byte * P * PANEL * 4,), "uint8", scope="local")
        scales = T.alloc_buffer((P * PANEL,), "float32", scope="local")
        offset = T.alloc_buffer((R * L,), "int32", scope="local")
        for i in T.unroll(R * P * V):
            acc[at(i * L, L)] = f32(0.0, L)
        weights: T.let = T.Cast("int64", panel) * T.int64(groups * stored * 64)
        for g in T.serial(groups):
            for r in T.unroll(R):
                offset[at(r * L, L)] = splat(XO[g * rows + row + r], L)
                for i in T.unroll(P * V):
                    running[at((r * P * V + i) * dot.width, dot.width)] = dot.start(load(offset, r * L, L))
            for p in T.unroll(P):
                for j in T.unroll(stored):
                    place: T.let = T.Cast("int64", ((p * groups + g) * stored + j) * 64 + PREFETCH)
                    prefetch(W, weights + place)
            for j in T.unroll(stored):
                for i in T.unroll(P * V):
                    place: T.let = T.Cast("int64", ((i // V * groups + g) * stored + j) * 64 + i % V * (4 * L))
                    _split(codes, load(W, weights + place, 4 * L), bits, i, P * V, 4 * L)
                for h in T.unroll(per_byte):
                    for r in T.unroll(R):
                        word: T.let = splat(X[(g * rows + row + r) * WORDS + j * per_byte + h], L)
                        for i in T.unroll(P * V):
                            running[at((r * P * V + i) * dot.width, dot.width)] = dot.step(
                                load(running, (r * P * V + i) * dot.width, dot.width),
                                load(codes, (h * P * V + i) * 4 * L, 4 * L),
                                word,
                            )
            for i in T.unroll(P * V):
                place: T.let = T.Cast("int64", panel) * T.int64(groups * PANEL) + T.Cast(
                    "int64", (i // V * groups + g) * PANEL + i % V * L
                )
                scales[at(i * L, L)] = T.Cast(wide("float32", L), load(WS, place, L))
            for r in T.unroll(R):
                for i in T.unroll(P * V):
                    whole = T.meta_var(
                        dot.finish(load(running, (r * P * V + i) * dot.width, dot.width), load(offset, r * L, L))
                    )
                    acc[at((r * P * V + i) * L, L)] = fma(
                        T.Cast(wide("float32", L), whole),
                        load(scales, i * L, L) * splat(XS[g * rows + row + r], L),
                        acc[at((r * P * V + i) * L, L)],
                    )
        for i in T.unroll(R * P * V):
            S[at(i * L, L)] = acc[at(i * L, L)]

    def sums_of(here, count, *where):
        """`sums` of as many rows as `here` and as many panels as `count` says: an unrolled copy for each."""
        # More than `2 · row_tile` rows in tiles of nearly equal height leave none that is much lower than the rest.
        for abreast, least, most in ((1, 1, row_tile), (2, pair_tile - 1, pair_tile)):
            for height in range(max(least, 1), most + 1):
                with T.If(T.And(here == height, count == abreast)), T.Then():
                    sums(*where, height, abreast)

    def abreast_of(rows):
        """Panels of a unit of work."""
        return GROUP // columns if quantized else T.Select(rows > row_tile, PANEL_CHUNK, 1)

    def units(rows):
        """Units of work of the product with one matrix."""
        per_chunk = T.truncdiv(panels + abreast_of(rows) - 1, abreast_of(rows))
        return per_chunk * T.truncdiv(rows + ROW_CHUNK - 1, ROW_CHUNK)

    @T.inline
    def work(X, XS, XO, W, WS, B, R, Y, YC, YS, YO, K, S, Z, stride, rows, base, which, begin, count):
        """Units begin..begin + count of the product of rows base..base + rows, of `stride`, with matrix `which`."""
        destination = T.meta_var(Z if quantized else Y)
        # Many rows: two panels at once, so that a word of activations is fetched once for both.
        many: T.let = T.And(rows > 2 * row_tile, pair_tile > 0)
        abreast = T.meta_var(abreast_of(rows))
        chunks: T.let = T.truncdiv(rows + ROW_CHUNK - 1, ROW_CHUNK)
        for u in T.serial(count):
            first: T.let = T.truncdiv(begin + u, chunks) * abreast
            end: T.let = T.min(panels, first + abreast)
            chunk: T.let = T.truncmod(begin + u, chunks)
            top: T.let = share(chunk, chunks, rows)
            height: T.let = share(chunk + 1, chunks, rows) - top
            high: T.let = T.Select(many, pair_tile, row_tile)
            tiles: T.let = T.truncdiv(height + high - 1, high)
            for t in T.serial(tiles):
                # Tiles of nearly equal height: 13 rows are 6 + 7, not 12 + 1.
                row: T.let = base + top + share(t, tiles, height)
                here: T.let = base + top + share(t + 1, tiles, height) - row
                for p in T.serial(T.Select(many, T.truncdiv(end - first + 1, 2), end - first)):
                    panel: T.let = first + p * T.Select(many, 2, 1)
                    both: T.let = T.Select(T.And(many, panel + 1 < end), 2, 1)
                    sums_of(here, both, X, XS, XO, W, WS, S, stride, row, which * panels + panel)
                    for i in T.serial(here * both):
                        r: T.let = T.truncdiv(i, both)
                        one: T.let = panel + T.truncmod(i, both)
                        column: T.let = one * columns
                        place = T.meta_var(
                            r * GROUP + column - first * columns if quantized else (row + r) * n + column
                        )
                        store_panel(result, S, i * PANEL, row + r, one, B, R, destination, place, n, columns, L, which)
                        if best:
                            # The sums' place takes the outputs; columns that are not there are NaN, which never wins.
                            if column + PANEL <= n:
                                for c in T.serial(V):
                                    S[at(i * PANEL + c * L, L)] = load(Y, place + c * L, L)
                            else:
                                for c in T.serial(PANEL):
                                    S[i * PANEL + c] = T.if_then_else(
                                        column + c < n, Y[place + c], T.reinterpret("float32", T.int32(-1))
                                    )
                            K[(row + r) * panels + one] = best_key(S, i * PANEL, column, L)
                if quantized:
                    for i in T.serial(here):
                        for c in T.serial(T.max(0, first * columns + GROUP - n)):
                            Z[i * GROUP + GROUP - 1 - c] = f32(0.0)
                        quantize_group(Z, i * GROUP, YC, YS, YO, T.truncdiv(first, abreast) * stride + row + i, L)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("int32"),
        xs: T.handle("float32"),
        xo: T.handle("int32"),
        starts: T.handle("int32"),
        w: T.handle("uint8"),
        ws: T.handle("float16"),
        b: T.handle("float32"),
        r: T.handle("float32"),
        y: T.handle("float32"),
        yc: T.handle("int8"),
        ys: T.handle("float32"),
        yo: T.handle("int32"),
        keys: T.handle("int64"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "int32", data=x)
        XS = T.decl_buffer((1,), "float32", data=xs)
        XO = T.decl_buffer((1,), "int32", data=xo)
        E = T.decl_buffer((1,), "int32", data=starts)
        W = T.decl_buffer((1,), "uint8", data=w)
        WS = T.decl_buffer((1,), "float16", data=ws)
        B = T.decl_buffer((1,), "float32", data=b)
        R = T.decl_buffer((1,), "float32", data=r)
        Y = T.decl_buffer((1,), "float32", data=y)
        YC = T.decl_buffer((1,), "int8", data=yc)
        YS = T.decl_buffer((1,), "float32", data=ys)
        YO = T.decl_buffer((1,), "int32", data=yo)
        K = T.decl_buffer((1,), "int64", data=keys)
        S = T.alloc_buffer((max(row_tile, 2 * pair_tile) * PANEL,), "float32", scope="local")
        Z = T.alloc_buffer((row_tile * GROUP if quantized else 1,), "float32", scope="local")
        stride: T.let = D[rows_dim] * per_token
        where = T.meta_var((X, XS, XO, W, WS, B, R, Y, YC, YS, YO, K, S, Z, stride))
        if experts > 0:
            each_segment(E, experts, task, tasks, units, work, where)
        else:
            begin: T.let = share(task, tasks, units(stride))
            work(*where, stride, 0, 0, begin, share(task + 1, tasks, units(stride)) - begin)

    present = {
        "starts": experts > 0,
        "b": bias,
        "r": residual,
        "y": not quantized,
        "keys": best,
        **dict.fromkeys(("yc", "ys", "yo"), quantized),
    }
    return specialised(kernel, symbol, present)


def best_key(S, base, column, lanes):
    """The largest of S[base..base + 16] in the high half, 2^31 - 1 less its column in the low one: of keys, the largest
    is that of the first of the largest outputs."""
    keys = [let(ordered(load(S, base + i * lanes, lanes), lanes)) for i in range(PANEL // lanes)]
    most = keys[0]
    for key in keys[1:]:
        most = T.max(most, key)
    peak = let(intrinsic("llvm.vector.reduce.smax", let(most), dtype="int32"))
    first = None
    for i, key in enumerate(keys):
        place = T.Select(key == splat(peak, lanes), at(i * lanes, lanes), i32(PANEL, lanes))
        first = place if first is None else T.min(first, place)
    where = intrinsic("llvm.vector.reduce.smin", let(first), dtype="int32")
    low = T.Cast("int64", T.int32(0x7FFFFFFF) - (column + where))
    return T.bitwise_or(T.shift_left(T.Cast("int64", peak), T.int64(32)), low)


def _split(codes, bytes_, bits, index, count, lanes):
    """codes[h, index] of [8 / bits, count, lanes] = the h-th code of each byte."""
    bytes_ = let(bytes_)
    for h in range(8 // bits):
        part = bytes_
        if h:
            # There is no shift of bytes: one of 16-bit pairs moves a neighbour's bits in, which the mask takes out.
            pairs = wide("uint16", lanes // 2)
            by = splat(tirx.IntImm("uint16", bits * h), lanes // 2)
            part = T.reinterpret(wide("uint8", lanes), T.shift_right(T.reinterpret(pairs, bytes_), by))
        if bits < 8:
            part = T.bitwise_and(part, splat(tirx.IntImm("uint8", (1 << bits) - 1), lanes))
        T.buffer_store(codes, part, [at((h * count + index) * lanes, lanes)])
