"""The rotary embedding of one head, as code that other kernels contain."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import at, f32, fma, lanes_of, load


def rotation(isa, *, head_dim, rot_dim, layout):
    """`rotate(X, x, C, S, t, Y, y)`: Y[y..y + head_dim] = the head X[x..x + head_dim] turned by the angles of token t,
    whose cosines and sines are C and S [tokens, rot_dim / 2].

    Pairs are (i, i + rot_dim / 2) in layout `half` and (2i, 2i + 1) in `interleaved`; elements from rot_dim on pass
    unchanged. Without any rotation (rot_dim 0) C and S are not read.
    """
    L = isa.lanes
    half = rot_dim // 2
    second, step = (half, 1) if layout == "half" else (1, 2)  # a pair: i · step, second + i · step
    vectors = half // L if layout == "half" else 0
    rest = head_dim - rot_dim

    @T.inline
    def rotate(X, x, C, S, t, Y, y):
        if rot_dim > 0:
            for i in T.serial(vectors):
                a: T.let = load(X, x + i * L, L)
                b: T.let = load(X, x + half + i * L, L)
                c: T.let = load(C, t * half + i * L, L)
                s: T.let = load(S, t * half + i * L, L)
                Y[at(y + i * L, L)] = _turn(a, c, b, s, -1.0)
                Y[at(y + half + i * L, L)] = _turn(b, c, a, s, 1.0)
            for j in T.serial(half - vectors * L):
                i: T.let = vectors * L + j
                Y[y + i * step] = _turn(
                    X[x + i * step], C[t * half + i], X[x + second + i * step], S[t * half + i], -1.0
                )
                Y[y + second + i * step] = _turn(
                    X[x + second + i * step], C[t * half + i], X[x + i * step], S[t * half + i], 1.0
                )
        for i in T.serial(rest // L):
            Y[at(y + rot_dim + i * L, L)] = load(X, x + rot_dim + i * L, L)
        for i in T.serial(rest % L):
            Y[y + rot_dim + rest // L * L + i] = X[x + rot_dim + rest // L * L + i]

    return rotate


def _turn(a, c, b, s, sign):
    """a · c + sign · b · s."""
    lanes = lanes_of(a)
    return fma(b * f32(sign, lanes), s, a * c)
