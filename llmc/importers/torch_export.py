"""Causal language models from torch.export: `torch.export.save`'s `.pt2` -> graph, weights, facts. torch is not needed.

The program must be f(input_ids [1, tokens]) -> logits [1, tokens, vocab_size], or the same without the unit axis, with
the number of tokens dynamic. A dynamic batch is taken at 1. `position_ids` or `cache_position` become the graph's
positions, `attention_mask` is taken as all ones. The first output is the logits; others (a cache, hidden states) are
left out. An `arange` over the tokens is the tokens' positions (see export/known.py).

16-bit floats of the export are computed in `activation`, as they are for models with a description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc.importers.export import aten_index, aten_math, aten_nn, aten_shape
from llmc.importers.export.archive import DTYPES, Archive, ArchivedTensor, ExportFailure
from llmc.importers.export.known import Affine, Choice, Condition, Line, constant
from llmc.importers.export.lowering import OPERATORS, Lowering, Tensor, shape_of
from llmc.importers.export.program import Given, Program, read_program
from llmc.importers.hf import ImportedModel
from llmc.importers.model_info import ModelInfo
from llmc.importers.weights import FLOATS, WeightMap, WeightSource
from llmc.ir.builder import Builder
from llmc.ir.graph import Graph, Param, prune
from llmc.ir.op import Array, Value
from llmc.ir.printer import layer_index
from llmc.ir.types import Dim, DType, Linear, symbol

assert OPERATORS and all((aten_index, aten_math, aten_nn, aten_shape)), "importing them registers the operators"

INDICES = ("position_ids", "cache_position", "positions")
"""Inputs that are the tokens' positions, by the names that transformers uses."""
TOKEN_IDS = ("input_ids", "token_ids", "tokens", "ids", "idx")
MAX_CONSTANT = 65536
"""Buffers of at most so many elements become constants, which passes may look at."""
MAX_TOKENS = 1 << 24


def import_export(path: Path, max_sequence_length: int | None = None, activation: DType = DType.F32) -> ImportedModel:
    """Import a `.pt2` file. `max_sequence_length` bounds the tokens where the export does not, or further.

    Raises `LlmcError` for anything missing, malformed or not understood, naming the node and its operator.
    """
    archive = Archive(path)
    program = read_program(archive.program(), str(path))
    stored = {**archive.tensors("constants"), **archive.tensors("weights")}
    ids = _token_ids(program, str(path))
    sizes = _symbols(program, ids, str(path))
    longest = _bound(program, sizes, max_sequence_length, str(path))
    tokens = symbol("tokens", 1, longest)
    lowering = Lowering(Builder(), str(path), activation, tokens)
    for given in program.inputs:
        lowering.values[given.name] = _input(lowering, given, ids, sizes, stored)
    for call in program.calls:
        lowering.run(call)
    graph = prune(_graph(lowering, program), keep_inputs=("token_ids", "positions"))
    reached = min([n for n in (longest, *lowering.tables) if n is not None], default=None)
    if reached is None:
        raise ExportFailure(
            f"{path}: the number of tokens has no upper bound; export with torch.export.Dim('tokens', max=…), or state"
            " --max-sequence-length"
        )
    if reached != longest:
        graph = graph.substitute({"tokens": symbol("tokens", 1, reached)})
    weights = WeightMap(
        {v.op.label: _source(stored[v.op.label], str(path)) for v in graph.params if isinstance(v.op, Param)}
    )
    return ImportedModel(
        graph, weights, _info(graph, program, weights, reached), None, {}, _unused(stored, program, weights)
    )


@dataclass(frozen=True)
class _Sizes:
    """What the sizes' symbols mean: `tokens`' name; every other is a batch, taken at 1."""

    tokens: str

    def dim(self, size: int | str, tokens: Linear, source: str) -> Dim:
        """A size of an input."""
        return size if isinstance(size, int) else tokens if size == self.tokens else 1


