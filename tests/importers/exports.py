"""Models exported by torch, as tests take them: the only place where the importer's tests need torch."""

from __future__ import annotations

import inspect
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import ROTARY, make_model

torch = pytest.importorskip("torch")

GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 3, "attention_bias": True}),
    "gpt2": ("gpt2", {}),
    "qwen3": ("qwen3", {**ROTARY, **GROUPED}),
    "gemma2": ("gemma2", {**ROTARY, **GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 10}),
}


def model_of(name: str, attention: str = "eager") -> Any:
    """The tiny model of that name; `attention` is transformers' word for how it is written."""
    kind, changes = CONFIGURATIONS[name]
    model = make_model(kind, seed=3, **changes)
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    return model


def export(model: Any, path: Path, core: bool = False, longest: int | None = 39, **inputs: Any) -> Path:
    """Export a model of token ids and save it; `core` runs torch's decompositions, `inputs` are further arguments."""
    ids = torch.arange(13)[None]
    tokens = torch.export.Dim("tokens", min=2, max=longest)
    sizes = {k: {v.dim() - 1: tokens} if isinstance(v, torch.Tensor) else None for k, v in inputs.items()}
    first = next(iter(inspect.signature(model.forward).parameters))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (ids,), inputs, dynamic_shapes={first: {1: tokens}, **sizes})
        torch.export.save(program.run_decompositions() if core else program, path)
    return path


def logits_of(model: Any, ids: list[int]) -> Any:
    """A module's logits [tokens, vocab_size], as numpy."""
    with torch.no_grad():
        result = model(torch.tensor([ids]))
    return getattr(result, "logits", result)[0].float().numpy()


Exported = Callable[[str, str], Path]
"""The fixture `exported(model, way)`: the archive of a tiny model."""
Change = Callable[[dict[str, bytes]], None]


def changed(path: Path, to: Path, change: Change) -> Path:
    """A copy of an archive whose members `change` has edited, by their names without the folder."""
    with zipfile.ZipFile(path) as old:
        members = {i.filename.partition("/")[2]: old.read(i) for i in old.infolist()}
    change(members)
    with zipfile.ZipFile(to, "w") as new:
        for name, data in members.items():
            new.writestr(f"model/{name}", data)
    return to


def edited(member: str, edit: Callable[[Any], None]) -> Change:
    """A change of one JSON member."""

    def change(members: dict[str, bytes]) -> None:
        data = json.loads(members[member])
        edit(data)
        members[member] = json.dumps(data).encode()

    return change
