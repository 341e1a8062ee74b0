"""Kernel specifications of routing and experts; their arguments are a node's operands, then its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmc.backends.base import KernelSpec
from llmc.backends.tvm.expert_ops import (
    CombineExperts,
    GroupRows,
    GroupTiles,
    PackedExpertsGatedLinear,
    PackedExpertsLinear,
    TiledExpertsGatedLinear,
    TiledExpertsLinear,
)
from llmc.backends.tvm.selected import rows_dim, width_of
from llmc.ir.op import Node, Op
from llmc.ir.ops.routing import Routing
from llmc.ir.quant import FORMATS
from llmc.ir.types import TensorType, symbols_of


def _routing(op: Any, node: Node) -> KernelSpec | None:
    logits = node.inputs[0].type
    if not symbols_of(logits.shape[0]):
        return None
    return KernelSpec.of("routing", rows_dim=rows_dim(logits), experts=width_of(logits), **vars(op))


def _group_rows(op: Any, node: Node) -> KernelSpec:
    x, weights = (v.type for v in node.inputs)
    return _grouping("group_rows", op, weights, width_of(x))


def _group_tiles(op: Any, node: Node) -> KernelSpec:
    codes, *_, weights = (v.type for v in node.inputs)
    groups, _, group = codes.shape
    assert isinstance(groups, int) and isinstance(group, int)
    return _grouping("group_tiles", op, weights, groups * group)


def _grouping(kind: str, op: Any, weights: TensorType, elements: int) -> KernelSpec:
    sizes = {"rows_dim": rows_dim(weights), "experts": width_of(weights), "width": elements}
    return KernelSpec.of(kind, per_token=op.per_token, **sizes)


def _combine(op: Any, node: Node) -> KernelSpec:
    rows, places, _ = (v.type for v in node.inputs)
    return KernelSpec.of("combine_experts", rows_dim=rows_dim(places), per_token=width_of(places), width=width_of(rows))


def _linear(op: Any, node: Node) -> KernelSpec:
    return _packed("experts_linear", op, node)


def _gated_linear(op: Any, node: Node) -> KernelSpec:
    return _packed("experts_gated_linear", op, node, **_gating(op))


def _packed(kind: str, op: Any, node: Node, **parameters: Any) -> KernelSpec:
    x, starts, panels, *_ = (v.type for v in node.inputs)
    return KernelSpec.of(
        kind,
        experts=width_of(starts) - 1,
        n=op.rows,
        k=width_of(x),
        weight_dtype=panels.dtype.value,
        bias=op.bias,
        **parameters,
    )


def _tiled_linear(op: Any, node: Node) -> KernelSpec:
    return _tiled("experts_quantized_linear", op, node)


def _tiled_gated_linear(op: Any, node: Node) -> KernelSpec:
    return _tiled("experts_quantized_gated_linear", op, node, **_gating(op))


def _tiled(kind: str, op: Any, node: Node, **parameters: Any) -> KernelSpec:
    _, scales, _, starts, *_ = (v.type for v in node.inputs)
    return KernelSpec.of(
        kind,
        rows_dim=rows_dim(TensorType(scales.dtype, scales.shape[1:])),
        per_token=op.per_token,
        experts=width_of(starts) - 1,
        n=op.rows,
        k=op.width,
        bits=FORMATS[op.format].bits,
        bias=op.bias,
        **parameters,
    )


def _gating(op: Any) -> dict[str, Any]:
    return {"activation": op.activation, "gating": op.gating, "limit": op.limit}


EXPERT_SPECS: Mapping[type[Op], Callable[[Any, Node], KernelSpec | None]] = {
    Routing: _routing,
    GroupRows: _group_rows,
    GroupTiles: _group_tiles,
    PackedExpertsLinear: _linear,
    PackedExpertsGatedLinear: _gated_linear,
    TiledExpertsLinear: _tiled_linear,
    TiledExpertsGatedLinear: _tiled_gated_linear,
    CombineExperts: _combine,
}
"""What makes the specification of a node's kernel, by the class of its op; None where there is no kernel."""
