"""Graphs of descriptions, interpreted in float64, against transformers' eager models on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmc.importers.hf import ImportedModel, import_model
from llmc.ir.interpret import interpret
from llmc.ir.types import DType
from llmc.ir.verify import verify
from tests.tiny_models import difference, load, logits, make_model, save, stepwise_logits, torch

TOLERANCE = 1e-5  # float32 against float64


def rope(kind: str, **keys: float | bool) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **keys}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "head_dim 20, seven heads to one": (
        "llama", {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 20, "hidden_size": 98}
    ),
    "head_dim 80": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80, "hidden_size": 66}),
    "grouped heads, tied": (
        "llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "exact gelu": ("llama", {"hidden_act": "gelu"}),
    "tanh gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": ("llama", {"hidden_act": "relu"}),
    "large eps": ("llama", {"rms_norm_eps": 0.3}),
    "theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "linear": ("llama", rope("linear", factor=4.0)),
    "dynamic": ("llama", rope("dynamic", factor=4.0)),
    "yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "yarn, all keys": (
        "llama",
        rope("yarn", factor=8.0, original_max_position_embeddings=24, beta_fast=20.0, beta_slow=2.0, mscale=0.9,
             mscale_all_dim=0.7, truncate=False),
    ),
    "yarn, attention factor": (
        "llama", rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.8)
    ),
    "bands": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "learned positions": ("gpt2", {}),
    "learned positions, untied": ("gpt2", {"tie_word_embeddings": False}),
    "inner size, exact gelu": ("gpt2", {"n_inner": 77, "activation_function": "gelu"}),
    "relu, odd sizes": ("gpt2", {"n_embd": 84, "n_head": 7, "activation_function": "relu", "layer_norm_epsilon": 0.1}),
    "scale by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}),
    "no scale": ("gpt2", {"scale_attn_weights": False}),
}  # fmt: skip


def run(model: ImportedModel, token_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    inputs = {"token_ids": token_ids, "positions": np.arange(len(token_ids))}
    return interpret(model.graph, inputs, model.weights.load).outputs["logits"]


def prompt(length: int, vocab_size: int = 1021) -> np.ndarray[Any, Any]:
    return np.random.default_rng(length).integers(0, vocab_size, length)


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    theirs = make_model(model_type, **changes)
    ours = import_model(save(theirs, tmp_path))
    verify(ours.graph, "primitive")
    assert ours.info.num_parameters == theirs.num_parameters()
    token_ids = prompt(47)
    assert difference(run(ours, token_ids), logits(theirs, token_ids)) < TOLERANCE


def test_dynamic_frequencies_beyond_the_trained_length(tmp_path: Path) -> None:
    """Beyond it, a token's frequencies are those of the length at which it was computed alone."""
    theirs = make_model("llama", **rope("dynamic", factor=2.0), max_position_embeddings=16)
    ours = import_model(save(theirs, tmp_path), max_sequence_length=40)
    token_ids = prompt(40)
    expected = stepwise_logits(theirs, token_ids)
    assert difference(run(ours, token_ids), expected) < TOLERANCE
    assert difference(run(ours, token_ids), logits(theirs, token_ids)) > 100 * TOLERANCE  # one length for all tokens


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_shards_of_16_bits(model_type: str, dtype: DType, tmp_path: Path) -> None:
    half = make_model(model_type).to({DType.BF16: torch.bfloat16, DType.F16: torch.float16}[dtype])
    save(half, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = import_model(tmp_path)
    verify(ours.graph, "primitive")
    assert {s.dtype for s in ours.weights.values()} == {dtype}
    token_ids = prompt(30)
    theirs = load(tmp_path)  # not half.float(): its rotary frequencies are rounded as well
    assert difference(run(ours, token_ids), logits(theirs, token_ids)) < TOLERANCE


def test_names_without_the_prefix(tmp_path: Path) -> None:
    """Old checkpoints: no `transformer.`, no head, and the causal masks stored as tensors."""
    theirs = make_model("gpt2")
    path = save(theirs, tmp_path) / "model.safetensors"
    tensors = {name.removeprefix("transformer."): array for name, array in load_file(path).items()}
    mask = np.tril(np.ones((1, 1, 64, 64), np.float32))
    save_file({**tensors, "h.0.attn.bias": mask, "h.0.attn.masked_bias": np.array(-1e4, np.float32)}, path)
    ours = import_model(tmp_path)
    assert "wte.weight" in ours.weights and "h.0.attn.bias" not in ours.weights
    assert difference(run(ours, prompt(20)), logits(theirs, prompt(20))) < TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_16_bit_activations(model_type: str, tmp_path: Path) -> None:
    theirs = make_model(model_type)
    folder = save(theirs, tmp_path)
    ours = import_model(folder, activation=DType.BF16)
    verify(ours.graph, "primitive")
    assert ours.graph.outputs[0][1].type.dtype is DType.F32
    assert difference(run(ours, prompt(20)), logits(theirs, prompt(20))) < 0.05
