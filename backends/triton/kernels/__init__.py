"""Kernel kinds: for each, a function that makes the Triton kernel of a specification."""

from __future__ import annotations

from collections.abc import Mapping

from llmc.backends.base import KernelSpec
from llmc.backends.triton.kernels import (
    attention_decode,
    attention_prefill,
    elementwise,
    embedding,
    gather_rows,
    linear,
    norm,
    rope_append,
    rotary_table,
    select_token,
)
from llmc.backends.triton.source import KernelSource, Maker
from llmc.ir.target import GpuVariant

MAKERS: Mapping[str, Maker] = {
    "attention_decode": attention_decode.source,
    "attention_prefill": attention_prefill.source,
    "dynamic_rotary_table": rotary_table.dynamic_source,
    "elementwise": elementwise.source,
    "embedding": embedding.source,
    "gather_rows": gather_rows.source,
    "linear": linear.source,
    "norm": norm.source,
    "rope_append": rope_append.source,
    "rotary_table": rotary_table.source,
    "select_token": select_token.source,
}
"""By kind."""


def source_of(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """The kernel of a specification, for an architecture or, with None, for Triton's interpreter."""
    return MAKERS[spec.kind](spec, target)