def _token_ids(program: Program, source: str) -> Given:
    """The input of token ids: by name, else the only tensor of integers."""
    given = [g for g in program.inputs if g.kind == "user_input"]
    named = [g for g in given if g.name in TOKEN_IDS]
    whole = [g for g in given if DTYPES.get(g.dtype) in (DType.I64, DType.I32)]
    chosen = named or whole
    if len(chosen) != 1:
        names = ", ".join(g.name for g in given) or "none"
        raise ExportFailure(f"{source}: expected one input of token ids, called input_ids; given {names}")
    return chosen[0]


def _symbols(program: Program, ids: Given, source: str) -> _Sizes:
    """Which symbol counts tokens: the last axis of the token ids."""
    sizes = ids.sizes or ()
    tokens = sizes[-1] if sizes else 0
    if len(sizes) not in (1, 2) or isinstance(tokens, int):
        raise ExportFailure(
            f"{source}: {ids.name} is {list(sizes)}; expected [1, tokens] with a dynamic number of tokens: export with"
            f" dynamic_shapes={{'{ids.name}': {{1: torch.export.Dim('tokens', max=…)}}}}"
        )
    if len(sizes) == 2 and isinstance(sizes[0], int) and sizes[0] != 1:
        raise ExportFailure(f"{source}: {ids.name} is {list(sizes)}: the batch must be 1 (or dynamic) at export")
    return _Sizes(tokens)


def _bound(program: Program, sizes: _Sizes, wanted: int | None, source: str) -> int | None:
    """The largest number of tokens, as far as the export and the user say."""
    largest = program.ranges.get(sizes.tokens)
    limit = MAX_TOKENS if largest is None else min(largest, MAX_TOKENS)
    if wanted is not None and not 1 <= wanted <= limit:
        raise ExportFailure(
            f"{source}: the maximum sequence length must be 1 to {limit} (the export's), given {wanted}"
        )
    return wanted if wanted is not None else largest


def _input(
    lowering: Lowering, given: Given, ids: Given, sizes: _Sizes, stored: Mapping[str, ArchivedTensor]
) -> Tensor | None:
    """The value of an input."""
    if given.kind == "constant_input":
        return None
    if given.label:
        return _stored(lowering, given, stored)
    shape = tuple(sizes.dim(s, lowering.tokens, lowering.source) for s in given.sizes or ())
    if given is ids:
        value = lowering.b.input("token_ids", DType.I32, (lowering.tokens,))
        _ = lowering.positions
        return lowering.reshape(value, shape)
    if given.name in INDICES:
        steps = tuple(int(d == lowering.tokens) for d in shape)
        return Affine(shape, DType.I64, Line(steps, 0))
    if given.name == "attention_mask" and len(shape) <= 2:
        return constant(1, shape, DTYPES.get(given.dtype, DType.I64))
    known = ", ".join((ids.name, *INDICES, "attention_mask"))
    raise ExportFailure(
        f"{lowering.source}: the input {given.name!r} {list(given.sizes or ())} is not understood; known: {known}; a"
        " cache must be switched off for the export (use_cache=False)"
    )


def _stored(lowering: Lowering, given: Given, stored: Mapping[str, ArchivedTensor]) -> Tensor:
    """A stored tensor: a parameter; or what is known of a buffer."""
    tensor = stored.get(given.label)
    if tensor is None:
        raise ExportFailure(f"{lowering.source} lacks the tensor {given.label!r}, which the program reads")
    if given.sizes is not None and tensor.shape != given.sizes:
        shapes = f"{list(tensor.shape)}, the program wants {list(given.sizes)}"
        raise ExportFailure(f"{lowering.source}: the tensor {given.label!r} is stored as {shapes}")
    if given.kind == "parameter" and tensor.dtype not in FLOATS:
        raise ExportFailure(
            f"{lowering.source}: the parameter {given.label!r} is {tensor.dtype}; expected f32, f16 or bf16"
        )
    if given.kind != "parameter" and (not tensor.dtype.is_float or math.prod(tensor.shape) <= MAX_CONSTANT):
        return _buffer(lowering, tensor)
    return lowering.b.param(given.label, tensor.dtype, tensor.shape)


