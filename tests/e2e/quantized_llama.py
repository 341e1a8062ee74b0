"""A Llama with quantized weights and activations in plain numpy, in float32 or float64: it shares no code with ours but
the codes of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from llmc.ir.quant import FORMATS

Array = npt.NDArray[Any]


class QuantizedLlama:
    """Weights of a tied model, every matrix as the codes of `format` say."""

    def __init__(self, folder: Path, format: str, dtype: type[np.floating[Any]]) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.dtype = dtype
        self.weights: dict[str, Array] = {}
        for name, weight in load_file(folder / "model.safetensors").items():
            if weight.ndim == 2:
                codes, scales = FORMATS[format].quantize(weight)
                weight = FORMATS[format].dequantize(codes, scales, weight.shape[1])
            self.weights[name] = weight.astype(dtype)

    def logits(self, ids: list[int]) -> Array:
        """After every token, [len(ids), vocab]."""
        c = self.config
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        width = c.get("head_dim") or c["hidden_size"] // heads
        theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
        frequencies = (1.0 / theta ** (np.arange(0, width, 2) / width)).astype(np.float32)
        angles = (np.arange(len(ids), dtype=np.float32)[:, None] * frequencies).astype(np.float64)
        cos, sin = (f(angles).astype(np.float32).astype(self.dtype) for f in (np.cos, np.sin))
        hidden = np.triu(np.full((len(ids), len(ids)), -np.inf), 1).astype(self.dtype)
        x = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(c["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            h = self._norm(x, f"{name}input_layernorm")
            q, k, v = (self._linear(h, f"{name}self_attn.{p}_proj").reshape(len(ids), -1, width) for p in "qkv")
            q, k = (self._rotate(t, cos, sin) for t in (q, k))
            k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) * self.dtype(width**-0.5) + hidden
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
            x = x + self._linear(mixed.reshape(len(ids), -1), f"{name}self_attn.o_proj")
            h = self._norm(x, f"{name}post_attention_layernorm")
            gate = self._linear(h, f"{name}mlp.gate_proj")
            up = self._linear(h, f"{name}mlp.up_proj")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, f"{name}mlp.down_proj")
        return self._linear(self._norm(x, "model.norm"), "model.embed_tokens")

    def _norm(self, x: Array, name: str) -> Array:
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + self.dtype(self.config["rms_norm_eps"]))
        return np.asarray(x * scale * self.weights[f"{name}.weight"])

    def _linear(self, x: Array, name: str) -> Array:
        weight = self.weights[f"{name}.weight"]
        groups = -(-x.shape[1] // 32)
        padded = np.zeros((len(x), groups * 32), np.float32)
        padded[:, : x.shape[1]] = x
        grouped = padded.reshape(len(x), groups, 32)
        peak = np.abs(grouped).max(2, keepdims=True)
        inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 1e-30)
        codes = np.rint(grouped * inverse)
        rounded = codes.astype(self.dtype) * (peak * np.float32(1 / 127)).astype(self.dtype)
        return np.asarray(rounded.reshape(len(x), -1)[:, : x.shape[1]] @ weight.T)

    def _rotate(self, x: Array, cos: Array, sin: Array) -> Array:
        first, second = np.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
