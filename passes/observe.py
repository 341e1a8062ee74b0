"""Observers, hung on the one callback between passes: the verifier, dumps, and a numeric comparison."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmc.ir.cost import graph_cost
from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph, Leaf, StateInput
from llmc.ir.interpret import interpret
from llmc.ir.op import Array, Emitter, Node, Value
from llmc.ir.types import DType, Sym
from llmc.ir.verify import verify
from llmc.passes.base import Observer, Pass, PassContext, Trial, later_stage, stage_of
from llmc.passes.constants import store_constants
from llmc.passes.trials import random_parameter, random_trial

SIZES = {"tokens": 64, "sequences": 1, "outputs": 64, "max_blocks": 4, "num_blocks": 4}
"""Sizes at which dumps count FLOPs and bytes: one sequence of 64 tokens, with all its logits."""


def together(*observers: Observer) -> Observer:
    """One observer that calls several in order."""

    def observe(step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        for observer in observers:
            observer(step, before, after, seconds)

    return observe


class Verifier:
    """Verifies every graph, at the stage that the passes so far have reached."""

    def __init__(self) -> None:
        self.stage: str | None = None

    def __call__(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        if self.stage is None:
            self.stage = stage_of(before)
            verify(before, self.stage)
        self.stage = later_stage(self.stage, step.stage)
        verify(after, self.stage)


class Dumper:
    """Writes `NNN-pass.ir` and the difference to the graph before it, and a line for each pass in `summary.txt`.

    `summary.json` has more: counts of nodes by op, firings, refusals with reasons, the pass's own numbers. Constants
    lie beside as `<sha256>.npy`, so that `llmc opt` reads a dump back.
    """

    def __init__(self, folder: Path, context: PassContext, sizes: Mapping[str, int] | None = None) -> None:
        self.folder = folder
        self.context = context
        self.sizes = dict(SIZES if sizes is None else sizes)
        self.rows: list[dict[str, Any]] = []

    def __call__(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        if not self.rows:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write("input", before, 0.0)
        old = str(before)
        stem = self._write(str(step), after, seconds)
        names = (self._stem(len(self.rows) - 2), stem.name)
        difference = difflib.unified_diff(old.splitlines(True), str(after).splitlines(True), *names, n=2)
        stem.with_suffix(".diff").write_text("".join(difference), encoding="utf-8")
        self._write_summary()

    def _write(self, title: str, graph: Graph, seconds: float) -> Path:
        stem = self.folder / self._stem(len(self.rows), title)
        stem.with_suffix(".ir").write_text(str(graph), encoding="utf-8")
        store_constants(graph, self.folder)
        cost = graph_cost(graph, self._sizes(graph))
        row = {
            "pass": title,
            "nodes": len(graph.nodes),
            "flops": cost.flops,
            "bytes": cost.bytes,
            "seconds": seconds,
            "ops": dict(sorted(Counter(n.op.name for n in graph.nodes).items())),
        }
        if self.rows:
            record = self.context.record
            row["firings"] = {k: n for k, n in record.counts.items() if n}
            row["refusals"] = {k: [str(r) for r in rs] for k, rs in record.refusals.items() if rs}
            row["numbers"] = record.numbers
        self.rows.append(row)
        return stem

    def _stem(self, number: int, title: str | None = None) -> str:
        name = title if title is not None else str(self.rows[number]["pass"])
        return f"{number:03}-{name.partition('{')[0]}"

    def _sizes(self, graph: Graph) -> dict[str, int]:
        return {s.name: _within(s, self.sizes.get(s.name, 64)) for s in graph.symbols.values()}

    def _write_summary(self) -> None:
        sizes = ", ".join(f"{k}={v}" for k, v in self.sizes.items())
        lines = [f"FLOPs and bytes at {sizes}, or the nearest within bounds", ""]
        lines.append(f"{'pass':<40} {'nodes':>6} {'MFLOPs':>10} {'MB':>10} {'ms':>8}  firings; refusals; numbers")
        for row in self.rows:
            firings = ", ".join(f"{k} {n}" for k, n in row.get("firings", {}).items())
            refusals = ", ".join(f"{k} {len(r)}" for k, r in row.get("refusals", {}).items())
            numbers = ", ".join(f"{k} {n}" for k, n in row.get("numbers", {}).items())
            figures = (row["flops"] / 1e6, row["bytes"] / 1e6, row["seconds"] * 1e3)
            columns = " ".join(f"{f:>{w}.3f}" for f, w in zip(figures, (10, 10, 8), strict=True))
            lines.append(f"{row['pass']:<40} {row['nodes']:>6} {columns}  {firings}; {refusals}; {numbers}")
        lines += ["", *(f"{row['pass']}: " + ", ".join(f"{k} {n}" for k, n in row["ops"].items()) for row in self.rows)]
        (self.folder / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        data = {"sizes": self.sizes, "passes": self.rows}
        (self.folder / "summary.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


class NumericsCheck:
    """Interprets the graph before and after each pass in float64 and compares outputs and states.

    `load` gives parameters; random ones are taken without it. State is kept in float64 on both sides: a cache that
    rounds to 16 bits is meant, and would hide what is not. Raises `LlmcError` naming the pass and the output.
    """

    def __init__(self, load: Callable[[str], Array] | None = None, seed: int = 0) -> None:
        self.load = load
        self.seed = seed
        self.trial: Trial | None = None
        self.last: tuple[Graph, Trial, dict[str, Array]] | None = None
        self.errors: list[tuple[str, float]] = []
        """Largest relative difference after each pass."""

    def __call__(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        left, right = with_wide_states(before), with_wide_states(after)
        given = random_trial(before, self.seed) if self.trial is None else self.trial
        ours, theirs = step.trials(left, right, given)
        self.trial = theirs
        worst = 0.0
        known = self.last is not None and self.last[0] is before and self.last[1] is ours
        expected = self.last[2] if known and self.last is not None else self._run(left, ours)
        actual = self._run(right, theirs)
        self.last = (after, theirs, actual)
        for name in expected.keys() & actual.keys():
            error = relative_error(expected[name], actual[name])
            if not error <= step.tolerance:
                raise LlmcError(
                    f"pass {step} changes {name!r}: relative difference {error:.3g} in float64, where at most"
                    f" {step.tolerance:.3g} is rounding; --rewrite-limit finds the rewrite"
                )
            worst = max(worst, error)
        self.errors.append((str(step), worst))

    def _run(self, graph: Graph, trial: Trial) -> dict[str, Array]:
        made = {v.op.label: v for v in graph.params if isinstance(v.op, Leaf)}
        results = interpret(graph, trial.inputs, self.load or (lambda k: random_parameter(made[k])), trial.states)
        return {**results.outputs, **results.states}


def relative_error(expected: Array, actual: Array) -> float:
    """Largest difference over largest magnitude; infinite where shapes or the places of NaN differ."""
    if expected.shape != actual.shape or not np.array_equal(np.isnan(expected), np.isnan(actual)):
        return float("inf")
    if not expected.size:
        return 0.0
    scale = float(np.nanmax(np.abs(expected), initial=0.0))
    difference = float(np.nanmax(np.abs(expected - actual), initial=0.0))
    return difference / scale if scale else difference


def with_wide_states(graph: Graph) -> Graph:
    """The graph with float64 states, which round nothing."""
    wide: dict[Value, Value] = {}
    for state in graph.states:
        assert isinstance(state.op, StateInput)
        op = StateInput(replace(state.op.state, dtype=DType.F64))
        wide[state] = Value(Node(op, (), (replace(state.type, dtype=DType.F64),)))

    def emit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        operands = tuple(wide.get(v, v) for v in inputs)
        return node.results if operands == node.inputs else Emitter().make(node.op, operands).results

    mapped = graph.map(emit)
    following = tuple(wide.get(v, v) for v in mapped.next_states)
    return replace(mapped, states=tuple(wide.values()), next_states=following)


def _within(sym: Sym, wanted: int) -> int:
    return max(sym.min, wanted if sym.max is None else min(wanted, sym.max))
