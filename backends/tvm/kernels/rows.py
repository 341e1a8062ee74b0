"""Kernels that choose: rows of activations, and the largest logit of a row."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import at, i32, load, share, specialised, splat, wide

LOWEST = -(2**31)


def ordered(value, lanes):
    """Integers in the order of the floats, with -0 equal to 0 and NaN (`LOWEST`) below all: exact, whatever the
    compiler takes floats' comparisons to mean."""
    bits = T.reinterpret(wide("int32", lanes), value)
    magnitude = T.bitwise_and(bits, i32(0x7FFFFFFF, lanes))
    signed = T.Select(bits < i32(0, lanes), i32(0, lanes) - magnitude, magnitude)
    return T.Select(magnitude > i32(0x7F800000, lanes), i32(LOWEST, lanes), signed)


def gather_rows(symbol, isa, *, width):
    """x f32 [tokens, width], logit_rows i32 [outputs], y f32 [outputs, width]."""
    L = isa.lanes

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        x: T.handle("float32"),
        chosen: T.handle("int32"),
        y: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=x)
        C = T.decl_buffer((1,), "int32", data=chosen)
        Y = T.decl_buffer((1,), "float32", data=y)
        first: T.let = share(task, tasks, D[3])
        for i in T.serial(share(task + 1, tasks, D[3]) - first):
            to: T.let = (first + i) * width
            source: T.let = C[first + i] * width
            for c in T.serial(width // L):
                Y[at(to + c * L, L)] = load(X, source + c * L, L)
            for c in T.serial(width % L):
                Y[to + width // L * L + c] = X[source + width // L * L + c]

    return specialised(kernel, symbol, {})


def argmax(symbol, isa, *, n):
    """logits f32 [outputs, n], greedy i32 [outputs]: the first of the largest. NaN never wins; of only NaN, 0 does."""
    L = isa.lanes

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32, tasks: T.int32, dims: T.handle("int32"), logits: T.handle("float32"), greedy: T.handle("int32")
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=logits)
        G = T.decl_buffer((1,), "int32", data=greedy)
        best = T.alloc_buffer((L,), "int32", scope="local")
        where = T.alloc_buffer((L,), "int32", scope="local")
        first: T.let = share(task, tasks, D[3])
        for i in T.serial(share(task + 1, tasks, D[3]) - first):
            row: T.let = (first + i) * n
            best[at(0, L)] = i32(LOWEST, L)
            where[at(0, L)] = i32(0, L)
            for c in T.serial(n // L):
                k: T.let = ordered(load(X, row + c * L, L), L)
                where[at(0, L)] = T.Select(k > load(best, 0, L), at(c * L, L), load(where, 0, L))
                best[at(0, L)] = T.Select(k > load(best, 0, L), k, load(best, 0, L))
            for lane in T.serial(1, L):
                if best[lane] > best[0] or (best[lane] == best[0] and where[lane] < where[0]):
                    best[0] = best[lane]
                    where[0] = where[lane]
            for c in T.serial(n % L):
                k: T.let = ordered(X[row + n // L * L + c], 1)
                if k > best[0]:
                    best[0] = k
                    where[0] = n // L * L + c
            G[first + i] = where[0]

    return specialised(kernel, symbol, {})


def best_of_panels(symbol, isa, *, panels):
    """keys i64 [outputs, panels] (see `kernels.quantized`), greedy i32 [outputs]: the column of the largest key."""
    lanes = isa.lanes // 2

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32, tasks: T.int32, dims: T.handle("int32"), keys: T.handle("int64"), greedy: T.handle("int32")
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        K = T.decl_buffer((1,), "int64", data=keys)
        G = T.decl_buffer((1,), "int32", data=greedy)
        best = T.alloc_buffer((lanes,), "int64", scope="local")
        first: T.let = share(task, tasks, D[3])
        for i in T.serial(share(task + 1, tasks, D[3]) - first):
            row: T.let = (first + i) * panels
            best[at(0, lanes)] = splat(T.int64(-(2**63)), lanes)
            for c in T.serial(panels // lanes):
                best[at(0, lanes)] = T.max(load(best, 0, lanes), load(K, row + c * lanes, lanes))
            for c in T.serial(1, lanes):
                best[0] = T.max(best[0], best[c])
            for c in T.serial(panels % lanes):
                best[0] = T.max(best[0], K[row + panels // lanes * lanes + c])
            G[first + i] = T.int32(0x7FFFFFFF) - T.Cast("int32", T.bitwise_and(best[0], T.int64(0x7FFFFFFF)))

    return specialised(kernel, symbol, {})
