"""Which kernel runs a node, on what grid: a table from op classes to kernel specifications and their arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmc.backends.base import SYMBOLS, KernelSpec
from llmc.backends.dynamic_rotary import DynamicRotaryTable
from llmc.backends.triton.kernels import (
    attention_decode,
    attention_prefill,
    attention_splits,
    elementwise,
    embedding,
    gather_rows,
    norm,
    rope_append,
    rotary_table,
    select_token,
)
from llmc.backends.triton.ops import (
    BlockAppend,
    BlockEmbedding,
    BlockGatedLinear,
    BlockLinear,
    RoundedAppend,
    RoundedNorm,
    SelectTokens,
)
from llmc.backends.triton.packing import blocks_of
from llmc.backends.triton.products import ProductCall, product_kernel
from llmc.backends.triton.tiling import Tunings
from llmc.ir.op import Node, Op, Value
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.ops.elementwise import ACTIVATIONS, Add, Cast, Mul, MulScalar, Tanh
from llmc.ir.ops.embedding import Embedding
from llmc.ir.ops.rope import RotaryTable
from llmc.ir.ops.shape import GatherRows
from llmc.ir.target import GPU_VARIANTS, GpuVariant
from llmc.ir.types import DType, TensorType, symbols_of

_OpT = TypeVar("_OpT", bound=Op)


@dataclass(frozen=True)
class Step:
    """A step that kernels are chosen for: on which architecture, of how many tokens, sequences and rows of logits at
    most; `decode` has one token for each sequence; contexts of `longest` tokens at most; `tunings` of products."""

    variant: GpuVariant
    tokens: int
    sequences: int
    outputs: int
    longest: int
    decode: bool
    tunings: Tunings = field(default_factory=Tunings)

    def rows(self, rows_dim: int) -> int:
        """The most rows that `dims[rows_dim]` counts."""
        return {"tokens": self.tokens, "outputs": self.outputs, "sequences": self.sequences}[SYMBOLS[rows_dim]]


@dataclass(frozen=True)
class Selected:
    """A kernel, the values it is given in order, its grid, and what its programs share (see `plan.GpuLaunch`), if
    the kernel takes something to share at all. `product`: what is cut into tiles, where it is a product."""

    spec: KernelSpec
    arguments: tuple[Value, ...]
    grid: tuple[int, int, int]
    workspace: int = 0
    tickets: int = 0
    shares: bool = False
    product: ProductCall | None = None


_Choose = Callable[[Any, Node, Step], Selected | None]
_TABLE: dict[type[Op], _Choose] = {}

PREFILL = Step(GPU_VARIANTS["sm_90"], 1, 1, 1, 1, decode=False)
"""A step for questions whose answer is the same for all steps with several tokens of a sequence."""


def has_kernel(node: Node) -> bool:
    """Whether `select` finds one."""
    return select(node, PREFILL) is not None


def arguments(node: Node) -> tuple[Value, ...] | None:
    """The values that a node's kernel is given in a prefill, but for what programs share; None without a kernel."""
    chosen = select(node, PREFILL)
    return None if chosen is None else chosen.arguments


def select(node: Node, step: Step) -> Selected | None:
    """The kernel for a node in a step, or None."""
    choose = _TABLE.get(type(node.op))
    return choose(node.op, node, step) if choose else None


def _kernel(kind: type[_OpT]) -> Callable[[Callable[[_OpT, Node, Step], Selected | None]], _Choose]:
    def register(choose: Callable[[_OpT, Node, Step], Selected | None]) -> _Choose:
        _TABLE[kind] = choose
        return choose

    return register


def rows_dim(type: TensorType) -> int:
    """Which entry of `dims` counts the rows of a [rows, width] value."""
    names = {s.name for s in symbols_of(type.shape[0])}
    assert len(names) == 1, f"rows of {type} are not one symbol"
    return SYMBOLS.index(names.pop())


def _width(type: TensorType) -> int:
    width = type.shape[-1]
    assert isinstance(width, int)
    return width


def _on(grid: tuple[int, int, int], spec: KernelSpec, node: Node) -> Selected:
    return Selected(spec, (*node.inputs, *node.results), grid)


