"""How a layer arranges norms, attention and MLP around the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.architectures.attention import Attention
from llmc.architectures.context import Block, Context
from llmc.architectures.mlp import Mlp
from llmc.architectures.norms import NO_NORM, Norm
from llmc.ir.op import Value


class Layer(Block):
    """One layer. In `name`, `{layer}` is its number."""

    name: str

    def place(self, c: Context) -> str:
        """Where the layer's weights are."""
        return self.name.replace("{layer}", str(c.layer))


@dataclass(frozen=True)
class SequentialLayer(Layer, kind="sequential"):
    """x + attention(norm(x)), then x + mlp(norm(x)); what is added goes through a second norm where there is one, and
    is multiplied by `residual_scale`."""

    name: str
    attention: Attention
    mlp: Mlp
    attention_norm: Norm = NO_NORM
    attention_output_norm: Norm = NO_NORM
    mlp_norm: Norm = NO_NORM
    mlp_output_norm: Norm = NO_NORM
    residual_scale: float = 1.0

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.place(c)):
            mixed = self.attention_output_norm(c, self.attention(c, self.attention_norm(c, x)))
            x = c.b.add(x, c.scaled(mixed, self.residual_scale))
            inner = self.mlp_output_norm(c, self.mlp(c, self.mlp_norm(c, x)))
            result: Value = c.b.add(x, c.scaled(inner, self.residual_scale))
        return result


@dataclass(frozen=True)
class NormedLayer(Layer, kind="normed_sum"):
    """norm(x + attention(x)), then norm(x + mlp(x)): the norms are on the residual stream itself."""

    name: str
    attention: Attention
    mlp: Mlp
    attention_norm: Norm
    mlp_norm: Norm

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.place(c)):
            x = self.attention_norm(c, c.b.add(x, self.attention(c, x)))
            return self.mlp_norm(c, c.b.add(x, self.mlp(c, x)))


@dataclass(frozen=True)
class ParallelLayer(Layer, kind="parallel"):
    """x + attention(norm(x)) + mlp(norm(x)), with one norm for both where there is no `mlp_norm`."""

    name: str
    attention: Attention
    mlp: Mlp
    attention_norm: Norm
    mlp_norm: Norm = NO_NORM

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.place(c)):
            normal = self.attention_norm(c, x)
            inner = self.mlp(c, self.mlp_norm(c, x) if self.mlp_norm.width else normal)
            result: Value = c.b.add(c.b.add(self.attention(c, normal), inner), x)
        return result
