"""What `--quant` asks for: a format's name, or a file that names one for each part of a model."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.ir.errors import LlmcError, nearest
from llmc.ir.graph import Graph
from llmc.ir.ops.quantized import QuantizedEmbedding
from llmc.ir.quant import FORMATS
from llmc.ir.target import Target
from llmc.passes.quantize import INT8, KEPT, NONE, Quantize, refusal, takes

KEYS = ("format", "linear", "lm_head", "embedding")
"""Keys of a file: `linear` is another name of `format`."""

_MAX_BYTES = 1 << 16


def activations_of(target: Target) -> str:
    """What products of quantized weights do with their activations: on CPUs integers are multiplied, on GPUs numbers of
    the activations' dtype."""
    return INT8 if target.kind == "cpu" else KEPT


def read_quantization(given: str, activations: str = INT8) -> Quantize | None:
    """The pass that `--quant` asks for: `none` (then None), a format's name, or the path of a file ending in .toml.

    A file holds `format` (or `linear`), `lm_head` and `embedding`, each `none` or a format's name; linears without a
    format are kept. `activations` follows from the target (see `activations_of`). Raises `LlmcError` naming the nearest
    key or format, and for a format that the target has no kernels for, naming those that it has.
    """
    if given.endswith(".toml"):
        return _parse(Path(given), activations)
    if given == NONE:
        return None
    if given not in FORMATS:
        raise LlmcError(f"--quant {given}: {nearest(given, takes(activations))} (or the path of a .toml file)")
    reason = refusal(given, activations)
    if reason is not None:
        raise LlmcError(f"--quant: {reason}")
    return Quantize(given, activations=activations)


def _parse(path: Path, activations: str) -> Quantize | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise LlmcError(f"--quant: cannot read {path}: {error.strerror or error}") from None
    if len(data) > _MAX_BYTES:
        raise LlmcError(f"--quant {path}: a file of formats has at most {_MAX_BYTES} bytes")
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise LlmcError(f"--quant {path} is no TOML: {error}") from None
    for key, value in table.items():
        if key not in KEYS:
            raise LlmcError(f"--quant {path}: there is no key {key!r}; {nearest(key, KEYS)}")
        if not isinstance(value, str):
            raise LlmcError(f"--quant {path}: {key} is {value!r}; expected {', '.join(takes(activations))} as text")
    if "format" in table and "linear" in table:
        raise LlmcError(f"--quant {path}: 'format' and 'linear' are two names of one key; give one of them")
    linear = table.get("format", table.get("linear", NONE))
    try:
        quant = Quantize(linear, table.get("lm_head"), table.get("embedding"), activations)
    except LlmcError as error:
        raise LlmcError(f"--quant {path}: {error}") from None
    return None if {quant.format, quant.head, quant.embedding or NONE} == {NONE} else quant


def described(quant: Quantize | None, step: Graph) -> dict[str, str]:
    """The formats for a manifest: of linears, the head and the table of tokens (which may be the head's weight); and
    what their products do with activations."""
    tables = {n.op.format for n in step.nodes if isinstance(n.op, QuantizedEmbedding)}
    return {
        "weights": NONE if quant is None else quant.format,
        "lm_head": NONE if quant is None else quant.head,
        "embedding": min(tables, default=NONE),
        "activations": KEPT if quant is None else quant.activations,
    }


def of_manifest(table: Mapping[str, Any]) -> Quantize | None:
    """The pass that made a package, from its manifest's `quantization`; one that is silent on activations is of a
    version that had them in 8 bits only."""
    parts = [str(table.get(key, NONE)) for key in ("weights", "lm_head", "embedding")]
    if set(parts) == {NONE}:
        return None
    weights, lm_head, embedding = parts
    return Quantize(weights, lm_head, embedding, str(table.get("activations", INT8)))
