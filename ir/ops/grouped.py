"""A matrix product for each of several groups of columns."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.ir.op import Emitter, Op, Value
from llmc.ir.types import TensorType


@dataclass(frozen=True)
class GroupedLinear(Op):
    """Every group of x's columns times a weight of its own. Operands: x [t, groups · k], weight [groups, n, k] in its
    storage dtype; result [t, groups · n], in which group g is x[:, g · k : (g + 1) · k] @ weight[g]ᵀ."""

    groups: int

    stage = "fused"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 2 and types[0].rank == 2 and types[1].rank == 3, "x and weight", *types)
        x, weight = types
        groups, n, k = weight.shape
        self.expects(groups == self.groups, f"weight [{self.groups}, n, k]", *types)
        self.expects(x.shape[1] == k * self.groups, "x [t, groups * k]", *types)
        return (TensorType(x.dtype, (x.shape[0], n * self.groups)),)

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, weight = values
        tokens, (_, n, k) = x.type.shape[0], weight.type.shape
        if weight.type.dtype is not x.type.dtype:
            weight = b.cast(weight, dtype=x.type.dtype)
        parts = b.transpose(b.reshape(x, shape=(tokens, self.groups, k)), axes=(1, 0, 2))
        products = b.matmul(parts, b.transpose(weight, axes=(0, 2, 1)))
        result: Value = b.reshape(b.transpose(products, axes=(1, 0, 2)), shape=(tokens, n * self.groups))
        return result
