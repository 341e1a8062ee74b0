"""Writing keys and values into the paged state, with or without a rotary embedding of the keys.

State of one layer: key [blocks, kv_heads, head_dim, 16] (a lane is a key), value [blocks, kv_heads, 16, head_dim].
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.rotation import rotation
from llmc.backends.tvm.kernels.vector import STORAGE, at, encode, load, share, specialised

BLOCK = 16


def append(symbol, isa, *, q_heads, kv_heads, head_dim, kv_dtype, rot_dim=0, layout="half"):
    """qkv f32 [tokens, (q_heads + 2 kv_heads) · head_dim], [cos and sin f32 [tokens, rot_dim / 2]], slot_mapping
    i32 [tokens], key and value states. Keys are rotated (see `rotation`), or not with rot_dim 0; queries stay.

    A negative slot is padding: nothing is appended.
    """
    storage = STORAGE[kv_dtype]
    write = writer(
        isa,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_dtype=kv_dtype,
        rot_dim=rot_dim,
        layout=layout,
    )

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
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=qkv)
        C = T.decl_buffer((1,), "float32", data=cos)
        S = T.decl_buffer((1,), "float32", data=sin)
        M = T.decl_buffer((1,), "int32", data=slots)
        K = T.decl_buffer((1,), storage, data=key)
        V = T.decl_buffer((1,), storage, data=value)
        H = T.alloc_buffer((head_dim,), "float32", scope="local")
        units: T.let = D[0] * kv_heads
        begin: T.let = share(task, tasks, units)
        for u in T.serial(share(task + 1, tasks, units) - begin):
            t: T.let = T.truncdiv(begin + u, kv_heads)
            write(X, C, S, H, K, V, t, M[t], T.truncmod(begin + u, kv_heads))

    return specialised(kernel, symbol, {"cos": rot_dim > 0, "sin": rot_dim > 0})


def writer(isa, *, q_heads, kv_heads, head_dim, kv_dtype, rot_dim, layout):
    """`write(X, C, S, H, K, V, t, slot, head)`: the key and value of token t and a kv head, from the joint projection
    X into their slot of the states K and V. H is scratch, f32 [head_dim]."""
    L = isa.lanes
    width = (q_heads + 2 * kv_heads) * head_dim
    rotate = rotation(isa, head_dim=head_dim, rot_dim=rot_dim, layout=layout)
    whole, tail = head_dim // L, head_dim % L

    @T.inline
    def write(X, C, S, H, K, V, t, slot, head):
        if slot >= 0:
            x: T.let = t * width + (q_heads + head) * head_dim
            v: T.let = x + kv_heads * head_dim
            offset: T.let = T.truncmod(slot, BLOCK)
            place: T.let = (T.Cast("int64", T.truncdiv(slot, BLOCK)) * kv_heads + head) * T.int64(head_dim * BLOCK)
            rotate(X, x, C, S, t, H, 0)
            for i in T.serial(head_dim):
                K[place + T.Cast("int64", i * BLOCK + offset)] = encode(H[i], kv_dtype)
            row: T.let = place + T.Cast("int64", offset * head_dim)
            for i in T.serial(whole):
                V[at(row + T.Cast("int64", i * L), L)] = encode(load(X, v + i * L, L), kv_dtype, L)
            for i in T.serial(tail):
                V[row + T.Cast("int64", whole * L + i)] = encode(X[v + whole * L + i], kv_dtype)

    return write
