"""`config.json`: reading it, and the facts that every family shares (element type, head, token ids)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.architectures.loader import common
from llmc.importers.json_file import ImportFailure, read_json
from llmc.ir.errors import nearest
from llmc.ir.types import DType

MAX_CONFIG_BYTES = 1 << 20

_DTYPES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}
_OTHER_HEAD = re.compile(r"For(?!CausalLM)[A-Z]\w*$")


def read_config(path: Path) -> dict[str, Any]:
    """A configuration as it stands; refuses one that is made for another head than a language model's."""
    config = read_json(path, MAX_CONFIG_BYTES)
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise ImportFailure(f"{path}: 'architectures' must be a list of names, given {str(classes)[:80]}")
    if classes and all(_OTHER_HEAD.search(c) for c in classes):
        missing = common().missing_blocks.get(str(config.get("model_type")))
        why = f" (no block computes {missing})" if missing else ""
        raise ImportFailure(f"{path}: the model is a {classes[0][:80]!r}; supported: causal language models{why}")
    return config


def storage_dtype(config: Mapping[str, Any], source: str) -> DType:
    """The dtype of random weights: `dtype` (transformers 5) or `torch_dtype` (4), float32 when neither is set."""
    name = config.get("dtype")
    name = config.get("torch_dtype") if name is None else name
    if name is None:
        return DType.F32
    short = name.removeprefix("torch.") if isinstance(name, str) else str(name)[:80]
    if short not in _DTYPES:
        raise ImportFailure(f"{source}: the dtype {short[:80]!r} is not supported; {nearest(short[:80], _DTYPES)}")
    return _DTYPES[short]


def token_ids(value: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    """Token ids from an integer, a list or null. Ids outside the vocabulary can never occur and are left out."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(v) is int for v in values):
        raise ImportFailure(f"{where} must be an integer or a list of integers, given {str(value)[:80]}")
    return tuple(dict.fromkeys(v for v in values if 0 <= v < vocab_size))
