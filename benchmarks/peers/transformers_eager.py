"""The same shape in transformers, eager: what `model.generate` costs without any compiler. Random weights, bf16."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bounds import Shape, row_bytes
from benchmarks.gpu.rows import Row

WARMING = 3


class EagerSteps:
    """See `timing.Steps`: greedy steps with a cache that grows by one token a step, as it does in use."""

    def __init__(self, model: Any, batch: int, context: int, vocabulary: int, device: str) -> None:
        self._model = model
        prompt = torch.randint(0, vocabulary, (batch, context), device=device)
        with torch.no_grad():
            out = model(prompt, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        self.tokens: Tensor = out.logits[:, -1:].argmax(-1)

    def start(self, count: int) -> None:
        """See `timing.Steps`."""
        with torch.no_grad():
            for _ in range(count):
                out = self._model(self.tokens, past_key_values=self._cache, use_cache=True)
                self.tokens = out.logits[:, -1:].argmax(-1)


def make_model(config: Path, device: str) -> Any:
    """A model of a configuration's file, with random weights in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads(config.read_text())
    given = AutoConfig.for_model(**{k: v for k, v in fields.items() if k not in ("architectures", "torch_dtype")})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(given, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def start_row(row: Row) -> tuple[EagerSteps, Mapping[str, Any]]:
    """A row's model, warm; its bytes are those of the first step."""
    shape = Shape.read(row.setup.config)
    steps = EagerSteps(make_model(row.setup.config, "cuda"), row.batch, row.context, shape.vocabulary, "cuda")
    steps.start(WARMING)
    return steps, {"bytes": row_bytes(row, shape), "settings": {"attention": "sdpa", "cache": "dynamic"}}
