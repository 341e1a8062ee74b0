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


def _rational(x, odd, even):
    x = let(x)
    square = let(x * x)
    return x * polynomial(square, odd) / polynomial(square, even)


def exp(x):
    """e^x: 1.1 units in the last place, zero below -104, infinity above 88.73. Range reduction and coefficients: Cephes, expf."""
    lanes = lanes_of(x)
    x = let(clamp(let(x), -104.0, 89.0))
    t = let(fma(x, f32(1.44269504088896341, lanes), f32(_MAGIC, lanes)))
    n = let(T.reinterpret(wide("int32", lanes), t) - i32(_MAGIC_BITS, lanes))
    whole = let(t - f32(_MAGIC, lanes))
    r = let(fma(whole, f32(2.12194440e-4, lanes), fma(whole, f32(-0.693359375, lanes), x)))
    p = polynomial(
        r, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    )
    mantissa = fma(p, r * r, r) + f32(1.0, lanes)
    # Two factors: one power of two cannot reach subnormal results, or infinity.
    half = let(T.shift_right(n, i32(1, lanes)))
    return mantissa * _two_to(half) * _two_to(n - half)


def _two_to(n):
    lanes = lanes_of(n)
    return T.reinterpret(wide("float32", lanes), T.shift_left(n + i32(127, lanes), i32(23, lanes)))


def tanh(x):
    """Hyperbolic tangent: 4e-7 relative. A rational function on [-7.9, 7.9]; coefficients: Eigen, ptanh."""
    odd = (
        -2.76076847742355e-16,
        2.00018790482477e-13,
        -8.60467152213735e-11,
        5.12229709037114e-08,
        1.48572235717979e-05,
        6.37261928875436e-04,
        4.89352455891786e-03,
    )
    even = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
    return _rational(clamp(let(x), -7.90531110763549805, 7.90531110763549805), odd, even)


def erf(x):
    """Error function: 4e-7 relative. A rational function on [-4, 4]; coefficients: Eigen, perf."""
    odd = (
        -2.72614225801306e-10,
        2.77068142495902e-08,
        -2.10102402082508e-06,
        -5.69250639462346e-05,
        -7.34990630326855e-04,
        -2.95459980854025e-03,
        -1.60960333262415e-02,
    )
    even = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02)
    return _rational(clamp(let(x), -4.0, 4.0), odd, even)


def sigmoid(x):
    """1 / (1 + e^-x)."""
    lanes = lanes_of(x)
    return f32(1.0, lanes) / (f32(1.0, lanes) + exp(f32(0.0, lanes) - x))


def relu(x):
    """x where it is positive (or NaN), else zero."""
    lanes = lanes_of(x)
    return T.Select(x < f32(0.0, lanes), f32(0.0, lanes), x)


def silu(x):
    """x · sigmoid(x)."""
    lanes = lanes_of(x)
    return x / (f32(1.0, lanes) + exp(f32(0.0, lanes) - x))


def gelu_erf(x):
    """x / 2 · (1 + erf(x / √2))."""
    lanes = lanes_of(x)
    return f32(0.5, lanes) * x * (f32(1.0, lanes) + erf(x * f32(0.70710678118654752, lanes)))


def gelu_tanh(x):
    """x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))."""
    lanes = lanes_of(x)
    cubic = fma(x * x * x, f32(0.044715, lanes), x)
    return f32(0.5, lanes) * x * (f32(1.0, lanes) + tanh(cubic * f32(0.79788456080286536, lanes)))


def gelu_sigmoid(x):
    """x · sigmoid(1.702 x)."""
    lanes = lanes_of(x)
    return x * sigmoid(x * f32(1.702, lanes))


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
