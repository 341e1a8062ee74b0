"""What the compiler sees in a model: what was recognised, what was raised to what, and what was not and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.importers.choose import import_model
from llmc.importers.hf import ImportedModel
from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph
from llmc.ir.op import Node
from llmc.ir.pattern import NoMatch
from llmc.ir.printer import layer_index, layer_template
from llmc.ir.types import DType
from llmc.passes.base import Observer, PassContext
from llmc.passes.observe import Dumper, Verifier, together
from llmc.passes.pipelines import model_pipeline, step_pipeline

FUSING = ("raise-linear", "fuse-norm", "fuse-rope", "fuse-attention", "fuse-mlp")
"""Passes whose refusals say why something was not recognised."""


@dataclass(frozen=True)
class Found:
    """An op of the graph, how often it occurs, and where: `{layer}` stands for the number of a layer."""

    op: str
    count: int
    place: str


@dataclass(frozen=True)
class Missed:
    """Why a rule did not fire where primitive ops are left: its deepest match, and how often it ended so."""

    rule: str
    count: int
    reason: str
    node: str


@dataclass(frozen=True)
class ImportReport:
    """`recognised` and `left` are what the passes leave of the graph, fused ops and primitive ones; `raised` counts the
    firings of each pass's rules. `obstacle` says why no package can be made of it, empty if one can."""

    source: str
    architecture: str
    num_layers: int
    vocab_size: int
    max_sequence_length: int
    num_parameters: int
    tensors: int
    bytes: int
    unused_tensors: tuple[str, ...]
    nodes: int
    recognised: tuple[Found, ...]
    raised: Mapping[str, Mapping[str, int]]
    left: tuple[Found, ...]
    missed: tuple[Missed, ...]
    obstacle: str

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.architecture}",
            f"layers: {self.num_layers}; vocabulary: {self.vocab_size}; longest sequence: {self.max_sequence_length}",
            f"parameters: {self.num_parameters:,} in {self.tensors} tensors, {self.bytes / 1e6:.1f} MB",
            f"unused tensors: {', '.join(self.unused_tensors) or 'none'}",
            "",
            f"recognised in {self.nodes} primitive nodes:",
            *_rows((f.op, str(f.count), f.place) for f in self.recognised),
            "",
            "raised, by pass:",
            *_rows((p, "", ", ".join(f"{rule} {n}" for rule, n in rules.items())) for p, rules in self.raised.items()),
            "",
            f"left as they are:{'' if self.left else ' nothing'}",
            *_rows((f.op, str(f.count), f.place) for f in self.left),
        ]
        if self.missed:
            lines += ["", "not recognised, because:"]
            lines += [f"  {m.rule} ({m.count} times): {m.reason}, first at {m.node}" for m in self.missed]
        lines += ["", f"no package can be made of it: {self.obstacle}" if self.obstacle else "compiles to a step"]
        return "\n".join(lines)


def report_import(
    source: Path,
    architecture: Path | None = None,
    max_sequence_length: int | None = None,
    random_weights: bool = False,
    dump: Path | None = None,
) -> ImportReport:
    """Import a model, run the passes that any model runs, and say what came of it. `dump` is a folder for the graph
    after every pass. Raises `LlmcError` where the model cannot be imported."""
    model = import_model(
        source, architecture=architecture, max_sequence_length=max_sequence_length, random_weights=random_weights
    )
    context = PassContext()
    observers: list[Observer] = [Verifier()]
    if dump is not None:
        observers.append(Dumper(dump, context))
    fused = model_pipeline().run(model.graph, context, together(*observers))
    try:
        step_pipeline(DType.F16).run(model.graph)
        obstacle = ""
    except LlmcError as error:
        obstacle = str(error)
    return _report(str(source), model, fused, context, obstacle)


def _report(source: str, model: ImportedModel, fused: Graph, context: PassContext, obstacle: str) -> ImportReport:
    nodes = [n for n in fused.nodes if n not in fused.parameter_only]
    left = [n for n in nodes if n.op.stage == "primitive"]
    raised: dict[str, dict[str, int]] = {}
    for record in context.records:
        for rule, count in record.counts.items():
            if count:
                rules = raised.setdefault(record.name, {})
                rules[rule] = rules.get(rule, 0) + count
    return ImportReport(
        source=source,
        architecture=model.info.architecture,
        num_layers=model.info.num_layers,
        vocab_size=model.info.vocab_size,
        max_sequence_length=model.info.max_sequence_length,
        num_parameters=model.info.num_parameters,
        tensors=len(model.weights),
        bytes=model.weights.bytes,
        unused_tensors=model.unused_tensors,
        nodes=len(model.graph.nodes),
        recognised=_found(n for n in nodes if n.op.stage != "primitive"),
        raised=raised,
        left=_found(left),
        missed=_missed(context, {_place(n) for n in left if _computes(n)}),
        obstacle=obstacle,
    )


def _found(nodes: Iterable[Node]) -> tuple[Found, ...]:
    """Ops by name and place, in the order in which they first occur."""
    counted = Counter((n.op.name, _place(n)) for n in nodes)
    return tuple(Found(op, count, place) for (op, place), count in counted.items())


def _missed(context: PassContext, places: set[str]) -> tuple[Missed, ...]:
    """The deepest refusal of every rule at those places. A rule that fitted hardly one node says nothing, and neither
    does one that would only have joined what was recognised with an addition."""
    refusals: dict[str, list[NoMatch]] = {}
    for record in context.records:
        if record.name in FUSING:
            for rule, given in record.refusals.items():
                if rule.startswith("add-"):
                    continue
                near = [r for r in given if r.depth > 1 and r.node is not None and _place(r.node) in places]
                refusals.setdefault(rule, []).extend(near)
    missed = []
    for rule, given in refusals.items():
        if given:
            deepest = max(given, key=lambda r: r.depth)
            count = sum(r.reason == deepest.reason for r in given)
            missed.append(Missed(rule, count, deepest.reason, repr(deepest.node)))
    return tuple(missed)


def _computes(node: Node) -> bool:
    """Whether a primitive op does arithmetic that a rule may have been meant for."""
    return not node.op.moves_data and node.op.name not in ("embedding", "cast")


def _place(node: Node) -> str:
    """Where a node stands, its layer's number replaced."""
    index = layer_index(node.loc)
    return node.loc if index is None else layer_template(node.loc, index)


def _rows(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Columns as wide as they must be."""
    table = list(rows)
    widths = [max((len(row[i]) for row in table), default=0) for i in (0, 1)]
    return [f"  {name:<{widths[0]}}  {count:>{widths[1]}}  {place}".rstrip() for name, count, place in table]
