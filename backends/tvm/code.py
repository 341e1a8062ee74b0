"""Code for kernel specifications: each distinct one is compiled once for every variant, then linked into a library."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmc.backends.base import Kernels, KernelSpec
from llmc.backends.tvm.compile import compile_kernel, link
from llmc.backends.tvm.isa import ISAS, Isa
from llmc.backends.tvm.kernels import (
    attention,
    cache,
    columns,
    decode,
    elementwise,
    embedding,
    linear,
    norm,
    quantized,
    rotary,
    rows,
    tiles,
)
from llmc.ir.target import CpuVariant

_MAKERS: dict[str, Callable[..., Any]] = {
    "embedding": embedding.embedding,
    "packed_embedding": embedding.packed_embedding,
    "quantized_embedding": embedding.quantized_embedding,
    "quantize_tiles": tiles.quantize_tiles,
    "quantized_linear": quantized.quantized_linear,
    "quantized_gated_linear": quantized.quantized_gated_linear,
    "rms_norm": norm.rms_norm,
    "add_rms_norm": norm.add_rms_norm,
    "layer_norm": norm.layer_norm,
    "norm_heads": norm.norm_heads,
    "add_layer_norm": norm.add_layer_norm,
    "linear": linear.linear,
    "gated_linear": linear.gated_linear,
    "rotary_table": rotary.rotary_table,
    "dynamic_rotary_table": rotary.dynamic_rotary_table,
    "append": cache.append,
    "attention": attention.attention,
    "split_attention": decode.split_attention,
    "combine_splits": decode.combine_splits,
    "gather_rows": rows.gather_rows,
    "argmax": rows.argmax,
    "best_of_panels": rows.best_of_panels,
    "add": elementwise.add,
    "multiply": elementwise.multiply,
    "scale": elementwise.scale,
    "unary": elementwise.unary,
    "concat": columns.concat,
    "columns": columns.columns,
    "repeat": columns.repeat,
    "rope": columns.rope,
}


@functools.cache
def _object(spec: KernelSpec, isa: Isa) -> bytes:
    """A kernel's object code; a process that compiles several models makes each kernel once."""
    return compile_kernel(_MAKERS[spec.kind](spec.symbol, isa, **dict(spec.parameters)), isa)


def compile_specs(specs: Iterable[KernelSpec], variants: Iterable[CpuVariant], scratch: Path) -> Kernels:
    """One library for each variant, with every kernel and the native runtime.

    `scratch` is a folder for intermediate files. Seconds are those of the slowest variant's compile of each kernel.
    """
    distinct = sorted(set(specs), key=lambda s: s.symbol)
    files: dict[str, bytes] = {}
    seconds: dict[str, float] = {}
    described = []
    for variant in variants:
        isa = ISAS[variant.name]
        objects: dict[str, bytes] = {}
        for spec in distinct:
            start = time.perf_counter()
            objects[spec.symbol] = _object(spec, isa)
            seconds[spec.symbol] = max(seconds.get(spec.symbol, 0.0), time.perf_counter() - start)
        library = scratch / f"kernels-{variant.name}.so"
        link(objects, isa, library)
        files[library.name] = library.read_bytes()
        described.append(
            {
                "name": variant.name,
                "kernels": library.name,
                "weights": "weights.bin",
                "requires": sorted(variant.requires),
            }
        )
    return Kernels(files, seconds, described)
