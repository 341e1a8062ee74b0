"""The building blocks that descriptions name: norms, attention, MLPs, and how a layer arranges them.

A block is a frozen dataclass. Its fields are read from its table in the description; a number, flag or text that the
table leaves out is the `[config]` value of the same name, else the field's default. Names are module names: a weight is
called after the place where the block stands (`model.layers.3.self_attn.q_proj` + `.weight`). Blocks write primitive
ops, in the forms that the fused ops decompose to.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.architectures.context import ACTIVATIONS, Block, Context
from llmc.architectures.settings import ConfigurationError
from llmc.ir.errors import nearest
from llmc.ir.op import Value
from llmc.ir.ops import attention as attention_ops
from llmc.ir.ops.rope import Rope
from llmc.ir.types import DType


class Norm(Block):
    """A normalisation over the last axis."""


@dataclass(frozen=True)
class RmsNormBlock(Norm, kind="rms_norm"):
    """Root-mean-square norm in float32, cast back before the weight is applied."""

    name: str
    hidden_size: int
    norm_eps: float

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.name):
            wide = c.cast(x, DType.F32)
            scale = c.b.rsqrt(c.b.add_scalar(c.b.mean(c.b.mul(wide, wide)), value=self.norm_eps))
            normal = c.cast(c.b.mul(wide, scale), c.activation)
            result: Value = c.b.mul(normal, c.vector(self.hidden_size, "ones", "weight"))
        return result


@dataclass(frozen=True)
class LayerNormBlock(Norm, kind="layer_norm"):
    """Mean and variance norm in float32, weight and bias included."""

    name: str
    hidden_size: int
    norm_eps: float

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.name):
            wide = c.cast(x, DType.F32)
            weight = c.cast(c.weight((self.hidden_size,), "ones", "weight"), DType.F32)
            bias = c.cast(c.weight((self.hidden_size,), "small", "bias"), DType.F32)
            centred = c.b.sub(wide, c.b.mean(wide))
            scale = c.b.rsqrt(c.b.add_scalar(c.b.mean(c.b.mul(centred, centred)), value=self.norm_eps))
            return c.cast(c.b.add(c.b.mul(c.b.mul(centred, scale), weight), bias), c.activation)


class Attention(Block):
    """Self-attention."""


@dataclass(frozen=True)
class Heads:
    """What every attention has: heads, scale and output projection. Scores are q·k / √head_dim by default."""

    name: str
    output: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    weights_in_out: bool = False
    scaled: bool = True
    scale_by_inverse_layer: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigurationError(
                f"the number of attention heads must be a multiple of that of key-value heads,"
                f" given {self.num_heads} and {self.num_kv_heads}"
            )

    def attend(self, c: Context, q: Value, k: Value, v: Value) -> Value:
        """Rotate, attend, project: q [t, num_heads · head_dim], k and v [t, num_kv_heads · head_dim]."""
        if c.rotation is not None:
            r = c.rotation
            q = Rope(self.num_heads, self.head_dim, r.rotary_dim, r.layout).decompose(c.b, q, r.cos, r.sin)
            k = Rope(self.num_kv_heads, self.head_dim, r.rotary_dim, r.layout).decompose(c.b, k, r.cos, r.sin)
        scale = self.head_dim**-0.5 if self.scaled else 1.0
        if self.scale_by_inverse_layer:
            scale /= c.layer + 1
        op = attention_ops.Attention(self.num_heads, self.num_kv_heads, self.head_dim, scale)
        mixed = op.decompose(c.b, q, k, v, c.positions)
        return c.linear(self.output, mixed, self.hidden_size, self.output_bias, self.weights_in_out)


@dataclass(frozen=True)
class SeparateAttention(Heads, Attention, kind="separate"):
    """Attention whose query, key and value projections are three matrices."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"

    def __call__(self, c: Context, x: Value) -> Value:
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        with c.b.at(self.name):
            q = c.linear(self.query, x, wide, self.qkv_bias, self.weights_in_out)
            k = c.linear(self.key, x, narrow, self.qkv_bias, self.weights_in_out)
            v = c.linear(self.value, x, narrow, self.qkv_bias, self.weights_in_out)
            return self.attend(c, q, k, v)


@dataclass(frozen=True)
class FusedAttention(Heads, Attention, kind="fused"):
    """Attention whose one projection gives all queries, then all keys, then all values."""

    qkv: str = "qkv_proj"

    def __call__(self, c: Context, x: Value) -> Value:
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        total = wide + 2 * narrow
        with c.b.at(self.name):
            y = c.linear(self.qkv, x, total, self.qkv_bias, self.weights_in_out)
            with c.b.at(self.qkv):
                q = c.b.slice(y, axis=1, start=0, stop=wide)
                k = c.b.slice(y, axis=1, start=wide, stop=wide + narrow)
                v = c.b.slice(y, axis=1, start=wide + narrow, stop=total)
            return self.attend(c, q, k, v)


class Mlp(Block):
    """A feed-forward block."""

    activation: str

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            choice = nearest(self.activation, ACTIVATIONS)
            raise ConfigurationError(f"the activation {self.activation[:80]!r} is not supported; {choice}")


@dataclass(frozen=True)
class PlainMlp(Mlp, kind="plain"):
    """down(activation(up(x)))."""

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


class Layer(Block):
    """One layer: how norms, attention and MLP are arranged around the residual stream."""


@dataclass(frozen=True)
class SequentialLayer(Layer, kind="sequential"):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    name: str
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.name.replace("{layer}", str(c.layer))):
            x = c.b.add(x, self.attention(c, self.attention_norm(c, x)))
            result: Value = c.b.add(x, self.mlp(c, self.mlp_norm(c, x)))
        return result
