"""The next token of each row of logits."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GpuVariant

BLOCK = 4096
"""Logits that a program looks at together."""


def select_spec(vocabulary: int) -> KernelSpec:
    """The first maximum, and a draw, from each row f32 [vocabulary]."""
    return KernelSpec.of("select_tokens", vocabulary=vocabulary)


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """See `select_spec`."""
    vocabulary = dict(spec.parameters)["vocabulary"]
    return KernelSource(
        spec.symbol,
        render("triton/select_tokens.py.jinja", name=spec.symbol),
        (
            ("logits_ptr", "*fp32"),
            ("sampling_ptr", "*i32"),
            ("greedy_ptr", "*i32"),
            ("chosen_ptr", "*i32"),
            ("dims_ptr", "*i32"),
        ),
        (
            ("VOCABULARY", vocabulary),
            ("BLOCK", min(BLOCK, 1 << (vocabulary - 1).bit_length())),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
        num_warps=16 if vocabulary > BLOCK else 4,
    )
