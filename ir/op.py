"""Operators, nodes and values: an op's attributes, types, meaning, cost and expansion stand in one class."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from llmc.ir.errors import LlmcError, TypeMismatch, nearest
from llmc.ir.types import TensorType

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Cost:
    """Work and traffic of one execution, in operations and bytes."""

    flops: int
    bytes_read: int
    bytes_written: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.bytes_read + other.bytes_read, self.bytes_written + other.bytes_written
        )

    @property
    def bytes(self) -> int:
        """Bytes moved, both ways."""
        return self.bytes_read + self.bytes_written


class ConstantData:
    """An immutable array with value semantics: equal when dtype, shape and bytes are."""

    def __init__(self, array: Array) -> None:
        self.array = np.ascontiguousarray(array).copy().reshape(np.shape(array))
        self.array.flags.writeable = False

    @cached_property
    def sha256(self) -> str:
        """Name of the constant: a hash of its dtype, shape and bytes."""
        digest = hashlib.sha256(f"{self.array.dtype}{self.array.shape}".encode())
        digest.update(self.array.tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConstantData) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"ConstantData({self.array.dtype}{list(self.array.shape)})"


@dataclass(frozen=True, eq=False)
class Node:
    """One application of an op. Identity is the object; `loc` says which part of the source model it came from."""

    op: Op
    inputs: tuple[Value, ...]
    types: tuple[TensorType, ...]
    loc: str = ""

    @property
    def results(self) -> tuple[Value, ...]:
        """The node's results as values."""
        return tuple(Value(self, i) for i in range(len(self.types)))

    def __repr__(self) -> str:
        return f"{self.op.name}({', '.join(str(v.type) for v in self.inputs)})" + (f" @{self.loc}" if self.loc else "")


@dataclass(frozen=True)
class Value:
    """Result `index` of a node."""

    node: Node
    index: int = 0

    @property
    def type(self) -> TensorType:
        """Its tensor type."""
        return self.node.types[self.index]

    @property
    def op(self) -> Op:
        """The op that makes it."""
        return self.node.op