@_kernel(Embedding)
def _embedding(op: Embedding, node: Node, step: Step) -> Selected | None:
    table = node.inputs[1].type
    if op.dtype is not DType.F32 or table.rank != 2:
        return None
    rows, width = table.concrete({})
    spec = embedding.embedding_spec(rows, width, table.dtype, blocks=False)
    return _on((step.tokens, blocks_of(width, embedding.BLOCK), 1), spec, node)


@_kernel(BlockEmbedding)
def _block_embedding(op: BlockEmbedding, node: Node, step: Step) -> Selected:
    spec = embedding.embedding_spec(op.rows, op.width, node.inputs[1].type.dtype, blocks=True, format=op.format)
    return _on((step.tokens, blocks_of(op.width, embedding.BLOCK), 1), spec, node)


@_kernel(RoundedNorm)
def _norm(op: RoundedNorm, node: Node, step: Step) -> Selected:
    x = node.inputs[0].type
    dim, kind = rows_dim(x), "layer" if op.centred else "rms"
    spec = norm.norm_spec(
        norm=kind,
        hidden=_width(x),
        eps=op.eps,
        residual="after" if op.residual else "none",
        out_dtype=op.dtype.value,
        rows_dim=dim,
    )
    return _on(norm.norm_grid(spec, step.rows(dim)), spec, node)


@_kernel(RotaryTable)
def _rotary_table(op: RotaryTable, node: Node, step: Step) -> Selected | None:
    frequencies = node.inputs[1].type
    if frequencies.rank != 1:
        return None
    spec = rotary_table.rotary_table_spec(rotary_dim=2 * _width(frequencies), scaling=op.scaling, rows_dim=0)
    return _on(rotary_table.rotary_table_grid(spec, step.tokens), spec, node)


@_kernel(DynamicRotaryTable)
def _dynamic_table(op: DynamicRotaryTable, node: Node, step: Step) -> Selected:
    spec = rotary_table.dynamic_rotary_table_spec(
        rotary_dim=op.rotary_dim,
        base=op.base,
        factor=op.factor,
        max_positions=op.max_positions,
        scaling=op.scaling,
        rows_dim=0,
    )
    return _on(rotary_table.rotary_table_grid(spec, step.tokens), spec, node)


@_kernel(BlockLinear)
def _linear(op: BlockLinear, node: Node, step: Step) -> Selected:
    end = {"epilogue": "residual" if op.residual else "store", "factor": op.factor, "soft_cap": op.soft_cap}
    given = (*node.inputs, *node.results)
    return _product(op, node, step, given, bias=op.bias, activation=op.activation, **end)


@_kernel(BlockGatedLinear)
def _gated_linear(op: BlockGatedLinear, node: Node, step: Step) -> Selected:
    return _product(op, node, step, (*node.inputs, *node.results), epilogue="gated", activation=op.activation)


@_kernel(BlockAppend)
def _append(op: BlockAppend, node: Node, step: Step) -> Selected:
    heads = {n: getattr(op, n) for n in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "layout")}
    state = node.inputs[op.states_at].type
    pages = {"block_size": _width(state), "state_dtype": state.dtype.value}
    given = (*node.inputs, node.results[0])
    return _product(op, node, step, given, epilogue="append", bias=op.bias, **heads, **pages)


def _product(
    op: BlockLinear | BlockGatedLinear | BlockAppend, node: Node, step: Step, given: tuple[Value, ...], **epilogue: Any
) -> Selected:
    x = node.inputs[0].type
    dim = rows_dim(x)
    weight = node.inputs[op.weight_at].type.dtype
    m = step.rows(dim)
    call, tiling = product_kernel(op, x.dtype, weight, m, dim, step.variant, step.tunings, **epilogue)
    workspace = tiling.workspace_bytes(op.rows, op.width, m)
    tickets = tiling.tiles(op.rows, m)
    return Selected(call.spec(tiling), given, (tiling.programs, 1, 1), workspace, tickets, shares=True, product=call)


@_kernel(RoundedAppend)
def _rounded_append(op: RoundedAppend, node: Node, step: Step) -> Selected:
    qkv, state = node.inputs[0].type, node.inputs[op.states_at].type
    heads = (op.num_heads, op.num_kv_heads, op.head_dim, op.rotary_dim, op.layout)
    norm: dict[str, Any] = {}
    if op.norm_eps is not None:
        norm = {"norm": "layer" if op.centred else "rms", "norm_eps": op.norm_eps, "whole": op.whole}
    dtypes = (qkv.dtype.value, op.dtype.value, state.dtype.value)
    spec = rope_append.append_spec(*heads, *dtypes, _width(state), **norm)
    return Selected(spec, (*node.inputs, node.results[0]), rope_append.grid(spec, step.tokens))


