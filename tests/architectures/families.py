"""Tiny random models of families that transformers has: configurations with odd sizes, each block switched on once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NAMES = {
    "vocab_size": 503,
    "hidden_size": 60,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
"""What most families call their sizes."""

OLDER = {"vocab_size": 503, "n_embd": 60, "n_layer": 3, "n_head": 6, "n_positions": 96}
SLIDING, FULL = "sliding_attention", "full_attention"
SHORT, LONG = [1.0 + 0.05 * i for i in range(4)], [1.5 + 0.5 * i for i in range(4)]


PLAIN = {k: v for k, v in NAMES.items() if k not in ("intermediate_size", "num_key_value_heads")}


ALIKE = {**PLAIN, "intermediate_size": 92}
"""For families whose heads all have keys of their own."""


@dataclass(frozen=True)
class Family:
    """A model type, its configuration, and `max_sequence_length` where it is not the configuration's.
    `shortest`: below so many tokens transformers computes something else, which depends on the length."""

    model_type: str
    config: dict[str, Any]
    longest: int | None = None
    shortest: int = 0


def rope(kind: str = "default", **keys: Any) -> dict[str, Any]:
    """`rope_parameters`."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **keys}}


MIXTURE = {**NAMES, "moe_intermediate_size": 36, "num_experts_per_tok": 3}
LATENT = {
    **MIXTURE,
    "num_key_value_heads": 6,
    "kv_lora_rank": 18,
    "q_lora_rank": 26,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
}
LONG_ROPE = {
    **NAMES,
    "pad_token_id": 0,
    **rope("longrope", partial_rotary_factor=0.8, short_factor=SHORT, long_factor=LONG),
}

FAMILIES = {
    "llama, also TinyLlama and SmolLM": Family("llama", {**NAMES, "tie_word_embeddings": True}),
    "gpt2": Family("gpt2", OLDER),
    "mistral": Family("mistral", {**NAMES, "head_dim": 12, "sliding_window": 7}),
    "mistral without a window": Family("mistral", {**NAMES, "sliding_window": None}),
    "qwen2": Family("qwen2", NAMES),
    "qwen2, windows in late layers": Family(
        "qwen2", {**NAMES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": Family("qwen3", {**NAMES, "head_dim": 14}),
    "gemma": Family("gemma", {**NAMES, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": Family("gemma2", {**NAMES, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "phi3": Family("phi3", {**NAMES, "sliding_window": 9, "pad_token_id": 0}),
    "phi3, long rope within": Family("phi3", {**LONG_ROPE, "original_max_position_embeddings": 64}, longest=64),
    "phi3, long rope beyond": Family(
        "phi3", {**LONG_ROPE, "original_max_position_embeddings": 8}, shortest=9
    ),
    "phi": Family("phi", {**NAMES, "num_key_value_heads": 6, **rope(partial_rotary_factor=0.4)}),
    "gpt_neox": Family("gpt_neox", {**ALIKE, **rope(partial_rotary_factor=0.4)}),
    "gpt_neox, sequential": Family(
        "gpt_neox", {**ALIKE, "use_parallel_residual": False, **rope(partial_rotary_factor=1.0)}
    ),
    "gptj": Family("gptj", {**OLDER, "rotary_dim": 6}),
    "opt": Family("opt", {**PLAIN, "ffn_dim": 92, "word_embed_proj_dim": 60, "init_std": 0.5}),
    "opt, norms on the sum": Family(
        "opt", {**PLAIN, "ffn_dim": 92, "word_embed_proj_dim": 60, "do_layer_norm_before": False}
    ),
    "bloom": Family("bloom", {"vocab_size": 503, "hidden_size": 60, "n_layer": 3, "n_head": 6}),
    "mpt": Family("mpt", {"vocab_size": 503, "d_model": 60, "n_layers": 3, "n_heads": 6, "max_seq_len": 96}),
    "falcon, one key head": Family("falcon", {**PLAIN, "alibi": False, "bias": True}),
    "falcon, key heads for groups": Family(
        "falcon", {**PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
    ),
    "falcon, key heads for all": Family("falcon", {**PLAIN, "multi_query": False, "num_kv_heads": 6, "alibi": False}),
    "stablelm": Family("stablelm", {**NAMES, "use_qkv_bias": True, **rope(partial_rotary_factor=0.4)}),
    "stablelm, parallel": Family(
        "stablelm", {**NAMES, "use_parallel_residual": True, **rope(partial_rotary_factor=0.4)}
    ),
    "starcoder2": Family("starcoder2", {**NAMES, "sliding_window": 8}),
    "olmo2": Family("olmo2", NAMES),
    "cohere": Family("cohere", {**NAMES, "logit_scale": 0.3}),
    "granite": Family(
        "granite",
        {**NAMES, "embedding_multiplier": 3.0, "logits_scaling": 5.0, "residual_multiplier": 0.4,
         "attention_multiplier": 0.2},
    ),
    "mixtral": Family("mixtral", {**NAMES, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3_moe": Family(
        "qwen3_moe", {**MIXTURE, "head_dim": 14, "num_experts": 7, "norm_topk_prob": True, "mlp_only_layers": [1]}
    ),
    "deepseek_v2": Family("deepseek_v2", {**LATENT, "n_shared_experts": 2}),
    "deepseek_v2, groups, one latent": Family(
        "deepseek_v2",
        {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
         "routed_scaling_factor": 1.7},
    ),
    "deepseek_v3": Family("deepseek_v3", {**LATENT, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}),
    "gpt_oss": Family(
        "gpt_oss",
        {**NAMES, "head_dim": 14, "sliding_window": 6, "num_local_experts": 5, "num_experts_per_tok": 3,
         "swiglu_limit": 0.7, "layer_types": [SLIDING, FULL, SLIDING],
         **rope("yarn", factor=4.0, original_max_position_embeddings=24, truncate=False)},
    ),
    "glm4": Family("glm4", {**NAMES, "head_dim": 20, "attention_bias": True, "pad_token_id": 0}),
    "glm4, yarn, tied": Family(
        "glm4",
        {**NAMES, "head_dim": 20, "attention_bias": False, "tie_word_embeddings": True, "pad_token_id": 0,
         **rope("yarn", partial_rotary_factor=0.3, factor=4.0, original_max_position_embeddings=24)},
    ),
    "smollm3": Family("smollm3", {**NAMES, "no_rope_layer_interval": 2, "pad_token_id": 0}),
    "smollm3, windows and biases": Family(
        "smollm3",
        {**NAMES, "no_rope_layers": [1, 0, 0], "use_sliding_window": True, "sliding_window": 7, "attention_bias": True,
         "mlp_bias": True, "tie_word_embeddings": False, "pad_token_id": 0},
    ),
    "gpt_bigcode": Family("gpt_bigcode", {**OLDER, "n_inner": 92}),
    "gpt_bigcode, key heads for all": Family("gpt_bigcode", {**OLDER, "multi_query": False}),
}  # fmt: skip
"""By what is special."""
