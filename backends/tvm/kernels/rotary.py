"""Tables of cosines and sines for rotary position embeddings."""

from __future__ import annotations

import math
import struct

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import f64, fma, let, share, specialised

_MAGIC = 6755399441055744.0  # 1.5 * 2^52: adding it leaves the nearest integer in the low mantissa bits
_HALF_PI = (1.5707963267948966, 6.123233995736766e-17)


def rotary_table(symbol, isa, *, rot_dim, attention_scaling=1.0):
    """positions i32 [tokens], inv_freq f32 [rot_dim / 2], cos and sin f32 [tokens, rot_dim / 2].

    The angle is position · inv_freq rounded to float32, as frameworks take it; cos and sin of it are correctly rounded
    but for rare ties.
    """
    return _table(symbol, rot_dim, attention_scaling, lambda F, position, i: F[i], fixed=True)


def dynamic_rotary_table(symbol, isa, *, rot_dim, base, factor, max_position_embeddings, attention_scaling=1.0):
    """positions i32 [tokens], cos and sin f32 [tokens, rot_dim / 2].

    Dynamic NTK scaling of each token by its own length n = position + 1: beyond `max_position_embeddings` the base is
    base · (factor · n / max - (factor - 1)) ^ (rot_dim / (rot_dim - 2)).
    """

    def frequency(F, position, i):
        length = T.Cast("float64", T.max(position + 1, max_position_embeddings))
        stretch = length * f64(factor / max_position_embeddings) - f64(factor - 1)
        power = f64(rot_dim / (rot_dim - 2)) if rot_dim > 2 else f64(0.0)
        exponent = T.Cast("float64", i) * f64(-2.0 / rot_dim)
        return T.Cast("float32", _exp(exponent * fma(power, _log(stretch), f64(math.log(base)))))

    return _table(symbol, rot_dim, attention_scaling, frequency, fixed=False)


def _table(symbol, rot_dim, attention_scaling, frequency, fixed):
    half = rot_dim // 2

    @T.prim_func(s_tir=True)
    def kernel(
        task: T.int32,
        tasks: T.int32,
        dims: T.handle("int32"),
        positions: T.handle("int32"),
        inv_freq: T.handle("float32"),
        cos: T.handle("float32"),
        sin: T.handle("float32"),
    ):
        D = T.decl_buffer((4,), "int32", data=dims)
        P = T.decl_buffer((1,), "int32", data=positions)
        F = T.decl_buffer((half,), "float32", data=inv_freq)
        C = T.decl_buffer((1,), "float32", data=cos)
        S = T.decl_buffer((1,), "float32", data=sin)
        first: T.let = share(task, tasks, D[0])
        for t in T.serial(share(task + 1, tasks, D[0]) - first):
            for i in T.serial(half):
                angle: T.let = T.Cast("float64", T.Cast("float32", P[first + t]) * frequency(F, P[first + t], i))
                biased: T.let = fma(angle, f64(2 / math.pi), f64(_MAGIC))
                quadrant: T.let = T.bitwise_and(T.reinterpret("int64", biased), T.int64(3))
                n: T.let = biased - f64(_MAGIC)
                r: T.let = fma(n, f64(-_HALF_PI[1]), fma(n, f64(-_HALF_PI[0]), angle))
                s: T.let = _sin(r)
                c: T.let = _cos(r)
                odd: T.let = T.bitwise_and(quadrant, T.int64(1)) != T.int64(0)
                # Quadrants turn (cos, sin) to (-sin, cos), (-cos, -sin), (sin, -cos).
                cosine: T.let = T.Select(odd, s, c) * T.Select(
                    T.bitwise_and(quadrant + T.int64(1), T.int64(2)) != T.int64(0), f64(-1.0), f64(1.0)
                )
                sine: T.let = T.Select(odd, c, s) * T.Select(
                    T.bitwise_and(quadrant, T.int64(2)) != T.int64(0), f64(-1.0), f64(1.0)
                )
                C[(first + t) * half + i] = T.Cast("float32", cosine * f64(attention_scaling))
                S[(first + t) * half + i] = T.Cast("float32", sine * f64(attention_scaling))

    return specialised(kernel, symbol, {"inv_freq": fixed})


def _polynomial(x, coefficients):
    """Horner's rule, lowest power first."""
    result = f64(coefficients[-1])
    for c in coefficients[-2::-1]:
        result = fma(result, x, f64(c))
    return result


def _sin(r):
    """Taylor's series on [-π/4, π/4], to 1e-14."""
    return r * _polynomial(let(r * r), [(-1) ** i / math.factorial(2 * i + 1) for i in range(8)])


def _cos(r):
    """Taylor's series on [-π/4, π/4], to 1e-14."""
    return _polynomial(let(r * r), [(-1) ** i / math.factorial(2 * i) for i in range(9)])


def _exp(x):
    """e^x for |x| < 700, to 1e-14 relative."""
    x = let(x)
    t = let(fma(x, f64(1.4426950408889634), f64(_MAGIC)))
    n = let(t - f64(_MAGIC))
    r = let(fma(n, f64(-1.9082149292705877e-10), fma(n, f64(-0.6931471803691238), x)))
    whole = T.reinterpret("int64", t) - T.int64(struct.unpack("q", struct.pack("d", _MAGIC))[0])
    power = T.reinterpret("float64", T.shift_left(whole + T.int64(1023), T.int64(52)))
    return _polynomial(r, [1 / math.factorial(i) for i in range(14)]) * power


def _log(x):
    """Natural logarithm of a normal x > 0, to 1e-14: 2 atanh((m - 1) / (m + 1)) of a mantissa m in [0.71, 1.42)."""
    bits = let(T.reinterpret("int64", x))
    # Counting the exponent from sqrt(1/2) puts the mantissa around 1.
    exponent = let(T.shift_right(bits - T.int64(0x3FE6A09E667F3BCD), T.int64(52)))
    m = let(T.reinterpret("float64", bits - T.shift_left(exponent, T.int64(52))))
    s = let((m - f64(1.0)) / (m + f64(1.0)))
    series = _polynomial(let(s * s), [2 / (2 * i + 1) for i in range(11)])
    return fma(T.Cast("float64", exponent), f64(math.log(2)), s * series)
