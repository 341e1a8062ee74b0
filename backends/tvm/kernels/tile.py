"""The products of attention, for a tile of rows in registers: queries with keys, weights with values."""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.cache import BLOCK
from llmc.backends.tvm.kernels.vector import BYTES, LINE, at, decode, f32, fma, load, prefetch, splat
from llmc.backends.tvm.splits import SEGMENT

COLUMNS = SEGMENT + BLOCK
"""The distance of two rows of scores: not a power of two, whose rows would meet in few sets of the cache."""


def rows_at_most(isa):
    """Rows of one tile: with two vectors a row, as many sums as registers hold beside the operands."""
    return 12 if isa.lanes == 16 else 6


def tile(isa, *, group, kv_heads, head_dim, value_dim, scale, kv_dtype, ahead, window):
    """`scores` and `values` of the rows low..low + rows of a unit (see `segment`).

    With a `window` blocks and values before a token's window are not read, whatever their tables say.

    `ahead`: what they read is not in a cache. Then values are asked for while scores are computed, and the keys of the
    next segment while values are: blocks lie anywhere, and the processor follows no such path by itself.
    """
    L, VK = isa.lanes, BLOCK // isa.lanes
    registers = 32 if isa.lanes == 16 else 16
    whole, tail = value_dim // L, value_dim % L
    scaled = kv_dtype == "i8"
    windowed = window > 0
    line = LINE // BYTES[kv_dtype]
    steps = line // BLOCK if ahead and line >= BLOCK and head_dim % (line // BLOCK) == 0 else 1

    def blocks_at_once(rows):
        """A power of two: with its keys, a broadcast and the sums of all rows it fits into the registers."""
        width = 1
        while (rows + 1) * 2 * width * VK < registers:
            width *= 2
        return width

    def scaled_scores(sums, KS, place):
        scores_ = sums * f32(scale, L)
        return scores_ * load(KS, place, L) if scaled else scores_

    def first_key(position, start):
        """The first key of a segment in the window of a token."""
        return T.max(0, T.min(SEGMENT, position - (window - 1) - start)) if windowed else 0

    def present(block, first, end):
        """The nearest of the blocks from `first` to `end`."""
        return T.max(first, T.min(block, end - 1)) if windowed else T.min(block, end - 1)

    @T.inline
    def scores(Q, K, V, KS, VS, B, W, table, first_block, blocks, head, low, rows):
        """W = scale · q · keys of the blocks from `first_block` to `blocks` of those whose ids begin at B[table].
        Several are taken at once; where none is there the nearest is taken again."""
        N = T.meta_var(blocks_at_once(rows))
        acc = T.alloc_buffer((rows * N * BLOCK,), "float32", scope="local")
        keys = T.alloc_buffer((N * BLOCK,), "float32", scope="local")
        unit = T.alloc_buffer((N,), "int64", scope="local")
        base = T.alloc_buffer((N,), "int64", scope="local")
        skipped: T.let = T.truncdiv(first_block, N) if windowed else 0
        for n_ in T.serial(T.truncdiv(blocks + N - 1, N) - skipped):
            n: T.let = skipped + n_
            for i in T.unroll(rows * N * VK):
                acc[at(i * L, L)] = f32(0.0, L)
            for b in T.unroll(N):
                block: T.let = T.Cast("int64", B[table + present(n * N + b, first_block, blocks)])
                unit[b] = (block * kv_heads + head) * T.int64(BLOCK)
                base[b] = unit[b] * T.int64(head_dim)
                if scaled and ahead:
                    prefetch(VS, unit[b])
            for whole_line in T.serial(head_dim // steps):
                if ahead:
                    for b in T.unroll(N):
                        values_at = T.meta_var(base[b] if value_dim == head_dim else unit[b] * T.int64(value_dim))
                        prefetch(V, values_at + T.Cast("int64", whole_line * (steps * BLOCK)))
                for step in T.unroll(steps):
                    d: T.let = whole_line * steps + step
                    for i in T.unroll(N * VK):
                        keys[at(i * L, L)] = decode(
                            load(K, base[i // VK] + T.Cast("int64", d * BLOCK + i % VK * L), L), kv_dtype, L
                        )
                    for r in T.unroll(rows):
                        x: T.let = splat(Q[(low + r) * head_dim + d], L)
                        for i in T.unroll(N * VK):
                            acc[at((r * N * VK + i) * L, L)] = fma(
                                x, load(keys, i * L, L), acc[at((r * N * VK + i) * L, L)]
                            )
            for r in T.unroll(rows):
                for i in T.unroll(N * VK):
                    W[at((low + r) * COLUMNS + n * N * BLOCK + i * L, L)] = scaled_scores(
                        acc[at((r * N * VK + i) * L, L)], KS, unit[i // VK] + T.int64(i % VK * L)
                    )

    @T.inline
    def add_value(V, B, W, acc, table, head, key, low, r, first, lanes, C):
        """Adds C columns of one key's weighted value to the sums of row r."""
        row: T.let = (
            (T.Cast("int64", B[table + T.truncdiv(key, BLOCK)]) * kv_heads + head) * T.int64(BLOCK)
            + T.Cast("int64", T.truncmod(key, BLOCK))
        ) * T.int64(value_dim)
        for c in T.unroll(C):
            v: T.let = decode(load(V, row + T.Cast("int64", first + c * lanes), lanes), kv_dtype, lanes)
            acc[at((r * C + c) * lanes, lanes)] = fma(
                splat(W[(low + r) * COLUMNS + key], lanes), v, acc[at((r * C + c) * lanes, lanes)]
            )

    @T.inline
    def column_values(
        K, V, KS, B, W, Y, A, stride, table, head, start, position, fresh, next_, here, low, lanes, C, first, rows
    ):
        acc = T.alloc_buffer((rows * C * lanes,), "float32", scope="local")
        of_key = T.alloc_buffer((C * lanes,), "float32", scope="local")
        following = T.alloc_buffer((1,), "int64", scope="local")
        for i in T.unroll(rows * C):
            acc[at(i * lanes, lanes)] = f32(0.0, lanes)
        common: T.let = T.max(0, T.min(SEGMENT, position + T.truncdiv(low, group) + 1 - start))
        begin: T.let = first_key(position + (low + rows - 1) // group, start)
        if windowed:
            # Earlier tokens of the tile see a few keys before those that all see.
            for r in T.unroll(rows):
                own: T.let = first_key(position + (low + r) // group, start)
                end: T.let = T.min(begin, T.max(0, T.min(SEGMENT, position + (low + r) // group + 1 - start)))
                if low + r < here:
                    for e in T.serial(end - own):
                        add_value(V, B, W, acc, table, head, own + e, low, r, first, lanes, C)
        skipped: T.let = T.truncdiv(begin, BLOCK) if windowed else 0
        for b_ in T.serial(T.max(0, T.truncdiv(common + BLOCK - 1, BLOCK) - skipped)):
            b: T.let = skipped + b_
            base: T.let = (T.Cast("int64", B[table + b]) * kv_heads + head) * T.int64(value_dim * BLOCK)
            if ahead:
                block: T.let = T.Cast("int64", B[next_[0] + T.min(b, next_[1] - 1)])
                following[0] = (block * kv_heads + next_[2]) * T.int64(head_dim * BLOCK)
                if scaled:
                    prefetch(KS, (block * kv_heads + next_[2]) * T.int64(BLOCK))
            inside: T.let = T.max(0, begin - b * BLOCK) if windowed else 0
            for j_ in T.serial(T.max(0, T.min(BLOCK, common - b * BLOCK) - inside)):
                j: T.let = inside + j_
                for c in T.unroll(C):
                    of_key[at(c * lanes, lanes)] = decode(
                        load(V, base + T.Cast("int64", j * value_dim + first + c * lanes), lanes), kv_dtype, lanes
                    )
                if ahead:
                    for c in T.unroll(-(-C * lanes // line)):
                        prefetch(K, following[0] + T.Cast("int64", j * head_dim + first + c * line))
                for r in T.unroll(rows):
                    weight: T.let = splat(W[(low + r) * COLUMNS + b * BLOCK + j], lanes)
                    for c in T.unroll(C):
                        acc[at((r * C + c) * lanes, lanes)] = fma(
                            weight, load(of_key, c * lanes, lanes), acc[at((r * C + c) * lanes, lanes)]
                        )
        for r in T.unroll(rows):
            # Later tokens of the tile see a few keys more.
            more: T.let = T.max(0, T.min(SEGMENT, position + T.truncdiv(low + r, group) + 1 - start))
            if T.And(low + r < here, more > 0):
                after: T.let = T.max(common, begin) if windowed else common
                for e in T.serial(more - after):
                    add_value(V, B, W, acc, table, head, after + e, low, r, first, lanes, C)
                for c in T.unroll(C):
                    y: T.let = (low + r) * value_dim + first + c * lanes
                    if fresh:
                        Y[at(y, lanes)] = acc[at((r * C + c) * lanes, lanes)]
                    else:
                        Y[at(y, lanes)] = fma(
                            acc[at((r * C + c) * lanes, lanes)],
                            splat(A[3 * stride + low + r], lanes),
                            load(Y, y, lanes) * splat(A[2 * stride + low + r], lanes),
                        )

    @T.inline
    def values(K, V, KS, B, W, Y, A, stride, table, head, start, position, fresh, next_, here, low, rows):
        """Folds the segment's weighted values into Y, by the factors in A [6, stride]. `start` is its first key's
        position, B[table] its first block; the unit has `here` rows. What will be read next are the keys of next_[1]
        blocks, from B[next_[0]] on, for head next_[2]."""
        C = T.meta_var(_columns(whole, (registers - 1) // (rows + 1)))
        for i in T.serial(whole // C):
            columns = T.meta_var((L, C, i * (C * L)))
            column_values(
                K, V, KS, B, W, Y, A, stride, table, head, start, position, fresh, next_, here, low, *columns, rows
            )
        if whole % C > 0:
            columns = T.meta_var((L, whole % C, whole // C * C * L))
            column_values(
                K, V, KS, B, W, Y, A, stride, table, head, start, position, fresh, next_, here, low, *columns, rows
            )
        for i in T.serial(tail):
            columns = T.meta_var((1, 1, whole * L + i))
            column_values(
                K, V, KS, B, W, Y, A, stride, table, head, start, position, fresh, next_, here, low, *columns, rows
            )

    return SimpleNamespace(scores=scores, values=values, first_key=first_key)


def _columns(whole, most):
    """Vectors of a head that are summed at once: `most` or fewer, in as equal parts as can be."""
    parts = -(-whole // max(1, most))
    return max(1, -(-whole // max(1, parts)))
