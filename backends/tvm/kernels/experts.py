"""A mixture of experts around its products: rows put beside each other by expert, and the weighted sum.

A token has `per_token` places; its chosen experts, those whose weights are not zero, have the first of them in the
order of experts. Rows are grouped by expert, and by token within an expert: starts[e] to starts[e + 1] are those of
expert e, places say where a token's rows are.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from llmc.backends.tvm.kernels.math import magnitude_bits
from llmc.backends.tvm.kernels.tiles import GROUP
from llmc.backends.tvm.kernels.vector import at, f32, fma, load, share, specialised, splat

COMBINE_COLUMNS = 256
"""Columns that one unit of a weighted sum covers."""


def _chosen(weight):
    """Whether a weight is not zero; NaN is not."""
    return magnitude_bits(weight) != tirx.IntImm("int32", 0)


@T.inline
def _group(W, E, P, H, task, tasks, tokens, experts, per_token, copy, where):
    """Starts into E, places into P, shares into H; copy(*where, tokens, token, place) for each row of the task.

    Every task counts all weights, which are few beside rows; the first writes starts. Weights of a token beyond
    `per_token` that are not zero would have no place: they are left out.
    """
    following = T.alloc_buffer((experts + 1,), "int32", scope="local")
    used = T.alloc_buffer((1,), "int32", scope="local")
    for e in T.serial(experts + 1):
        following[e] = 0
    for t in T.serial(tokens):
        used[0] = 0
        for e in T.serial(experts):
            if T.And(_chosen(W[t * experts + e]), used[0] < per_token):
                following[e + 1] = following[e + 1] + 1
                used[0] = used[0] + 1
    for e in T.serial(experts):
        following[e + 1] = following[e + 1] + following[e]
    if task == 0:
        for e in T.serial(experts + 1):
            E[e] = following[e]
    first: T.let = share(task, tasks, following[experts])
    end: T.let = share(task + 1, tasks, following[experts])
    mine: T.let = share(task, tasks, tokens)
    others: T.let = share(task + 1, tasks, tokens)
    for t in T.serial(tokens):
        used[0] = 0
        for e in T.serial(experts):
            if T.And(_chosen(W[t * experts + e]), used[0] < per_token):
                place: T.let = following[e]
                following[e] = place + 1
                if T.And(place >= first, place < end):
                    copy(*where, tokens, t, place)
                if T.And(t >= mine, t < others):
                    P[t * per_token + used[0]] = place
                    H[t * per_token + used[0]] = W[t * experts + e]
                used[0] = used[0] + 1
        if T.And(t >= mine, t < others):
            for j in T.serial(per_token - used[0]):
                P[t * per_token + used[0] + j] = -1
                H[t * per_token + used[0] + j] = f32(0.0)


def group_rows(symbol, isa, *, rows_dim, experts, per_token, width):
    """x f32 [tokens, width], weights f32 [tokens, experts]; rows f32 [tokens · per_token, width], starts i32 [experts +
    1], places i32 [tokens, per_token] (-1 where none is chosen), shares f32 [tokens, per_token]: a place's weight.
    Rows from starts[experts] on are not written."""
    L = isa.lanes

    @T.inline
    def copy(X, Y, tokens, token, place):
        for c in T.serial(width // L):
            Y[at(place * width + c * L, L)] = load(X, token * width + c * L, L)
        for c in T.serial(width % L):
            Y[place * width + width // L * L + c] = X[token * width + width // L * L + c]

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        weights: T.handle("float32"),
        rows: T.handle("float32"),
        starts: T.handle("int32"),
        places: T.handle("int32"),
        shares: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        W = T.decl_buffer((1,), "float32", data=weights)
        Y = T.decl_buffer((1,), "float32", data=rows)
        E = T.decl_buffer((1,), "int32", data=starts)
        P = T.decl_buffer((1,), "int32", data=places)
        H = T.decl_buffer((1,), "float32", data=shares)
        where = T.meta_var((X, Y))
        _group(W, E, P, H, task, tasks, D[rows_dim], experts, per_token, copy, where)

    return specialised(kernel, symbol, {})


def group_tiles(symbol, isa, *, rows_dim, experts, per_token, width):
    """The same of activations in tiles (`kernels.tiles`): codes i8 [groups, tokens, 32], scales f32 and offsets i32
    [groups, tokens], weights; these three for tokens · per_token rows, starts, places, shares."""
    words = GROUP // 4
    groups = -(-width // GROUP)
    vector = min(isa.lanes, words)

    @T.inline
    def copy(C, S, F, YC, YS, YO, tokens, token, place):
        for g in T.serial(groups):
            source: T.let = g * tokens + token
            to: T.let = g * (tokens * per_token) + place
            for i in T.serial(words // vector):
                YC[at(to * words + i * vector, vector)] = load(C, source * words + i * vector, vector)
            YS[to] = S[source]
            YO[to] = F[source]

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        codes: T.handle("int32"),
        scales: T.handle("float32"),
        offsets: T.handle("int32"),
        weights: T.handle("float32"),
        yc: T.handle("int32"),
        ys: T.handle("float32"),
        yo: T.handle("int32"),
        starts: T.handle("int32"),
        places: T.handle("int32"),
        shares: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        C = T.decl_buffer((1,), "int32", data=codes)
        S = T.decl_buffer((1,), "float32", data=scales)
        F = T.decl_buffer((1,), "int32", data=offsets)
        W = T.decl_buffer((1,), "float32", data=weights)
        YC = T.decl_buffer((1,), "int32", data=yc)
        YS = T.decl_buffer((1,), "float32", data=ys)
        YO = T.decl_buffer((1,), "int32", data=yo)
        E = T.decl_buffer((1,), "int32", data=starts)
        P = T.decl_buffer((1,), "int32", data=places)
        H = T.decl_buffer((1,), "float32", data=shares)
        where = T.meta_var((C, S, F, YC, YS, YO))
        _group(W, E, P, H, task, tasks, D[rows_dim], experts, per_token, copy, where)

    return specialised(kernel, symbol, {})


def combine_experts(symbol, isa, *, rows_dim, per_token, width):
    """rows f32 [tokens · per_token, width], places i32 and shares f32 [tokens, per_token], y f32 [tokens, width]: the
    sum of a token's rows times their shares, one fused multiply-add after another in the order of experts."""
    L = isa.lanes
    blocks = -(-width // COMBINE_COLUMNS)

    @T.inline
    def combine(X, P, H, Y, token, column, lanes):
        acc = T.alloc_buffer((lanes,), "float32", scope="local")
        acc[at(0, lanes)] = f32(0.0, lanes)
        for j in T.serial(per_token):
            place: T.let = P[token * per_token + j]
            if place >= 0:
                acc[at(0, lanes)] = fma(
                    splat(H[token * per_token + j], lanes), load(X, place * width + column, lanes), load(acc, 0, lanes)
                )
        Y[at(token * width + column, lanes)] = load(acc, 0, lanes)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        places: T.handle("int32"),
        shares: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        P = T.decl_buffer((1,), "int32", data=places)
        H = T.decl_buffer((1,), "float32", data=shares)
        Y = T.decl_buffer((1,), "float32", data=y)
        begin: T.let = share(task, tasks, D[rows_dim] * blocks)
        for u in T.serial(share(task + 1, tasks, D[rows_dim] * blocks) - begin):
            token: T.let = T.truncdiv(begin + u, blocks)
            low: T.let = T.truncmod(begin + u, blocks) * COMBINE_COLUMNS
            columns: T.let = T.min(COMBINE_COLUMNS, width - low)
            for c in T.serial(T.truncdiv(columns, L)):
                combine(X, P, H, Y, token, low + c * L, L)
            for c in T.serial(T.truncmod(columns, L)):
                combine(X, P, H, Y, token, low + T.truncdiv(columns, L) * L + c, 1)

    return specialised(kernel, symbol, {})
