"""Attention blocks: where queries, keys and values come from, and how heads attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmc.architectures.context import Block, Context
from llmc.architectures.norms import NO_NORM, Norm
from llmc.architectures.settings import ZERO, ConfigurationError, Count
from llmc.ir.op import Value
from llmc.ir.ops import attention as attention_ops
from llmc.ir.ops.rope import Rope


class Attention(Block):
    """Self-attention."""


@dataclass(frozen=True)
class Heads:
    """What every attention has: heads, scores and output projection.

    Scores are q·k · `scale`, by default 1 / √head_dim. `window`, `soft_cap`: see the op `attention`; 0 for none.
    `sinks`: the name of the parameter with a logit for each head, or empty. `query_norm` and `key_norm` come before the
    rotation, over each head where they are as wide as one, else over all heads together. `rotated`: false for layers
    without positions in a model that has them.
    """

    name: str
    output: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    weights_in_out: bool = False
    scale: float | None = None
    window: Count = ZERO
    soft_cap: float = 0.0
    sinks: str = ""
    query_norm: Norm = NO_NORM
    key_norm: Norm = NO_NORM
    rotated: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigurationError(
                f"the number of attention heads must be a multiple of that of key-value heads,"
                f" given {self.num_heads} and {self.num_kv_heads}"
            )

    @property
    def key_value_width(self) -> int:
        """Of all keys, or of all values, of a token."""
        return self.num_kv_heads * self.head_dim

    def attend(self, c: Context, q: Value, k: Value, v: Value) -> Value:
        """Normalise, rotate, attend, project: q [t, num_heads · head_dim], k and v [t, num_kv_heads · head_dim]."""
        q = self._normal(c, self.query_norm, q, self.num_heads)
        k = self._normal(c, self.key_norm, k, self.num_kv_heads)
        if c.rotation is not None and self.rotated:
            r = c.rotation
            q = Rope(self.num_heads, self.head_dim, r.rotary_dim, r.layout).decompose(c.b, q, r.cos, r.sin)
            k = Rope(self.num_kv_heads, self.head_dim, r.rotary_dim, r.layout).decompose(c.b, k, r.cos, r.sin)
        per_head = [] if c.slopes is None else [c.slopes]
        if self.sinks:
            per_head.append(c.weight((self.num_heads,), "small", self.sinks))
        op = attention_ops.Attention(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim**-0.5 if self.scale is None else self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            alibi=c.slopes is not None,
            sinks=bool(self.sinks),
        )
        mixed = op.decompose(c.b, q, k, v, c.positions, *per_head)
        return c.linear(self.output, mixed, self.hidden_size, self.output_bias, self.weights_in_out)

    def _normal(self, c: Context, norm: Norm, x: Value, heads: int) -> Value:
        if norm.width != self.head_dim:
            return norm(c, x)
        split = c.b.reshape(x, shape=(x.type.shape[0], heads, self.head_dim))
        result: Value = c.b.reshape(norm(c, split), shape=x.type.shape)
        return result


@dataclass(frozen=True)
class SeparateAttention(Heads, Attention, kind="separate"):
    """Attention whose query, key and value projections are three matrices."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.name):
            q = c.linear(self.query, x, self.num_heads * self.head_dim, self.qkv_bias, self.weights_in_out)
            k = c.linear(self.key, x, self.key_value_width, self.qkv_bias, self.weights_in_out)
            v = c.linear(self.value, x, self.key_value_width, self.qkv_bias, self.weights_in_out)
            return self.attend(c, q, k, v)


@dataclass(frozen=True)
class FusedAttention(Heads, Attention, kind="fused"):
    """Attention with one projection for queries, keys and values.

    `layout` says what its rows are: `parts`, all queries, then all keys, then all values; or `groups`, for each key
    head the queries that share it, the key, the value.
    """

    qkv: str = "qkv_proj"
    layout: Literal["parts", "groups"] = "parts"

    def __call__(self, c: Context, x: Value) -> Value:
        wide, narrow = self.num_heads * self.head_dim, self.key_value_width
        with c.b.at(self.name):
            y = c.linear(self.qkv, x, wide + 2 * narrow, self.qkv_bias, self.weights_in_out)
            with c.b.at(self.qkv):
                if self.layout == "groups":
                    q, k, v = self._of_groups(c, y)
                else:
                    q = c.b.slice(y, axis=1, start=0, stop=wide)
                    k = c.b.slice(y, axis=1, start=wide, stop=wide + narrow)
                    v = c.b.slice(y, axis=1, start=wide + narrow, stop=wide + 2 * narrow)
            return self.attend(c, q, k, v)

    def _of_groups(self, c: Context, y: Value) -> tuple[Value, ...]:
        group, tokens = self.num_heads // self.num_kv_heads, y.type.shape[0]
        heads = c.b.reshape(y, shape=(tokens, self.num_kv_heads, group + 2, self.head_dim))
        found = []
        for start, stop in ((0, group), (group, group + 1), (group + 1, group + 2)):
            part = c.b.slice(heads, axis=2, start=start, stop=stop)
            found.append(c.b.reshape(part, shape=(tokens, (stop - start) * self.key_value_width)))
        return tuple(found)
