"""Operators that only move, make or look up data: views, slices, concatenations, tensors of one number, gathers."""

from __future__ import annotations

from typing import Any

from llmc.importers.export.archive import DTYPES, ExportFailure
from llmc.importers.export.known import (
    Affine,
    Unknown,
    computed,
    constant,
    joined,
    moved,
    sliced,
    spread,
)
from llmc.importers.export.lowering import Operands, Tensor, aten, dtype_of, is_token_ids, shape_of
from llmc.ir.graph import Param
from llmc.ir.op import Value
from llmc.ir.types import Dim, DType, Linear, Shape

_END = 1 << 62
"""A slice that ends here or beyond has no end."""


@aten("_assert_tensor_metadata.default", "_assert_scalar.default", "sym_constrain_range.default")
@aten("sym_constrain_range_for_size.default", "_assert_async.msg")
def nothing(o: Operands) -> Any:
    """Checks of what the shapes say already."""
    return [None] * len(o.call.outputs)


@aten("_operator.ge", "_operator.le", "_operator.gt", "_operator.lt", "_operator.eq", "_operator.ne", "_operator.and_")
def sym_flag(o: Operands) -> Any:
    """Comparisons of sizes, which only checks read."""
    return [None]


@aten("sym_size.int")
def sym_size(o: Operands) -> Dim:
    """One size."""
    shape = shape_of(o.tensor("self"))
    return shape[o.axis("dim", len(shape))]


@aten("_operator.add", "_operator.sub", "_operator.mul", "_operator.floordiv", "_operator.neg")
def sym_arithmetic(o: Operands) -> Any:
    """Arithmetic of sizes."""
    values = o.places()
    if not all(isinstance(v, int | Linear) for v in values):
        raise ExportFailure(f"sizes must be integers or symbols, given {str(values)[:80]}")
    if o.name == "_operator.neg":
        return values[0] * -1
    x, y = values
    if o.name == "_operator.add":
        return x + y
    if o.name == "_operator.sub":
        return x - y
    if o.name == "_operator.mul":
        return y * x if isinstance(x, int) else x * y
    return x // y


@aten("alias.default", "clone.default", "contiguous.default", "detach.default", "detach_.default")
@aten("lift_fresh_copy.default", "dropout.default", "native_dropout.default", "feature_dropout.default")
@aten("_to_copy.default", "to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as.default")
def converted(o: Operands) -> Tensor:
    """The same elements, perhaps in another type. Dropout must be off."""
    if "dropout" in o.name and o.get("train", True) and o.number("p", 0.5):
        raise ExportFailure("the model was exported in training mode; call eval() before exporting it")
    x = o.tensor("self" if o.has("self") else "input")
    other = next((o.get(name) for name in ("other",) if o.has(name)), None)
    if other is not None:
        return cast(o, x, dtype_of(other))
    number = o.get("dtype")
    return x if number is None else cast(o, x, torch_dtype(number))


def torch_dtype(number: Any) -> DType:
    """An element type by its number in the archive."""
    if number not in DTYPES:
        raise ExportFailure(f"the element type {number!r:.40} is not supported; known: {sorted(DTYPES)}")
    return DTYPES[number]


def cast(o: Operands, x: Tensor, dtype: DType) -> Tensor:
    """The tensor in a type."""
    if isinstance(x, Value):
        if is_token_ids(x) or x.type.dtype is dtype:
            return x
        return o.lower.cast(o.lower.value(x), o.lower.dtype(dtype))
    if isinstance(x, Affine) and not x.line.fixed:
        return Affine(x.shape, o.lower.dtype(dtype), x.line)
    kind = bool if dtype is DType.BOOL else float if dtype.is_float else int
    return x if x.dtype is dtype else computed(kind, x, dtype=dtype)


@aten("view.default", "reshape.default", "_unsafe_view.default", "_reshape_alias.default")
def view(o: Operands) -> Tensor:
    """Another shape; one size may be -1."""
    sizes = o.shape("size" if o.has("size") else "shape")
    return viewed(o, o.tensor("self"), completed(shape_of(o.tensor("self")), sizes))


