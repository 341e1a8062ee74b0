"""What stands between the product of queries and keys and the softmax: scales, a cap, biases and masks.

It is read from the outside in. A factor that applies to a sum applies to each addend, so scales may stand anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmc.ir.op import Node, Value
from llmc.ir.ops.elementwise import Add, Cast, Div, Mask, Mul, MulScalar, Neg, Tanh
from llmc.ir.ops.linear import Matmul
from llmc.ir.ops.shape import Expand, Reshape
from llmc.ir.types import DType
from llmc.passes.attention_mask import Condition, Refused, conditions
from llmc.passes.position_forms import Form, form, single, squeezed

_HIDDEN = -1e30
"""Scores at or below this weigh exactly nothing after a softmax in any of our dtypes."""

_HIDDEN_F16 = -65504.0
"""The lowest number of f16, which masks of that dtype use."""


@dataclass(frozen=True)
class Bias:
    """factor · slopes · form: what is added to a score by where its key and its query are. Without `slopes` (a value
    with one number for each head) it is the same for all heads."""

    slopes: Value | None
    form: Form
    node: Node


@dataclass
class Scores:
    """scale · product, capped, with biases, where the conditions hold. `nodes` are those of the chain itself: masks
    and biases may be shared between layers."""

    product: Value
    scale: float = 1.0
    soft_cap: float = 0.0
    conditions: list[Condition] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    nodes: set[Node] = field(default_factory=set)


def read_scores(value: Value) -> Scores:
    """What a softmax's operand [heads, queries, keys] is made of. Raises `Refused` where it is something else."""
    found = Scores(value)
    factor = 1.0
    masked = False
    while not isinstance(found.product.op, Matmul):
        value = found.product
        node, op = value.node, value.op
        scaled = unscaled(value)
        if scaled is not None:
            found.product, step = scaled
            factor *= step
        elif isinstance(op, Mask):
            _check_hidden(op, factor, value)
            masked = True
            found.product, visible = node.inputs
            found.conditions += conditions(visible)
        elif isinstance(op, Add) and any(_reaches_product(v) for v in node.inputs):
            first = _reaches_product(node.inputs[0])
            found.product, bias = node.inputs if first else node.inputs[::-1]
            masked = _add_bias(found, bias, factor) or masked
        elif isinstance(op, Reshape) and squeezed(op.shape) == squeezed(node.inputs[0].type.shape):
            (found.product,) = node.inputs
        elif isinstance(op, Tanh) and not found.soft_cap:
            found.soft_cap = abs(factor)
            (found.product,) = node.inputs
        elif not masked:
            raise Refused(f"the scores are not masked (found {op.name}): this is not causal", node, 2)
        else:
            raise Refused(f"want the product of queries and keys, found {op.name}", node, 4)
        if found.soft_cap and isinstance(op, Mask | Add):
            raise Refused(f"{op.name} stands before the cap of the scores, want it after", node, 4)
        found.nodes.add(node)
    if not found.conditions:
        raise Refused("the scores are not masked (found matmul): this is not causal", found.product.node, 2)
    found.nodes.add(found.product.node)
    found.scale = factor
    return found


def unscaled(value: Value) -> tuple[Value, float] | None:
    """What a number is multiplied with, and the number; None where nothing is."""
    op, inputs = value.op, value.node.inputs
    match op:
        case MulScalar():
            return inputs[0], op.value
        case Neg():
            return inputs[0], -1.0
        case Mul() | Div():
            x, y = inputs
            number = single(y)
            if number and x.type.shape == value.type.shape:
                return x, number if isinstance(op, Mul) else 1.0 / number
            number = single(x)
            if isinstance(op, Mul) and number and y.type.shape == value.type.shape:
                return y, number
    return None


def _check_hidden(op: Mask, factor: float, value: Value) -> None:
    """A hidden score must weigh nothing, whatever the others are."""
    lowest = _HIDDEN_F16 if value.type.dtype is DType.F16 else _HIDDEN
    if op.value * factor > lowest:
        raise Refused(f"masked scores become {op.value * factor}, want -inf", value.node, 3)


def _reaches_product(value: Value) -> bool:
    """Whether a value is made of a product of two others by what may stand between that and a softmax."""
    while not isinstance(value.op, Matmul):
        if isinstance(value.op, Add | Mul):
            return any(_reaches_product(v) for v in value.node.inputs)
        if not isinstance(value.op, Mask | MulScalar | Neg | Div | Tanh | Reshape):
            return False
        value = value.node.inputs[0]
    return True


def _add_bias(found: Scores, value: Value, factor: float) -> bool:
    """Read an addend of scores: masks, biases by position, sums of them. Whether there was a mask."""
    node, op = value.node, value.op
    if single(value) == 0.0:
        return False
    if isinstance(op, Mask):
        _check_hidden(op, factor, value)
        rest, visible = node.inputs
        found.conditions += conditions(visible)
        _add_bias(found, rest, factor)
        return True
    if isinstance(op, Reshape | Expand) and _keeps_axes(value):
        return _add_bias(found, node.inputs[0], factor)
    by_position = _bias(value, factor)
    if by_position is not None:
        found.biases.append(by_position)
        return False
    if isinstance(op, Add):
        masked = [_add_bias(found, v, factor) for v in node.inputs]
        return any(masked)
    raise Refused(f"{op.name} is added to the scores, which is neither a mask nor slope · position", node, 4)


def _keeps_axes(value: Value) -> bool:
    """Whether a reshape or an expansion only adds or drops leading axes of size 1 or repeats axes."""
    if isinstance(value.op, Expand):
        return True
    before, after = value.node.inputs[0].type.shape, value.type.shape
    rank = min(len(before), len(after))
    return before[len(before) - rank :] == after[len(after) - rank :]


def _bias(value: Value, factor: float) -> Bias | None:
    """A number for each head times a form of positions, or such a form alone."""
    node = value.node
    while (scaled := unscaled(value)) is not None:
        value, step = scaled
        factor *= step
    alone = form(value)
    if alone is not None:
        return Bias(None, alone.times(factor), node)
    if not isinstance(value.op, Mul):
        return None
    for slopes, places in (value.node.inputs, value.node.inputs[::-1]):
        by_head, by_place = _of_heads(slopes), form(places)
        if by_head is not None and by_place is not None:
            return Bias(by_head, by_place.times(factor), node)
    return None


def _of_heads(value: Value) -> Value | None:
    """What has one number for each head, [.., heads, 1, 1], and none for tokens; without casts that lose nothing."""
    shape = value.type.shape
    if len(shape) < 3 or shape[-2:] != (1, 1) or any(d != 1 for d in shape[:-3]) or value.type.symbols:
        return None
    while isinstance(value.op, Cast) and value.node.inputs[0].type.dtype is DType.F32:
        (value,) = value.node.inputs
    return value
