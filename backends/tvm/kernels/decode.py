"""Attention of one token of each sequence: splits of the context go to different tasks, then `combine_splits` folds.

Together the two give the bits of `attention`: inside a split and over splits the arithmetic is the same.
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.cache import BLOCK, present, row_width, writer
from llmc.backends.tvm.kernels.math import exp
from llmc.backends.tvm.kernels.rotation import rotation
from llmc.backends.tvm.kernels.segment import segment, sink
from llmc.backends.tvm.kernels.tile import COLUMNS
from llmc.backends.tvm.kernels.vector import STORAGE, at, fma, load, share, specialised, splat
from llmc.backends.tvm.splits import SEGMENT


def split_attention(
    symbol,
    isa,
    *,
    q_heads,
    kv_heads,
    head_dim,
    scale,
    kv_dtype,
    splits,
    split=SEGMENT,
    rot_dim=0,
    layout="half",
    value_dim=0,
    window=0,
    soft_cap=0.0,
    alibi=False,
):
    """qkv f32 [tokens, row_width], [cos and sin f32 [tokens, rot_dim / 2]], slot_mapping i32 [tokens], key and value
    states, [their scales] (layouts: `cache`), positions i32 [tokens], block_tables i32 [tokens, max_blocks], [slopes
    f32 [q_heads]], partial f32 [tokens, splits, q_heads · (value_dim + 2)]: for each split of `split` keys (a multiple
    of 256) weighted values [q_heads, value_dim], the maxima and the sums of exponentials [q_heads]. Splits that a token
    sees no keys of are left as they are.

    A unit of work is a token, a kv head and a split. The unit of the last split appends the token's own key and value
    (as `append` does), which no other unit reads.
    """
    L = isa.lanes
    G = q_heads // kv_heads
    width, value_width = row_width(q_heads, kv_heads, head_dim, value_dim), value_dim or head_dim
    stride = q_heads * (value_width + 2)
    storage = STORAGE[kv_dtype]
    heads = {"kv_heads": kv_heads, "head_dim": head_dim, "kv_dtype": kv_dtype, "value_dim": value_dim}
    of_scores = {"scale": scale, "window": window, "soft_cap": soft_cap, "alibi": alibi}
    part = segment(isa, group=G, tokens=1, ahead=True, **heads, **of_scores)
    rotate = rotation(isa, head_dim=head_dim, rot_dim=rot_dim, layout=layout)
    write = writer(isa, q_heads=q_heads, rot_dim=rot_dim, layout=layout, **heads)
    rows = part.rows
    windowed = window > 0

    def lowest(length):
        """The first key that the last of so many tokens sees."""
        return T.max(0, length - window) if windowed else 0

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
        positions: T.handle("int32"),
        block_tables: T.handle("int32"),
        slopes: T.handle("float32"),
        partial: T.handle("float32"),
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
        P = T.decl_buffer((1,), "int32", data=positions)
        B = T.decl_buffer((1,), "int32", data=block_tables)
        SL = T.decl_buffer((1,), "float32", data=slopes)
        R = T.decl_buffer((1,), "float32", data=partial)
        Q = T.alloc_buffer((rows * head_dim,), "float32", scope="local")
        W = T.alloc_buffer((rows * COLUMNS,), "float32", scope="local")
        Y = T.alloc_buffer((rows * value_width,), "float32", scope="local")
        A = T.alloc_buffer((rows * 6,), "float32", scope="local")
        H = T.alloc_buffer((head_dim,), "float32", scope="local")
        next_ = T.alloc_buffer((3,), "int32", scope="local")
        keys = T.alloc_buffer((1,), "int64", scope="local")  # of all tokens, then of those before this one
        keys[0] = T.int64(0)
        for t in T.serial(D[0]):
            keys[0] = keys[0] + T.Cast("int64", P[t] + 1 - lowest(P[t] + 1))
        low: T.let = T.truncdiv(keys[0] * T.Cast("int64", task), T.Cast("int64", tasks))
        high: T.let = T.truncdiv(keys[0] * T.Cast("int64", task + 1), T.Cast("int64", tasks))
        keys[0] = T.int64(0)
        for t in T.serial(D[0]):
            length: T.let = P[t] + 1
            unseen: T.let = lowest(length)
            before: T.let = keys[0]
            mine: T.let = T.And(before < high, before + T.Cast("int64", length - unseen) > low)
            skipped: T.let = T.truncdiv(unseen, split)
            pieces: T.let = T.Select(mine, T.truncdiv(length + split - 1, split), skipped)
            for u_ in T.serial((pieces - skipped) * kv_heads):
                u: T.let = skipped * kv_heads + u_
                piece: T.let = T.truncdiv(u, kv_heads)
                head: T.let = T.truncmod(u, kv_heads)
                begin: T.let = T.max(piece * split, unseen) if windowed else piece * split
                stop: T.let = T.min(piece * split + split, length)
                size: T.let = stop - begin
                # A unit belongs to the task in whose share of all keys its middle lies. In keys · 2 · kv_heads.
                middle: T.let = (before + T.Cast("int64", begin - unseen)) * T.int64(2 * kv_heads) + T.Cast(
                    "int64", (2 * head + 1) * size
                )
                if T.And(middle >= low * T.int64(2 * kv_heads), middle < high * T.int64(2 * kv_heads)):
                    if piece == pieces - 1:
                        write(X, C, S, H, K, V, KS, VS, t, M[t], head)
                    for r in T.serial(G):
                        rotate(X, t * width + (head * G + r) * head_dim, C, S, t, Q, r * head_dim)
                    aligned: T.let = begin - T.truncmod(begin, SEGMENT) if windowed else begin
                    for g in T.serial(T.truncdiv(stop - aligned + SEGMENT - 1, SEGMENT)):
                        start: T.let = aligned + g * SEGMENT
                        table: T.let = t * D[2] + T.truncdiv(start, BLOCK)
                        same: T.let = start + SEGMENT < stop
                        following: T.let = T.min(u + 1, pieces * kv_heads - 1)
                        first: T.let = T.Select(same, start + SEGMENT, T.truncdiv(following, kv_heads) * split)
                        next_[0] = t * D[2] + T.truncdiv(first, BLOCK)
                        next_[1] = T.min(SEGMENT // BLOCK, T.truncdiv(length - 1 - first, BLOCK) + 1)
                        next_[2] = T.Select(same, head, T.truncmod(following, kv_heads))
                        part.run(
                            Q, K, V, KS, VS, B, SL, W, Y, A, table, head, start, stop - 1, length - 1, G, g == 0, next_
                        )
                    row: T.let = (T.Cast("int64", t) * T.int64(splits) + T.Cast("int64", piece)) * T.int64(stride)
                    y: T.let = row + T.Cast("int64", head * (G * value_width))
                    for i in T.serial(G * value_width // L):
                        R[at(y + T.Cast("int64", i * L), L)] = load(Y, i * L, L)
                    for i in T.serial(G * value_width % L):
                        R[y + T.Cast("int64", G * value_width // L * L + i)] = Y[G * value_width // L * L + i]
                    for r in T.serial(G):
                        h: T.let = row + T.Cast("int64", q_heads * value_width + head * G + r)
                        R[h] = A[r]
                        R[h + T.int64(q_heads)] = A[rows + r]
            keys[0] = before + T.Cast("int64", length - unseen)

    return specialised(kernel, symbol, {**present(rot_dim, kv_dtype), "slopes": alibi})


def combine_splits(symbol, isa, *, q_heads, head_dim, splits, split=SEGMENT, window=0, sinks=False):
    """partial f32 [tokens, splits, q_heads · (head_dim + 2)] (see `split_attention`; head_dim is that of values),
    positions i32 [tokens], [sinks f32 [q_heads]], out f32 [tokens, q_heads · head_dim]."""
    L = isa.lanes
    stride = q_heads * (head_dim + 2)
    most = -(-splits // 16) * 16
    windowed = window > 0
    whole, tail = head_dim // L, head_dim % L
    with_sink, finished = sink(sinks)

    @T.inline
    def fold(R, Z, before, this, total, x, y, skipped, pieces, lanes, d):
        acc = T.alloc_buffer((lanes,), "float32", scope="local")
        acc[at(0, lanes)] = load(R, x + T.Cast("int64", skipped) * T.int64(stride) + T.Cast("int64", d), lanes)
        for p in T.serial(skipped + 1, pieces):
            acc[at(0, lanes)] = fma(
                load(R, x + T.Cast("int64", p) * T.int64(stride) + T.Cast("int64", d), lanes),
                splat(this[p], lanes),
                load(acc, 0, lanes) * splat(before[p], lanes),
            )
        Z[at(y + d, lanes)] = finished(load(acc, 0, lanes), total, lanes)

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        partial: T.handle("float32"),
        positions: T.handle("int32"),
        sinks_: T.handle("float32"),
        out: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        R = T.decl_buffer((1,), "float32", data=partial)
        P = T.decl_buffer((1,), "int32", data=positions)
        SI = T.decl_buffer((1,), "float32", data=sinks_)
        Z = T.decl_buffer((1,), "float32", data=out)
        before = T.alloc_buffer((most,), "float32", scope="local")
        this = T.alloc_buffer((most,), "float32", scope="local")
        total = T.alloc_buffer((2,), "float32", scope="local")
        top = T.alloc_buffer((1,), "float32", scope="local")
        units: T.let = D[0] * q_heads
        first: T.let = share(task, tasks, units)
        for u in T.serial(share(task + 1, tasks, units) - first):
            t: T.let = T.truncdiv(first + u, q_heads)
            head: T.let = T.truncmod(first + u, q_heads)
            row: T.let = T.Cast("int64", t) * T.int64(splits * stride)
            peak: T.let = row + T.Cast("int64", q_heads * head_dim + head)
            pieces: T.let = T.truncdiv(P[t], split) + 1
            skipped: T.let = T.truncdiv(T.max(0, P[t] - (window - 1)), split) if windowed else 0
            begin: T.let = peak + T.Cast("int64", skipped) * T.int64(stride)
            # Maxima one after another; then the factors, which need all of them, several at once; then the sums.
            top[0] = R[begin]
            for i in T.serial(pieces - skipped - 1):
                p: T.let = skipped + i + 1
                m: T.let = top[0]
                next_: T.let = R[peak + T.Cast("int64", p) * T.int64(stride)]
                high: T.let = T.Select(next_ > m, next_, m)
                before[p] = m - high
                this[p] = next_ - high
                top[0] = high
            if pieces > skipped + 1:
                whole_vectors: T.let = T.truncdiv(skipped, L) if windowed else 0
                for i in T.serial(T.truncdiv(pieces + L - 1, L) - whole_vectors):
                    v: T.let = whole_vectors + i
                    before[at(v * L, L)] = exp(load(before, v * L, L))
                    this[at(v * L, L)] = exp(load(this, v * L, L))
            total[0] = R[begin + T.int64(q_heads)]
            for i in T.serial(pieces - skipped - 1):
                p: T.let = skipped + i + 1
                part: T.let = R[peak + T.Cast("int64", p) * T.int64(stride) + T.int64(q_heads)]
                total[0] = fma(this[p], part, total[0] * before[p])
            if sinks:
                with_sink(total, top[0], SI[head])
            x: T.let = row + T.Cast("int64", head * head_dim)
            y: T.let = (first + u) * head_dim
            for c in T.serial(whole):
                fold(R, Z, before, this, total, x, y, skipped, pieces, L, c * L)
            for c in T.serial(tail):
                fold(R, Z, before, this, total, x, y, skipped, pieces, 1, whole * L + c)

    return specialised(kernel, symbol, {"sinks_": sinks})
