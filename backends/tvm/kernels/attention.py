"""Causal attention over the paged KV state for any number of tokens of each sequence: prefill and verify."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.cache import BLOCK, present, row_width
from llmc.backends.tvm.kernels.rotation import rotation
from llmc.backends.tvm.kernels.segment import segment, sink
from llmc.backends.tvm.kernels.tile import COLUMNS, rows_at_most
from llmc.backends.tvm.kernels.vector import STORAGE, at, fma, load, specialised, splat
from llmc.backends.tvm.splits import SEGMENT


def attention(
    symbol,
    isa,
    *,
    q_heads,
    kv_heads,
    head_dim,
    scale,
    kv_dtype,
    rot_dim=0,
    layout="half",
    split=SEGMENT,
    value_dim=0,
    window=0,
    soft_cap=0.0,
    alibi=False,
    sinks=False,
):
    """qkv f32 [tokens, row_width], [cos and sin f32 [tokens, rot_dim / 2]], key and value states that hold the tokens'
    own, [their scales] (layouts: `cache`), positions i32 [tokens], query_start i32 [sequences + 1], block_tables
    i32 [sequences, max_blocks], [slopes f32 [q_heads]], [sinks f32 [q_heads]], out f32 [tokens, q_heads · value_dim].

    What `window`, `soft_cap`, `alibi` and `sinks` mean: see `llmc.ir.ops.attention`.
    Queries are rotated as they are read (see `rotation`), or not with rot_dim 0. `split` is a multiple of 256: how many
    keys are folded before the results of these are (see `segment`).
    """
    L = isa.lanes
    G = q_heads // kv_heads
    width, value_width = row_width(q_heads, kv_heads, head_dim, value_dim), value_dim or head_dim
    out_width = q_heads * value_width
    storage = STORAGE[kv_dtype]
    tokens = max(1, rows_at_most(isa) // G)  # of one unit
    heads = {"kv_heads": kv_heads, "head_dim": head_dim, "kv_dtype": kv_dtype, "value_dim": value_dim}
    of_scores = {"scale": scale, "window": window, "soft_cap": soft_cap, "alibi": alibi}
    part = segment(isa, group=G, tokens=tokens, **heads, **of_scores)
    rotate = rotation(isa, head_dim=head_dim, rot_dim=rot_dim, layout=layout)
    rows = part.rows
    whole, tail = value_width // L, value_width % L
    windowed = window > 0
    splits = split > SEGMENT  # else a segment is a split, and one fold is enough

    @T.inline
    def merge(Z, Y, A, row, fresh, lanes, d):
        """Folds a split's weighted values Y into Z, by the factors in A."""
        if fresh:
            Z[at(row * value_width + d, lanes)] = load(Y, row * value_width + d, lanes)
        else:
            Z[at(row * value_width + d, lanes)] = fma(
                load(Y, row * value_width + d, lanes),
                splat(A[3 * rows + row], lanes),
                load(Z, row * value_width + d, lanes) * splat(A[2 * rows + row], lanes),
            )

    with_sink, finished = sink(sinks)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        qkv: T.handle("float32"),
        cos: T.handle("float32"),
        sin: T.handle("float32"),
        key: T.handle(storage),
        value: T.handle(storage),
        key_scale: T.handle("float32"),
        value_scale: T.handle("float32"),
        positions: T.handle("int32"),
        query_start: T.handle("int32"),
        block_tables: T.handle("int32"),
        slopes: T.handle("float32"),
        sinks_: T.handle("float32"),
        out: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        X = T.decl_buffer((1,), "float32", data=qkv)
        C = T.decl_buffer((1,), "float32", data=cos)
        S = T.decl_buffer((1,), "float32", data=sin)
        K = T.decl_buffer((1,), storage, data=key)
        V = T.decl_buffer((1,), storage, data=value)
        KS = T.decl_buffer((1,), "float32", data=key_scale)
        VS = T.decl_buffer((1,), "float32", data=value_scale)
        P = T.decl_buffer((1,), "int32", data=positions)
        N = T.decl_buffer((1,), "int32", data=query_start)
        B = T.decl_buffer((1,), "int32", data=block_tables)
        SL = T.decl_buffer((1,), "float32", data=slopes)
        SI = T.decl_buffer((1,), "float32", data=sinks_)
        R = T.decl_buffer((1,), "float32", data=out)
        Q = T.alloc_buffer((rows * head_dim,), "float32", scope="local")
        W = T.alloc_buffer((rows * COLUMNS,), "float32", scope="local")
        Y = T.alloc_buffer((rows * value_width,), "float32", scope="local")
        A = T.alloc_buffer((rows * 6,), "float32", scope="local")
        Y2 = T.alloc_buffer((rows * value_width,), "float32", scope="local")
        A2 = T.alloc_buffer((rows * 4,), "float32", scope="local")
        end = T.alloc_buffer((2,), "float32", scope="local")
        before = T.alloc_buffer((1,), "int32", scope="local")
        before[0] = 0
        for s in T.serial(D[1]):
            many: T.let = N[s + 1] - N[s]
            units: T.let = T.truncdiv(many + tokens - 1, tokens) * kv_heads
            # Tasks take turns: later tokens have more keys, so consecutive shares would not be equal.
            offset: T.let = T.floormod(task - before[0], tasks)
            for u in T.serial(T.truncdiv(units - offset + tasks - 1, tasks)):
                unit: T.let = offset + u * tasks
                first: T.let = N[s] + T.truncdiv(unit, kv_heads) * tokens
                head: T.let = T.truncmod(unit, kv_heads)
                count: T.let = T.min(tokens, N[s + 1] - first)
                position: T.let = P[first]
                last: T.let = position + count - 1
                for r in T.serial(count * G):
                    t: T.let = first + T.truncdiv(r, G)
                    rotate(X, t * width + (head * G + T.truncmod(r, G)) * head_dim, C, S, t, Q, r * head_dim)
                lowest: T.let = T.truncdiv(T.max(0, position - (window - 1)), SEGMENT) if windowed else 0
                for g_ in T.serial(T.truncdiv(last, SEGMENT) + 1 - lowest):
                    g: T.let = lowest + g_
                    start: T.let = g * SEGMENT
                    of_split: T.let = T.truncmod(start, split) == 0 if splits else start == 0
                    fresh: T.let = T.Or(of_split, g_ == 0) if windowed else of_split
                    table: T.let = s * D[2] + g * (SEGMENT // BLOCK)
                    part.run(
                        Q, K, V, KS, VS, B, SL, W, Y, A, table, head, start, last, position, count * G, fresh, before
                    )
                    if splits:  # noqa: SIM102 (decided while the kernel is made)
                        if T.Or(start + SEGMENT > last, T.truncmod(start + SEGMENT, split) == 0):
                            begin: T.let = start - T.truncmod(start, split)
                            alone: T.let = begin <= lowest * SEGMENT
                            part.factors(A2, A, 0, (begin - position) * G, alone)
                            for r in T.serial(count * G):
                                if position + T.truncdiv(r, G) >= begin:
                                    for c in T.serial(whole):
                                        merge(Y2, Y, A2, r, alone, L, c * L)
                                    for c in T.serial(tail):
                                        merge(Y2, Y, A2, r, alone, 1, whole * L + c)
                for r in T.serial(count * G):
                    of_head: T.let = head * G + T.truncmod(r, G)
                    y: T.let = (first + T.truncdiv(r, G)) * out_width + of_head * value_width
                    done = T.meta_var((A2, Y2) if splits else (A, Y))
                    end[0] = done[0][rows + r]
                    if sinks:
                        with_sink(end, done[0][r], SI[of_head])
                    for c in T.serial(whole):
                        R[at(y + c * L, L)] = finished(load(done[1], r * value_width + c * L, L), end, L)
                    for c in T.serial(tail):
                        R[y + whole * L + c] = finished(done[1][r * value_width + whole * L + c], end, 1)
            before[0] = T.truncmod(before[0] + units, tasks)

    return specialised(kernel, symbol, {**present(rot_dim, kv_dtype), "slopes": alibi, "sinks_": sinks})
