"""Rows of an embedding table."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.tiles import GROUP
from llmc.backends.tvm.kernels.vector import STORAGE, at, decode, i32, load, share, specialised, splat, wide
from llmc.backends.tvm.packing import PANEL


def embedding(symbol, isa, *, vocab, hidden, weight_dtype):
    """ids i32 [tokens], table [vocab, hidden], out f32 [tokens, hidden]. An id outside the table takes its nearest row:
    no memory is read that is not the table's."""
    L = isa.lanes
    storage = STORAGE[weight_dtype]

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        ids: T.handle("int32"),
        table: T.handle(storage),
        out: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        N = T.decl_buffer((1,), "int32", data=ids)
        W = T.decl_buffer((1,), storage, data=table)
        Y = T.decl_buffer((1,), "float32", data=out)
        first: T.let = share(task, tasks, D[0])
        for i in T.serial(share(task + 1, tasks, D[0]) - first):
            t: T.let = first + i
            row: T.let = T.Cast("int64", T.max(0, T.min(vocab - 1, N[t]))) * T.int64(hidden)
            for c in T.serial(hidden // L):
                Y[at(t * hidden + c * L, L)] = decode(load(W, row + T.Cast("int64", c * L), L), weight_dtype, L)
            for c in T.serial(hidden % L):
                Y[t * hidden + hidden // L * L + c] = decode(
                    load(W, row + T.Cast("int64", hidden // L * L + c)), weight_dtype
                )

    return specialised(kernel, symbol, {})


def packed_embedding(symbol, isa, *, vocab, hidden, weight_dtype):
    """ids i32 [tokens], table packed [ceil(vocab / 16), hidden, 16] (`packing.pack`), out f32 [tokens, hidden]: for a
    table that is also a linear layer's weight. Ids as in `embedding`."""
    storage = STORAGE[weight_dtype]

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        ids: T.handle("int32"),
        table: T.handle(storage),
        out: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        N = T.decl_buffer((1,), "int32", data=ids)
        W = T.decl_buffer((1,), storage, data=table)
        Y = T.decl_buffer((1,), "float32", data=out)
        first: T.let = share(task, tasks, D[0])
        for i in T.serial(share(task + 1, tasks, D[0]) - first):
            t: T.let = first + i
            id: T.let = T.max(0, T.min(vocab - 1, N[t]))
            start: T.let = T.Cast("int64", T.truncdiv(id, PANEL)) * T.int64(hidden * PANEL) + T.Cast(
                "int64", T.truncmod(id, PANEL)
            )
            for c in T.serial(hidden):
                Y[t * hidden + c] = decode(load(W, start + T.Cast("int64", c * PANEL)), weight_dtype)

    return specialised(kernel, symbol, {})


def quantized_embedding(symbol, isa, *, vocab, hidden, bits):
    """ids i32 [tokens], codes in panels (`packing.pack_codes`; here i32 words, of four codes at one place of each
    byte), scales f16 [panels, groups, 16], out f32 [tokens, hidden]: rows of a quantized table, which is at most a
    linear layer's weight too. Ids as in `embedding`."""
    groups = -(-hidden // GROUP)
    per_byte = 8 // bits
    stored = GROUP // 4 // per_byte

    def four(word, half, scale, lanes, first):
        """`lanes` of the four codes of a word, from the first one wanted on, times the group's scale."""
        places = first * 8 + half * bits
        shifts = T.ramp(places, 8, lanes) if lanes > 1 else places
        codes = T.bitwise_and(T.shift_right(splat(word, lanes), shifts), i32((1 << bits) - 1, lanes))
        values = T.Cast(wide("float32", lanes), codes - i32(1 << (bits - 1), lanes))
        return values * splat(scale, lanes)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        ids: T.handle("int32"),
        codes: T.handle("int32"),
        scales: T.handle("float16"),
        out: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        N = T.decl_buffer((1,), "int32", data=ids)
        C = T.decl_buffer((1,), "int32", data=codes)
        S = T.decl_buffer((1,), "float16", data=scales)
        Y = T.decl_buffer((1,), "float32", data=out)
        first: T.let = share(task, tasks, D[0])
        for i in T.serial(share(task + 1, tasks, D[0]) - first):
            t: T.let = first + i
            id: T.let = T.max(0, T.min(vocab - 1, N[t]))
            lane: T.let = T.Cast("int64", T.truncmod(id, PANEL))
            for g in T.serial(groups):
                group: T.let = T.Cast("int64", T.truncdiv(id, PANEL)) * T.int64(groups) + T.Cast("int64", g)
                scale: T.let = T.Cast("float32", S[group * T.int64(PANEL) + lane])
                for j in T.serial(stored):
                    word: T.let = C[(group * T.int64(stored) + T.Cast("int64", j)) * T.int64(PANEL) + lane]
                    for h in T.unroll(per_byte):
                        column: T.let = g * GROUP + (j * per_byte + h) * 4
                        if column + 4 <= hidden:
                            Y[at(t * hidden + column, 4)] = four(word, h, scale, 4, 0)
                        else:
                            for c in T.serial(hidden - column):
                                Y[t * hidden + column + c] = four(word, h, scale, 1, c)

    return specialised(kernel, symbol, {})
