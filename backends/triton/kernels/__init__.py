"""Kernel kinds: for each, a module whose `source` makes the Triton kernel of a specification."""

from __future__ import annotations

from collections.abc import Mapping

from llmc.backends.base import KernelSpec
from llmc.backends.triton.kernels import attention_decode, attention_prefill, gather_rows, rope_append
from llmc.backends.triton.source import KernelSource, Maker
from llmc.ir.target import GpuVariant

MAKERS: Mapping[str, Maker] = {
    "attention_decode": attention_decode.source,
    "attention_prefill": attention_prefill.source,
    "gather_rows": gather_rows.source,
    "rope_append": rope_append.source,
}
"""By kind."""


def source_of(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """The kernel of a specification, for an architecture or, with None, for Triton's interpreter."""
    return MAKERS[spec.kind](spec, target)
