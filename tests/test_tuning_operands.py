"""Operands for timing: every kernel finds numbers where it reads, writes nothing outside, leaves tickets at zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.ops import BlockAppend, BlockGatedLinear, BlockLinear
from llmc.backends.triton.products import ProductCall, product_kernel
from llmc.backends.triton.tiling import Tiling, Tunings
from llmc.ir.quant import FORMATS
from llmc.ir.target import GPU_VARIANTS
from llmc.ir.types import DType
from llmc.runtime.cuda_driver import KernelLaunch
from llmc.runtime.cuda_kernels import Kernel
from llmc.tuning_operands import MAX_COPIES, Layout, Patterns, fill, layout_of
from tests.backends.triton.interpreted_device import InterpretedDevice

BF16, F32 = DType.BF16, DType.F32
TILINGS = [Tiling(64, 8, 128, 3, 2, 4), Tiling(128, 16, 128, 2, 2, 4)]
WIDTH = 200


def linear(format: str, m: int = 3) -> ProductCall:
    op = BlockLinear(format, 200, WIDTH, True, "none", True, None, BF16, F32)
    return _call(op, BF16, m, epilogue="residual", bias=True)


def gated(format: str, m: int = 3) -> ProductCall:
    op = BlockGatedLinear(format, 192, WIDTH, "silu", 1e-5, BF16, BF16)
    return _call(op, F32, m, epilogue="gated", activation="silu")


def append(format: str, m: int, state: str = "bf16", rotary_dim: int = 16) -> ProductCall:
    heads: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "layout": "half"}
    op = BlockAppend(format, WIDTH, False, **heads, rotary_dim=rotary_dim, norm_eps=1e-5, compute=BF16, dtype=BF16)
    rest = {"rotary_dim": rotary_dim, "block_size": 16, "state_dtype": state}
    return _call(op, F32, m, epilogue="append", **heads, **rest)


def _call(op: Any, x: DType, m: int, **options: Any) -> ProductCall:
    call, _ = product_kernel(op, x, BF16, m, 0, GPU_VARIANTS["sm_90"], Tunings(), **options)
    return call


CALLS = {
    "residual": linear("none"),
    **{f"residual, {name}": linear(name) for name in FORMATS},
    "gated": gated("none"),
    "gated, q4": gated("q4"),
    "append": append("none", 3),
    "append, 20 tokens": append("q8", 20),
    "append, int8 without rotation": append("none", 3, "i8", 0),
    "append, fp8": append("none", 3, "f8e4m3"),
}


@pytest.mark.parametrize("tiling", TILINGS, ids=["small", "large"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_kernels_run_on_them(call: ProductCall, tiling: Tiling) -> None:
    source = source_of(call.spec(tiling), None)
    device = InterpretedDevice({source.name: source})
    layout = layout_of(call, source, TILINGS, 100_000)
    base = device.allocate(layout.bytes)
    fill(device, layout, base, Patterns())
    kernel = Kernel(source.name, source.name, 128, 0, len(source.arguments), False)
    before = contents(device, layout, base, "weight_ptr").clone()
    for copy in (0, layout.copies - 1):
        launch = KernelLaunch(kernel, (tiling.programs, 1, 1), layout.arguments(base, source, copy))
        device.prepare([launch]).replay(0)
        out = contents(device, layout, base, "out_ptr").view(
            {"*bf16": torch.bfloat16, "*fp32": torch.float32}[layout.kinds["out_ptr"]]
        )
        assert out.isfinite().all()  # memory is NaN where nobody wrote
        assert out.float().abs().max() > 0
    assert torch.equal(before, contents(device, layout, base, "weight_ptr"))
    assert not contents(device, layout, base, "tickets_ptr").any()
    for name in {"key_ptr", "value_ptr"} & layout.places.keys():
        assert (contents(device, layout, base, name) != 0xFF).any()
    whole = device.tensor(base, "*u8")[: layout.bytes].clone()
    for offset, size in layout.places.values():
        whole[offset : offset + size] = 0xFF
    assert bool((whole == 0xFF).all()), "something was written between the operands"


def contents(device: InterpretedDevice, layout: Layout, base: int, name: str) -> torch.Tensor:
    offset, size = layout.places[name]
    return device.tensor(base + offset, "*u8")[:size]


def test_weights_exceed_the_cache_and_never_are_zero() -> None:
    call = linear("q8")
    source = source_of(call.spec(TILINGS[0]), None)
    weight = 256 * 256
    assert layout_of(call, source, TILINGS, 0).copies == 1
    layout = layout_of(call, source, TILINGS, 10 * weight)
    assert (layout.copies, layout.weight_bytes) == (11, weight)
    assert layout_of(call, source, TILINGS, 1 << 40).copies == MAX_COPIES
    at = [n for n, _ in source.arguments].index("weight_ptr")
    first, second = (layout.arguments(1 << 20, source, copy) for copy in (0, 1))
    assert second[at] - first[at] == weight
    assert [a for i, a in enumerate(first) if i != at] == [a for i, a in enumerate(second) if i != at]
    patterns = Patterns()
    assert np.count_nonzero(patterns.of("weight_ptr", "*i32")) > 0.99 * patterns.of("weight_ptr", "*i32").size
    codes = patterns.of("weight_ptr", "*u8")
    assert not np.isin(codes, (0x7F, 0xFF)).any() and len(np.unique(codes)) == 254
    assert patterns.of("x_ptr", "*fp32") is patterns.of("residual_ptr", "*fp32")
    assert not np.array_equal(patterns.of("x_ptr", "*bf16"), patterns.of("weight_ptr", "*bf16"))
