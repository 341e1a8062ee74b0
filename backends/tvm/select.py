"""Which kernel runs a node: a table from op classes to kernel specifications and the order of their C arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llmc.backends.base import SYMBOLS, KernelSpec
from llmc.backends.dynamic_rotary import DynamicRotaryTable
from llmc.backends.tvm.attention_ops import AppendKeys, CombineSplits, RotatedAttention, SplitAttention
from llmc.backends.tvm.ops import PackedEmbedding, PackedGatedLinear, PackedLinear
from llmc.backends.tvm.select_rows import ROWS
from llmc.backends.tvm.selected import Selected, elements, given, rows_dim, width_of
from llmc.backends.tvm.tile_fusions import (
    AddLayerNormTiles,
    AddRmsNormTiles,
    LayerNormTiles,
    RmsNormTiles,
    TiledGatedLinearTiles,
    TiledLinearKeys,
    TiledLinearTiles,
)
from llmc.backends.tvm.tiled_ops import BestOfPanels, QuantizeTiles, TiledEmbedding, TiledGatedLinear, TiledLinear
from llmc.ir.op import Node, Op, Value
from llmc.ir.ops.embedding import Embedding
from llmc.ir.ops.norm import AddLayerNorm, AddRmsNorm, LayerNorm, RmsNorm
from llmc.ir.ops.reduce import Argmax
from llmc.ir.ops.rope import RotaryTable
from llmc.ir.ops.shape import GatherRows
from llmc.ir.quant import FORMATS
from llmc.ir.types import DType, TensorType, symbols_of

_OpT = TypeVar("_OpT", bound=Op)


_TABLE: dict[type[Op], Callable[[Op, Node], Selected | None]] = {}


def has_kernel(node: Node) -> bool:
    """Whether `select` finds one."""
    return select(node) is not None


def select(node: Node) -> Selected | None:
    """The kernel for a node, or None."""
    choose = _TABLE.get(type(node.op))
    return choose(node.op, node) if choose else None


def arguments(node: Node) -> tuple[Value, ...] | None:
    """The values that a node's kernel is given; None for a node without a kernel."""
    chosen = select(node)
    return None if chosen is None else chosen.arguments


def _kernel(
    kind: type[_OpT],
) -> Callable[[Callable[[_OpT, Node], Selected | None]], Callable[[_OpT, Node], Selected | None]]:
    def register(choose: Callable[[_OpT, Node], Selected | None]) -> Callable[[_OpT, Node], Selected | None]:
        _TABLE[kind] = choose  # type: ignore[assignment]
        return choose

    return register


def _sizes(type: TensorType) -> tuple[int, ...]:
    return type.concrete({})


@_kernel(Embedding)
def _embedding(op: Embedding, node: Node) -> Selected | None:
    ids, table = node.inputs
    if op.dtype is not DType.F32:
        return None
    vocab, hidden = _sizes(table.type)
    spec = KernelSpec.of("embedding", vocab=vocab, hidden=hidden, weight_dtype=table.type.dtype.value)
    return Selected(spec, (ids, table, *node.results))


@_kernel(PackedEmbedding)
def _packed_embedding(op: PackedEmbedding, node: Node) -> Selected:
    ids, panels = node.inputs
    hidden = width_of(node.types[0])
    spec = KernelSpec.of("packed_embedding", vocab=op.rows, hidden=hidden, weight_dtype=panels.type.dtype.value)
    return Selected(spec, (ids, panels, *node.results))


@_kernel(RmsNorm)
def _rms_norm(op: RmsNorm, node: Node) -> Selected | None:
    return _norm("rms_norm", op.eps, node)


@_kernel(LayerNorm)
def _layer_norm(op: LayerNorm, node: Node) -> Selected | None:
    return _norm("layer_norm", op.eps, node)


@_kernel(AddRmsNorm)
def _add_rms_norm(op: AddRmsNorm, node: Node) -> Selected | None:
    return _norm("add_rms_norm", op.eps, node)


@_kernel(AddLayerNorm)
def _add_layer_norm(op: AddLayerNorm, node: Node) -> Selected | None:
    return _norm("add_layer_norm", op.eps, node)


