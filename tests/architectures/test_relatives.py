"""Families that transformers does not have, judged by one that computes the same: its weights under other names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from llmc.importers.hf import import_model
from llmc.ir.interpret import interpret
from tests.architectures.families import NAMES
from tests.tiny_models import difference, logits, make_model, save

Tensors = dict[str, npt.NDArray[np.float32]]
TOLERANCE = 1e-5  # float32 against float64
HEADS, GROUPS, WIDTH = NAMES["num_attention_heads"], NAMES["num_key_value_heads"], NAMES["hidden_size"]
HEAD_DIM = WIDTH // HEADS
ALIKE = {**NAMES, "num_key_value_heads": HEADS}


@dataclass(frozen=True)
class Relative:
    """The judge, and how its configuration and its tensors are written by the other family."""

    judge: str
    given: Mapping[str, Any]
    config: Mapping[str, Any]
    names: Mapping[str, str]
    joined: Callable[[Tensors], Tensors] = lambda tensors: tensors


def in_parts(tensors: Tensors) -> Tensors:
    """Queries, keys and values as one matrix, one after the other."""
    return _joined(tensors, np.concatenate)


def in_groups(tensors: Tensors) -> Tensors:
    """For each key head its queries, the key, the value."""

    def group(parts: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        split = [x.reshape(GROUPS, -1, HEAD_DIM, *x.shape[1:]) for x in parts]
        return np.concatenate(split, axis=1).reshape(-1, *parts[0].shape[1:])

    return _joined(tensors, group)


def _joined(tensors: Tensors, join: Callable[[list[Any]], Any]) -> Tensors:
    result = dict(tensors)
    for name in tensors:
        if (found := re.fullmatch(r"(.*)q_proj\.(weight|bias)", name)) is not None:
            start, suffix = found.groups()
            result[f"{start}qkv.{suffix}"] = join([result.pop(f"{start}{x}_proj.{suffix}") for x in "qkv"])
    return result


LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
RELATIVES = {
    "minicpm": Relative(
        "granite",
        {**NAMES, "embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5,
         "attention_multiplier": HEAD_DIM**-0.5},
        {**NAMES, **LLAMA, "scale_emb": 3, "dim_model_base": WIDTH // 4, "scale_depth": 0.5 * 3**0.5,
         "tie_word_embeddings": False},
        {},
    ),
    "internlm2": Relative(
        "llama",
        NAMES,
        {**NAMES, **LLAMA, "bias": False},
        {"embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.qkv": "attention.wqkv",
         "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
         "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
         "post_attention_layernorm": "ffn_norm"},
        in_groups,
    ),
    "baichuan": Relative(
        "llama",
        ALIKE,
        {**{k: v for k, v in NAMES.items() if k != "num_key_value_heads"}, **LLAMA},
        {"self_attn.qkv": "self_attn.W_pack"},
        in_parts,
    ),
    "mimo": Relative("qwen2", NAMES, {**NAMES, **LLAMA, "attention_bias": True}, {}),
    "qwen": Relative(
        "qwen2",
        ALIKE,
        {"vocab_size": 503, "hidden_size": WIDTH, "intermediate_size": 2 * NAMES["intermediate_size"],
         "num_hidden_layers": 3, "num_attention_heads": HEADS, "kv_channels": HEAD_DIM, "seq_length": 96,
         "layer_norm_epsilon": 1e-6, "no_bias": True},
        {"model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "model.norm": "transformer.ln_f",
         "self_attn.qkv": "attn.c_attn", "self_attn.o_proj": "attn.c_proj", "mlp.gate_proj": "mlp.w2",
         "mlp.up_proj": "mlp.w1", "mlp.down_proj": "mlp.c_proj", "input_layernorm": "ln_1",
         "post_attention_layernorm": "ln_2"},
        in_parts,
    ),
    "phi-msft": Relative(
        "phi",
        {**ALIKE, "intermediate_size": 4 * WIDTH,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}},
        {"vocab_size": 503, "n_embd": WIDTH, "n_layer": 3, "n_head": HEADS, "n_positions": 96, "rotary_dim": 4},
        {"model.embed_tokens": "transformer.embd.wte", "model.layers": "transformer.h", "lm_head": "lm_head.linear",
         "model.final_layernorm": "lm_head.ln", "self_attn.qkv": "mixer.Wqkv", "self_attn.dense": "mixer.out_proj",
         "input_layernorm": "ln"},
        in_parts,
    ),
    "chatglm": Relative(
        "glm",
        {**NAMES, "head_dim": 12, "pad_token_id": 0, "attention_bias": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {"padded_vocab_size": 503, "hidden_size": WIDTH, "num_layers": 3, "num_attention_heads": HEADS,
         "multi_query_attention": True, "multi_query_group_num": GROUPS, "kv_channels": 12,
         "ffn_hidden_size": NAMES["intermediate_size"], "seq_length": 96, "add_qkv_bias": True,
         "layernorm_epsilon": 1.5625e-07},
        {"model.embed_tokens": "transformer.embedding.word_embeddings", "model.layers": "transformer.encoder.layers",
         "model.norm": "transformer.encoder.final_layernorm", "lm_head": "transformer.output_layer",
         "self_attn.qkv": "self_attention.query_key_value", "self_attn.o_proj": "self_attention.dense",
         "mlp.gate_up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h"},
        in_parts,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", RELATIVES)
def test_the_same_model_under_other_names(family: str, tmp_path: Path) -> None:
    relative = RELATIVES[family]
    judge = make_model(relative.judge, **relative.given)
    tensors = relative.joined(load_file(save(judge, tmp_path / "judge") / "model.safetensors"))
    renamed = {}
    for name, array in tensors.items():
        for old, new in relative.names.items():
            name = re.sub(rf"(?<![\w]){re.escape(old)}(?=\.)", new, name, count=1)
        renamed[name] = array
    (tmp_path / "other").mkdir()
    save_file({n: np.ascontiguousarray(a) for n, a in renamed.items()}, tmp_path / "other" / "model.safetensors")
    config = {"model_type": family, "torch_dtype": "float32", **relative.config}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    ours = import_model(tmp_path / "other")
    token_ids: Any = np.random.default_rng(3).integers(0, 503, 41)
    inputs = {"token_ids": token_ids, "positions": np.arange(41)}
    found = interpret(ours.graph, inputs, ours.weights.load).outputs["logits"]
    assert difference(found, logits(judge, token_ids)) < TOLERANCE
