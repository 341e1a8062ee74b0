"""Attention whose keys and values are made of one narrow latent for each token (arXiv:2405.04434, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.architectures.attention import Attention
from llmc.architectures.context import Context
from llmc.architectures.norms import NO_NORM, Norm
from llmc.architectures.rope import RopeParameters, score_factor
from llmc.architectures.settings import ZERO, ConfigurationError, Count
from llmc.ir.op import Value
from llmc.ir.ops import attention as attention_ops
from llmc.ir.ops.rope import Rope


@dataclass(frozen=True)
class LatentAttention(Attention, kind="latent"):
    """Multi-head latent attention, in its expanded form.

    One projection of x gives the latent [t, latent_dim] and a key [t, rope_dim] that is rotated and shared by all
    heads. The latent, normalised, gives each head a key of nope_dim elements, which no rotation touches, and a value of
    value_dim. A head's key is the two beside each other, and its query likewise; scores are q·k / √(nope_dim +
    rope_dim), times the factor that the scaling of the rotation asks for (`score_factor`).

    Queries are made of a normalised latent of their own, query_latent_dim wide, by `query_down` and `query_up`; where
    that is 0, by `query` alone. `bias` is for the projections of x to latents and for the output. `interleaved`: pairs
    are neighbours, whatever the model's rotation says.
    """

    name: str
    query: str
    query_down: str
    query_up: str
    key_value_down: str
    key_value_norm: Norm
    key_value_up: str
    output: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    latent_dim: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: RopeParameters
    query_norm: Norm = NO_NORM
    query_latent_dim: Count = ZERO
    bias: bool = False
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads != self.num_heads:
            raise ConfigurationError(
                "latent attention has a key and a value for each query head; the numbers of attention heads and of"
                f" key-value heads must be equal, given {self.num_heads} and {self.num_kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Elements of a query and of a key."""
        return self.nope_dim + self.rope_dim

    def __call__(self, c: Context, x: Value) -> Value:
        tokens = x.type.shape[0]
        with c.b.at(self.name):
            q_nope, q_rope = self._split(c, self._queries(c, x), self.nope_dim)
            latent, k_rope = self._latent(c, x)
            k_nope, v = self._split(c, self._expanded(c, latent), self.nope_dim)
            q_rope = self._rotated(c, q_rope, self.num_heads)
            k_rope = c.b.expand(self._rotated(c, k_rope, 1), shape=(tokens, self.num_heads, self.rope_dim))
            q = c.b.reshape(c.b.concat(q_nope, q_rope, axis=2), shape=(tokens, self.num_heads * self.head_dim))
            k = c.b.reshape(c.b.concat(k_nope, k_rope, axis=2), shape=(tokens, self.num_heads * self.head_dim))
            v = c.b.reshape(v, shape=(tokens, self.num_heads * self.value_dim))
            scale = self.head_dim**-0.5 * score_factor(self.rope)
            op = attention_ops.Attention(self.num_heads, self.num_heads, self.head_dim, scale, value_dim=self.value_dim)
            mixed = op.decompose(c.b, q, k, v, c.positions)
            return c.linear(self.output, mixed, self.hidden_size, self.bias, False)

    def _queries(self, c: Context, x: Value) -> Value:
        """[t, num_heads · head_dim]."""
        wide = self.num_heads * self.head_dim
        if not self.query_latent_dim:
            return c.linear(self.query, x, wide, False, False)
        narrow = c.linear(self.query_down, x, self.query_latent_dim, self.bias, False)
        return c.linear(self.query_up, self.query_norm(c, narrow), wide, False, False)

    def _latent(self, c: Context, x: Value) -> tuple[Value, Value]:
        """The latent [t, latent_dim], normalised, and the shared key [t, rope_dim], not yet rotated."""
        width = self.latent_dim + self.rope_dim
        both = c.linear(self.key_value_down, x, width, self.bias, False)
        with c.b.at(self.key_value_down):
            latent = c.b.slice(both, axis=1, start=0, stop=self.latent_dim)
            shared: Value = c.b.slice(both, axis=1, start=self.latent_dim, stop=width)
        return self.key_value_norm(c, latent), shared

    def _expanded(self, c: Context, latent: Value) -> Value:
        """Each head's key without its rotated part, and its value [t, num_heads · (nope_dim + value_dim)]."""
        return c.linear(self.key_value_up, latent, self.num_heads * (self.nope_dim + self.value_dim), False, False)

    def _split(self, c: Context, x: Value, at: int) -> tuple[Value, Value]:
        """[t, num_heads · width] as [t, num_heads, at] and what follows in each head."""
        tokens, total = x.type.shape
        assert isinstance(total, int)
        width = total // self.num_heads
        heads = c.b.reshape(x, shape=(tokens, self.num_heads, width))
        return c.b.slice(heads, axis=2, start=0, stop=at), c.b.slice(heads, axis=2, start=at, stop=width)

    def _rotated(self, c: Context, x: Value, heads: int) -> Value:
        """x, rotated by the tokens' positions: [t, heads, rope_dim]."""
        r = c.rotation
        if r is None or r.rotary_dim != self.rope_dim:
            given = "none is" if r is None else f"{r.rotary_dim} are"
            raise ConfigurationError(f"latent attention needs {self.rope_dim} elements to be rotated; {given}")
        tokens = x.type.shape[0]
        layout = "interleaved" if self.interleaved else r.layout
        flat = c.b.reshape(x, shape=(tokens, heads * self.rope_dim))
        turned = Rope(heads, self.rope_dim, self.rope_dim, layout).decompose(c.b, flat, r.cos, r.sin)
        result: Value = c.b.reshape(turned, shape=(tokens, heads, self.rope_dim))
        return result
