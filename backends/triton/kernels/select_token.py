"""The next token of rows of logits: the first maximum, and one drawn as `llmc.runtime.sampler` does.

Programs of a row find the largest of a chunk each, and the sum of its weights; the last to arrive combines them. A row
of temperature 0 is done then, and a draw without truncation reads one chunk more. For top-k, top-p and min-p that
program alone gathers candidates, a superset of what stays that is small unless the row is flat, and finds thresholds
among them by bisection over the bits of a float.

All sums are of f32, as trees over a block, one block after another: relative errors of some 2^-21, so that a draw
differs from the host's, in f64, only where its uniform number or a bound lies so near.
"""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.kernels.common import DIMS, Grid, ceil_div, is_dependent, power_of_two
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GpuVariant

BLOCK = 4096
"""Tokens of a row that one program takes."""

GROUP = 32
"""Tokens whose maximum is kept: the k-th of these bounds the k-th of all."""

_PER_THREAD = 8
"""Logits in one thread: two loads of 16 bytes under way; more would make long code, which is read from memory, too."""


def select_token_spec(*, vocab: int, rows_dim: int = 3, block: int = BLOCK) -> KernelSpec:
    """logits f32 [rows, vocab], sampling i32 [rows, 8], greedy i32 [rows], chosen i32 [rows], workspace, tickets, dims.

    A row of `sampling`: temperature (bits of an f32; 0: chosen is greedy), top-k (0: off), top-p (bits of an f32; 1:
    off), min-p (the same; 0: off), seed (low and high half), sequence key, position. NaN is never the greedy token; of
    only NaN, 0 is. `chosen` is -1 where the host raises an error: the temperature is not 0 and a logit is NaN, or the
    largest is infinite. `block` is a power of two; a smaller one is for tests.
    """
    assert vocab >= 1 and block == power_of_two(block)
    return KernelSpec.of("select_token", vocab=vocab, rows_dim=rows_dim, block=min(block, power_of_two(vocab)))


def select_token_grid(spec: KernelSpec, rows: int) -> Grid:
    """A program for each row and chunk."""
    p = dict(spec.parameters)
    return rows, ceil_div(p["vocab"], p["block"]), 1


def select_token_workspace(spec: KernelSpec, rows: int) -> tuple[int, int]:
    """Floats of workspace and number of tickets that a launch over `rows` needs."""
    return rows * _constants(spec)["STRIDE"], rows


def _constants(spec: KernelSpec) -> dict[str, int]:
    p = dict(spec.parameters)
    vocab, block = p["vocab"], p["block"]
    chunks = ceil_div(vocab, block)
    slots, group = power_of_two(chunks), min(GROUP, block)
    groups = slots * (block // group)
    stride = ceil_div(3 * slots + groups + 2 * vocab, 64) * 64
    return {
        "VOCAB": vocab,
        "BLOCK": block,
        "CHUNKS": chunks,
        "SLOTS": slots,
        "GROUP": group,
        "GROUPS": groups,
        "STRIDE": stride,
        "ROWS_DIM": p["rows_dim"],
    }


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """The kernel of `select_token_spec`."""
    constants = _constants(spec)
    return KernelSource(
        spec.symbol,
        render("triton/select_token.py.jinja", name=spec.symbol),
        (
            ("logits_ptr", "*fp32"),
            ("sampling_ptr", "*i32"),
            ("greedy_ptr", "*i32"),
            ("chosen_ptr", "*i32"),
            ("workspace_ptr", "*fp32"),
            ("tickets_ptr", "*i32"),
            DIMS,
        ),
        (*constants.items(), ("PDL", is_dependent(target))),
        num_warps=max(1, min(16, constants["BLOCK"] // (32 * _PER_THREAD))),
        num_stages=1,
    )
