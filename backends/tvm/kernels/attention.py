"""Causal attention over the paged KV state: one kernel for decode, prefill and verify.

A query row is one head of one token. Its keys are taken from position 0 in segments of 256; a segment gives its own
maximum, sum and weighted values, and segments are combined in order. All of that depends on the row's own position
alone, so a row's bits are the same in any batch, chunk or tile; and segments may one day go to different tasks.

Registers hold a tile of rows that share a kv head: heads of one group, and neighbouring tokens where a group is small.
What lies beyond a row's position (later keys, slots not yet written, blocks of others) never enters its arithmetic:
scores there are replaced, not multiplied, and values there are not read.
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.cache import BLOCK
from llmc.backends.tvm.kernels.linear import CHAINS
from llmc.backends.tvm.kernels.math import exp
from llmc.backends.tvm.kernels.vector import (
    STORAGE,
    at,
    decode,
    f32,
    fma,
    load,
    share,
    specialised,
    splat,
    tree_max,
    tree_sum,
)

SEGMENT = 256
_LOWEST = -3.0e38


def paged_attention(symbol, isa, *, q_heads, kv_heads, head_dim, scale, kv_dtype, query_stride=None):
    """q f32 [tokens, query_stride] (a row's first q_heads · head_dim; `query_stride` defaults to that), key and value
    states (layouts: kernels.cache), positions i32 [tokens], query_start i32 [sequences + 1],
    block_tables i32 [sequences, max_blocks], out f32 [tokens, q_heads · head_dim]."""
    L, VK = isa.lanes, BLOCK // isa.lanes
    G = q_heads // kv_heads
    stride = query_stride or q_heads * head_dim
    storage = STORAGE[kv_dtype]
    most = 6  # rows of a tile
    registers = 12 if isa.lanes <= 8 else 24  # for sums of weighted values
    tokens = max(1, most // G)  # of one tile
    chunks = -(-G // most)  # of a group of heads, when it is larger than a tile
    if chunks == 1:
        heights = [t * G for t in range(1, tokens + 1)]
    else:
        heights = sorted({G * (c + 1) // chunks - G * c // chunks for c in range(chunks)})
    rows_at_most = heights[-1]
    # A tile of few rows takes several blocks of keys at once, as `linear` takes panels. {rows: blocks}
    groups = {h: CHAINS // (h * VK) for h in heights if CHAINS // (h * VK) > 1}
    few = max(groups, default=0)
    whole, tail = head_dim // L, head_dim % L

    def for_height(here, inline, *where):
        """One unrolled copy of `inline` for each number of rows that a tile can have."""
        for height in heights:
            with T.If(here == height), T.Then():
                inline(*where, height)

    @T.inline
    def scores(Q, K, B, W, query, table, column, head, height, blocks):
        """W[row, column..column + 16 · blocks] = scale · q · keys, of blocks that begin at B[table + column / 16]."""
        acc = T.alloc_buffer((height * blocks * BLOCK,), "float32", scope="local")
        keys = T.alloc_buffer((blocks * BLOCK,), "float32", scope="local")
        base = T.alloc_buffer((blocks,), "int64", scope="local")
        for i in T.unroll(height * blocks * VK):
            acc[at(i * L, L)] = f32(0.0, L)
        for b in T.unroll(blocks):
            block: T.let = T.Cast("int64", B[table + T.truncdiv(column, BLOCK) + b])
            base[b] = (block * kv_heads + head) * T.int64(head_dim * BLOCK)
        for d in T.serial(head_dim):
            for i in T.unroll(blocks * VK):
                keys[at(i * L, L)] = decode(
                    load(K, base[i // VK] + T.Cast("int64", d * BLOCK + i % VK * L), L), kv_dtype, L
                )
            for r in T.unroll(height):
                x: T.let = splat(Q[query + r // G * stride + r % G * head_dim + d], L)
                for i in T.unroll(blocks * VK):
                    acc[at((r * blocks * VK + i) * L, L)] = fma(
                        x, load(keys, i * L, L), acc[at((r * blocks * VK + i) * L, L)]
                    )
        for r in T.unroll(height):
            for i in T.unroll(blocks * VK):
                W[at(r * SEGMENT + column + i * L, L)] = acc[at((r * blocks * VK + i) * L, L)] * f32(scale, L)

    def scores_of(height, widths, *where):
        """`scores` of as many rows as `height` says: one unrolled copy for each of {rows: blocks}."""
        for rows, blocks in widths.items():
            with T.If(height == rows), T.Then():
                scores(*where, rows, blocks)

    @T.inline
    def values(V, B, W, A, Y, table, head, start, result, position, lanes, C, first, height):
        """Y[rows, first..first+C·lanes] = their values, weighted, combined with those of the segments before."""
        acc = T.alloc_buffer((height * C * lanes,), "float32", scope="local")
        of_key = T.alloc_buffer((C * lanes,), "float32", scope="local")
        for i in T.unroll(height * C):
            acc[at(i * lanes, lanes)] = f32(0.0, lanes)
        common: T.let = T.max(0, T.min(SEGMENT, position + 1 - start))
        for b in T.serial(T.truncdiv(common + BLOCK - 1, BLOCK)):
            base: T.let = (T.Cast("int64", B[table + T.truncdiv(start, BLOCK) + b]) * kv_heads + head) * T.int64(
                head_dim * BLOCK
            )
            for j in T.serial(T.min(BLOCK, common - b * BLOCK)):
                for c in T.unroll(C):
                    of_key[at(c * lanes, lanes)] = decode(
                        load(V, base + T.Cast("int64", j * head_dim + first + c * lanes), lanes), kv_dtype, lanes
                    )
                for r in T.unroll(height):
                    weight: T.let = splat(W[r * SEGMENT + b * BLOCK + j], lanes)
                    for c in T.unroll(C):
                        acc[at((r * C + c) * lanes, lanes)] = fma(
                            weight, load(of_key, c * lanes, lanes), acc[at((r * C + c) * lanes, lanes)]
                        )
        # Later tokens of the tile see a few keys more.
        for r in T.unroll(height):
            more: T.let = T.max(0, T.min(SEGMENT, position + r // G + 1 - start))
            for e in T.serial(more - common):
                key: T.let = common + e
                row: T.let = (
                    (T.Cast("int64", B[table + T.truncdiv(start + key, BLOCK)]) * kv_heads + head) * T.int64(BLOCK)
                    + T.Cast("int64", T.truncmod(key, BLOCK))
                ) * T.int64(head_dim)
                for c in T.unroll(C):
                    v: T.let = decode(load(V, row + T.Cast("int64", first + c * lanes), lanes), kv_dtype, lanes)
                    acc[at((r * C + c) * lanes, lanes)] = fma(
                        splat(W[r * SEGMENT + key], lanes), v, acc[at((r * C + c) * lanes, lanes)]
                    )
            if more > 0:
                for c in T.unroll(C):
                    y: T.let = result + r // G * (q_heads * head_dim) + r % G * head_dim + first + c * lanes
                    if start == 0:
                        Y[at(y, lanes)] = acc[at((r * C + c) * lanes, lanes)]
                    else:
                        Y[at(y, lanes)] = fma(
                            acc[at((r * C + c) * lanes, lanes)],
                            splat(A[r * 4 + 3], lanes),
                            load(Y, y, lanes) * splat(A[r * 4 + 2], lanes),
                        )

    @T.inline
    def all_values(V, B, W, A, Y, table, head, start, result, position, height):
        C = T.meta_var(max(1, min(whole, registers // height)))
        for i in T.serial(whole // C):
            values(V, B, W, A, Y, table, head, start, result, position, L, C, i * (C * L), height)
        if whole % C > 0:
            values(V, B, W, A, Y, table, head, start, result, position, L, whole % C, whole // C * C * L, height)
        for i in T.serial(tail):
            values(V, B, W, A, Y, table, head, start, result, position, 1, 1, whole * L + i, height)

    @T.inline
    def weigh(W, A, row, valid, start):
        """W[row] = e^(score - maximum), zero beyond `valid` keys; A[row] = maximum, sum, and the factors of the
        segments before and of this one."""
        lane = T.alloc_buffer((L,), "float32", scope="local")
        lane[at(0, L)] = f32(_LOWEST, L)
        for j in T.serial(T.truncdiv(valid + L - 1, L)):
            s: T.let = T.Select(at(j * L, L) < splat(valid, L), load(W, row * SEGMENT + j * L, L), f32(_LOWEST, L))
            lane[at(0, L)] = T.Select(s > load(lane, 0, L), s, load(lane, 0, L))
        peak: T.let = tree_max([lane[i] for i in range(L)])
        lane[at(0, L)] = f32(0.0, L)
        for j in T.serial(T.truncdiv(valid + L - 1, L)):
            e: T.let = exp(load(W, row * SEGMENT + j * L, L) - splat(peak, L))
            kept: T.let = T.Select(at(j * L, L) < splat(valid, L), e, f32(0.0, L))
            W[at(row * SEGMENT + j * L, L)] = kept
            lane[at(0, L)] = load(lane, 0, L) + kept
        total: T.let = tree_sum([lane[i] for i in range(L)])
        if start == 0:
            A[row * 4] = peak
            A[row * 4 + 1] = total
        else:
            top: T.let = T.Select(peak > A[row * 4], peak, A[row * 4])
            A[row * 4 + 2] = exp(A[row * 4] - top)
            A[row * 4 + 3] = exp(peak - top)
            A[row * 4] = top
            A[row * 4 + 1] = fma(A[row * 4 + 3], total, A[row * 4 + 1] * A[row * 4 + 2])

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        q: T.handle("float32"),
        key: T.handle(storage),
        value: T.handle(storage),
        positions: T.handle("int32"),
        query_start: T.handle("int32"),
        block_tables: T.handle("int32"),
        out: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        Q = T.decl_buffer((1,), "float32", data=q)
        K = T.decl_buffer((1,), storage, data=key)
        V = T.decl_buffer((1,), storage, data=value)
        P = T.decl_buffer((1,), "int32", data=positions)
        N = T.decl_buffer((1,), "int32", data=query_start)
        B = T.decl_buffer((1,), "int32", data=block_tables)
        Y = T.decl_buffer((1,), "float32", data=out)
        W = T.alloc_buffer((rows_at_most * SEGMENT,), "float32", scope="local")
        A = T.alloc_buffer((rows_at_most * 4,), "float32", scope="local")
        before = T.alloc_buffer((1,), "int32", scope="local")
        before[0] = 0
        for s in T.serial(D[1]):
            many: T.let = N[s + 1] - N[s]
            units: T.let = T.truncdiv(many + tokens - 1, tokens) * (kv_heads * chunks)
            table: T.let = s * D[2]
            # Tasks take turns: later tokens have more keys, so consecutive shares would not be equal.
            offset: T.let = T.floormod(task - before[0], tasks)
            for u in T.serial(T.truncdiv(units - offset + tasks - 1, tasks)):
                unit: T.let = offset + u * tasks
                t: T.let = T.truncdiv(unit, kv_heads * chunks) * tokens
                head: T.let = T.truncdiv(T.truncmod(unit, kv_heads * chunks), chunks)
                chunk: T.let = T.truncmod(unit, chunks)
                low: T.let = share(chunk, chunks, G)
                height: T.let = T.min(tokens, many - t) * (share(chunk + 1, chunks, G) - low)
                first: T.let = N[s] + t
                position: T.let = P[first]
                query: T.let = first * stride + (head * G + low) * head_dim
                result: T.let = (first * q_heads + head * G + low) * head_dim
                last: T.let = position + T.min(tokens, many - t) - 1
                for g in T.serial(T.truncdiv(last, SEGMENT) + 1):
                    start: T.let = g * SEGMENT
                    first_block: T.let = table + g * (SEGMENT // BLOCK)
                    blocks: T.let = T.min(SEGMENT // BLOCK, T.truncdiv(last - start, BLOCK) + 1)
                    wide: T.let = T.truncdiv(CHAINS // VK, height)
                    grouped: T.let = T.Select(height <= few, T.truncdiv(blocks, T.max(wide, 1)), 0)
                    for b in T.serial(grouped):
                        scores_of(height, groups, Q, K, B, W, query, first_block, b * wide * BLOCK, head)
                    for b in T.serial(blocks - grouped * wide):
                        column: T.let = (grouped * wide + b) * BLOCK
                        scores_of(height, dict.fromkeys(heights, 1), Q, K, B, W, query, first_block, column, head)
                    for r in T.serial(height):
                        valid: T.let = T.min(SEGMENT, position + T.truncdiv(r, G) + 1 - start)
                        if valid > 0:
                            weigh(W, A, r, valid, start)
                    for_height(height, all_values, V, B, W, A, Y, table, head, start, result, position)
                for r in T.serial(height):
                    y: T.let = result + T.truncdiv(r, G) * (q_heads * head_dim) + T.truncmod(r, G) * head_dim
                    for c in T.serial(whole):
                        Y[at(y + c * L, L)] = load(Y, y + c * L, L) / splat(A[r * 4 + 1], L)
                    for c in T.serial(tail):
                        Y[y + whole * L + c] = Y[y + whole * L + c] / A[r * 4 + 1]
            before[0] = T.truncmod(before[0] + units, tasks)

    return specialised(kernel, symbol, {})
