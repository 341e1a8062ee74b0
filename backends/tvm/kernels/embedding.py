"""Rows of an embedding table."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import STORAGE, at, decode, load, share, specialised
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
