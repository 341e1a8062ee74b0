"""Kernels of ops that work row by row: rows taken apart and put together, rotated, and elementwise arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmc.backends.base import KernelSpec
from llmc.backends.tvm.selected import Selected, elements, given, rows_dim
from llmc.ir.op import Node, Op
from llmc.ir.ops.elementwise import ACTIVATIONS, Add, Mul, MulScalar, Sigmoid, Tanh
from llmc.ir.ops.norm import NormHeads
from llmc.ir.ops.rope import Rope
from llmc.ir.ops.shape import Concat, Expand, Slice
from llmc.ir.types import DType, TensorType, symbols_of

_PARTS = 4
"""What `kernels.columns.concat` joins at most."""


def _moves(node: Node) -> TensorType | None:
    """The type of a step's float32 rows that are only moved; None for anything else."""
    type = node.inputs[0].type
    fixed = not any(symbols_of(d) for v in (*node.inputs, *node.results) for d in v.type.shape[1:])
    return type if fixed and type.rank > 1 and type.dtype is DType.F32 and symbols_of(type.shape[0]) else None


def _concat(op: Op, node: Node) -> Selected | None:
    assert isinstance(op, Concat)
    type = _moves(node)
    if type is None or op.axis == 0 or not 2 <= len(node.inputs) <= _PARTS:
        return None
    widths = ",".join(str(elements(v.type.shape[op.axis :])) for v in node.inputs)
    rows = elements(type.shape[1 : op.axis])
    return Selected(
        KernelSpec.of("concat", rows_dim=rows_dim(type), rows=rows, widths=widths), (*node.inputs, *node.results)
    )


def _slice(op: Op, node: Node) -> Selected | None:
    assert isinstance(op, Slice)
    type = _moves(node)
    if type is None or op.axis == 0 or (op.step != 1 and op.axis != type.rank - 1):
        return None
    each = elements(type.shape[op.axis + 1 :])
    spec = KernelSpec.of(
        "columns",
        rows_dim=rows_dim(type),
        rows=elements(type.shape[1 : op.axis]),
        width=elements(type.shape[op.axis :]),
        start=op.start * each,
        count=elements(node.types[0].shape[op.axis :]),
        step=op.step,
    )
    return Selected(spec, (*node.inputs, *node.results))


def _expand(op: Op, node: Node) -> Selected | None:
    assert isinstance(op, Expand)
    type = _moves(node)
    wide = node.types[0].shape
    if type is None or len(wide) != type.rank or wide[0] != type.shape[0]:
        return None
    repeated = [i for i, (a, b) in enumerate(zip(type.shape, wide, strict=True)) if a != b]
    if len(repeated) != 1:
        return None
    (axis,) = repeated
    spec = KernelSpec.of(
        "repeat",
        rows_dim=rows_dim(type),
        rows=elements(type.shape[1:axis]),
        width=elements(type.shape[axis:]),
        times=elements(wide[axis : axis + 1]),
    )
    return Selected(spec, (*node.inputs, *node.results))


def _rope(op: Op, node: Node) -> Selected | None:
    assert isinstance(op, Rope)
    x = node.inputs[0].type
    if x.dtype is not DType.F32:
        return None
    spec = KernelSpec.of(
        "rope",
        rows_dim=rows_dim(x),
        heads=op.num_heads,
        head_dim=op.head_dim,
        rot_dim=op.rotary_dim,
        layout=op.layout,
    )
    return Selected(spec, (*node.inputs, *node.results))


def _norm_heads(op: Op, node: Node) -> Selected | None:
    x = node.inputs[0].type
    if not symbols_of(x.shape[0]) or any(v.type.dtype is not DType.F32 for v in node.inputs):
        return None
    spec = KernelSpec.of("norm_heads", rows_dim=rows_dim(x), width=elements(x.shape[1:]), **vars(op))
    return Selected(spec, (*node.inputs, *node.results))


def _add(op: Op, node: Node) -> Selected | None:
    return _elementwise("add", node)


def _multiply(op: Op, node: Node) -> Selected | None:
    return _elementwise("multiply", node)


def _scale(op: Op, node: Node) -> Selected | None:
    assert isinstance(op, MulScalar)
    return _elementwise("scale", node, factor=op.value)


def _activation(name: str) -> Callable[[Op, Node], Selected | None]:
    return lambda op, node: _elementwise("unary", node, activation=name)


def _elementwise(kind: str, node: Node, **parameters: float | str) -> Selected | None:
    """Rows of one shape, float32, or rows and a vector that is the same for all tokens."""
    type = node.types[0]
    fixed = not any(symbols_of(d) for d in type.shape[1:])
    if type.rank < 2 or type.dtype is not DType.F32 or not fixed or not symbols_of(type.shape[0]):
        return None
    inputs = node.inputs if node.inputs[0].type == type else node.inputs[::-1]
    period = 0
    if any(v.type != type for v in inputs):
        first, vector = inputs
        period = _period(type, vector.type)
        if first.type != type or not period:
            return None
    sizes = {"rows_dim": rows_dim(type), "width": elements(type.shape[1:]), **given(period=period)}
    return Selected(KernelSpec.of(kind, **sizes, **parameters), (*inputs, *node.results))


def _period(type: TensorType, vector: TensorType) -> int:
    """After how many elements a vector that broadcasts to a type is read again; 0 where that is no whole of its last
    axes."""
    shape = vector.shape
    while shape and shape[0] == 1:
        shape = shape[1:]
    if vector.dtype is not type.dtype or not shape or shape != type.shape[type.rank - len(shape) :]:
        return 0
    return 0 if len(shape) == type.rank else elements(shape)


ROWS: Mapping[type[Op], Callable[[Op, Node], Selected | None]] = {
    Concat: _concat,
    Slice: _slice,
    Expand: _expand,
    Rope: _rope,
    NormHeads: _norm_heads,
    Add: _add,
    Mul: _multiply,
    MulScalar: _scale,
    **{kind: _activation(name) for name, kind in {**ACTIVATIONS, "tanh": Tanh, "sigmoid": Sigmoid}.items()},
}
"""How kernels are chosen, by op."""