@_kernel(PagedAttention)
def _attention(op: PagedAttention, node: Node, step: Step) -> Selected | None:
    if op.value_dim:
        return None
    q, key = node.inputs[0].type.dtype.value, node.inputs[1].type
    meant = ("num_heads", "num_kv_heads", "head_dim", "scale", "window", "soft_cap", "alibi", "sinks")
    told: dict[str, Any] = {name: getattr(op, name) for name in meant}
    states: dict[str, Any] = {
        "dtype": q,
        "state_dtype": key.dtype.value,
        "block_size": _width(key),
        "variant": step.variant,
    }
    if not step.decode:
        spec = attention_prefill.prefill_spec(**told, **states, tokens=step.tokens, sequences=step.sequences)
        return Selected(spec, (*node.inputs, *node.results), attention_prefill.grid(spec, step.tokens, step.sequences))
    spec = attention_decode.decode_spec(**told, **states, sequences=step.tokens, longest=step.longest)
    query_start = node.inputs[4 + 2 * op.scaled]
    given = tuple(v for v in node.inputs if v != query_start)
    workspace, tickets = (
        attention_splits.workspace_bytes(spec, step.tokens),
        attention_splits.tickets(spec, step.tokens),
    )
    return Selected(
        spec, (*given, *node.results), attention_splits.grid(spec, step.tokens), workspace, tickets, shares=True
    )


@_kernel(GatherRows)
def _gather_rows(op: GatherRows, node: Node, step: Step) -> Selected | None:
    x = node.inputs[0].type
    if x.rank != 2 or not x.dtype.is_float:
        return None
    grid = (step.outputs, blocks_of(_width(x), gather_rows.BLOCK), 1)
    return _on(grid, gather_rows.gather_spec(_width(x), x.dtype), node)


@_kernel(SelectTokens)
def _select_tokens(op: SelectTokens, node: Node, step: Step) -> Selected:
    spec = select_token.select_token_spec(vocab=_width(node.inputs[0].type))
    floats, tickets = select_token.select_token_workspace(spec, step.outputs)
    grid = select_token.select_token_grid(spec, step.outputs)
    return Selected(spec, (*node.inputs, *node.results), grid, 4 * floats, tickets, shares=True)


@_kernel(Add)
def _add(op: Add, node: Node, step: Step) -> Selected | None:
    return _elementwise("add", node, step)


@_kernel(Mul)
def _multiply(op: Mul, node: Node, step: Step) -> Selected | None:
    return _elementwise("multiply", node, step)


@_kernel(MulScalar)
def _scale(op: MulScalar, node: Node, step: Step) -> Selected | None:
    return _elementwise("scale", node, step, op.value)


@_kernel(Cast)
def _cast(op: Cast, node: Node, step: Step) -> Selected | None:
    return _elementwise("none", node, step)


def _activation(name: str) -> _Choose:
    return lambda op, node, step: _elementwise(name, node, step)


_FUNCTIONS: dict[str, type[Op]] = {**ACTIVATIONS, "tanh": Tanh}
for _name, _kind in _FUNCTIONS.items():
    _TABLE[_kind] = _activation(_name)


def _elementwise(operation: str, node: Node, step: Step, factor: float | None = None) -> Selected | None:
    """Rows of one shape: what broadcasts has no kernel."""
    type = node.types[0]
    if type.rank != 2 or not symbols_of(type.shape[0]) or any(v.type.shape != type.shape for v in node.inputs):
        return None
    dtypes = [v.type.dtype for v in (*node.inputs, node.results[0])]
    if any(d not in (DType.F32, DType.F16, DType.BF16) for d in dtypes):
        return None
    dim, (x, *y, out) = rows_dim(type), (d.value for d in dtypes)
    spec = elementwise.elementwise_spec(
        operation=operation,
        width=_width(type),
        x_dtype=x,
        out_dtype=out,
        rows_dim=dim,
        y_dtype=y[0] if y else None,
        factor=factor,
    )
    return _on(elementwise.elementwise_grid(spec, step.rows(dim)), spec, node)