def _buffer(lowering: Lowering, tensor: ArchivedTensor) -> Tensor:
    """A buffer as indices, or a triangle of ones, or a constant."""
    array = tensor.load()
    if array.size and (array == array.reshape(-1)[0]).all() and tensor.dtype is not DType.F64:
        return constant(array.reshape(-1)[0].item(), tensor.shape, tensor.dtype)
    if array.ndim >= 2 and (found := _triangle(array, tensor)) is not None:
        return found
    if not tensor.dtype.is_float:
        steps = tuple(int(n != 1) for n in array.shape)
        if sum(steps) == 1 and np.array_equal(array.reshape(-1), np.arange(array.size)):
            return Affine(tensor.shape, DType.I64, Line(steps, 0))
        raise ExportFailure(
            f"{lowering.source}: the buffer {tensor.name!r} {tensor.dtype}{list(tensor.shape)} holds neither indices in"
            " order nor a triangle of ones"
        )
    dtype = lowering.dtype(tensor.dtype)
    made: Value = lowering.b.constant(array.astype(dtype.numpy), dtype)
    return made


def _triangle(array: Array, tensor: ArchivedTensor) -> Tensor | None:
    """The lower triangle of a square of ones (0 above it, or the other way round), if the array is one."""
    *batch, rows, columns = array.shape
    if rows != columns or any(n != 1 for n in batch) or rows < 2 or rows > 1 << 14:
        return None
    matrix = array.reshape(rows, columns)
    lower, upper = matrix[-1, 0], matrix[0, -1]
    if not np.array_equal(matrix, np.where(np.tri(rows, dtype=np.bool_), lower, upper)):
        return None
    line = Line((*(0,) * len(batch), 1, -1), 0)
    condition = Condition(tensor.shape, (line,))
    if tensor.dtype is DType.BOOL and lower:
        return condition
    return Choice(condition, lower.item(), upper.item(), tensor.dtype)


def _graph(lowering: Lowering, program: Program) -> Graph:
    """The graph of the first output."""
    name = program.outputs[0] if program.outputs else ""
    logits = lowering.values.get(name)
    tokens = lowering.tokens
    if not isinstance(logits, Value):
        raise ExportFailure(f"{lowering.source}: the first output, {name!r}, is no tensor that the model computes")
    shape = shape_of(logits)
    if shape[:-1] not in ((1, tokens), (tokens,)) or not isinstance(shape[-1], int):
        raise ExportFailure(
            f"{lowering.source}: the first output is {logits.type}; expected logits [1, tokens, vocab_size]"
        )
    lowering.b.loc = ""
    flat = lowering.reshape(logits, (tokens, shape[-1]))
    return lowering.b.graph({"logits": lowering.cast(flat, DType.F32)})


def _source(tensor: ArchivedTensor, origin: str) -> WeightSource:
    return WeightSource(tensor.dtype, tensor.shape, origin, tensor.load)


def _info(graph: Graph, program: Program, weights: WeightMap, longest: int) -> ModelInfo:
    """What a package says about the model. Special tokens are not part of an export."""
    vocab_size = dict(graph.outputs)["logits"].type.shape[-1]
    tables = [n for n in graph.nodes if n.op.name == "embedding"]
    hidden_size = tables[0].types[0].shape[-1] if tables else 0
    layers = {layer_index(n.loc) for n in graph.nodes} - {None}
    assert isinstance(vocab_size, int) and isinstance(hidden_size, int)
    return ModelInfo(
        architecture=program.root,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=len(layers),
        num_parameters=weights.num_parameters,
        max_sequence_length=longest,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
        add_bos=False,
    )


def _unused(stored: Mapping[str, ArchivedTensor], program: Program, weights: WeightMap) -> tuple[str, ...]:
    """Parameters that the logits do not depend on, under no name (buffers may have become constants)."""
    buffers = {g.label for g in program.inputs if g.kind in ("buffer", "tensor_constant")}
    used = {stored[label].content for label in weights}
    return tuple(sorted(n for n, t in stored.items() if n not in buffers and t.content not in used))
