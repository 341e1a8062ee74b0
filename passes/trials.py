"""Random arrays on which graphs are interpreted: small sizes, parameters by name, batches in shuffled blocks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from llmc.ir.graph import Graph, Input, StateInput
from llmc.ir.op import Array, Value
from llmc.ir.ops.embedding import Embedding
from llmc.ir.types import evaluate
from llmc.passes.base import Trial

_LONGEST = 40
"""Tokens of the longest sequence in a batch, past and new: a few blocks of the usual size."""


def random_parameter(value: Value) -> Array:
    """Values for a parameter, always the same for one name and shape, scaled so that products stay near 1."""
    label: str = getattr(value.op, "label", "")
    shape = value.type.concrete({})
    rng = np.random.default_rng(zlib.crc32(label.encode()))
    array: Array = rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 4)
    return array + 1.0 if len(shape) == 1 else array


def random_trial(graph: Graph, seed: int = 0, tokens: int = 5) -> Trial:
    """Inputs and states of a graph at small sizes.

    token_ids fit the tables that they index; positions count from 0. A step gets a batch of sequences (as many as its
    bounds allow, of different lengths, with a past) in shuffled blocks; what belongs to no sequence, or lies in a block
    that no window shows, is NaN.
    """
    rng = np.random.default_rng(seed)
    inputs = {v.op.label: v for v in graph.inputs if isinstance(v.op, Input)}
    if "block_tables" in inputs:
        return _batch(graph, rng, tokens)
    sizes = {s.name: _fit(tokens, s.min, s.max, s.multiple_of) for s in graph.symbols.values()}
    return Trial({label: _random(graph, v, rng, sizes) for label, v in inputs.items()})


def _fit(wanted: int, low: int, high: int | None, multiple: int) -> int:
    """The size nearest to the wanted one within the bounds."""
    size = max(low, min(wanted, high if high is not None else wanted))
    return max(-(-low // multiple), size // multiple) * multiple


def _random(graph: Graph, value: Value, rng: np.random.Generator, sizes: Mapping[str, int]) -> Array:
    shape = tuple(evaluate(d, sizes) for d in value.type.shape)
    if value.type.dtype.is_float:
        return rng.standard_normal(shape)
    if value.op.label == "positions" and len(shape) == 1:  # type: ignore[attr-defined]
        return np.arange(shape[0])
    return rng.integers(0, _rows(graph, value), shape)


def _rows(graph: Graph, ids: Value, default: int = 2) -> int:
    """How many rows the smallest table has that the ids index; the default where they index none."""
    rows = [n.inputs[1].type.shape[0] for n, i in graph.uses.get(ids, ()) if i == 0 and isinstance(n.op, Embedding)]
    return min((r for r in rows if isinstance(r, int)), default=default)


def _batch(graph: Graph, rng: np.random.Generator, tokens: int) -> Trial:
    symbols = graph.symbols
    decode = "sequences" not in symbols
    bound = symbols["tokens"].max or tokens
    count = min(tokens, bound)
    sequences = count if decode else min(3, count, symbols["sequences"].max or 3)
    cuts = np.sort(rng.choice(np.arange(1, count), sequences - 1, replace=False)) if sequences > 1 else np.zeros(0, int)
    query_start = np.concatenate([[0], cuts, [count]]).astype(np.int64)
    lengths = np.diff(query_start)
    inputs = {v.op.label: v for v in graph.inputs if isinstance(v.op, Input)}
    longest = _rows(graph, inputs["positions"], _LONGEST)
    past = rng.integers(0, np.maximum(longest - lengths, 0) + 1)
    states = [v for v in graph.states if isinstance(v.op, StateInput)]
    sizes = [v.type.shape[3] for v in states if getattr(v.op, "label", "").endswith("key")]
    size = next((s for s in sizes if isinstance(s, int)), 16)
    needed = -(-(past + lengths) // size)
    positions = np.concatenate([past[s] + np.arange(lengths[s]) for s in range(sequences)])
    owner = np.repeat(np.arange(sequences), lengths)
    outputs = min(count, symbols["outputs"].max or count) if "outputs" in symbols else count
    arrays = {
        "token_ids": rng.integers(0, _rows(graph, inputs["token_ids"]), count),
        "positions": positions,
        "query_start": query_start,
    }
    filled: dict[str, Array] = {}
    for group in graph.layer_groups:
        first = np.maximum(past - group.window + 1, 0) // size if group.window else np.zeros(sequences, int)
        num_blocks = int((needed - first).sum()) + 2
        free = rng.permutation(num_blocks)
        tables = rng.integers(0, num_blocks, (sequences, int(needed.max()) + 1))
        for s in range(sequences):
            held = int(needed[s] - first[s])
            tables[s, first[s] : needed[s]], free = free[:held], free[held:]
        arrays[group.slot_mapping] = tables[owner, positions // size] * size + positions % size
        arrays[group.block_tables] = tables
        for value in states:
            assert isinstance(value.op, StateInput)
            if value.op.state.layer_group == group.name:
                filled[value.op.label] = _filled(value, rng, group.num_blocks, num_blocks, free)
    arrays["logit_rows"] = rng.permutation(count)[:outputs]
    return Trial({label: arrays[label] for label in inputs}, filled)


def _filled(state: Value, rng: np.random.Generator, symbol: str, num_blocks: int, free: Array) -> Array:
    """A past of random keys or values; blocks that no sequence owns are NaN."""
    shape = state.type.concrete({symbol: num_blocks})
    if not state.type.dtype.is_float:
        return rng.integers(-127, 128, shape)  # codes, whose scales are NaN there
    array = rng.standard_normal(shape)
    array[free] = np.nan
    return array
