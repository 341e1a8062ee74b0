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

INSTRUCTIONS, SCALING = {"float": 0.5, "int4": 1.55, "int8": 1.95, "e4m3": 2.45}, 1.0
"""Of a thread for each weight, by how it is decoded, but for what a pass of the loop takes anyhow; and to scale it:
counted in code for sm_90 (see benchmarks/NOTES.md)."""

SUMS_MOST = {8: 32, 9: 1 << 30, 10: 16}
"""Rows of x up to which sums are scaled, by the architecture's major number. Before Hopper the sums of a group and of
the tile would not both fit in registers; on Blackwell those of more rows lie in a memory of their own (`tcgen05`)."""


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
    scale = scales_weights(op, rows, variant)
    product = product_of(op, rows, scale)
    options |= {"norm_eps": op.norm_eps, "out_dtype": op.dtype.value, "scale_weights": scale}
    call = ProductCall(product, rows_dim, op.format, weight, x, op.compute, tuple(sorted(options.items())))
    return call, tunings.get(product, variant) or _choose(product, variant)


def scales_weights(op: BlockLinear | BlockGatedLinear | BlockAppend, rows: int, variant: GpuVariant) -> bool:
    """Whether codes are scaled before they are multiplied, and not the sums of each group afterwards.

    A thread scales two weights with two instructions (see `times` in templates/triton/dequant), and a sum of `group`
    weights with one for each row of x.
    """
    format = FORMATS.get(op.format)
    if format is None or op.compute is DType.F32:
        return False
    return rows > min(format.group, SUMS_MOST[variant.capability[0]])


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
        copies=int(op.compute is DType.F32),
        sums=not scale_weights,
    )