def completed(shape: Shape, sizes: Shape) -> Shape:
    """The sizes with -1 replaced by what is left."""
    if -1 not in sizes:
        return sizes
    factor, symbols = _factors(shape)
    known, used = _factors(tuple(s for s in sizes if s != -1))
    for symbol in used:
        if symbol not in symbols:
            raise ExportFailure(f"sizes {list(map(str, sizes))} do not fit a shape {list(map(str, shape))}")
        symbols.remove(symbol)
    if sizes.count(-1) > 1 or not known or factor % known or len(symbols) > 1:
        raise ExportFailure(f"sizes {list(map(str, sizes))} do not fit a shape {list(map(str, shape))}")
    left: Dim = symbols[0] * (factor // known) if symbols else factor // known
    return tuple(left if s == -1 else s for s in sizes)


def _factors(shape: Shape) -> tuple[int, list[Linear]]:
    """The number of elements as an integer and symbolic factors."""
    symbols: list[Linear] = []
    factor = 1
    for dim in shape:
        if isinstance(dim, int):
            factor *= dim
        elif not dim.constant and len(dim.terms) == 1:
            factor *= dim.terms[0][1]
            symbols.append(Linear(((dim.terms[0][0], 1),)))
        else:
            symbols.append(dim)
    return factor, symbols


def viewed(o: Operands, x: Tensor, shape: Shape) -> Tensor:
    """The tensor in a shape of as many elements."""
    if isinstance(x, Value):
        return o.lower.reshape(o.lower.value(x), shape)
    if x.number is not None:
        return constant(x.number, shape, x.dtype)
    old = [i for i, d in enumerate(x.shape) if d != 1]
    if tuple(x.shape[i] for i in old) != tuple(d for d in shape if d != 1):
        raise Unknown("indices in another order")
    rest = iter(old)
    return moved(x, shape, [None if d == 1 else next(rest) for d in shape])


@aten("unsqueeze.default")
def unsqueeze(o: Operands) -> Tensor:
    """A new axis of size 1."""
    x = o.tensor("self")
    shape = list(shape_of(x))
    shape.insert(o.axis("dim", len(shape) + 1), 1)
    return viewed(o, x, tuple(shape))


@aten("squeeze.dim", "squeeze.dims", "squeeze.default")
def squeeze(o: Operands) -> Tensor:
    """Without axes of size 1."""
    x = o.tensor("self")
    shape = shape_of(x)
    given = o.get("dim", list(range(len(shape))))
    axes = {a % len(shape) for a in (given if isinstance(given, list) else [given])}
    return viewed(o, x, tuple(d for i, d in enumerate(shape) if i not in axes or d != 1))


@aten("flatten.using_ints")
def flatten(o: Operands) -> Tensor:
    """Axes joined into one."""
    x = o.tensor("self")
    shape = shape_of(x)
    first, last = o.axis("start_dim", len(shape), 0), o.axis("end_dim", len(shape), -1)
    return viewed(o, x, completed(shape, (*shape[:first], -1, *shape[last + 1 :])))


@aten("unflatten.int")
def unflatten(o: Operands) -> Tensor:
    """One axis taken apart."""
    x = o.tensor("self")
    shape = shape_of(x)
    axis = o.axis("dim", len(shape))
    parts = completed((shape[axis],), o.shape("sizes"))
    return viewed(o, x, (*shape[:axis], *parts, *shape[axis + 1 :]))


@aten("transpose.int", "t.default", "permute.default", "numpy_T.default", "mT.default")
def permuted(o: Operands) -> Tensor:
    """Axes in another order."""
    x = o.tensor("self")
    rank = len(shape_of(x))
    axes = list(range(rank))
    if o.name == "permute.default":
        axes = [a % rank for a in o.get("dims")]
    elif o.name == "transpose.int":
        i, j = o.axis("dim0", rank), o.axis("dim1", rank)
        axes[i], axes[j] = j, i
    elif o.name == "mT.default":
        axes[-2:] = reversed(axes[-2:])
    else:
        axes.reverse()
    return transposed(o, x, axes)


def transposed(o: Operands, x: Tensor, axes: list[int]) -> Tensor:
    """The tensor with its axes in that order."""
    if isinstance(x, Value):
        result: Value = o.b.transpose(o.lower.value(x), axes=tuple(axes))
        return result
    return moved(x, tuple(x.shape[a] for a in axes), axes)


@aten("expand.default", "broadcast_to.default")
def expand(o: Operands) -> Tensor:
    """Axes of size 1 repeated; -1 keeps a size."""
    x = o.tensor("self")
    shape, sizes = shape_of(x), o.shape("size")
    new = len(sizes) - len(shape)
    wide = tuple(shape[i - new] if d == -1 else d for i, d in enumerate(sizes))
    return o.lower.expand(o.lower.value(x), wide) if isinstance(x, Value) else spread(x, wide)


@aten("repeat_interleave.self_int")
def repeat_interleave(o: Operands) -> Tensor:
    """Each element of an axis several times, one beside the other."""
    x = o.value("self")
    shape = x.type.shape
    axis, count = o.axis("dim", len(shape)), o.integer("repeats")
    narrow = o.lower.reshape(x, (*shape[: axis + 1], 1, *shape[axis + 1 :]))
    wide = o.lower.expand(narrow, (*shape[: axis + 1], count, *shape[axis + 1 :]))
    return o.lower.reshape(wide, (*shape[:axis], shape[axis] * count, *shape[axis + 1 :]))


@aten("slice.Tensor", "narrow.default")
def slice_(o: Operands) -> Tensor:
    """A range along one axis."""
    x = o.tensor("self")
    shape = shape_of(x)
    axis = o.axis("dim", len(shape), 0)
    size = shape[axis]
    start, step = o.get("start", 0), o.integer("step", 1)
    end = o.get("end")
    start = 0 if start is None else start
    if o.name == "narrow.default":
        end = start + o.get("length")
    end = size if end is None or (isinstance(end, int) and end >= _END) else end
    start, end = (v + size if isinstance(v, int) and v < 0 else v for v in (start, end))
    if isinstance(size, int) and isinstance(end, int):
        end = min(end, size)
    return cut(o, x, axis, start, end, step)


def cut(o: Operands, x: Tensor, axis: int, start: Dim, end: Dim, step: int = 1) -> Tensor:
    """Every `step`th element from `start` to `end` along an axis. The first rows of a table, as many as there are
    tokens, are its rows at the positions."""
    size = shape_of(x)[axis]
    if (start, end, step) == (0, size, 1):
        return x
    if not isinstance(start, int):
        raise ExportFailure(f"it cuts from {start} on, which depends on the number of tokens")
    length = end - start if step == 1 else -(-(end - start) // step) if isinstance(end, int) else None
    if length is None:
        raise ExportFailure(f"it takes every {step}th of the tokens")
    if not isinstance(x, Value):
        return sliced(x, axis, start, step, length)
    if isinstance(size, int) and isinstance(end, int):
        result: Value = o.b.slice(o.lower.value(x), axis=axis, start=start, stop=end, step=step)
        return result
    if start == 0 and end == o.lower.tokens and isinstance(size, int) and _is_table(x, axis):
        return _rows(o, x, axis)
    raise ExportFailure(f"it cuts {x.type} from {start} to {end} along the tokens: every token's logits are needed")


def _is_table(x: Value, axis: int) -> bool:
    return isinstance(x.op, Param) and x.type.rank - axis == 2 and all(d == 1 for d in x.type.shape[:axis])


def _rows(o: Operands, x: Value, axis: int) -> Tensor:
    rows, width = x.type.shape[axis:]
    assert isinstance(rows, int)
    o.lower.tables.append(rows)
    table = o.lower.reshape(x, (rows, width))
    found: Value = o.b.embedding(o.lower.positions, table, dtype=o.lower.dtype(x.type.dtype))
    return o.lower.reshape(found, (*x.type.shape[:axis], o.lower.tokens, width))


@aten("select.int")
def select(o: Operands) -> Tensor:
    """One element of an axis, which is dropped."""
    x = o.tensor("self")
    shape = shape_of(x)
    axis, index = o.axis("dim", len(shape)), o.integer("index")
    size = shape[axis]
    if index < 0 and not isinstance(size, int):
        raise ExportFailure("it takes one token of all: every token's logits are needed")
    start = index + size if index < 0 else index
    assert isinstance(start, int)
    return viewed(o, cut(o, x, axis, start, start + 1), (*shape[:axis], *shape[axis + 1 :]))


@aten("split.Tensor", "split_with_sizes.default", "chunk.default", "split.sizes")
def split(o: Operands) -> list[Tensor]:
    """Consecutive pieces of an axis of fixed size."""
    x = o.tensor("self")
    shape = shape_of(x)
    axis = o.axis("dim", len(shape), 0)
    size = shape[axis]
    if not isinstance(size, int):
        raise ExportFailure("it splits the tokens")
    if o.name == "chunk.default":
        each = -(-size // o.integer("chunks"))
        widths = [each] * (size // each) + ([size % each] if size % each else [])
    elif o.name == "split.Tensor":
        each = o.integer("split_size")
        widths = [each] * (size // each) + ([size % each] if size % each else [])
    else:
        widths = [int(w) for w in o.shape("split_sizes" if o.has("split_sizes") else "split_size")]  # type: ignore[arg-type]
    pieces: list[Tensor] = []
    at = 0
    for width in widths:
        pieces.append(cut(o, x, axis, at, at + width))
        at += width
    return pieces


@aten("unbind.int")
def unbind(o: Operands) -> list[Tensor]:
    """Every element of an axis of fixed size."""
    x = o.tensor("self")
    shape = shape_of(x)
    axis = o.axis("dim", len(shape), 0)
    size = shape[axis]
    if not isinstance(size, int):
        raise ExportFailure("it takes the tokens apart")
    return [viewed(o, cut(o, x, axis, i, i + 1), (*shape[:axis], *shape[axis + 1 :])) for i in range(size)]


@aten("cat.default", "stack.default")
def concatenate(o: Operands) -> Tensor:
    """Tensors joined along an axis, or along a new one."""
    parts: list[Tensor] = o.get("tensors")
    rank = len(shape_of(parts[0]))
    if o.name == "stack.default":
        axis = o.axis("dim", rank + 1, 0)
        shape = shape_of(parts[0])
        parts = [viewed(o, p, (*shape[:axis], 1, *shape[axis:])) for p in parts]
    else:
        axis = o.axis("dim", rank, 0)
    if all(isinstance(p, Affine) for p in parts):
        return joined([p for p in parts if isinstance(p, Affine)], axis)
    result: Value = o.b.concat(*(o.lower.value(p) for p in parts), axis=axis)
    return result
