"""The arithmetic of bounds: bytes and operations that a step needs, from a model's shape alone.

Independent of the compiler's own count, which the rows report, so that each checks the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Row

GROUP = 128
"""Weights for each 16-bit scale, in both quantized formats."""
SCALE_BYTES = 2
BITS = {"bf16": 16, "int8": 8, "int4": 4}
CACHE_BYTES = {"bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with gated products and grouped heads."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool

    @staticmethod
    def read(path: Path) -> Shape:
        """From a configuration's file."""
        c = json.loads(path.read_text())
        heads = c["num_attention_heads"]
        return Shape(
            c["hidden_size"],
            c["num_hidden_layers"],
            heads,
            c["num_key_value_heads"],
            c.get("head_dim") or c["hidden_size"] // heads,
            c["intermediate_size"],
            c["vocab_size"],
            c.get("tie_word_embeddings", False),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices."""
        attention = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        attention += self.heads * self.head_dim * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the matrix that makes logits."""
        return self.hidden * self.vocabulary

    def weight_bytes(self, weights: str) -> float:
        """What a step reads of the weights: every matrix once, and of the table of tokens next to nothing."""
        head = "int8" if weights == "int4" else weights
        return self.layer_weights * _bytes_each(weights) + self.head_weights * _bytes_each(head)

    def cache_bytes(self, cache: str) -> int:
        """Keys and values of one token of context."""
        return 2 * self.layers * self.kv_heads * self.head_dim * CACHE_BYTES[cache]

    def decode_bytes(self, weights: str, cache: str, batch: int, context: int) -> float:
        """Bytes that a decode step reads of weights, keys and values."""
        return self.weight_bytes(weights) + batch * context * self.cache_bytes(cache)

    def decode_flops(self, batch: int, context: int) -> float:
        """Multiplications and additions of a decode step."""
        pairs = batch * (context + 1)
        return 2 * batch * (self.layer_weights + self.head_weights) + self._attention_flops(pairs)

    def prefill_flops(self, tokens: int) -> float:
        """The same for a prompt of which the last token's logits are wanted, with causal attention."""
        pairs = tokens * (tokens + 1) // 2
        return 2 * tokens * self.layer_weights + 2 * self.head_weights + self._attention_flops(pairs)

    def _attention_flops(self, pairs: int) -> int:
        """Of so many pairs of a query and a key, in all layers and heads."""
        return 4 * self.heads * self.head_dim * self.layers * pairs


def row_bytes(row: Row, shape: Shape) -> float:
    """Bytes that a row's step must read."""
    context = row.context if row.kind == "decode" else 0
    return shape.decode_bytes(row.setup.weights, row.setup.cache, row.batch, context)


def row_flops(row: Row, shape: Shape) -> float:
    """Operations of a row's step."""
    if row.kind == "decode":
        return shape.decode_flops(row.batch, row.context)
    return shape.prefill_flops(row.context)


def bound(moved: float, flops: float, ceilings: Mapping[str, float]) -> float:
    """Seconds that a step takes at least: bytes at the bandwidth or operations at the matrix rate, the greater."""
    return max(moved / ceilings["copy_bandwidth"], flops / ceilings["matrix_rate"])


def plan_bytes(launches: list[dict[str, Any]], tokens: int, context: int, sequences: int = 1) -> int:
    """What a plan's launches say that they move, for so many new tokens over so many tokens of context in all.

    Logits are counted for one row, whatever the batch.
    """
    moved = 0
    for launch in launches:
        window = launch.get("window", 0)
        counts = (1, tokens, min(context, sequences * window) if window else context)
        moved += sum(a * b for a, b in zip(launch["bytes"], counts, strict=True))
    return moved


def _bytes_each(weights: str) -> float:
    return BITS[weights] / 8 + (SCALE_BYTES / GROUP if weights != "bf16" else 0)
