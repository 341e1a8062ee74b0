"""The tensors of a model of the Llama family from its config.json, by their names in GGUF."""

from __future__ import annotations

import math
from typing import Any

Shape = tuple[int, ...]


def head_dim(config: dict[str, Any]) -> int:
    """Elements of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def tensors(config: dict[str, Any]) -> list[tuple[str, Shape]]:
    """Name and shape (rows, columns as in `y = W x`) of every weight, embeddings first; vectors are norms.

    `output.weight` is absent where the embeddings are tied.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * head_dim(config)
    keys = config["num_key_value_heads"] * head_dim(config)
    block: list[tuple[str, Shape]] = [
        ("attn_norm", (width,)),
        ("attn_q", (queries, width)),
        ("attn_k", (keys, width)),
        ("attn_v", (keys, width)),
        ("attn_output", (width, queries)),
        ("ffn_norm", (width,)),
        ("ffn_gate", (inner, width)),
        ("ffn_up", (inner, width)),
        ("ffn_down", (width, inner)),
    ]
    table: list[tuple[str, Shape]] = [("token_embd.weight", (config["vocab_size"], width))]
    for i in range(config["num_hidden_layers"]):
        table += [(f"blk.{i}.{name}.weight", shape) for name, shape in block]
    table.append(("output_norm.weight", (width,)))
    if not config.get("tie_word_embeddings"):
        table.append(("output.weight", (config["vocab_size"], width)))
    return table


def parameters(config: dict[str, Any]) -> int:
    """How many weights the model has; tied embeddings count once."""
    return sum(math.prod(shape) for _, shape in tensors(config))


def rope_factors(config: dict[str, Any]) -> list[float] | None:
    """What each rotary frequency is divided by, one for each pair of a head's elements; None: by nothing.

    Source: llama.cpp, convert_hf_to_gguf.py, `rope_freqs` of models with `rope_type` "llama3". Raises `ValueError` for
    another kind of scaling.
    """
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "llama3":
        raise ValueError(f"rope_scaling of type {kind!r}: expected none or 'llama3'")
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, size = scaling["original_max_position_embeddings"], head_dim(config)
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * config.get("rope_theta", 10000.0) ** (i / size)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(float(factor))
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
