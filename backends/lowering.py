"""What lowerings share: a node becomes ops that have kernels, or what it is made of does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from llmc.backends.buffers import is_view
from llmc.ir.errors import NoKernel
from llmc.ir.op import Emitter, Hole, Node, Op, Value, as_tuple, topological
from llmc.ir.printer import op_text


class Lowering(ABC):
    """A subclass says which nodes have kernels, and what else takes a node's place."""

    processor: ClassVar[str]
    """`CPU` or `GPU`, for errors."""

    @abstractmethod
    def has_kernel(self, node: Node) -> bool:
        """Whether a kernel runs the node."""

    @abstractmethod
    def lowered(self, b: Emitter, node: Node, inputs: tuple[Value, ...]) -> Value | tuple[Value, ...]:
        """The node in ops that have kernels; `inputs` are its operands, lowered already."""

    def kernel_or_parts(self, b: Emitter, node: Node) -> tuple[Value, ...]:
        """The node itself where it has a kernel, else its decomposition, lowered in turn. Raises `NoKernel` naming a
        node that has neither."""
        if is_view(node) or self.has_kernel(node):
            return node.results
        if not node.op.decomposes:
            name, attributes = op_text(node.op)
            types = ", ".join(str(v.type) for v in node.inputs)
            place = node.loc or "no place"
            raise NoKernel(f"no {self.processor} kernel for {name}({types}){attributes} at {place}, a primitive op")
        holes, results = node.op.expand([v.type for v in node.inputs])
        new = dict(zip(holes, node.inputs, strict=True))
        for inner in topological(v.node for v in results):
            if isinstance(inner.op, Hole):
                continue
            try:
                made = self.lowered(b, inner, tuple(new[v] for v in inner.inputs))
            except NoKernel as error:
                raise NoKernel(f"{error}, part of {node.op.name}") from None
            new.update(zip(inner.results, as_tuple(made), strict=True))
        return tuple(new[v] for v in results)

    def emit(self, b: Emitter, op: Op, *inputs: Value) -> Value:
        """The only result of an op that has a kernel."""
        made = b.make(op, inputs)
        assert self.has_kernel(made), made
        return made.results[0]
