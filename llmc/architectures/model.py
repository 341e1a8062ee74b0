"""The whole model: embedding, positions, layers, final norm, head; built as one graph over one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.architectures.context import Context, Parameters
from llmc.architectures.layers import Layer
from llmc.architectures.norms import NO_NORM, Norm
from llmc.architectures.positions import Positions
from llmc.architectures.settings import MAX_DIMENSION, ConfigurationError
from llmc.ir.builder import Builder
from llmc.ir.graph import Graph
from llmc.ir.op import Value
from llmc.ir.ops.linear import Linear
from llmc.ir.types import DType, symbol

MAX_LAYERS = 1024
"""Eight times the deepest models of today; each layer is a hundred nodes."""


@dataclass(frozen=True)
class Embedding:
    """The token table [vocab_size, hidden_size], whose rows are multiplied by `scale` and normalised by `norm`."""

    name: str
    scale: float = 1.0
    norm: Norm = NO_NORM


@dataclass(frozen=True)
class Head:
    """The projection to logits [vocab_size, hidden_size]; the token table itself where `tie_word_embeddings`.

    Logits are multiplied by `scale`; with a `soft_cap` they become soft_cap · tanh(logits / soft_cap).
    """

    name: str
    bias: bool = False
    scale: float = 1.0
    soft_cap: float = 0.0

    def finish(self, c: Context, logits: Value) -> Value:
        """Logits in float32."""
        logits = c.scaled(logits, self.scale)
        if self.soft_cap:
            capped = c.b.tanh(c.b.mul_scalar(logits, value=1 / self.soft_cap))
            logits = c.b.mul_scalar(capped, value=self.soft_cap)
        return c.cast(logits, DType.F32)


@dataclass(frozen=True)
class Model:
    """A description applied to a configuration: everything but the weights."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    tie_word_embeddings: bool
    embedding: Embedding
    positions: Positions
    final_norm: Norm
    head: Head
    layers: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        if self.num_layers > MAX_LAYERS:
            raise ConfigurationError(f"{self.num_layers} layers are absurd: at most {MAX_LAYERS} are accepted")

    def build(self, parameters: Parameters, activation: DType, max_sequence_length: int | None) -> Graph:
        """The graph: token_ids i32[tokens], positions i32[tokens] -> logits f32[tokens, vocab_size], primitive ops."""
        b = Builder()
        longest = self.sequence_length(max_sequence_length)
        tokens = symbol("tokens", 1, longest)
        token_ids = b.input("token_ids", DType.I32, (tokens,))
        c = Context(b, parameters, activation, b.input("positions", DType.I32, (tokens,)), longest=longest)
        table_name, head_name = f"{self.embedding.name}.weight", f"{self.head.name}.weight"
        if self.tie_word_embeddings:
            table_name = head_name = parameters.tie(head_name, table_name)
        shape = (self.vocab_size, self.hidden_size)
        label, dtype = parameters.declare(table_name, shape, "normal")
        table = b.param(label, dtype, shape)
        with b.at(self.embedding.name):
            x = c.scaled(b.embedding(token_ids, table, dtype=activation), self.embedding.scale)
        x = self.positions(c, self.embedding.norm(c, x))
        for c.layer, layer in enumerate(self.layers):
            x = layer(c, x)
        x = self.final_norm(c, x)
        with b.at(self.head.name):
            if not self.tie_word_embeddings:
                table = c.weight(shape)
            logits = Linear().decompose(b, x, table)
            if self.head.bias:
                logits = b.add(logits, c.vector(self.vocab_size, "small", "bias"))
            logits = self.head.finish(c, logits)
        return b.graph({"logits": logits})

    def sequence_length(self, wanted: int | None) -> int:
        """The longest sequence: what the user wants, else what the configuration says."""
        if wanted is None:
            return self.max_positions
        longest = self.positions.longest or MAX_DIMENSION
        if not 1 <= wanted <= longest:
            why = " (the positions of the description end there)" if self.positions.longest else ""
            raise ConfigurationError(f"the maximum sequence length must be 1 to {longest}{why}, given {wanted}")
        return wanted
