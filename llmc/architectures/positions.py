"""Positions: rotary angles, a learned table, biases of attention, or none."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmc.architectures.context import Block, Context, Rotation
from llmc.architectures.rope import MAX_ROTARY_DIM, RopeParameters, inverse_frequencies
from llmc.architectures.settings import ZERO, ConfigurationError, Count
from llmc.ir.op import Value
from llmc.ir.ops.rope import RotaryTable
from llmc.ir.types import DType


class Positions(Block):
    """How tokens know their places: applied to the embeddings, it returns them and may set the context's rotation."""

    @property
    @abstractmethod
    def longest(self) -> int | None:
        """The most positions there can be (a table's length), or None when nothing but training sets a limit."""


@dataclass(frozen=True)
class RotaryPositions(Positions, kind="rotary"):
    """Rotary embedding (Su et al., 2021) of queries and keys; nothing is added to the embeddings.

    `layout` says which elements form a pair: i and i + rotary_dim / 2 (`half`), or 2i and 2i + 1 (`interleaved`).
    `rotary_dim`: how many elements of a head are rotated, by default what `partial_rotary_factor` says. `ends`: beyond
    the trained length the model does something else, so that sequences may not be longer.
    """

    name: str
    head_dim: int
    rope: RopeParameters
    layout: Literal["half", "interleaved"] = "half"
    rotary_dim: int | None = None
    ends: bool = False

    @property
    def longest(self) -> int | None:
        return self.rope.max_positions if self.ends else None

    def __post_init__(self) -> None:
        smallest = 4 if self.rope.scaling == "dynamic" else 2  # its exponent is d / (d - 2)
        width = self.rotated
        if width % 2 or not smallest <= width <= min(MAX_ROTARY_DIM, self.head_dim):
            raise ConfigurationError(
                f"the rotated part of a head must be an even number of elements, {smallest} to {MAX_ROTARY_DIM};"
                f" given {width} of head_dim {self.head_dim}"
            )

    @property
    def rotated(self) -> int:
        """How many elements of a head are rotated: what the description says, else what the configuration does."""
        return self.rotary_dim or int(self.head_dim * self.rope.partial_rotary_factor)

    def __call__(self, c: Context, x: Value) -> Value:
        rotary_dim = self.rotated
        with c.b.at(self.name):
            frequencies, scaling = self._frequencies(c, rotary_dim)
            cos, sin = RotaryTable(scaling).decompose(c.b, c.positions, frequencies)
            c.rotation = Rotation(c.cast(cos, c.activation), c.cast(sin, c.activation), rotary_dim, self.layout)
        return x

    def _frequencies(self, c: Context, rotary_dim: int) -> tuple[Value, float]:
        if self.rope.scaling != "dynamic":
            table, scaling = inverse_frequencies(self.rope, rotary_dim, c.longest)
            return c.b.constant(table, DType.F32), scaling
        # The token at position p uses the frequencies of length p + 1, whatever it is computed together with.
        values: Value = c.b.dynamic_frequencies(
            c.b.cast(c.positions, dtype=DType.F32),
            base=self.rope.theta,
            factor=self.rope.values["factor"],
            max_positions=self.rope.max_positions,
            rotary_dim=rotary_dim,
        )
        return values, 1.0


@dataclass(frozen=True)
class LearnedPositions(Positions, kind="learned"):
    """A table of learned vectors, one for each position, added to the embeddings; its first `offset` rows are none."""

    name: str
    hidden_size: int
    max_positions: int
    offset: Count = ZERO

    @property
    def longest(self) -> int | None:
        return self.max_positions

    def __call__(self, c: Context, x: Value) -> Value:
        with c.b.at(self.name):
            table = c.weight((self.max_positions + self.offset, self.hidden_size))
            rows = c.b.slice(table, axis=0, start=self.offset, stop=self.max_positions + self.offset)
            result: Value = c.b.add(x, c.b.embedding(c.positions, rows, dtype=c.activation))
        return result


@dataclass(frozen=True)
class AlibiPositions(Positions, kind="alibi"):
    """Attention with linear biases (Press et al., 2022): each head's scores fall with the distance at a rate of its
    own, 2^(-`strongest` · i / n) for the i-th of the next power of two n of heads, every second one of these first."""

    num_heads: int
    strongest: float = 8.0

    @property
    def longest(self) -> int | None:
        return None

    def __call__(self, c: Context, x: Value) -> Value:
        power = 1 << (self.num_heads - 1).bit_length()
        slopes = 2.0 ** (-self.strongest / power * np.arange(1, power + 1))
        if power != self.num_heads:
            slopes = np.concatenate([slopes[1::2], slopes[::2]])[: self.num_heads]
        c.slopes = c.b.constant(slopes, DType.F32)
        return x


@dataclass(frozen=True)
class NoPositions(Positions, kind="none"):
    """No positions at all: the causal mask alone gives the order."""

    @property
    def longest(self) -> int | None:
        return None

    def __call__(self, c: Context, x: Value) -> Value:
        return x
