"""The passes in order, to be read aloud; each line says why it stands where it does."""

from __future__ import annotations

from llmc.ir.types import DType
from llmc.passes.base import Pipeline, parse_pipeline
from llmc.passes.canonicalize import Canonicalize
from llmc.passes.constant_fold import ConstantFold
from llmc.passes.fuse_append import FuseAppend
from llmc.passes.fuse_attention import FuseAttention
from llmc.passes.fuse_mlp import FuseMlp
from llmc.passes.fuse_norm import FuseNorm
from llmc.passes.fuse_residual import FuseResidual
from llmc.passes.fuse_rope import FuseRope
from llmc.passes.pack_linears import PackLinears
from llmc.passes.paged_kv import PagedKv
from llmc.passes.plan_memory import PlanMemory
from llmc.passes.quantize import Quantize
from llmc.passes.raise_linear import RaiseLinear
from llmc.passes.specialize import Specialize
from llmc.passes.split_linears import SplitLinears

COMMON = Pipeline(
    (
        ConstantFold(),  # scalars become attributes, which the patterns below expect
        Canonicalize(),  # one way to write each thing, and one copy of what every layer computes
        RaiseLinear(),  # products with weights, apart from those of attention
        FuseNorm(),  # norms, then the residual additions before them
        FuseRope(),  # rotations, which stand between projections and attention
        FuseAttention(),  # what may mix tokens gets a name
        FuseMlp(),  # activations and gates go into their linears, before these are packed
        SplitLinears(),  # joint projections in groups of heads: their weights are sorted, not their results
        PackLinears(),  # queries, keys and values in one product
        FuseResidual(),  # what is left of additions goes into the linears, which packing leaves as they are now
        ConstantFold(),  # tables in the shapes that fused ops take
        Canonicalize(),  # fusing left slices of concatenations and reshapes of reshapes
    )
)
"""Any model: from primitive ops to fused ones."""


def model_pipeline(quant: Quantize | None = None) -> Pipeline:
    """Any model, from primitive ops to the fused ones whose weights are in the formats asked for."""
    # Quantizing comes after packing, which joins weights that then have one format, and before rows are gathered.
    return COMMON if quant is None else COMMON + Pipeline((quant,))


def step_pipeline(kv_dtype: DType, block_size: int = 16, quant: Quantize | None = None) -> Pipeline:
    """From an imported model, a function of one sequence, to a step over a ragged batch with paged state."""
    return model_pipeline(quant) + Pipeline(
        (
            PagedKv(block_size, kv_dtype),  # attention reads through block tables
            FuseAppend(),  # rotation and cache append read the joint projection once
            Canonicalize(),  # slices that the append made unnecessary
        )
    )


def entry_pipeline(entry: str, tokens: int | None = None, sequences: int = 64, outputs: int = 64) -> Pipeline:
    """From a step to one of its entry points (see `Specialize`)."""
    return Pipeline(
        (
            Specialize(entry, tokens, sequences, outputs),  # bounds on symbols
            PlanMemory(),  # how much memory a step takes at these bounds
        )
    )


def read_pipeline(text: str) -> Pipeline:
    """A pipeline from its text form; any pass of this list may stand in it (see `parse_pipeline`)."""
    return parse_pipeline(text)
