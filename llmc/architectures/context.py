"""What blocks are made of: the base class, the context they are built in, and where weights come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

import numpy as np

from llmc.ir.builder import Builder
from llmc.ir.op import Op, Value
from llmc.ir.ops.elementwise import GeluErf, GeluTanh, Relu, Silu
from llmc.ir.ops.linear import Linear
from llmc.ir.types import DType

Initial: TypeAlias = Literal["normal", "ones", "small"]
"""How a random weight is drawn: a matrix, a norm's weight, a bias."""

ACTIVATIONS: dict[str, type[Op]] = {
    "gelu": GeluErf,
    "gelu_fast": GeluTanh,
    "gelu_new": GeluTanh,
    "gelu_pytorch_tanh": GeluTanh,
    "relu": Relu,
    "silu": Silu,
    "swish": Silu,
}
"""Activations by the names that configurations use."""


class Parameters(Protocol):
    """Where weights come from: a checkpoint, or random numbers."""

    def declare(self, name: str, shape: tuple[int, ...], initial: Initial) -> tuple[str, DType]:
        """The label and storage dtype of the tensor of that name. Raises when it is missing or has another shape."""
        ...

    def tie(self, name: str, to: str) -> str:
        """Say that two names mean one tensor; the name to declare (the one that is stored)."""
        ...


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines [tokens, rotary_dim / 2] of the step's positions, and which elements form a pair."""

    cos: Value
    sin: Value
    rotary_dim: int
    layout: str


@dataclass
class Context:
    """What blocks share while a graph is built: `slopes` of attention biases f32 [num_heads], where there are any, and
    how many tokens the `longest` sequence has."""

    b: Builder
    parameters: Parameters
    activation: DType
    positions: Value
    rotation: Rotation | None = None
    slopes: Value | None = None
    longest: int = 0
    layer: int = 0

    def scaled(self, x: Value, factor: float) -> Value:
        """x times a number that is rounded to the activations' dtype; no op where it is 1."""
        if factor == 1.0:
            return x
        result: Value = self.b.mul_scalar(x, value=float(np.array(factor, x.type.dtype.numpy)))
        return result

    def weight(self, shape: tuple[int, ...], initial: Initial = "normal", suffix: str = "weight") -> Value:
        """The tensor named after the present place, in its storage dtype."""
        label, dtype = self.parameters.declare(f"{self.b.loc}.{suffix}", shape, initial)
        return self.b.param(label, dtype, shape)

    def vector(self, size: int, initial: Initial, suffix: str) -> Value:
        """A norm's weight or a bias, in the activations' dtype."""
        return self.cast(self.weight((size,), initial, suffix), self.activation)

    def cast(self, x: Value, dtype: DType) -> Value:
        """The value in a dtype; no op where it has it already."""
        if x.type.dtype is dtype:
            return x
        result: Value = self.b.cast(x, dtype=dtype)
        return result

    def linear(self, name: str, x: Value, size: int, bias: bool, weights_in_out: bool) -> Value:
        """x [t, k] times a weight [size, k] (or [k, size] where `weights_in_out`), plus a bias."""
        width = x.type.shape[-1]
        assert isinstance(width, int)
        with self.b.at(name):
            if weights_in_out:
                weight = self.weight((width, size))
                y: Value = self.b.matmul(x, self.cast(weight, self.activation))
            else:
                y = Linear().decompose(self.b, x, self.weight((size, width)))
            if bias:
                y = self.b.add(y, self.vector(size, "small", "bias"))
        return y

    def activate(self, name: str, x: Value) -> Value:
        """An activation function, by the name that configurations use."""
        op = ACTIVATIONS[name]()
        with self.b.at("act_fn"):
            result: Value = op.decompose(self.b, x) if op.decomposes else self.b(op, x)
        return result


class Block(ABC):
    """A building block. Each role (norm, attention, …) has its kinds, by the name that descriptions use."""

    kinds: ClassVar[dict[str, type[Block]]]

    def __init_subclass__(cls, kind: str | None = None) -> None:
        if kind is None:
            cls.kinds = {}
        else:
            cls.kinds[kind] = cls

    @abstractmethod
    def __call__(self, c: Context, x: Value) -> Value:
        """Apply the block to x [tokens, width]."""
