"""What an example of an op is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc.ir.op import Array, Op
from llmc.ir.types import DType, TensorType, symbol

T = symbol("t")
SIZE = 5
"""What the symbol t is in these tests."""


@dataclass(frozen=True)
class Example:
    """An op, its operands' types, what it computes written once more in numpy, and operands where random ones will not
    do."""

    op: Op
    types: tuple[TensorType, ...]
    expected: Callable[..., Any]
    given: dict[int, Array] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.op.name + "-" + "-".join(map(str, self.types))


def f(*shape: Any) -> TensorType:
    return TensorType(DType.F32, shape)


def i(*shape: Any) -> TensorType:
    return TensorType(DType.I32, shape)


def silu(x: Array) -> Any:
    return x / (1 + np.exp(-x))
