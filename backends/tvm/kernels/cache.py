"""Writing keys and values into the paged state, with or without a rotary embedding of queries and keys.

State of one layer: key [blocks, kv_heads, head_dim, 16] (a lane is a key), value [blocks, kv_heads, 16, head_dim].
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import STORAGE, at, encode, f32, fma, lanes_of, load, share, specialised

BLOCK = 16


def rope_append(symbol, isa, *, q_heads, kv_heads, head_dim, rot_dim, layout, kv_dtype):
    """qkv f32 [tokens, (q_heads + 2 kv_heads) · head_dim], cos and sin f32 [tokens, rot_dim / 2],
    slot_mapping i32 [tokens], key and value states, q_out f32 [tokens, q_heads · head_dim].

    Pairs are (i, i + rot_dim / 2) in layout `half` and (2i, 2i + 1) in `interleaved`; elements from rot_dim on pass
    unchanged. A negative slot is padding: nothing is appended.
    """
    return _append(symbol, isa, q_heads, kv_heads, head_dim, rot_dim, layout, kv_dtype)


def append(symbol, isa, *, q_heads, kv_heads, head_dim, kv_dtype):
    """qkv f32 [tokens, (q_heads + 2 kv_heads) · head_dim], slot_mapping i32 [tokens], key and value states.

    Queries are not copied: attention reads them from qkv (its `query_stride`). A negative slot is padding.
    """
    return _append(symbol, isa, q_heads, kv_heads, head_dim, 0, "half", kv_dtype)


def _append(symbol, isa, q_heads, kv_heads, head_dim, rot_dim, layout, kv_dtype):
    L = isa.lanes
    half = rot_dim // 2
    group = q_heads // kv_heads
    width = (q_heads + 2 * kv_heads) * head_dim
    storage = STORAGE[kv_dtype]
    # The places of a pair: first + i · step, second + i · step.
    second, step = (half, 1) if layout == "half" else (1, 2)
    vectors = half // L if layout == "half" else 0

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        qkv: T.handle("float32"),
        cos: T.handle("float32"),
        sin: T.handle("float32"),
        slots: T.handle("int32"),
        key: T.handle(storage),
        value: T.handle(storage),
        out: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=qkv)
        C = T.decl_buffer((1,), "float32", data=cos)
        S = T.decl_buffer((1,), "float32", data=sin)
        M = T.decl_buffer((1,), "int32", data=slots)
        K = T.decl_buffer((1,), storage, data=key)
        V = T.decl_buffer((1,), storage, data=value)
        Q = T.decl_buffer((1,), "float32", data=out)
        units: T.let = D[0] * kv_heads
        begin: T.let = share(task, tasks, units)
        for u in T.serial(share(task + 1, tasks, units) - begin):
            t: T.let = T.truncdiv(begin + u, kv_heads)
            head: T.let = T.truncmod(begin + u, kv_heads)
            if rot_dim > 0:
                for g in T.serial(group):
                    x: T.let = t * width + (head * group + g) * head_dim
                    q: T.let = (t * q_heads + head * group + g) * head_dim
                    for i in T.serial(vectors):
                        a: T.let = load(X, x + i * L, L)
                        b: T.let = load(X, x + half + i * L, L)
                        c: T.let = load(C, t * half + i * L, L)
                        s: T.let = load(S, t * half + i * L, L)
                        Q[at(q + i * L, L)] = _turn(a, c, b, s, -1.0)
                        Q[at(q + half + i * L, L)] = _turn(b, c, a, s, 1.0)
                    for j in T.serial(half - vectors * L):
                        i: T.let = vectors * L + j
                        Q[q + i * step] = _turn(
                            X[x + i * step], C[t * half + i], X[x + second + i * step], S[t * half + i], -1.0
                        )
                        Q[q + second + i * step] = _turn(
                            X[x + second + i * step], C[t * half + i], X[x + i * step], S[t * half + i], 1.0
                        )
                    for i in T.serial(head_dim - rot_dim):
                        Q[q + rot_dim + i] = X[x + rot_dim + i]
            slot: T.let = M[t]
            if slot >= 0:
                x: T.let = t * width + (q_heads + head) * head_dim
                v: T.let = x + kv_heads * head_dim
                offset: T.let = T.truncmod(slot, BLOCK)
                place: T.let = (T.Cast("int64", T.truncdiv(slot, BLOCK)) * kv_heads + head) * T.int64(head_dim * BLOCK)
                k: T.let = place + T.Cast("int64", offset)
                if rot_dim > 0:
                    for i in T.serial(half):
                        a: T.let = X[x + i * step]
                        b: T.let = X[x + second + i * step]
                        K[k + T.Cast("int64", i * step * BLOCK)] = encode(
                            _turn(a, C[t * half + i], b, S[t * half + i], -1.0), kv_dtype
                        )
                        K[k + T.Cast("int64", (second + i * step) * BLOCK)] = encode(
                            _turn(b, C[t * half + i], a, S[t * half + i], 1.0), kv_dtype
                        )
                for i in T.serial(head_dim - rot_dim):
                    K[k + T.Cast("int64", (rot_dim + i) * BLOCK)] = encode(X[x + rot_dim + i], kv_dtype)
                row: T.let = place + T.Cast("int64", offset * head_dim)
                for i in T.serial(head_dim // L):
                    V[at(row + T.Cast("int64", i * L), L)] = encode(load(X, v + i * L, L), kv_dtype, L)
                for i in T.serial(head_dim % L):
                    V[row + T.Cast("int64", head_dim // L * L + i)] = encode(X[v + head_dim // L * L + i], kv_dtype)

    return specialised(kernel, symbol, {"cos": rot_dim > 0, "sin": rot_dim > 0, "out": rot_dim > 0})


def _turn(a, c, b, s, sign):
    """a · c + sign · b · s."""
    lanes = lanes_of(a)
    return fma(b * f32(sign, lanes), s, a * c)