class Op:
    """One operator: a frozen dataclass whose fields are its attributes.

    A subclass gives either `infer`, `reference` and `cost` (a primitive), or `decompose` (a fused op): then the other
    three follow from the expansion. `stage` says from which stage of compilation on it may occur.
    """

    registry: ClassVar[dict[str, type[Op]]] = {}
    name: ClassVar[str]
    stage: ClassVar[str] = "primitive"
    """`primitive` (importers write these), `fused`, or `step` (paged state, ragged batches)."""
    elementwise: ClassVar[bool] = False
    """Each result element depends on the operands' elements at the same (broadcast) place only."""
    commutative: ClassVar[bool] = False
    """The two operands may change places."""
    moves_data: ClassVar[bool] = False
    """Only copies elements: no arithmetic, so it works on storage arrays of any dtype."""
    result_count: ClassVar[int] = 1
    """How many results it has."""
    leaf: ClassVar[bool] = False
    """Whether its value comes from outside: an input, a parameter, a state, a hole."""
    updates: ClassVar[Mapping[int, int]] = MappingProxyType({})
    """Which operand (a state) each result replaces: operand index -> result index."""

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if abstract:
            return
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        known = Op.registry.get(cls.name)
        assert known is None or known.__qualname__ == cls.__qualname__, f"two ops are named {cls.name}"
        Op.registry[cls.name] = cls

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        """Types of the results. Raises `TypeMismatch` naming the op, the operand and what was expected."""
        return tuple(v.type for v in self.expand(types)[1])

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """The results in float64 (integers in int64): the oracle. Shares no code with any kernel."""
        raise NotImplementedError(f"{self.name} defines neither reference nor decompose")

    def evaluate(
        self, types: Sequence[TensorType], arrays: Sequence[Array], sizes: Mapping[str, int]
    ) -> tuple[Array, ...]:
        """`reference`, or the expansion run op by op where there is one. `sizes` gives the symbols' values."""
        if not self.decomposes:
            return self.reference(*arrays)
        holes, results = self.expand(types)
        return tuple(run(results, dict(zip(holes, arrays, strict=True)), sizes))

    def pack(
        self, types: Sequence[TensorType], results: Sequence[TensorType], arrays: Sequence[Array]
    ) -> tuple[Array, ...]:
        """The results as storage arrays, from storage arrays: what the pack program runs. Data movement works on them
        as they are, arithmetic in float64."""
        if self.moves_data and arrays:
            return self.evaluate(types, arrays, {})
        oracles = [a.astype(t.dtype.oracle) for a, t in zip(arrays, types, strict=True)]
        return tuple(t.dtype.store(r) for r, t in zip(self.evaluate(types, oracles, {}), results, strict=True))

    def cost(self, *types: TensorType) -> Cost:
        """Work of one execution for types without symbols: operations of the expansion, bytes of the boundary only."""
        results = self.infer(*types)
        read, written = self.bytes_read(types), sum(t.bytes for t in results)
        if not self.decomposes:
            return Cost(self.operations(types, results), read, written)
        flops = sum(
            n.op.cost(*(v.type for v in n.inputs)).flops
            for n in topological(v.node for v in self.expand(types)[1])
            if not isinstance(n.op, Hole)
        )
        return Cost(flops, read, written)

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        """Bytes of the operands; less where an op reads only a part of one, or one is stored denser than its type."""
        return sum(t.bytes for t in operands)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        """Arithmetic operations of a primitive: by default one for each result element of an elementwise op."""
        return sum(t.elements for t in results) if self.elementwise else 0

    def decompose(self, b: Emitter, *values: Value) -> Any:
        """The same computation in simpler ops; a Value or a tuple of them."""
        raise NotImplementedError(f"{self.name} is primitive")

    @property
    def decomposes(self) -> bool:
        """Whether this op can be written with simpler ones."""
        return type(self).decompose is not Op.decompose

    def expand(self, types: Iterable[TensorType]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
        """The decomposition traced on holes of the given types: (holes, results)."""
        holes = tuple(Value(Node(Hole(i), (), (t,))) for i, t in enumerate(types))
        try:
            return holes, as_tuple(self.decompose(Emitter(), *holes))
        except ValueError:  # raised where a decomposition unpacks its operands
            raise TypeMismatch(f"{self.name} does not take {len(holes)} operands") from None

    def expects(self, condition: bool, what: str, *given: object) -> None:
        """Raise `TypeMismatch` unless the condition holds."""
        if not condition:
            stated = [f for f in fields(self) if f.default is MISSING or f.default != getattr(self, f.name)]  # type: ignore[arg-type]
            attributes = ", ".join(f"{f.name}={_shown(getattr(self, f.name))}" for f in stated)
            written = f"{self.name}{{{attributes}}}" if attributes else self.name
            raise TypeMismatch(f"{written}: expected {what}; given {', '.join(map(str, given)) or 'something else'}")


def _shown(attribute: object) -> str:
    return f"[{', '.join(map(_shown, attribute))}]" if isinstance(attribute, tuple) else str(attribute)


@dataclass(frozen=True)
class Hole(Op):
    """Stands for an operand while a decomposition is traced; never occurs in a graph."""

    index: int

    leaf = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        raise LlmcError("a hole has no type of its own")


class Emitter:
    """Makes nodes: `b.rms_norm(x, w, eps=1e-5)` for every op in the registry, or `b(RmsNorm(1e-5), x, w)`.

    A node with one result gives a Value, one with several a tuple of Values.
    """

    loc: str = ""

    def __call__(self, op: Op, *inputs: Value) -> Any:
        node = self.make(op, inputs)
        return node.results[0] if op.result_count == 1 else node.results

    def one(self, op: Op, *inputs: Value) -> Value:
        """The only result of an op, typed as such."""
        (result,) = self.make(op, inputs).results
        return result

    def make(self, op: Op, inputs: tuple[Value, ...]) -> Node:
        """The node itself, its types inferred."""
        return Node(op, inputs, op.infer(*(v.type for v in inputs)), self.loc)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        kind = Op.registry.get(name)
        if kind is None:
            raise LlmcError(f"there is no op {name!r}; {nearest(name, Op.registry)}")
        return lambda *inputs, **attributes: self(kind(**attributes), *inputs)


def as_tuple(values: Any) -> tuple[Value, ...]:
    """One value or several, as a tuple."""
    return values if isinstance(values, tuple) else (values,)


def topological(roots: Iterable[Node]) -> Iterator[Node]:
    """Every node that the roots reach, operands first, in a deterministic order; iterative, so depth is no limit."""
    done: set[Node] = set()
    for root in roots:
        stack = [(root, iter(root.inputs))]
        if root in done:
            continue
        while stack:
            node, pending = stack[-1]
            following = next((v.node for v in pending if v.node not in done), None)
            if following is not None:
                stack.append((following, iter(following.inputs)))
                continue
            stack.pop()
            if node not in done:
                done.add(node)
                yield node


def run(
    results: Sequence[Value],
    values: dict[Value, Array],
    sizes: Mapping[str, int],
    load: Callable[[Value], Array] | None = None,
) -> list[Array]:
    """Evaluate values from given leaves (inputs, holes), op by op, by each op's reference.

    `load` gives a leaf that `values` lacks, when it is needed and each time anew, so that weights stream through;
    what nothing needs any more is dropped.
    """
    nodes = [n for n in topological(v.node for v in results) if not n.op.leaf]
    pending: dict[Value, int] = {}
    for value in (*(v for n in nodes for v in n.inputs), *results):
        pending[value] = pending.get(value, 0) + 1

    def take(value: Value) -> Array:
        if value not in values:
            assert load is not None
            return load(value)
        pending[value] -= 1
        return values[value] if pending[value] else values.pop(value)

    for node in nodes:
        arrays = node.op.evaluate([v.type for v in node.inputs], [take(v) for v in node.inputs], sizes)
        for value, array in zip(node.results, arrays, strict=True):
            if pending.get(value):
                values[value] = array
    return [take(v) for v in results]
