"""The graph of a package or a model at any stage, as text or as a drawing for Graphviz."""

from __future__ import annotations

from pathlib import Path

from llmc.backends.choose import know_ops
from llmc.backends.tvm.lower import lower
from llmc.backends.tvm.lower_attention import entry_graph
from llmc.entries import specialised
from llmc.importers.choose import import_model
from llmc.ir.errors import LlmcError, nearest
from llmc.ir.graph import Graph, Leaf
from llmc.ir.op import Value
from llmc.ir.printer import op_text
from llmc.ir.text import parse
from llmc.ir.types import DType
from llmc.options import Limits
from llmc.packages import read_manifest
from llmc.passes.base import Pipeline
from llmc.passes.constants import ConstantFolder
from llmc.passes.pipelines import step_pipeline
from llmc.passes.quantize import Quantize
from llmc.quantization import of_manifest

ENTRIES = ("prefill", "decode", "verify")
FORMATS = ("text", "dot")


def inspect(
    source: Path,
    after: str | None = None,
    entry: str | None = None,
    form: str = "text",
    architecture: Path | None = None,
) -> str:
    """The graph as imported; after the pass named `after` (its last run); or lowered, for the entry point `entry`.

    `source` is a package's folder, a model's, or a configuration; `architecture` is a user's description of it. Raises
    `LlmcError` naming the nearest valid choice.
    """
    if form not in FORMATS:
        raise LlmcError(f"--format {form}: {nearest(form, FORMATS)}")
    if entry is not None and entry not in ENTRIES:
        raise LlmcError(f"--entry {entry}: {nearest(entry, ENTRIES)}")
    if after is not None and entry is not None:
        raise LlmcError("--pass and --entry exclude each other: an entry point is what all passes and lowering leave")
    packaged = (source / "manifest.json").is_file()
    if packaged and after is None:
        graph = read_graph(source, entry or "model")
    else:
        made = read_manifest(source)["quantization"] if packaged else {"kv": "f16"}
        kv, quant = DType(made["kv"]), of_manifest(made)
        imported = None if packaged else import_model(source, architecture=architecture)
        graph = imported.graph if imported else read_graph(source, "model")
        if after is not None:
            graph = run_until(graph, after, kv, quant)
        elif entry is not None and imported:
            longest = imported.info.max_sequence_length
            lowered = lower(step_pipeline(kv).run(graph), longest)
            graph = entry_graph(entry, dict(specialised(lowered, Limits()))[entry], longest)
    return str(graph) if form == "text" else to_dot(graph)


def read_graph(package: Path, stage: str) -> Graph:
    """A graph that a package carries: `model`, `step`, or an entry point."""
    know_ops(read_manifest(package)["target"]["kind"])
    path = package / "graph" / f"{stage}.ir"
    if not path.is_file():
        raise LlmcError(f"{package} has no graph {stage!r}; it has {sorted(p.stem for p in path.parent.glob('*.ir'))}")
    return parse(path.read_text(encoding="utf-8"), ConstantFolder(path.parent))


def run_until(graph: Graph, name: str, kv: DType, quant: Quantize | None = None) -> Graph:
    """The graph after the last pass of that name in the pipeline."""
    passes = step_pipeline(kv, quant=quant).passes
    places = [i for i, step in enumerate(passes) if step.name == name]
    if not places:
        raise LlmcError(f"there is no pass {name!r} in the pipeline; {nearest(name, {p.name for p in passes})}")
    return Pipeline(passes[: places[-1] + 1]).run(graph)


def to_dot(graph: Graph) -> str:
    """The graph in Graphviz's language: boxes are nodes, edges carry types."""
    names: dict[Value, str] = {}
    lines = [f"digraph {graph.name} {{", "  node [shape=box, fontname=monospace];"]
    for i, value in enumerate((*graph.inputs, *graph.params, *graph.states)):
        assert isinstance(value.op, Leaf)
        names[value] = f"leaf{i}"
        lines.append(f'  leaf{i} [label="{value.op.label}\\n{value.type}", shape=ellipse];')
    for i, node in enumerate(graph.nodes):
        name, attributes = op_text(node.op)
        label = f"{name}{attributes}\\n{node.loc}".replace('"', "'")
        lines.append(f'  node{i} [label="{label}"];')
        lines += [f'  {names[v]} -> node{i} [label="{v.type}"];' for v in node.inputs]
        names.update(dict.fromkeys(node.results, f"node{i}"))
    for name, value in graph.outputs:
        lines += [f'  output_{name} [label="{name}", shape=ellipse];', f"  {names[value]} -> output_{name};"]
    return "\n".join([*lines, "}"]) + "\n"
