"""A product and its operands as the matrix kernel takes them, with the reference and a naive implementation beside."""

from __future__ import annotations

from dataclasses import dataclass
from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmc.backends.triton.kernels.linear import linear_spec, source
from llmc.backends.triton.packing import row_order, to_blocks, to_words
from llmc.backends.triton.packing_ops import PackScales
from llmc.backends.triton.tiling import Tiling
from llmc.ir.quant import FORMATS
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType
from tests.backends.triton.interpreter import TARGET, run

Array = npt.NDArray[Any]
TORCH = {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}
EPS = 1e-5


@dataclass
class Case:
    """One launch: y [m, n] = x [m, k] · weight [n, k]ᵀ, with what comes before and after it."""

    n: int
    k: int
    m: int
    tiling: Tiling
    compute: DType = DType.BF16
    format: str = "none"
    norm: bool = False
    bias: bool = False
    activation: str = "none"
    factor: float = 1.0
    soft_cap: float = 0.0
    epilogue: str = "store"
    out_dtype: DType = DType.F32
    scale_weights: bool = False
    seed: int = 0
    variant: GpuVariant | None = None
    """Whose code is interpreted; None has none of its own."""
    extra_rows: int = 2
    """Rows of operands and results beyond those that count."""

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        self.x = random.standard_normal((self.m + self.extra_rows, self.k)).astype(np.float32)
        self.x[self.m :] = np.nan  # nobody may look at these
        self.gain = random.uniform(0.5, 1.5, self.k).astype(np.float32)
        self.weight = (random.standard_normal((self.n, self.k)) * self.k**-0.5).astype(np.float32)
        self.shift = random.standard_normal(self.n).astype(np.float32)
        self.residual = random.standard_normal((self.m + self.extra_rows, self.n)).astype(np.float32)
        if self.format == "none":
            self.weight = self.rounded(self.weight)
        else:
            self.codes, self.scales = FORMATS[self.format].quantize(self.weight)
            self.weight = FORMATS[self.format].dequantize(self.codes, self.scales, self.k)
        if not self.norm:
            self.x = self.rounded(self.x)

    def rounded(self, array: Array) -> npt.NDArray[np.float32]:
        """As the products' dtype holds it, in f32."""
        result: npt.NDArray[np.float32] = torch.from_numpy(array).to(TORCH[self.compute]).float().numpy()
        return result

    def expected(self, dtype: Any = np.float64, naive: bool = False) -> Array:
        """In float64; or naively: operands rounded to the products' dtype, sums in f32, the result rounded."""
        x = self.x[: self.m].astype(dtype)
        if self.norm:
            x = x / np.sqrt((x * x).mean(1, keepdims=True) + dtype(EPS)) * self.gain
        weight = self.weight.astype(dtype)
        if naive:
            x, weight = self.rounded(x.astype(np.float32)), self.rounded(weight.astype(np.float32))
        y = x @ weight.T
        if self.bias:
            y = y + self.shift
        half = self.n // 2
        y = self._activated(y[:, :half]) * y[:, half:] if self.epilogue == "gated" else self._activated(y)
        y = y * dtype(self.factor)
        if self.soft_cap:
            y = np.tanh(y * dtype(1 / self.soft_cap)) * dtype(self.soft_cap)
        if self.epilogue == "residual":
            y = y + self.residual[: self.m]
        return torch.from_numpy(y).to(TORCH[self.out_dtype]).double().numpy() if naive else y

    def _activated(self, y: Array) -> Array:
        return activated(self.activation, y.astype(np.float64)).astype(y.dtype)

    def run(self) -> Array:
        """The kernel's result [m, …] in float64, after looking whether anything else was touched."""
        width = self.n // 2 if self.epilogue == "gated" else self.n
        out = torch.full((self.m + self.extra_rows, width), torch.nan, dtype=TORCH[self.out_dtype])
        tickets = torch.zeros(self.tiling.tiles(self.n, self.m), dtype=torch.int32)
        size = self.tiling.workspace_bytes(self.n, self.k, self.m) // 4
        order = row_order("gated" if self.epilogue == "gated" else "natural", self.n, 2, 0, "half", 0)
        dtype = DType.F32 if self.norm else self.compute
        tensors = {"x_ptr": torch.from_numpy(self.x).to(TORCH[dtype])}
        if self.norm:
            tensors["norm_ptr"] = torch.from_numpy(self.gain)
        if self.format == "none":
            tensors["weight_ptr"] = torch.from_numpy(to_blocks(self.weight[order])).to(TORCH[self.compute])
        else:
            format = FORMATS[self.format]
            blocks = to_blocks(self.codes[order])
            tensors["weight_ptr"] = torch.from_numpy(to_words(blocks, format.bits))
            tensors["scale_ptr"] = torch.from_numpy(PackScales(format.group).reference(self.scales[order])[0])
        if self.bias:
            tensors["bias_ptr"] = torch.from_numpy(self.shift[order])
        if self.epilogue == "residual":
            tensors["residual_ptr"] = torch.from_numpy(self.residual)
        tensors["out_ptr"] = out
        tensors["workspace_ptr"] = torch.full((size,), torch.nan)
        tensors["tickets_ptr"] = tickets
        tensors["dims_ptr"] = torch.tensor([self.m, 1, 1, 1], dtype=torch.int32)
        spec = linear_spec(
            self.n,
            self.k,
            self.m,
            0,
            self.format,
            self.compute,
            dtype,
            self.compute,
            self.tiling,
            norm_eps=EPS if self.norm else None,
            bias=self.bias,
            activation=self.activation,
            factor=self.factor,
            soft_cap=self.soft_cap,
            epilogue=self.epilogue,
            out_dtype=self.out_dtype.value,
            scale_weights=self.scale_weights,
        )
        run(source(spec, TARGET or self.variant), (self.tiling.programs, 1, 1), tensors)
        assert not tickets.any(), "tickets are left as they were found"
        assert out[self.m :].isnan().all(), "rows that do not count are not written"
        return out[: self.m].double().numpy()


def activated(activation: str, y: Array) -> Array:
    """The activations by their definitions, of float64."""
    result: Array = y
    if activation == "silu":
        result = y / (1 + np.exp(-y))
    elif activation == "gelu_tanh":
        result = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    elif activation == "gelu_erf":
        result = 0.5 * y * (1 + np.vectorize(erf)(y / np.sqrt(2)))
    elif activation == "relu":
        result = np.maximum(y, 0)
    return result
