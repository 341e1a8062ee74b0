"""What TIR kernels share: vector loads, constants, storage conversions, and the shares of work of a task.

These are Python functions that build expressions; TVMScript calls them while a kernel is being parsed.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

STORAGE = {"f32": "float32", "f16": "float16", "bf16": "uint16"}
"""The dtype that a kernel's buffer of weights or KV has. LLVM's bf16 is avoided: its conversions are library calls."""

PREFETCH = 8192
"""Bytes by which weights are asked for ahead: a core needs some 4 KB in flight to hide the memory's latency, and the
processor's own prefetching ends at page boundaries. Past a task's share are another's share, or the next matrix."""


def wide(dtype, lanes):
    """The name of a vector type, or of the scalar."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat(value, lanes):
    """A value in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def f32(value, lanes=1):
    """A float32 constant in every lane."""
    return splat(tirx.FloatImm("float32", value), lanes)


def f64(value, lanes=1):
    """A float64 constant in every lane."""
    return splat(tirx.FloatImm("float64", value), lanes)


def i32(value, lanes=1):
    """An int32 constant in every lane."""
    return splat(tirx.IntImm("int32", value), lanes)


def u32(value, lanes=1):
    """A uint32 constant in every lane."""
    return splat(tirx.IntImm("uint32", value), lanes)


def at(index, lanes):
    """The index of `lanes` consecutive elements."""
    return index if lanes == 1 else T.ramp(index, 1, lanes)


def load(buffer, index, lanes=1):
    """`lanes` consecutive elements."""
    return buffer[at(index, lanes)]


def lanes_of(value):
    """How many lanes an expression has."""
    return int(str(value.ty.dtype).partition("x")[2] or 1)


def let(value):
    """A value under a name: for one that is used more than once. Emits its definition into the block being parsed.

    The name is a local buffer, which LLVM turns into a register. A TIR binding would do the same, but TVM's analyzer
    follows bindings into the values they were made of, and takes minutes over a polynomial of a polynomial.
    """
    lanes = lanes_of(value)
    name = T.alloc_buffer((lanes,), str(value.ty.dtype).partition("x")[0], scope="local")
    T.buffer_store(name, value, [at(0, lanes)])
    return load(name, 0, lanes)


def intrinsic(name, *arguments, dtype):
    """A pure LLVM intrinsic."""
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *arguments, dtype=dtype)


def prefetch(buffer, index):
    """Ask for the cache line of an element; one that is not there is no error."""
    T.evaluate(T.call_intrin("void", "tirx.prefetch", T.address_of(buffer[index]), 0, 3, 1))


def fma(a, b, c):
    """a · b + c, rounded once. Written out wherever a product is added: what the compiler may fuse is then decided."""
    return intrinsic("llvm.fma", a, b, c, dtype=str(c.ty.dtype))


def square_root(x):
    """The correctly rounded square root."""
    return intrinsic("llvm.sqrt", x, dtype=str(x.ty.dtype))


def tree_sum(values):
    """The sum of a power of two of scalars: elements i and i + n/2 are added, then the same again with what results."""
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def tree_max(values):
    """The greatest of a power of two of scalars, in pairs."""
    while len(values) > 1:
        half = len(values) // 2
        values = [T.Select(a > b, a, b) for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def decode(value, dtype, lanes=1):
    """Stored elements (f32, f16 or bf16 bits) as float32; exact."""
    if dtype == "f32":
        return value
    if dtype == "f16":
        return T.Cast(wide("float32", lanes), value)
    bits = T.Cast(wide("uint32", lanes), value)
    return T.reinterpret(wide("float32", lanes), T.shift_left(bits, u32(16, lanes)))


def encode(value, dtype, lanes=1):
    """float32 as stored elements, rounded to nearest even; NaN stays NaN."""
    if dtype == "f32":
        return value
    if dtype == "f16":
        return T.Cast(wide("float16", lanes), value)

    bits = let(T.reinterpret(wide("uint32", lanes), value))
    odd = T.bitwise_and(T.shift_right(bits, u32(16, lanes)), u32(1, lanes))
    nearest = T.shift_right(bits + odd + u32(0x7FFF, lanes), u32(16, lanes))
    quiet = T.bitwise_or(T.shift_right(bits, u32(16, lanes)), u32(0x40, lanes))
    nan = T.bitwise_and(bits, u32(0x7FFFFFFF, lanes)) > u32(0x7F800000, lanes)
    return T.Cast(wide("uint16", lanes), T.Select(nan, quiet, nearest))


def share(task, tasks, units):
    """The first of the consecutive units of work that belong to `task`; its last is before the next task's first."""
    whole = T.Cast("int64", units) * T.Cast("int64", task)
    return T.Cast("int32", T.truncdiv(whole, T.Cast("int64", tasks)))


def specialised(func, symbol, present):
    """The kernel under its symbol, without the parameters that `present` says are absent."""
    absent = {p for p in func.params if not present.get(p.name, True)}
    body = tirx.SeqStmt([s for s in func.body.seq if not (isinstance(s, tirx.DeclBuffer) and s.data in absent)])
    attributes = {"global_symbol": symbol, "calling_conv": 1, "tirx.noalias": True}
    kernel = tirx.PrimFunc([p for p in func.params if p not in absent], body, func.ret_type)
    for name, value in attributes.items():
        kernel = kernel.with_attr(name, value)
    return kernel
