"""Elementwise operations against float64, within twice the error of PyTorch in float32, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.kernels.elementwise import elementwise_grid, elementwise_spec
from tests.backends.triton.interpreter import TARGET, run

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DIMS = torch.tensor([1, 1, 1, 2], dtype=torch.int32)


def compute(x: torch.Tensor, out_dtype: str, y: torch.Tensor | None = None, **parameters: Any) -> torch.Tensor:
    """The operation on all rows but the last, which must stay as it was."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    spec = elementwise_spec(
        width=x.shape[1],
        x_dtype=names[x.dtype],
        out_dtype=out_dtype,
        y_dtype=None if y is None else names[y.dtype],
        rows_dim=3,
        **parameters,
    )
    out = torch.full(x.shape, torch.nan, dtype=DTYPES[out_dtype])
    tensors = {"x_ptr": x, **({} if y is None else {"y_ptr": y}), "out_ptr": out, "dims_ptr": DIMS}
    run(source_of(spec, TARGET), elementwise_grid(spec, len(x)), tensors)
    assert out[-1].isnan().all()
    return out[:-1]


def normal(seed: int, width: int, dtype: str = "f32") -> torch.Tensor:
    values = 3 * np.random.default_rng(seed).standard_normal((3, width)).astype(np.float32)
    return torch.from_numpy(values).to(DTYPES[dtype])


@pytest.mark.parametrize(
    ("x_dtype", "y_dtype", "out_dtype"), [("f32", "f32", "f32"), ("bf16", "f32", "bf16"), ("f16", "f16", "f32")]
)
@pytest.mark.parametrize("width", [8, 1100])
def test_sums_products_and_factors_are_rounded_once(x_dtype: str, y_dtype: str, out_dtype: str, width: int) -> None:
    x, y = normal(1, width, x_dtype), normal(2, width, y_dtype)
    exact = x[:2].float(), y[:2].float()
    assert torch.equal(compute(x, out_dtype, y, operation="add"), (exact[0] + exact[1]).to(DTYPES[out_dtype]))
    assert torch.equal(compute(x, out_dtype, y, operation="multiply"), (exact[0] * exact[1]).to(DTYPES[out_dtype]))
    assert torch.equal(compute(x, out_dtype, operation="scale", factor=0.3), (exact[0] * 0.3).to(DTYPES[out_dtype]))
    assert torch.equal(compute(x, out_dtype, operation="none"), exact[0].to(DTYPES[out_dtype]))


REFERENCES = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_erf": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("name", REFERENCES)
def test_activations(name: str, out_dtype: str) -> None:
    far = 1e12 if out_dtype == "f32" else 3e4
    sweep = torch.cat([torch.linspace(-30, 30, 1000), torch.tensor([0.0, -0.0, -88.0, -far, far, 87.5, 1e-30])])
    x = sweep.repeat(3, 1)
    found = compute(x, out_dtype, operation=name)[0]
    exact = REFERENCES[name](sweep.double())
    naive = REFERENCES[name](sweep).to(DTYPES[out_dtype]).double()
    finite = naive.isfinite()
    assert torch.equal(found.isfinite(), finite)
    unit = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}[out_dtype]
    error = ((found.double() - exact).abs() / exact.abs().clamp(min=1e-3))[finite]
    allowed = ((naive - exact).abs() / exact.abs().clamp(min=1e-3))[finite]
    assert error.max().item() <= max(2 * allowed.max().item(), 2 * unit)


@pytest.mark.parametrize("name", REFERENCES)
def test_what_is_not_a_number_stays(name: str) -> None:
    x = torch.full((3, 8), torch.nan)
    assert compute(x, "f32", operation=name).isnan().all()