@_kernel(RmsNormTiles)
def _rms_norm_tiles(op: RmsNormTiles, node: Node) -> Selected | None:
    return _norm("rms_norm", op.eps, node, tiles=True)


@_kernel(LayerNormTiles)
def _layer_norm_tiles(op: LayerNormTiles, node: Node) -> Selected | None:
    return _norm("layer_norm", op.eps, node, tiles=True)


@_kernel(AddRmsNormTiles)
def _add_rms_norm_tiles(op: AddRmsNormTiles, node: Node) -> Selected | None:
    return _norm("add_rms_norm", op.eps, node, tiles=True)


@_kernel(AddLayerNormTiles)
def _add_layer_norm_tiles(op: AddLayerNormTiles, node: Node) -> Selected | None:
    return _norm("add_layer_norm", op.eps, node, tiles=True)


def _norm(kind: str, eps: float, node: Node, **tiles: bool) -> Selected | None:
    x = node.inputs[0].type
    if not symbols_of(x.shape[0]) or any(v.type.dtype is not DType.F32 for v in node.inputs):
        return None
    heads = elements(x.shape[1:-1])
    if heads != 1 and len(node.types) > 1:
        return None  # additions before norms are of whole rows
    many = given(heads=heads if heads > 1 else 0)
    spec = KernelSpec.of(kind, rows_dim=rows_dim(x), hidden=width_of(x), eps=eps, **tiles, **many)
    return Selected(spec, (*node.inputs, *node.results))


@_kernel(QuantizeTiles)
def _quantize_tiles(op: QuantizeTiles, node: Node) -> Selected | None:
    x = node.inputs[0].type
    if x.dtype is not DType.F32:
        return None
    return Selected(
        KernelSpec.of("quantize_tiles", rows_dim=rows_dim(x), width=width_of(x)), (*node.inputs, *node.results)
    )


@_kernel(TiledLinear)
def _tiled_linear(op: TiledLinear, node: Node) -> Selected:
    return _tiled("quantized_linear", op, node, bias=op.bias, epilogue=op.activation, residual=op.residual)


@_kernel(TiledLinearTiles)
def _tiled_linear_tiles(op: TiledLinearTiles, node: Node) -> Selected:
    return _tiled("quantized_linear", op, node, bias=True, epilogue=op.activation, tiles=True)


@_kernel(TiledLinearKeys)
def _tiled_linear_keys(op: TiledLinearKeys, node: Node) -> Selected:
    return _tiled("quantized_linear", op, node, best=True)


@_kernel(BestOfPanels)
def _best_of_panels(op: BestOfPanels, node: Node) -> Selected:
    return Selected(
        KernelSpec.of("best_of_panels", panels=width_of(node.inputs[0].type)), (*node.inputs, *node.results)
    )


@_kernel(TiledGatedLinear)
def _tiled_gated_linear(op: TiledGatedLinear, node: Node) -> Selected:
    return _tiled("quantized_gated_linear", op, node, activation=op.activation)


@_kernel(TiledGatedLinearTiles)
def _tiled_gated_linear_tiles(op: TiledGatedLinearTiles, node: Node) -> Selected:
    return _tiled("quantized_gated_linear", op, node, activation=op.activation, tiles=True)


def _tiled(kind: str, op: Any, node: Node, **parameters: bool | str) -> Selected:
    rows = node.inputs[1].type  # scales [groups, m]
    spec = KernelSpec.of(
        kind,
        rows_dim=rows_dim(TensorType(rows.dtype, rows.shape[1:])),
        n=op.rows,
        k=op.width,
        bits=FORMATS[op.format].bits,
        **parameters,
    )
    return Selected(spec, (*node.inputs, *node.results))


@_kernel(TiledEmbedding)
def _tiled_embedding(op: TiledEmbedding, node: Node) -> Selected:
    spec = KernelSpec.of("quantized_embedding", vocab=op.rows, hidden=op.width, bits=FORMATS[op.format].bits)
    return Selected(spec, (*node.inputs, *node.results))


@_kernel(PackedLinear)
def _linear(op: PackedLinear, node: Node) -> Selected:
    x, panels = node.inputs[:2]
    spec = KernelSpec.of(
        "linear",
        rows_dim=rows_dim(x.type),
        n=op.rows,
        k=width_of(x.type),
        weight_dtype=panels.type.dtype.value,
        bias=op.bias,
        epilogue=op.activation,
        residual=op.residual,
    )
    return Selected(spec, (*node.inputs, *node.results))


