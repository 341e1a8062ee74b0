"""Normalisations against float64, within twice the error of the same formula in float32 and rounded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.kernels.norm import norm_grid, norm_spec
from tests.backends.triton.interpreter import TARGET, run

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
EPS = 1e-5


def formula(norm: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if norm == "rms":
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + EPS) * weight + bias


@pytest.mark.parametrize("residual", ["none", "before", "after"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(
    ("hidden", "x_dtype", "out_dtype"),
    [(8, "f32", "f32"), (96, "bf16", "bf16"), (5120, "f32", "f32"), (2048, "f32", "f16"), (16384, "f32", "bf16")],
)
def test_norms(norm: str, residual: str, hidden: int, x_dtype: str, out_dtype: str) -> None:
    random = np.random.default_rng(hidden)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    x = (normal(3, hidden) + 0.5).to(DTYPES[x_dtype])
    x[2] = torch.inf  # padding
    weight, bias, other = normal(hidden), normal(hidden), normal(3, hidden)
    out = torch.full((3, hidden), torch.nan, dtype=DTYPES[out_dtype])
    total = torch.full((3, hidden), torch.nan)
    spec = norm_spec(
        norm=norm, hidden=hidden, eps=EPS, residual=residual, x_dtype=x_dtype, out_dtype=out_dtype, rows_dim=0
    )
    tensors = {
        "x_ptr": x,
        **({"residual_ptr": other} if residual == "before" else {}),
        "weight_ptr": weight,
        **({"bias_ptr": bias} if norm == "layer" else {}),
        **({"residual_ptr": other} if residual == "after" else {}),
        **({"sum_ptr": total} if residual == "before" else {}),
        "out_ptr": out,
        "dims_ptr": torch.tensor([2, 1, 1, 1], dtype=torch.int32),
    }
    run(source_of(spec, TARGET), norm_grid(spec, 3), tensors)
    assert out[2].isnan().all() and total[2].isnan().all()
    entered = x[:2].float() + other[:2] if residual == "before" else x[:2].float()
    added = other[:2] if residual == "after" else torch.zeros(2, hidden)
    if residual == "before":
        assert torch.equal(total[:2], entered)
    exact = formula(norm, entered.double(), weight.double(), bias.double()) + added
    naive = (formula(norm, entered, weight, bias) + added).to(out.dtype)
    error, allowed = (out[:2].double() - exact).abs().max(), 2 * (naive.double() - exact).abs().max()
    assert error <= allowed, (error, allowed)


def test_a_row_of_zeros_is_finite() -> None:
    spec = norm_spec(norm="rms", hidden=32, eps=1e-6, residual="none", out_dtype="f32", rows_dim=3)
    out = torch.full((1, 32), torch.nan)
    tensors = {"x_ptr": torch.zeros(1, 32), "weight_ptr": torch.ones(32), "out_ptr": out}
    run(source_of(spec, TARGET), (1, 1, 1), {**tensors, "dims_ptr": torch.tensor([0, 0, 0, 1], dtype=torch.int32)})
    assert torch.equal(out, torch.zeros(1, 32))
