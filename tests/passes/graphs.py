"""Small models in primitive form, built as importers build them: from the fused ops' own decompositions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from llmc.ir.builder import Builder
from llmc.ir.graph import Graph
from llmc.ir.op import Op, Value
from llmc.ir.ops.attention import Attention
from llmc.ir.ops.elementwise import GeluTanh, Silu
from llmc.ir.ops.linear import Linear
from llmc.ir.ops.norm import LayerNorm, RmsNorm
from llmc.ir.ops.rope import DynamicFrequencies, Rope, RotaryTable
from llmc.ir.types import DType, symbol

F32 = DType.F32


class Model(Builder):
    """A builder with the blocks that models are made of; weights are named after the place where a block stands."""

    def __init__(self, weights: DType = F32) -> None:
        super().__init__("main")
        self.weights = weights
        self.tokens = symbol("tokens", 1, 64)
        self.token_ids = self.input("token_ids", DType.I32, (self.tokens,))
        self.positions = self.input("positions", DType.I32, (self.tokens,))

    def primitive(self, op: Op, *inputs: Value) -> Value:
        """The op's decomposition, in this graph."""
        result: Value = op.decompose(self, *inputs)
        return result

    def weight(self, *shape: int, name: str = "weight") -> Value:
        """A parameter in float32, cast from its storage dtype."""
        value = self.param(f"{self.loc}.{name}", self.weights, shape)
        result: Value = value if self.weights is F32 else self.cast(value, dtype=F32)
        return result

    def project(self, name: str, x: Value, rows: int, bias: bool = False, in_out: bool = False) -> Value:
        """x times a weight stored [rows, width], or [width, rows] with `in_out`."""
        width = x.type.shape[1]
        assert isinstance(width, int)
        with self.at(name):
            if in_out:
                y: Value = self.matmul(x, self.weight(width, rows))
            else:
                y = self.primitive(Linear(), x, self.param(f"{self.loc}.weight", self.weights, (rows, width)))
            if bias:
                y = self.add(y, self.weight(rows, name="bias"))
        return y

    def table(self, width: int, scaling: float = 1.0, dynamic: bool = False) -> tuple[Value, Value]:
        """Cosines and sines of the positions; the frequencies may depend on these too."""
        if dynamic:
            places = self.cast(self.positions, dtype=F32)
            frequencies = self(DynamicFrequencies(10000.0, 2.0, 4, width), places)
        else:
            frequencies = self.constant(1 / 10000 ** (np.arange(0, width, 2) / width), F32)
        cos, sin = RotaryTable(scaling).decompose(self, self.positions, frequencies)
        return cos, sin


def rotary_model(
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 4,
    rotary: int = 4,
    layout: str = "half",
    weights: DType = F32,
    qkv_bias: bool = False,
    dynamic: bool = False,
    windows: tuple[int, ...] = (),
) -> Graph:
    """RMS norms, rotary positions, grouped queries, gated SiLU, tied head; vocabulary 11. `windows`: of each layer;
    attention is one op then."""
    b = Model(weights)
    hidden = heads * width
    table = b.param("embed.weight", weights, (11, hidden))
    with b.at("embed"):
        x = b.embedding(b.token_ids, table, dtype=F32)
    with b.at("rotary"):
        cos, sin = b.table(rotary, dynamic=dynamic)
    for layer in range(layers):
        with b.at(f"layers.{layer}"):
            with b.at("attention_norm"):
                y = b.primitive(RmsNorm(1e-5), x, b.weight(hidden))
            with b.at("attention"):
                q = b.project("query", y, hidden, qkv_bias)
                k = b.project("key", y, kv_heads * width, qkv_bias)
                v = b.project("value", y, kv_heads * width, qkv_bias)
                q = b.primitive(Rope(heads, width, rotary, layout), q, cos, sin)
                k = b.primitive(Rope(kv_heads, width, rotary, layout), k, cos, sin)
                attention = Attention(heads, kv_heads, width, width**-0.5, window=windows[layer] if windows else 0)
                y = b(attention, q, k, v, b.positions) if windows else b.primitive(attention, q, k, v, b.positions)
                y = b.project("output", y, hidden)
            x = b.add(x, y)
            with b.at("mlp_norm"):
                y = b.primitive(RmsNorm(1e-5), x, b.weight(hidden))
            with b.at("mlp"):
                gate, up = b.project("gate", y, 24), b.project("up", y, 24)
                y = b.project("down", b.mul(b.primitive(Silu(), gate), up), hidden)
            x = b.add(x, y)
    with b.at("norm"):
        x = b.primitive(RmsNorm(1e-5), x, b.weight(hidden))
    with b.at("head"):
        logits = b.primitive(Linear(), x, table)
    return b.graph({"logits": logits})


