"""Elementary functions on float32 vectors, as expressions. Errors were measured over all finite inputs in range.

NaN goes through every function: comparisons are written so that a NaN operand is the one that is kept.
"""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import f32, fma, i32, lanes_of, let, wide

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
_MAGIC_BITS = 0x4B400000


def clamp(x, low, high):
    """x within [low, high]; NaN stays."""
    lanes = lanes_of(x)
    above = let(T.Select(x < f32(low, lanes), f32(low, lanes), x))
    return T.Select(above > f32(high, lanes), f32(high, lanes), above)


def polynomial(x, coefficients):
    """Horner's rule, highest power first."""
    lanes = lanes_of(x)
    result = f32(coefficients[0], lanes)
    for c in coefficients[1:]:
        result = fma(result, x, f32(c, lanes))
    return result


def magnitude_bits(x):
    """The bits of |x| as int32, whose order is that of magnitudes, with NaN above all."""
    lanes = lanes_of(x)
    return T.bitwise_and(T.reinterpret(wide("int32", lanes), x), i32(0x7FFFFFFF, lanes))


def _magnitude(x):
    """|x|, as bits: NaN stays."""
    return T.reinterpret(wide("float32", lanes_of(x)), magnitude_bits(x))


def code(x, scale):
    """x / scale as an i8 code from -127 to 127, rounded half to even; 0 where the scale is 0 or NaN, or x infinite."""
    lanes = lanes_of(x)
    nearest = let(let(clamp(let(x / scale), -127.0, 127.0)) + f32(_MAGIC, lanes))
    whole = T.reinterpret(wide("int32", lanes), nearest) - i32(_MAGIC_BITS, lanes)
    return T.Cast(wide("int8", lanes), T.Select(scale > f32(0.0, lanes), whole, i32(0, lanes)))


def _with_sign_of(x, magnitude):
    lanes = lanes_of(x)
    return T.Select(x < f32(0.0, lanes), f32(0.0, lanes) - magnitude, magnitude)


def exp(x):
    """e^x: 1.0 units in the last place, zero below -104, infinity above 88.73. After Cephes, expf."""
    lanes = lanes_of(x)
    mantissa, n = _exp_parts(let(clamp(let(x), -104.0, 89.0)))
    # Two factors: one power of two cannot reach subnormal results, or infinity.
    half = let(T.shift_right(n, i32(1, lanes)))
    return mantissa * _two_to(half) * _two_to(n - half)


def exp_of_difference(x):
    """e^x for x <= 0, as `exp`; zero below -80. Beside a largest weight of 1 what is left out is nothing, and subnormal
    weights would slow every product that they go into down, to two thirds of its speed and less."""
    lanes = lanes_of(x)
    x = let(x)
    mantissa, n = _exp_parts(let(T.Select(x < f32(-80.0, lanes), f32(-80.0, lanes), x)))
    return T.Select(x < f32(-80.0, lanes), f32(0.0, lanes), mantissa * _two_to(n))


def _exp_parts(x):
    """e^x as mantissa · 2^n."""
    lanes = lanes_of(x)
    t = let(fma(x, f32(1.44269504088896341, lanes), f32(_MAGIC, lanes)))
    n = let(T.reinterpret(wide("int32", lanes), t) - i32(_MAGIC_BITS, lanes))
    whole = let(t - f32(_MAGIC, lanes))
    r = let(fma(whole, f32(2.12194440e-4, lanes), fma(whole, f32(-0.693359375, lanes), x)))
    p = polynomial(
        r, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    )
    return fma(p, r * r, r) + f32(1.0, lanes), n


def _two_to(n):
    lanes = lanes_of(n)
    return T.reinterpret(wide("float32", lanes), T.shift_left(n + i32(127, lanes), i32(23, lanes)))


def tanh(x):
    """Hyperbolic tangent: 1.5 units in the last place. 1 - 2 / (e^2|x| + 1) from 0.6 on; below that, where the
    subtraction would lose digits, a polynomial (least squares at Chebyshev nodes, error 4e-10)."""
    lanes = lanes_of(x)
    x = let(x)
    magnitude = let(_magnitude(x))
    far = let(f32(1.0, lanes) - f32(2.0, lanes) / (exp(magnitude * f32(2.0, lanes)) + f32(1.0, lanes)))
    small = let(clamp(x, -0.6, 0.6))
    square = let(small * small)
    series = polynomial(
        square, (2.364191459e-3, -8.404963650e-3, 2.178697102e-2, -5.396141112e-2, 1.333331168e-1, -3.333333433e-1)
    )
    near = fma(small * square, series, small)
    return T.Select(magnitude < f32(0.6, lanes), near, _with_sign_of(x, far))


