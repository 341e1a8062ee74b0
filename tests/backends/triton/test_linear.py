"""The matrix kernel against float64: every format, beginning and end, split and whole tiles, odd sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from llmc.backends.triton.tiling import Tiling
from llmc.ir.quant import FORMATS
from llmc.ir.target import GPU_VARIANTS
from llmc.ir.types import DType
from tests.backends.triton import assembly
from tests.backends.triton.products import Case

F32, F16, BF16 = DType.F32, DType.F16, DType.BF16


def tiling(n: int = 64, m: int = 8, k: int = 128, programs: int = 3) -> Tiling:
    return Tiling(n, m, k, programs, 3, 4)


def check(case: Case) -> None:
    expected = case.expected()
    error = np.abs(case.run() - expected).max()
    naive = np.abs(case.expected(np.float32, naive=True) - expected).max()
    assert error <= 2 * naive, f"{error:.2e}, and naively {naive:.2e}"


@pytest.mark.parametrize(
    ("format", "compute"), [("none", F32), *((f, c) for f in ("none", *FORMATS) for c in (F16, BF16))], ids=str
)
def test_every_format_in_every_dtype(format: str, compute: DType) -> None:
    check(Case(100, 300, 3, tiling(), compute, format))


@pytest.mark.parametrize(("format", "compute"), [(f, c) for f in FORMATS for c in (F16, BF16)], ids=str)
@pytest.mark.parametrize("scale_weights", [False, True], ids=["sums", "weights"])
def test_decoded_in_assembly_for_the_matrix_instructions_of_one_warp(
    format: str, compute: DType, scale_weights: bool
) -> None:
    """What is compiled for an architecture, but for the instructions' own layouts."""
    assembly.mend()
    variant = GPU_VARIANTS["sm_89"]
    case = Case(100, 300, 3, tiling(), compute, format, scale_weights=scale_weights, variant=variant)
    check(case)
    if not scale_weights or compute is F16:  # the same weights and sums, in another order of columns
        portable = Case(100, 300, 3, tiling(), compute, format, scale_weights=scale_weights)
        assert np.abs(case.run() - portable.run()).max() <= 2e-6


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("epilogue", "activation"),
    [("store", "gelu_erf"), ("residual", "none"), ("gated", "silu"), ("gated", "gelu_tanh"), ("store", "relu")],
)
def test_what_comes_before_and_after(norm: bool, epilogue: str, activation: str) -> None:
    check(
        Case(
            192,
            256,
            5,
            tiling(n=128),
            epilogue=epilogue,
            activation=activation,
            norm=norm,
            bias=epilogue != "gated",
            out_dtype=BF16 if epilogue == "gated" else F32,
        )
    )


@pytest.mark.parametrize(
    "end",
    [{"factor": 0.22, "epilogue": "residual", "bias": True}, {"soft_cap": 1.5}, {"factor": 3.0, "soft_cap": 30.0}],
    ids=str,
)
@pytest.mark.parametrize("format", ["none", "q4"])
def test_factors_and_soft_caps(end: dict[str, Any], format: str) -> None:
    for compute in (F32, BF16) if format == "none" else (BF16,):
        check(Case(192, 256, 5, tiling(n=128), compute, format, **end))


@pytest.mark.parametrize("m", [1, 8, 17, 64])
def test_tokens_up_to_a_bucket(m: int) -> None:
    block = max(8, 1 << (m - 1).bit_length())
    check(Case(64, 384, m, tiling(m=block, programs=2), norm=True))


@pytest.mark.parametrize("programs", [1, 2, 4, 5, 6])
def test_however_tiles_are_split_the_result_is_right(programs: int) -> None:
    # 2 tiles of 3 pieces: whole, halves across tiles, one piece each
    check(Case(128, 384, 4, tiling(programs=programs), F32, norm=True))


@pytest.mark.parametrize("format", ["none", "q4", "q8g128", "fp8"])
@pytest.mark.parametrize("scale_weights", [False, True], ids=["sums", "weights"])
def test_large_tiles_of_many_tokens(format: str, scale_weights: bool) -> None:
    columns = 64 if format == "none" else 128
    made = Tiling(128, 64, columns, 6, 2, 4)  # 2 tiles of rows by 3 of tokens, one to a program
    check(Case(200, 200, 150, made, BF16, format, scale_weights=scale_weights and format != "none"))


@pytest.mark.parametrize("format", ["q4", "q4g64", "q8"])
@pytest.mark.parametrize("scale_weights", [False, True], ids=["sums", "weights"])
def test_codes_after_a_norm_in_split_tiles(format: str, scale_weights: bool) -> None:
    made = Case(130, 520, 5, tiling(n=128, programs=4), BF16, format, norm=True, scale_weights=scale_weights)
    check(made)


def test_results_are_the_same_bits_each_time_and_with_more_tokens_beside() -> None:
    first = Case(128, 384, 8, tiling(programs=5), norm=True)
    alone = Case(128, 384, 2, tiling(programs=5), norm=True)
    alone.x[:2], alone.weight, alone.gain = first.x[:2], first.weight, first.gain
    assert np.array_equal(first.run(), first.run())
    assert np.array_equal(first.run()[:2], alone.run())


def test_the_order_in_which_programs_run_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(128, 640, 4, tiling(programs=5), norm=True)
    expected = case.run()
    place = InterpreterBuilder.set_grid_idx
    for order in ((4, 3, 2, 1, 0), (2, 0, 4, 1, 3)):

        def reordered(self: Any, x: int, y: int, z: int, order: tuple[int, ...] = order) -> None:
            place(self, order[x], y, z)

        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reordered)
        assert np.array_equal(case.run(), expected)


def test_launches_may_follow_each_other_on_one_workspace() -> None:
    # The tickets are checked to be zero after every run; two launches on the same ones show it again.
    case = Case(128, 384, 4, tiling(programs=5))
    before = case.run()
    assert np.array_equal(before, case.run())


def test_padding_columns_and_rows_of_blocks_do_not_count() -> None:
    case = Case(70, 130, 2, tiling(n=128, programs=2), F32)
    assert torch.from_numpy(case.run()).isfinite().all()
    check(case)
