"""Routing: which experts each token goes to, and with which weights (`ir.ops.routing.Routing`)."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.math import activate, exp
from llmc.backends.tvm.kernels.rows import LOWEST, ordered
from llmc.backends.tvm.kernels.vector import at, f32, i32, load, share, specialised, splat, tree_max, tree_sum
from llmc.ir.ops.routing import GROUP_SCORES, TINY

_MOST = 2**31 - 1
_FLOOR = -3.0e38
_NOT_ALLOWED = -0x7F800000
"""The order of minus infinity (`rows.ordered`)."""


def routing(
    symbol,
    isa,
    *,
    rows_dim,
    experts,
    k,
    scoring,
    normalise,
    scale,
    groups=1,
    top_groups=1,
    group_score="max",
    bias=False,
):
    """logits f32 [rows, experts], [bias f32 [experts]], weights f32 [rows, experts]: `ir.ops.routing.Routing`."""
    L = isa.lanes
    vectors = -(-experts // L)
    size = experts // groups
    best_of = GROUP_SCORES[group_score]
    # Softmax keeps the order of logits, which rounding may not: where nothing is added, the choice is by these.
    by_logits = scoring == "softmax" and not bias and best_of == 1

    @T.inline
    def pick(K, first, count, most):
        """Takes the `most` greatest of K[first..first + count], the first of equal ones: their order becomes LOWEST."""
        top = T.alloc_buffer((2,), "int32", scope="local")
        for _ in T.serial(most):
            top[0] = LOWEST
            top[1] = first
            for e in T.serial(count):
                if K[first + e] > top[0]:
                    top[0] = K[first + e]
                    top[1] = first + e
            K[top[1]] = LOWEST

    @T.inline
    def softmax(P):
        """P[0..vectors · L] = e^(x - largest) over their sum; what is beyond the experts is `_FLOOR`."""
        lane = T.alloc_buffer((L,), "float32", scope="local")
        lane[at(0, L)] = f32(_FLOOR, L)
        for v in T.serial(vectors):
            x: T.let = load(P, v * L, L)
            lane[at(0, L)] = T.Select(x > load(lane, 0, L), x, load(lane, 0, L))
        peak: T.let = tree_max([lane[i] for i in range(L)])
        lane[at(0, L)] = f32(0.0, L)
        for v in T.serial(vectors):
            P[at(v * L, L)] = exp(load(P, v * L, L) - splat(peak, L))
            lane[at(0, L)] = load(lane, 0, L) + load(P, v * L, L)
        total: T.let = tree_sum([lane[i] for i in range(L)])
        for v in T.serial(vectors):
            P[at(v * L, L)] = load(P, v * L, L) / splat(T.Select(total == f32(0.0), f32(1.0), total), L)

    @T.inline
    def keep_best_groups(P, B, K):
        """The order of experts outside the best groups becomes that of minus infinity."""
        inner = T.alloc_buffer((size,), "int32", scope="local")
        strength = T.alloc_buffer((groups,), "int32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        for g in T.serial(groups):
            for e in T.serial(size):
                inner[e] = K[g * size + e]
            pick(inner, 0, size, best_of)
            total[0] = f32(0.0)
            for e in T.serial(size):
                if inner[e] == LOWEST:
                    total[0] = total[0] + (P[g * size + e] + B[g * size + e] if bias else P[g * size + e])
            strength[g] = _order(total[0])
        pick(strength, 0, groups, top_groups)
        for g in T.serial(groups):
            if strength[g] != LOWEST:
                for e in T.serial(size):
                    K[g * size + e] = _NOT_ALLOWED

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        logits: T.handle("float32"),
        b: T.handle("float32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=logits)
        B = T.decl_buffer((1,), "float32", data=b)
        Y = T.decl_buffer((1,), "float32", data=y)
        P = T.alloc_buffer((vectors * L,), "float32", scope="local")
        K = T.alloc_buffer((experts,), "int32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        first: T.let = share(task, tasks, D[rows_dim])
        for i in T.serial(share(task + 1, tasks, D[rows_dim]) - first):
            row: T.let = (first + i) * experts
            for e in T.serial(vectors * L):
                P[e] = T.if_then_else(e < experts, X[row + e], f32(_FLOOR))
            if by_logits:
                for e in T.serial(experts):
                    K[e] = _order(P[e])
            if scoring == "softmax":
                softmax(P)
            else:
                for v in T.serial(vectors):
                    P[at(v * L, L)] = activate("sigmoid", load(P, v * L, L))
            if not by_logits:
                for e in T.serial(experts):
                    K[e] = _order(P[e] + B[e] if bias else P[e])
            if groups > 1:
                keep_best_groups(P, B, K)
            pick(K, 0, experts, k)
            total[0] = f32(0.0)
            for e in T.serial(experts):
                if K[e] == LOWEST:
                    total[0] = total[0] + P[e]
            for e in T.serial(experts):
                weight = T.meta_var(P[e] / (total[0] + f32(TINY)) if normalise else P[e])
                Y[row + e] = T.Select(K[e] == LOWEST, weight if scale == 1.0 else weight * f32(scale), f32(0.0))

    return specialised(kernel, symbol, {"b": bias})


def _order(x):
    """`rows.ordered`, but NaN above all: it is chosen, and so not lost."""
    place = ordered(x, 1)
    return T.Select(place == i32(LOWEST), i32(_MOST), place)