def _erf_parts(x):
    """|x|, ln(1 - erf |x|) for |x| >= 0.93, and erf x for |x| < 0.93. Coefficients: N. Juffa, erff (0.99 units)."""
    lanes = lanes_of(x)
    magnitude = let(_magnitude(x))
    t = let(clamp(magnitude, 0.0, 12.0))
    tail = polynomial(
        t,
        (
            -1.72853470e-5,
            3.83197126e-4,
            -3.88396438e-3,
            2.42546219e-2,
            -1.06777877e-1,
            -6.34846687e-1,
            -1.28717512e-1,
        ),
    )
    near = polynomial(
        let(x * x),
        (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1),
    )
    return magnitude, fma(tail, t, f32(0.0, lanes) - t), fma(near, x, x)


def erf(x):
    """Error function: 1.0 units in the last place."""
    lanes = lanes_of(x)
    x = let(x)
    magnitude, tail, near = _erf_parts(x)
    far = let(f32(1.0, lanes) - exp(tail))
    return T.Select(magnitude < f32(0.927734375, lanes), near, _with_sign_of(x, far))


def _small_sigmoid(x):
    """The lesser of sigmoid(x) and sigmoid(-x): e / (1 + e) with e = e^-|x|, which neither overflows nor cancels."""
    lanes = lanes_of(x)
    e = let(exp(f32(0.0, lanes) - _magnitude(let(x))))
    return e / (f32(1.0, lanes) + e)


def _times_sigmoid(x, argument):
    """x · sigmoid(argument), of one sign. What is missing to x is subtracted: near 1, a sigmoid's own rounding would
    be the largest error."""
    lanes = lanes_of(x)
    lesser = let(_small_sigmoid(argument))
    return T.Select(x < f32(0.0, lanes), x * lesser, fma(f32(0.0, lanes) - x, lesser, x))


def sigmoid(x):
    """1 / (1 + e^-x)."""
    lanes = lanes_of(x)
    x = let(x)
    lesser = let(_small_sigmoid(x))
    return T.Select(x < f32(0.0, lanes), lesser, f32(1.0, lanes) - lesser)


def relu(x):
    """x where it is positive (or NaN), else zero."""
    lanes = lanes_of(x)
    return T.Select(x < f32(0.0, lanes), f32(0.0, lanes), x)


def silu(x):
    """x · sigmoid(x)."""
    x = let(x)
    return _times_sigmoid(x, x)


def gelu_erf(x):
    """x / 2 · (1 + erf(z)), z = x / √2; for z < -0.93 the sum is taken as 1 - erf |z| = e^…, which loses no digits."""
    lanes = lanes_of(x)
    x = let(x)
    z = let(x * f32(0.70710678118654752, lanes))
    magnitude, tail, near = _erf_parts(z)
    rest = let(exp(tail))
    far = T.Select(z < f32(0.0, lanes), rest, f32(2.0, lanes) - rest)
    total = T.Select(magnitude < f32(0.927734375, lanes), f32(1.0, lanes) + near, far)
    return f32(0.5, lanes) * x * total


def gelu_tanh(x):
    """x / 2 · (1 + tanh(u)), u = √(2/π) · (x + 0.044715 x³), as x · sigmoid(2u): for a negative x the first form would
    subtract two nearly equal numbers."""
    lanes = lanes_of(x)
    x = let(x)
    cubic = fma(x * x * x, f32(0.044715, lanes), x)
    return _times_sigmoid(x, cubic * f32(1.5957691216057308, lanes))


def gelu_sigmoid(x):
    """x · sigmoid(1.702 x)."""
    x = let(x)
    return _times_sigmoid(x, x * f32(1.702, lanes_of(x)))


def relu_squared(x):
    """relu(x)²."""
    v = let(relu(x))
    return v * v


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": relu,
    "silu": silu,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "gelu_erf": gelu_erf,
    "gelu_tanh": gelu_tanh,
    "gelu_sigmoid": gelu_sigmoid,
    "relu_squared": relu_squared,
}


def activate(name, x):
    """An activation by its name; the argument is evaluated once."""
    return ACTIVATIONS[name](let(x))
