"""Rotary tables against the cosine and sine, in float64, of the angle that frameworks take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.kernels.rotary_table import dynamic_rotary_table_spec, rotary_table_grid, rotary_table_spec
from llmc.ir.ops.rope import DynamicFrequencies
from tests.backends.triton.interpreter import TARGET, run

POSITIONS = np.array([0, 1, 17, 4095, 8192, 131071, 524287, 1 << 20, 2**31 - 1], np.int32)
"""The last is padding."""

UNIT = 2.0**-24
"""Half a unit in the last place of numbers below 1: what rounding to float32 costs."""


def tables(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((len(POSITIONS), width), torch.nan), torch.full((len(POSITIONS), width), torch.nan)


DIMS = torch.tensor([len(POSITIONS) - 1, 1, 1, 1], dtype=torch.int32)


@pytest.mark.parametrize(("rotary_dim", "scaling"), [(8, 1.0), (96, 1.1902380714238083), (128, 1.0)])
def test_cosines_and_sines_of_far_positions(rotary_dim: int, scaling: float) -> None:
    frequencies = (10_000.0 ** -(np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)
    cos, sin = tables(rotary_dim // 2)
    spec = rotary_table_spec(rotary_dim=rotary_dim, scaling=scaling, rows_dim=0)
    tensors = {
        "positions_ptr": torch.from_numpy(POSITIONS),
        "frequencies_ptr": torch.from_numpy(frequencies),
        "cos_ptr": cos,
        "sin_ptr": sin,
        "dims_ptr": DIMS,
    }
    run(source_of(spec, TARGET), rotary_table_grid(spec, len(POSITIONS)), tensors)
    angles = (POSITIONS[:-1, None].astype(np.float32) * frequencies).astype(np.float64)
    for found, expected in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        assert found[-1].isnan().all()
        assert np.abs(found[:-1].double().numpy() - scaling * expected).max() <= scaling * UNIT * 1.01


@pytest.mark.parametrize("rotary_dim", [2, 64])
def test_dynamic_frequencies(rotary_dim: int) -> None:
    if rotary_dim == 2:  # the exponent d / (d - 2) has no meaning; its only frequency is 1
        frequencies = np.ones((len(POSITIONS) - 1, 1))
    else:
        op = DynamicFrequencies(base=10_000.0, factor=2.5, max_positions=4096, rotary_dim=rotary_dim)
        (frequencies,) = op.reference(POSITIONS[:-1].astype(np.float64))
    cos, sin = tables(rotary_dim // 2)
    spec = dynamic_rotary_table_spec(
        rotary_dim=rotary_dim, base=10_000.0, factor=2.5, max_positions=4096, scaling=1.0, rows_dim=0
    )
    tensors = {"positions_ptr": torch.from_numpy(POSITIONS), "cos_ptr": cos, "sin_ptr": sin, "dims_ptr": DIMS}
    run(source_of(spec, TARGET), rotary_table_grid(spec, len(POSITIONS)), tensors)
    positions = POSITIONS[:-1, None].astype(np.float32)
    # A frequency is rounded to float32, and rarely, where float64 is undecided, to the other neighbour.
    angles = (positions * frequencies.astype(np.float32)).astype(np.float64)
    slack = UNIT * 1.01 + 1e-3 * (np.abs(angles) * 2.0**-23)
    for found, expected in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        assert found[-1].isnan().all()
        assert (np.abs(found[:-1].double().numpy() - expected) <= slack).all()
