"""Tiny random models made by transformers at fixed seeds: the judge of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROTARY = {
    "vocab_size": 1021,
    "hidden_size": 60,
    "intermediate_size": 92,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 64,
}
LEARNED = {"vocab_size": 1021, "n_embd": 60, "n_layer": 2, "n_head": 5, "n_positions": 64}


def make_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A model in float32 with eager attention. Weights are large, so that every part shows in the logits."""
    defaults = {"llama": ROTARY, "gpt2": LEARNED}.get(model_type, {})
    config = transformers.AutoConfig.for_model(model_type, **{**defaults, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1:
                tensor.copy_(torch.randn_like(tensor) * 0.2 + (1.0 if "bias" not in name else 0.0))
            else:
                tensor.copy_(torch.randn_like(tensor) * (1.0 / tensor.shape[-1] ** 0.5))
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write the model as a Hugging Face folder (`max_shard_size=…` for shards)."""
    model.save_pretrained(folder, **options)
    return folder


def load(folder: Path) -> Any:
    """A folder's model in float32 with eager attention, whatever dtype its weights are stored in."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: Any, token_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Logits [tokens, vocab_size] of one causal pass."""
    with torch.no_grad():
        result: npt.NDArray[np.float32] = (
            model(torch.tensor([np.asarray(token_ids).tolist()])).logits[0].float().numpy()
        )
    return result


def stepwise_logits(model: Any, token_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Logits [tokens, vocab_size], computed one token at a time with a cache."""
    rows, cache = [], None
    with torch.no_grad():
        for token in np.asarray(token_ids).tolist():
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].numpy())
    return np.stack(rows)


def difference(given: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """max |given - expected| over max |expected|."""
    return float(np.abs(given - expected).max() / np.abs(expected).max())