def learned_model(layers: int = 2, heads: int = 3, width: int = 4, weights: DType = F32) -> Graph:
    """Layer norms, learned positions, one joint projection stored [in, out], biases, GELU; vocabulary 11."""
    b = Model(weights)
    hidden = heads * width
    with b.at("tokens"):
        x = b.embedding(b.token_ids, b.param("tokens.weight", weights, (11, hidden)), dtype=F32)
    with b.at("places"):
        x = b.add(x, b.embedding(b.positions, b.param("places.weight", weights, (64, hidden)), dtype=F32))
    for layer in range(layers):
        with b.at(f"layers.{layer}"):
            with b.at("norm_1"):
                y = b.primitive(LayerNorm(1e-5), x, b.weight(hidden), b.weight(hidden, name="bias"))
            with b.at("attention"):
                y = b.project("joint", y, 3 * hidden, bias=True, in_out=True)
                q, k, v = (b.slice(y, axis=1, start=i * hidden, stop=(i + 1) * hidden) for i in range(3))
                y = b.primitive(Attention(heads, heads, width, width**-0.5), q, k, v, b.positions)
                y = b.project("output", y, hidden, bias=True, in_out=True)
            x = b.add(x, y)
            with b.at("norm_2"):
                y = b.primitive(LayerNorm(1e-5), x, b.weight(hidden), b.weight(hidden, name="bias"))
            with b.at("mlp"):
                y = b.project("up", y, 32, bias=True, in_out=True)
                y = b.project("down", b.primitive(GeluTanh(), y), hidden, bias=True, in_out=True)
            x = b.add(x, y)
    with b.at("norm"):
        x = b.primitive(LayerNorm(1e-5), x, b.weight(hidden), b.weight(hidden, name="bias"))
    with b.at("head"):
        logits = b.project("logits", x, 11)
    return b.graph({"logits": logits})


def latent_attention(
    b: Model,
    heads: int = 4,
    rank: int = 5,
    nope: int = 4,
    rope: int = 2,
    width: int = 3,
    weights: DType = F32,
    rotated: bool = False,
    **scores: Any,
) -> Value:
    """Fused ops: attention [t, heads · width] whose keys and values are products with a latent [t, rank]; the last
    `rope` elements of a key are those of all heads, perhaps rotated as the queries' last elements are. Operands that
    `scores` ask for are inputs."""
    t = b.tokens
    q = b.input("q", F32, (t, heads * (nope + rope)))
    c, shared = b.input("c", F32, (t, rank)), b.input("shared", F32, (t, rope))
    if rotated:
        tables = [b.input(name, F32, (t, rope // 2)) for name in ("cos", "sin")]
        split = b.reshape(q, shape=(t, heads, nope + rope))
        last = b.reshape(b.slice(split, axis=2, start=nope, stop=nope + rope), shape=(t, heads * rope))
        turned = b.reshape(b(Rope(heads, rope, rope), last, *tables), shape=(t, heads, rope))
        q = b.concat(b.slice(split, axis=2, start=0, stop=nope), turned, axis=2)
        q, shared = b.reshape(q, shape=(t, heads * (nope + rope))), b(Rope(1, rope, rope), shared, *tables)
    with b.at("attention"):
        y = b.linear(c, b.param("up.weight", weights, (heads * (nope + width), rank)))
        parts = b.reshape(y, shape=(t, heads, nope + width))
        one = b.expand(b.reshape(shared, shape=(t, 1, rope)), shape=(t, heads, rope))
        k = b.concat(b.slice(parts, axis=2, start=0, stop=nope), one, axis=2)
        v = b.slice(parts, axis=2, start=nope, stop=nope + width)
        op = Attention(heads, heads, nope + rope, 0.5, value_dim=width, **scores)
        per_head = [b.input(name, F32, (heads,)) for name in op.per_head]
        flat = (b.reshape(x, shape=(t, heads * x.type.shape[2])) for x in (k, v))
        result: Value = b(op, q, *flat, b.positions, *per_head)
    return result


def counts(graph: Graph) -> Counter[str]:
    """Nodes by op, of those that run at every step."""
    return Counter(n.op.name for n in graph.nodes if n not in graph.parameter_only)
