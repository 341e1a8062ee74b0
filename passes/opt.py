"""Any pipeline on a graph in text form: what `llmc opt` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from llmc.ir.errors import LlmcError, nearest
from llmc.ir.graph import Graph
from llmc.ir.op import ConstantData
from llmc.ir.pattern import NoMatch
from llmc.ir.text import parse
from llmc.ir.verify import verify
from llmc.passes.base import PassContext, Record
from llmc.passes.constants import ConstantFolder, store_constants
from llmc.passes.observe import Verifier
from llmc.passes.pipelines import read_pipeline

_SHOWN = 5
"""Refusals shown for one rule: the deepest ones say most."""


def optimize_file(path: Path, pipeline: str, limit: int | None = None, explain: str | None = None) -> tuple[str, str]:
    """`optimize_text` on a file, with its large constants beside it; new ones are stored there too."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlmcError(f"cannot read {path}: {error}") from None
    graph, report = _optimize(text, pipeline, ConstantFolder(path.parent), limit, explain)
    try:
        store_constants(graph, path.parent)
    except OSError as error:
        raise LlmcError(f"cannot store the new constants beside {path}: {error.strerror}") from None
    return str(graph), report


def optimize_text(
    text: str,
    pipeline: str,
    constants: Mapping[str, ConstantData] | None = None,
    limit: int | None = None,
    explain: str | None = None,
) -> tuple[str, str]:
    """The graph's text after the pipeline, and a report: why the pass or rule that `explain` names did not fire.

    At most `limit` rewrites are made, counted over all passes. Every graph on the way is verified. Raises `LlmcError`.
    """
    graph, report = _optimize(text, pipeline, constants or {}, limit, explain)
    return str(graph), report


def _optimize(
    text: str, pipeline: str, constants: Mapping[str, ConstantData], limit: int | None, explain: str | None
) -> tuple[Graph, str]:
    steps = read_pipeline(pipeline)
    context = PassContext(limit)
    before = parse(text, constants)
    verify(before)
    graph = steps.run(before, context, Verifier())
    return graph, explanation(context, explain) if explain else ""


def explanation(context: PassContext, name: str) -> str:
    """What the passes or rules of that name did, and the reasons for which they refused, the deepest first."""
    lines = []
    for record in context.records:
        titles = list(dict.fromkeys([*record.counts, *record.refusals]))
        chosen = titles if record.name == name else [t for t in titles if t == name]
        if chosen or record.name == name:
            lines.append(f"{record.name}:{'' if chosen else ' it has no rules'}")
        lines += [line for title in chosen for line in _rule(record, title)]
    if not lines:
        names = {r.name for r in context.records} | {t for r in context.records for t in (*r.counts, *r.refusals)}
        raise LlmcError(f"no pass or rule {name!r} ran; {nearest(name, names)}")
    return "\n".join(lines) + "\n"


def _rule(record: Record, title: str) -> list[str]:
    refusals = record.refusals.get(title, [])
    lines = [f"  {title}: fired {record.counts.get(title, 0)} times, refused {len(refusals)} times"]
    counted = Counter(r.reason for r in refusals)
    first: dict[str, NoMatch] = {}
    for refusal in refusals:
        first.setdefault(refusal.reason, refusal)
    for reason, count in list(counted.items())[:_SHOWN]:
        lines.append(f"    {count} x {reason}, first at {first[reason].node!r}")
    if len(counted) > _SHOWN:
        lines.append(f"    and {len(counted) - _SHOWN} more reasons")
    return lines
