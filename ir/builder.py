"""The one vocabulary: importers, blocks, patterns, rewrites and tests all write `b.rms_norm(x, w, eps=…)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph, Input, Param, State, StateInput
from llmc.ir.op import ConstantData, Emitter, Node, Value
from llmc.ir.ops.shape import Constant
from llmc.ir.types import DType, Shape, TensorType


class Builder(Emitter):
    """Builds a graph from leaves and ops. Every op of the registry is a method (see `Emitter`)."""

    def __init__(self, name: str = "main") -> None:
        self.graph_name = name
        self.inputs: dict[str, Value] = {}
        self.params: dict[str, Value] = {}
        self.states: dict[str, Value] = {}

    def input(self, label: str, dtype: DType, shape: Shape) -> Value:
        """A run-time input, made on first use."""
        return self._leaf(self.inputs, label, Input(label), TensorType(dtype, shape))

    def param(self, label: str, dtype: DType, shape: Shape) -> Value:
        """A weight, made on first use: asking again (a tied weight) gives the same value."""
        return self._leaf(self.params, label, Param(label), TensorType(dtype, shape))

    def state(self, state: State) -> Value:
        """A state's value at the start of the step."""
        return self._leaf(self.states, state.name, StateInput(state), TensorType(state.dtype, state.shape))

    def constant(self, array: npt.ArrayLike, dtype: DType) -> Value:
        """An array known now."""
        made: Value = self(Constant(dtype, ConstantData(dtype.store(np.asarray(array)))))
        return made

    @contextmanager
    def at(self, loc: str) -> Iterator[None]:
        """Nodes made inside carry `outer.loc` as their place in the source model, or `outer` where `loc` is empty."""
        outer = self.loc
        self.loc = f"{outer}.{loc}" if outer and loc else outer or loc
        try:
            yield
        finally:
            self.loc = outer

    def graph(self, outputs: dict[str, Value], next_states: dict[str, Value] | None = None) -> Graph:
        """The finished graph. `next_states` gives the new value of each state that changed."""
        following = next_states or {}
        return Graph(
            self.graph_name,
            tuple(self.inputs.values()),
            tuple(self.params.values()),
            tuple(self.states.values()),
            tuple(outputs.items()),
            tuple(following.get(name, value) for name, value in self.states.items()),
        )

    def _leaf(self, table: dict[str, Value], label: str, op: Any, type: TensorType) -> Value:
        known = table.get(label)
        if known is None:
            table[label] = known = Value(Node(op, (), (type,), ""))
        elif known.type != type:
            raise LlmcError(f"{op.name} {label!r} was declared as {known.type} and is now asked for as {type}")
        return known
