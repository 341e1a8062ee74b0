"""Embeddings against the table's rows, in every dtype, and against `QuantFormat`'s arithmetic in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.kernels.embedding import embedding_grid, embedding_spec
from llmc.backends.triton.kernels.quantized_embedding import quantized_embedding_grid, quantized_embedding_spec
from llmc.ir.quant import FORMATS
from tests.backends.triton.interpreter import run

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
IDS = torch.tensor([3, 0, 10, 3, -(2**30)], dtype=torch.int32)  # the last is padding
DIMS = torch.tensor([4, 1, 1, 1], dtype=torch.int32)


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize(("out_dtype", "hidden"), [("f32", 40), ("bf16", 1030), ("f16", 64)])
def test_rows_of_a_table(table_dtype: str, out_dtype: str, hidden: int) -> None:
    table = torch.from_numpy(np.random.default_rng(hidden).standard_normal((11, hidden), np.float32))
    table = table.to(DTYPES[table_dtype])
    out = torch.full((5, hidden), torch.nan, dtype=DTYPES[out_dtype])
    spec = embedding_spec(hidden=hidden, table_dtype=table_dtype, out_dtype=out_dtype, rows_dim=0)
    tensors = {"ids_ptr": IDS, "table_ptr": table, "out_ptr": out, "dims_ptr": DIMS}
    run(source_of(spec, None), embedding_grid(spec, 5), tensors)
    assert torch.equal(out[:4], table[IDS[:4].long()].to(out.dtype))
    assert out[4].isnan().all()


def run_quantized(
    codes: np.ndarray, scales: np.ndarray, bits: int, group: int, kind: str, hidden: int, out_dtype: str
) -> torch.Tensor:
    out = torch.full((5, hidden), torch.nan, dtype=DTYPES[out_dtype])
    spec = quantized_embedding_spec(hidden=hidden, bits=bits, group=group, kind=kind, out_dtype=out_dtype, rows_dim=0)
    tensors = {
        "ids_ptr": IDS,
        "codes_ptr": torch.from_numpy(codes),
        "scales_ptr": torch.from_numpy(scales),
        "out_ptr": out,
        "dims_ptr": DIMS,
    }
    run(source_of(spec, None), quantized_embedding_grid(spec, 5), tensors)
    assert out[4].isnan().all()
    return out[:4]


@pytest.mark.parametrize("hidden", [72, 1056])
@pytest.mark.parametrize("name", ["q8", "q4"])
def test_rows_of_a_format(name: str, hidden: int) -> None:
    form = FORMATS[name]
    weights = np.random.default_rng(hidden).standard_normal((11, hidden)).astype(np.float32)
    codes, scales = form.quantize(weights)
    found = run_quantized(form.pack(codes), scales, form.bits, form.group, "integer", hidden, "f32")
    assert torch.equal(found, torch.from_numpy(form.dequantize(codes, scales, hidden))[IDS[:4].long()])
    rounded = run_quantized(form.pack(codes), scales, form.bits, form.group, "integer", hidden, "bf16")
    assert torch.equal(rounded, found.to(torch.bfloat16))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_any_size(bits: int, group: int) -> None:
    random = np.random.default_rng(group)
    hidden = 200
    groups = -(-hidden // group)
    codes = random.integers(0, 1 << bits, (11, groups * group)).astype(np.uint8)
    scales = random.standard_normal((11, groups)).astype(np.float16)
    packed = codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4
    found = run_quantized(packed, scales, bits, group, "integer", hidden, "f32")
    expected = (codes.astype(np.float64) - (1 << (bits - 1))) * np.repeat(scales.astype(np.float64), group, axis=1)
    np.testing.assert_array_equal(found.double().numpy(), expected[IDS[:4], :hidden])


def test_every_e4m3_code() -> None:
    finite = [c for c in range(256) if c & 0x7F != 0x7F]
    codes = np.resize(np.array(finite, np.uint8), (11, 256))
    scales = np.random.default_rng(0).standard_normal((11, 2)).astype(np.float16)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    found = run_quantized(codes, scales, 8, 128, "e4m3", 256, "f32")
    np.testing.assert_array_equal(found.double().numpy(), (values * np.repeat(scales, 128, axis=1))[IDS[:4]])
