"""Feed-forward blocks."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.architectures.context import ACTIVATIONS, Block, Context
from llmc.architectures.settings import ConfigurationError
from llmc.ir.errors import nearest
from llmc.ir.op import Value


class Mlp(Block):
    """A feed-forward block."""

    activation: str

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            choice = nearest(self.activation, ACTIVATIONS)
            raise ConfigurationError(f"the activation {self.activation[:80]!r} is not supported; {choice}")


@dataclass(frozen=True)
class PlainMlp(Mlp, kind="plain"):
    """down(activation(up(x))). An empty `name`: its matrices stand beside the attention."""

    name: str
    up: str
    down: str
    hidden_size: int
    intermediate_size: int
    activation: str
    bias: bool = False
    weights_in_out: bool = False

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.name):
            inner = c.linear(self.up, x, self.intermediate_size, self.bias, self.weights_in_out)
            active = c.activate(self.activation, inner)
            return c.linear(self.down, active, self.hidden_size, self.bias, self.weights_in_out)


@dataclass(frozen=True)
class GatedMlp(Mlp, kind="gated"):
    """down(activation(gate(x)) * up(x)) (Shazeer, 2020)."""

    name: str
    gate: str
    up: str
    down: str
    hidden_size: int
    intermediate_size: int
    activation: str
    bias: bool = False
    weights_in_out: bool = False

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.name):
            gate = c.linear(self.gate, x, self.intermediate_size, self.bias, self.weights_in_out)
            up = c.linear(self.up, x, self.intermediate_size, self.bias, self.weights_in_out)
            inner = c.b.mul(c.activate(self.activation, gate), up)
            return c.linear(self.down, inner, self.hidden_size, self.bias, self.weights_in_out)


@dataclass(frozen=True)
class FusedGatedMlp(Mlp, kind="fused_gated"):
    """A gated MLP whose gate and up projections are one matrix: the gate's rows, then the others."""

    name: str
    gate_up: str
    down: str
    hidden_size: int
    intermediate_size: int
    activation: str
    bias: bool = False
    weights_in_out: bool = False

    def __call__(self, c: Context, x: Value) -> Value:
        width = self.intermediate_size
        with c.b.at(self.name):
            both = c.linear(self.gate_up, x, 2 * width, self.bias, self.weights_in_out)
            gate = c.b.slice(both, axis=1, start=0, stop=width)
            up = c.b.slice(both, axis=1, start=width, stop=2 * width)
            inner = c.b.mul(c.activate(self.activation, gate), up)
            return c.linear(self.down, inner, self.hidden_size, self.bias, self.weights_in_out)
