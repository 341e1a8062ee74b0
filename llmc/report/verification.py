"""Is a package right? Against the checks stored in it, and, given its source, node by node against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmc.backends.buffers import is_intermediate
from llmc.backends.choose import arguments_of
from llmc.importers.choose import import_model
from llmc.inspection import read_graph
from llmc.ir.graph import Graph, Input
from llmc.ir.interpret import evaluate_parameters, interpret
from llmc.ir.op import Array, Node, Value
from llmc.packages import open_package
from llmc.passes.plan_memory import storage
from llmc.runtime.batch import SAMPLING_WORDS, Batch, Chunk, build_batch
from llmc.runtime.plan import inputs_of

_PROMPT_LENGTHS = (24, 7)


@dataclass
class Verification:
    """The stored checks' report, and what a comparison with the source found."""

    checks: Any
    against: dict[str, float] = field(default_factory=dict)
    divergent: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything that was asked for holds."""
        return bool(self.checks.ok) and not self.divergent

    def as_json(self) -> dict[str, Any]:
        """The verdict and its figures."""
        return {
            "ok": self.ok,
            "checks": str(self.checks),
            **self.against,
            "first_divergent_node": self.divergent or None,
        }

    def __str__(self) -> str:
        lines = [str(self.checks)]
        if self.against:
            lines.append(
                f"against the source in float64: max |difference| {self.against['error']:.1e} of max |logit|,"
                f" top-1 agreement {self.against['top1']:.1%}, KL divergence {self.against['kl']:.2e}"
            )
            lines.append(f"first divergent node: {self.divergent}" if self.divergent else "no node diverges")
        return "\n".join(lines)


def verify_package(folder: Path, against: Path | None, architecture: Path | None = None) -> Verification:
    """Run the package's own checks; with a source model, compare logits and every node's results with float64.
    `architecture`: the description of the source model that the package was compiled with, where it is the user's."""
    model = open_package(folder).load()
    result = Verification(model.verify())
    if against is not None:
        imported = import_model(against, architecture=architecture)
        tolerance = result.checks.tolerance
        _compare_logits(model, imported.graph, imported.weights.load, result)
        result.divergent = first_divergent(model, read_graph(folder, "prefill"), imported.weights.load, tolerance)
    model.close()
    return result


def _compare_logits(model: Any, graph: Graph, load: Callable[[str], Array], result: Verification) -> None:
    errors, agreements, divergences = [], [], []
    for seed, length in enumerate(_PROMPT_LENGTHS):
        ids = _prompt(model, seed, length)
        expected = interpret(graph, {"token_ids": ids, "positions": np.arange(len(ids))}, load).outputs["logits"]
        given = model.logits(ids.tolist()).astype(np.float64)
        errors.append(np.abs(given - expected).max() / np.abs(expected).max())
        agreements.append((given.argmax(-1) == expected.argmax(-1)).mean())
        log_p, log_q = _log_softmax(expected), _log_softmax(given)
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    result.against = {
        "error": float(max(errors)),
        "top1": float(np.mean(agreements)),
        "kl": float(np.mean(divergences)),
    }


def first_divergent(model: Any, graph: Graph, load: Callable[[str], Array], tolerance: float) -> str:
    """The first node whose result on the machine is not the float64 interpreter's; empty when all agree.

    Both run the same lowered graph on one prefill of two sequences; the machine's values are read after each launch.
    A node is judged on what the machine gave it: what nodes before it rounded, activations to 8 bits above all, is not
    its fault.
    """
    engine = model.sequence().engine
    tables = [engine.new_table() for _ in _PROMPT_LENGTHS]
    prompts = [_prompt(model, i, n).astype(np.int32) for i, n in enumerate(_PROMPT_LENGTHS)]
    with engine.exclusive():
        for table, prompt in zip(tables, prompts, strict=True):
            table.extend(len(prompt), engine.executor.copy_block)
        chunks = [Chunk(table, prompt, 1) for table, prompt in zip(tables, prompts, strict=True)]
        batch = build_batch(chunks, engine.executor.block_size)
        sizes = dict(zip(("tokens", "sequences", "max_blocks", "outputs"), batch.dims, strict=True))
        paged = ((name, batch.input(name)) for name in inputs_of(engine.executor.groups))
        inputs = {name: array for name, array in paged if array is not None} | _greedy(batch)
        for group in graph.layer_groups:
            sizes[group.num_blocks] = int(inputs[group.block_tables].max()) + 1
        values = _Reference(graph, inputs, load, sizes)
        arguments = arguments_of(model.info["target"]["kind"])
        named = [(n, arguments(n)) for n in graph.nodes if n not in graph.parameter_only]
        launched = [(n, given) for n, given in named if given is not None]
        verdict = ""
        for (node, given), read in zip(launched, engine.executor.trace("prefill", batch), strict=True):
            verdict = verdict or _difference(node, given, read, values, graph, tolerance)
        for table in tables:
            table.free()
    return verdict


def _greedy(batch: Batch) -> dict[str, Array]:
    """The input of graphs that sample: zeros, which draw nothing."""
    return {"sampling": np.zeros((len(batch.logit_rows), SAMPLING_WORDS), np.int32)}


def _difference(
    node: Node, arguments: Sequence[Value], read: Any, values: _Reference, graph: Graph, tolerance: float
) -> str:
    """What is wrong with a node's results, if anything."""
    expected = dict(zip(node.results, values.compute(node), strict=True))
    for place, value in enumerate(arguments):
        if value not in expected or not is_intermediate(storage(value), graph):
            continue
        want = expected[value]
        given = read(place, value.type.dtype.numpy, want.shape).astype(value.type.dtype.oracle)
        error = float(np.abs(given - want).max() / max(np.abs(want).max(), 1e-30))
        if not error <= tolerance:
            return f"{node.op.name} at {node.loc or 'no place'}: off by {error:.1e} of its largest value"
        values.values[value] = given
    return ""


class _Reference:
    """The lowered graph's values in float64, node by node; parameters are evaluated when read and not kept."""

    def __init__(
        self, graph: Graph, inputs: dict[str, Array], load: Callable[[str], Array], sizes: dict[str, int]
    ) -> None:
        self.load, self.sizes, self.graph = load, sizes, graph
        self.values: dict[Value, Array] = {}
        for leaf in graph.inputs:
            assert isinstance(leaf.op, Input)
            self.values[leaf] = inputs[leaf.op.label].astype(leaf.type.dtype.oracle)
        for leaf in graph.states:
            self.values[leaf] = np.zeros(leaf.type.concrete(sizes))

    def compute(self, node: Node) -> tuple[Array, ...]:
        """A node's results, from those of the nodes before it."""
        arrays = node.op.evaluate([v.type for v in node.inputs], [self._value(v) for v in node.inputs], self.sizes)
        self.values.update(zip(node.results, arrays, strict=True))
        return arrays

    def _value(self, value: Value) -> Array:
        if value in self.values:
            return self.values[value]
        if value.node in self.graph.parameter_only or value.op.leaf:
            return evaluate_parameters(value, self.load).astype(value.type.dtype.oracle)
        return self.compute(value.node)[value.index]  # a view, which no kernel runs


def _prompt(model: Any, seed: int, length: int) -> Array:
    length = min(length, model.info["model"]["max_sequence_length"])
    return np.random.default_rng(100 + seed).integers(0, model.info["model"]["vocab_size"], length)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
