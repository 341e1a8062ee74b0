"""Walking a subgraph: through ops that only look at data another way, however many there are, or giving up."""

from __future__ import annotations

from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.shape import Reshape, Transpose
from llmc.ir.pattern import NoMatch
from llmc.ir.types import Shape


class Refused(Exception):
    """Why a subgraph is not what a rule looks for; raised while it is walked, `refusal` says it to the rule."""

    def __init__(self, reason: str, node: Node, depth: int) -> None:
        super().__init__(reason)
        self.refusal = NoMatch(reason, node, depth)


def reshaped(b: Emitter, value: Value, shape: Shape) -> Value:
    """The value in another shape, without a detour through shapes it had before."""
    while value.type.shape != shape and isinstance(value.op, Reshape):
        value = value.node.inputs[0]
    if value.type.shape == shape:
        return value
    result: Value = b.reshape(value, shape=shape)
    return result


def through_reshapes(value: Value) -> Value:
    """What a chain of reshapes starts from."""
    while isinstance(value.op, Reshape):
        value = value.node.inputs[0]
    return value


def through_transposes(value: Value) -> tuple[Value, tuple[int, ...]]:
    """What a chain of transposes starts from, and the one permutation that they make."""
    axes = tuple(range(value.type.rank))
    while isinstance(value.op, Transpose):
        inner = value.op.axes
        axes = tuple(inner[a] for a in axes)
        value = value.node.inputs[0]
    return value, axes