@_kernel(PackedGatedLinear)
def _gated_linear(op: PackedGatedLinear, node: Node) -> Selected:
    x, panels = node.inputs
    spec = KernelSpec.of(
        "gated_linear",
        rows_dim=rows_dim(x.type),
        n=op.rows,
        k=width_of(x.type),
        weight_dtype=panels.type.dtype.value,
        activation=op.activation,
    )
    return Selected(spec, (*node.inputs, *node.results))


@_kernel(RotaryTable)
def _rotary_table(op: RotaryTable, node: Node) -> Selected | None:
    positions, frequencies = node.inputs
    width = 2 * width_of(frequencies.type)
    if frequencies.type.rank != 1:
        return None
    spec = KernelSpec.of("rotary_table", rot_dim=width, attention_scaling=op.scaling)
    return Selected(spec, (positions, frequencies, *node.results))


@_kernel(DynamicRotaryTable)
def _dynamic_rotary_table(op: DynamicRotaryTable, node: Node) -> Selected:
    spec = KernelSpec.of(
        "dynamic_rotary_table",
        rot_dim=op.rotary_dim,
        base=op.base,
        factor=op.factor,
        max_position_embeddings=op.max_positions,
        attention_scaling=op.scaling,
    )
    return Selected(spec, (*node.inputs, *node.results))


@_kernel(AppendKeys)
def _append(op: AppendKeys, node: Node) -> Selected:
    return Selected(_attention("append", op, node, op.leading + 1), node.inputs)


@_kernel(RotatedAttention)
def _rotated_attention(op: RotatedAttention, node: Node) -> Selected:
    spec = _attention("attention", op, node, op.leading, **_of_scores(op), split=op.split, **given(sinks=op.sinks))
    return Selected(spec, (*node.inputs, *node.results))


@_kernel(SplitAttention)
def _split_attention(op: SplitAttention, node: Node) -> Selected:
    spec = _attention("split_attention", op, node, op.leading + 1, **_of_scores(op), split=op.split, splits=op.splits)
    return Selected(spec, (*node.inputs, node.results[0]))


@_kernel(CombineSplits)
def _combine_splits(op: CombineSplits, node: Node) -> Selected:
    splits = node.inputs[0].type.shape[1]
    assert isinstance(splits, int)
    sizes = {"q_heads": op.num_heads, "head_dim": op.value_width, "split": op.split, "splits": splits}
    spec = KernelSpec.of("combine_splits", **sizes, **given(window=op.window, sinks=op.sinks))
    return Selected(spec, (*node.inputs, *node.results))


def _attention(
    kind: str, op: AppendKeys | RotatedAttention | SplitAttention, node: Node, key: int, **parameters: Any
) -> KernelSpec:
    """`key`: which operand the state of keys is."""
    return KernelSpec.of(
        kind,
        q_heads=op.num_heads,
        kv_heads=op.num_kv_heads,
        head_dim=op.head_dim,
        rot_dim=op.rotary_dim,
        layout=op.layout,
        kv_dtype=node.inputs[key].type.dtype.value,
        **given(value_dim=op.value_dim),
        **parameters,
    )


def _of_scores(op: RotatedAttention | SplitAttention) -> dict[str, Any]:
    return {"scale": op.scale, **given(window=op.window, soft_cap=op.soft_cap, alibi=op.alibi)}


@_kernel(GatherRows)
def _gather_rows(op: GatherRows, node: Node) -> Selected | None:
    x, rows = node.inputs
    if x.type.rank != 2 or x.type.dtype is not DType.F32:
        return None
    return Selected(KernelSpec.of("gather_rows", width=width_of(x.type)), (x, rows, *node.results))


@_kernel(Argmax)
def _argmax(op: Argmax, node: Node) -> Selected | None:
    (x,) = node.inputs
    if x.type.rank != 2 or x.type.dtype is not DType.F32 or rows_dim(x.type) != SYMBOLS.index("outputs"):
        return None
    return Selected(KernelSpec.of("argmax", n=width_of(x.type)), (x, *node.results))


_TABLE |= ROWS
