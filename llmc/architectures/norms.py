"""Norms over the last axis, as descriptions name them."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.architectures.context import Block, Context
from llmc.ir.op import Value
from llmc.ir.types import DType


class Norm(Block):
    """A normalisation over the last axis."""

    @property
    def width(self) -> int:
        """How many elements it normalises together; 0 where it does nothing."""
        return int(getattr(self, "hidden_size", 0))


@dataclass(frozen=True)
class NoNorm(Norm, kind="none"):
    """No norm at all."""

    def __call__(self, c: Context, x: Value) -> Value:
        return x


NO_NORM = NoNorm()


@dataclass(frozen=True)
class RmsNormBlock(Norm, kind="rms_norm"):
    """Root-mean-square norm in float32.

    The weight is multiplied after the cast back to the activations' dtype, or before it where `wide_weight`;
    `plus_one`: what is stored is the weight minus 1.
    """

    name: str
    hidden_size: int
    norm_eps: float
    wide_weight: bool = False
    plus_one: bool = False

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.name):
            wide = c.cast(x, DType.F32)
            scale = c.b.rsqrt(c.b.add_scalar(c.b.mean(c.b.mul(wide, wide)), value=self.norm_eps))
            normal = c.b.mul(wide, scale)
            dtype = DType.F32 if self.wide_weight else c.activation
            weight = c.cast(c.weight((self.hidden_size,), "small" if self.plus_one else "ones"), dtype)
            if self.plus_one:
                weight = c.b.add_scalar(weight, value=1.0)
            return c.cast(c.b.mul(c.cast(normal, dtype), weight), c.activation)


@dataclass(frozen=True)
class LayerNormBlock(Norm, kind="layer_norm"):
    """Mean and variance norm in float32, weight and, where `norm_bias`, bias included."""

    name: str
    hidden_size: int
    norm_eps: float
    norm_bias: bool = True

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.name):
            wide = c.cast(x, DType.F32)
            weight = c.cast(c.weight((self.hidden_size,), "ones", "weight"), DType.F32)
            centred = c.b.sub(wide, c.b.mean(wide))
            scale = c.b.rsqrt(c.b.add_scalar(c.b.mean(c.b.mul(centred, centred)), value=self.norm_eps))
            normal = c.b.mul(c.b.mul(centred, scale), weight)
            if self.norm_bias:
                normal = c.b.add(normal, c.cast(c.weight((self.hidden_size,), "small", "bias"), DType.F32))
            return c.cast(normal, c.activation)
