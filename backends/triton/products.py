"""From an op over a weight in blocks to its kernel and tiling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from llmc.backends.base import KernelSpec
from llmc.backends.triton.kernels.linear import linear_spec
from llmc.backends.triton.ops import BlockAppend, BlockGatedLinear, BlockLinear
from llmc.backends.triton.tiling import Product, Tiling, Tunings, choose
from llmc.ir.quant import FORMATS
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

_choose = cache(choose)

SMALL_GROUP = 64
"""4-bit weights in smaller groups are scaled before the product. Counted for sm_90, tiles of 128 × 8: 4.6 instructions
a weight, where a product for each group of 32 takes 5.9; groups of 64 take 3.2 with a product each."""

INSTRUCTIONS, SCALING = {"float": 0.8, "int4": 2.3, "int8": 3.7, "e4m3": 3.1}, 1.7
"""Of a thread for each weight, by how it is decoded, but for what a pass of the loop takes anyhow; and to scale it:
counted in code for sm_90 (see benchmarks/NOTES.md)."""


@dataclass(frozen=True)
class ProductCall:
    """A product as a launch does it: what the model of tilings looks at, and all else of its kernel but the tiling.

    `rows_dim`, `format`, `weight`, `x`, `compute` and `options` as in `linear_spec`.
    """

    product: Product
    rows_dim: int
    format: str
    weight: DType
    x: DType
    compute: DType
    options: tuple[tuple[str, Any], ...]

    def spec(self, tiling: Tiling) -> KernelSpec:
        """The kernel that is cut so."""
        p = self.product
        return linear_spec(
            p.n, p.k, p.m, self.rows_dim, self.format, self.weight, self.x, self.compute, tiling, **dict(self.options)
        )


def product_kernel(
    op: BlockLinear | BlockGatedLinear | BlockAppend,
    x: DType,
    weight: DType,
    rows: int,
    rows_dim: int,
    variant: GpuVariant,
    tunings: Tunings,
    **options: Any,
) -> tuple[ProductCall, Tiling]:
    """The product of up to `rows` rows of x, which `dims[rows_dim]` counts, and its tiling: the measured one, or the
    model's choice. `options` as in `linear_spec`."""
    scale = scales_weights(op, variant)
    product = product_of(op, rows, scale)
    options |= {"norm_eps": op.norm_eps, "out_dtype": op.dtype.value, "scale_weights": scale}
    call = ProductCall(product, rows_dim, op.format, weight, x, op.compute, tuple(sorted(options.items())))
    return call, tunings.get(product, variant) or _choose(product, variant)


def scales_weights(op: BlockLinear | BlockGatedLinear | BlockAppend, variant: GpuVariant) -> bool:
    """Whether codes are scaled before they are multiplied. From Blackwell on sums lie in a memory of their own, and to
    fetch those of each group takes longer than to scale its weights."""
    format = FORMATS.get(op.format)
    if format is None or format.kind != "integer" or op.compute is DType.F32:
        return False
    return variant.capability >= (10, 0) or (format.bits == 4 and format.group < SMALL_GROUP)


def product_of(op: BlockLinear | BlockGatedLinear | BlockAppend, rows: int, scale_weights: bool = False) -> Product:
    """What the model of tilings looks at."""
    format = FORMATS.get(op.format)
    item, norm = op.compute.itemsize, op.norm_eps is not None
    if format is None:
        return Product(op.rows, op.width, rows, 8.0 * item, 8 * item, 0, item, norm, INSTRUCTIONS["float"])
    kind = "e4m3" if format.kind == "e4m3" else f"int{format.bits}"
    return Product(
        op.rows,
        op.width,
        rows,
        format.bits_per_weight,
        format.bits,
        format.group,
        item,
        norm,
        INSTRUCTIONS[kind] + (SCALING if scale_weights else 0),
        copies=2 if kind == "int8" and op.compute is DType.BF16 and not scale_weights else 1,
        sums=not scale_weights,
    )
