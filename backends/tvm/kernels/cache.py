"""Writing keys and values into the paged state, with or without a rotary embedding of the keys.

State of one layer: key [blocks, kv_heads, head_dim, 16] (a lane is a key), value [blocks, kv_heads, 16, value_dim],
where value_dim is head_dim unless it is given. With kv_dtype i8 these are codes, and each head's key and value has a
scale: key_scale and value_scale f32 [blocks, kv_heads, 16] (`llmc.ir.ops.cache.quantize_rows` says how they are taken).
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.math import code, magnitude_bits
from llmc.backends.tvm.kernels.rotation import rotation
from llmc.backends.tvm.kernels.vector import STORAGE, at, encode, i32, load, share, specialised, splat, tree_max

BLOCK = 16


def append(symbol, isa, *, q_heads, kv_heads, head_dim, kv_dtype, rot_dim=0, layout="half", value_dim=0):
    """qkv f32 [tokens, row_width], [cos and sin f32 [tokens, rot_dim / 2]], slot_mapping i32 [tokens], key and value
    states, [their scales]. Keys are rotated (see `rotation`), or not with rot_dim 0; queries stay.

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
        value_dim=value_dim,
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
        key_scale: T.handle("float32"),
        value_scale: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=qkv)
        C = T.decl_buffer((1,), "float32", data=cos)
        S = T.decl_buffer((1,), "float32", data=sin)
        M = T.decl_buffer((1,), "int32", data=slots)
        K = T.decl_buffer((1,), storage, data=key)
        V = T.decl_buffer((1,), storage, data=value)
        KS = T.decl_buffer((1,), "float32", data=key_scale)
        VS = T.decl_buffer((1,), "float32", data=value_scale)
        H = T.alloc_buffer((head_dim,), "float32", scope="local")
        units: T.let = D[0] * kv_heads
        begin: T.let = share(task, tasks, units)
        for u in T.serial(share(task + 1, tasks, units) - begin):
            t: T.let = T.truncdiv(begin + u, kv_heads)
            write(X, C, S, H, K, V, KS, VS, t, M[t], T.truncmod(begin + u, kv_heads))

    return specialised(kernel, symbol, present(rot_dim, kv_dtype))


def present(rot_dim, kv_dtype):
    """Which of the parameters that not every kernel needs this one has."""
    tables, scales = rot_dim > 0, kv_dtype == "i8"
    return {"cos": tables, "sin": tables, "key_scale": scales, "value_scale": scales}


def row_width(q_heads, kv_heads, head_dim, value_dim):
    """Elements of a joint row: queries, keys, values."""
    return (q_heads + kv_heads) * head_dim + kv_heads * (value_dim or head_dim)


def writer(isa, *, q_heads, kv_heads, head_dim, kv_dtype, rot_dim, layout, value_dim=0):
    """`write(X, C, S, H, K, V, KS, VS, t, slot, head)`: the key and value of token t and a kv head, from the joint
    projection X into their slot of the states. H is scratch, f32 [head_dim]."""
    L = isa.lanes
    width = row_width(q_heads, kv_heads, head_dim, value_dim)
    value_width = value_dim or head_dim
    rotate = rotation(isa, head_dim=head_dim, rot_dim=rot_dim, layout=layout)
    whole, tail = value_width // L, value_width % L
    scaled = kv_dtype == "i8"

    @T.inline
    def scale_of(X, x, Z, z, size):
        """Z[z] = the largest magnitude of X[x..x + size], over 127."""
        most = T.alloc_buffer((L,), "int32", scope="local")
        most[at(0, L)] = i32(0, L)
        for i in T.serial(size // L):
            bits: T.let = magnitude_bits(load(X, x + i * L, L))
            most[at(0, L)] = T.Select(bits > load(most, 0, L), bits, load(most, 0, L))
        for i in T.serial(size % L):
            most[0] = T.max(most[0], magnitude_bits(X[x + size // L * L + i]))
        Z[z] = T.reinterpret("float32", tree_max([most[i] for i in range(L)])) / T.float32(127)

    def stored(value, scales, place, lanes=1):
        return code(value, splat(scales[place], lanes)) if scaled else encode(value, kv_dtype, lanes)

    @T.inline
    def write(X, C, S, H, K, V, KS, VS, t, slot, head):
        if slot >= 0:
            x: T.let = t * width + (q_heads + head) * head_dim
            v: T.let = t * width + (q_heads + kv_heads) * head_dim + head * value_width
            offset: T.let = T.truncmod(slot, BLOCK)
            unit: T.let = T.Cast("int64", T.truncdiv(slot, BLOCK)) * kv_heads + head
            place: T.let = unit * T.int64(head_dim * BLOCK)
            at_scale: T.let = unit * T.int64(BLOCK) + T.Cast("int64", offset)
            rotate(X, x, C, S, t, H, 0)
            if scaled:
                scale_of(H, 0, KS, at_scale, head_dim)
                scale_of(X, v, VS, at_scale, value_width)
            for i in T.serial(head_dim):
                K[place + T.Cast("int64", i * BLOCK + offset)] = stored(H[i], KS, at_scale)
            row: T.let = unit * T.int64(value_width * BLOCK) + T.Cast("int64", offset * value_width)
            for i in T.serial(whole):
                V[at(row + T.Cast("int64", i * L), L)] = stored(load(X, v + i * L, L), VS, at_scale, L)
            for i in T.serial(tail):
                V[row + T.Cast("int64", whole * L + i)] = stored(X[v + whole * L + i], VS, at_scale)

    return write
