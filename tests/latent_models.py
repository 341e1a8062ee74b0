"""Tiny models with latent attention and without experts, and the description that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DESCRIPTION = """
model_types = ["deepseek_v2", "deepseek_v3"]
ignored = [
  "head_dim", "qk_head_dim", "pretraining_tp", "n_routed_experts", "n_shared_experts", "n_group", "topk_group",
  "topk_method", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor", "norm_topk_prob",
  "first_k_dense_replace", "output_router_logits", "num_mtp_layers", "num_nextn_predict_layers", "num_local_experts",
  "num_experts",
]
neutral.rope_interleaved = [false]
neutral.mlp_bias = [false]
embedding.name = "model.embed_tokens"
positions = { kind = "rotary", name = "model.rotary_emb", head_dim = "rope_dim", layout = "LAYOUT" }
final_norm = { kind = "rms_norm", name = "model.norm" }
head.name = "lm_head"

[config]
vocab_size = "vocab_size"
hidden_size = "hidden_size"
num_layers = "num_hidden_layers"
num_heads = "num_attention_heads"
num_kv_heads = { key = "num_key_value_heads", otherwise = "num_heads" }
latent_dim = "kv_lora_rank"
query_latent_dim = { key = "q_lora_rank", default = 0 }
nope_dim = "qk_nope_head_dim"
rope_dim = "qk_rope_head_dim"
value_dim = "v_head_dim"
interleaved = { key = "rope_interleave", default = INTERLEAVED }
intermediate_size = "intermediate_size"
max_positions = "max_position_embeddings"
activation = "hidden_act"
norm_eps = "rms_norm_eps"
attention_bias = { key = "attention_bias", default = false }
tie_word_embeddings = { key = "tie_word_embeddings", default = false }

[layer]
kind = "sequential"
name = "model.layers.{layer}"
attention_norm = { kind = "rms_norm", name = "input_layernorm" }
mlp_norm = { kind = "rms_norm", name = "post_attention_layernorm" }
mlp = { kind = "gated", name = "mlp", gate = "gate_proj", up = "up_proj", down = "down_proj", bias = false }

[layer.attention]
kind = "latent"
name = "self_attn"
query = "q_proj"
query_down = "q_a_proj"
query_up = "q_b_proj"
key_value_down = "kv_a_proj_with_mqa"
key_value_up = "kv_b_proj"
output = "o_proj"
bias = "attention_bias"
key_value_norm = { kind = "rms_norm", name = "kv_a_layernorm", hidden_size = "latent_dim", norm_eps = 1e-6 }

[layer.attention.query_norm]
when = "query_latent_dim > 0"
kind = "rms_norm"
name = "q_a_layernorm"
hidden_size = "query_latent_dim"
norm_eps = 1e-6
"""

SIZES = {
    "hidden_size": 60,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "kv_lora_rank": 19,
    "q_lora_rank": 23,
    "qk_nope_head_dim": 11,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "intermediate_size": 92,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "vocab_size": 1021,
    "max_position_embeddings": 64,
}
"""Odd sizes; every layer is dense."""

EVEN = {"kv_lora_rank": 18, "qk_nope_head_dim": 12}
"""Sizes that let the judge read a row's end as complex numbers."""


def yarn(**keys: float) -> dict[str, Any]:
    """Rotary keys of a stretched context, whose magnitude goes to the scores too."""
    values = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.9, **keys}
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **values}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "two latents": ("deepseek_v3", {}),
    "one latent": ("deepseek_v3", {"q_lora_rank": None}),
    "halves": ("deepseek_v3", {"rope_interleave": False}),
    "biases": ("deepseek_v3", {"attention_bias": True}),
    "one latent, yarn": ("deepseek_v3", {"q_lora_rank": None, **yarn()}),
    "complex rotation": ("deepseek_v2", {**EVEN}),
    "complex rotation, one latent, yarn": ("deepseek_v2", {**EVEN, "q_lora_rank": None, **yarn(mscale=1.0)}),
    "one head": ("deepseek_v2", {**EVEN, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "values wider than keys": ("deepseek_v3", {"v_head_dim": 30, "qk_nope_head_dim": 3, "qk_rope_head_dim": 10}),
}


def write_description(folder: Path, interleaved: bool = True) -> Path:
    """A file with the description."""
    path = folder / "latent.toml"
    text = DESCRIPTION.replace("LAYOUT", "half").replace("INTERLEAVED", str(interleaved).lower())
    path.write_text(text, encoding="utf-8")
    return path
