"""Pipelines: their text form, its errors, the order of events, and the budget of rewrites."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llmc.ir.errors import LlmcError, ParseError
from llmc.ir.graph import Graph
from llmc.ir.types import DType
from llmc.passes.base import Pass, PassContext, common_place, later_stage, parse_pipeline, stage_of
from llmc.passes.pipelines import COMMON, entry_pipeline, read_pipeline, step_pipeline
from llmc.passes.specialize import Specialize
from tests.passes.graphs import rotary_model

PIPELINES = [COMMON, step_pipeline(DType.BF16, 8), entry_pipeline("decode"), entry_pipeline("prefill", 7, 3, 2)]


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_text_round_trip(pipeline: object) -> None:
    assert read_pipeline(str(pipeline)) == pipeline


def test_options_are_typed() -> None:
    (step,) = parse_pipeline(" specialize{ entry = 'prefill' , tokens=12 } ").passes
    assert step == Specialize("prefill", 12)
    assert parse_pipeline("specialize{entry=decode,tokens=None}").passes == (Specialize("decode"),)
    assert parse_pipeline("").passes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fuse-nrom", r"there is no pass 'fuse-nrom'; did you mean 'fuse-norm'\?"),
        ("zzz", r"there is no pass 'zzz'; known: absorb-latent, canonicalize"),
        ("specialize", r"the pass 'specialize' needs the option 'entry': specialize\{entry=…\}"),
        ("specialize{entrry=decode}", r"'specialize' has no option 'entrry'; did you mean 'entry'\?"),
        ("specialize{entry}", r"expected entry=VALUE, given 'entry'"),
        ("specialize{entry=decode", r"no closing '}'"),
        ("specialize{entry=decide}", r"there is no entry point 'decide'; did you mean 'decode'\?"),
        ("specialize{entry=decode,tokens=many}", r"tokens=many is not of the expected kind: int or NoneType"),
        ("specialize{entry=decode,tokens=0}", r"tokens must be at least 1, given 0"),
        ("paged-kv{dtype=f8}", r"dtype=f8 is not of the expected kind: f64, f32, f16"),
        ("paged-kv{dtype=i32}", r"keys and values are floating point, or i8 with scales: dtype cannot be i32"),
        ("paged-kv{block_size=0}", r"block_size must be at least 1, given 0"),
        ("paged-kv{block_size=True}", r"block_size=True is not of the expected kind"),
        ("canonicalize{x=1}", r"the pass 'canonicalize' has no option 'x'; there is none"),
    ],
)
def test_mistakes_name_what_is_near(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse_pipeline(text)


def test_the_observer_sees_every_pass_in_order() -> None:
    seen: list[tuple[str, Graph, Graph]] = []
    start = rotary_model(layers=1)

    def observe(step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        assert seconds >= 0
        seen.append((step.name, before, after))

    end = COMMON.run(start, observer=observe)
    assert [name for name, _, _ in seen] == [p.name for p in COMMON.passes]
    assert seen[0][1] is start
    assert seen[-1][2] is end
    assert all(one[2] is two[1] for one, two in pairwise(seen))


def test_records_are_one_for_each_pass() -> None:
    context = PassContext()
    COMMON.run(rotary_model(layers=1), context)
    assert [r.name for r in context.records] == [p.name for p in COMMON.passes]
    assert context.counts["rope"] == 2
    assert sum(r.counts.get("reshape", 0) for r in context.records) == context.counts["reshape"]


def test_a_limit_stops_after_so_many_rewrites() -> None:
    start = rotary_model(layers=1)
    total = sum(_counts(start, None).values())
    assert sum(_counts(start, 0).values()) == 0
    assert COMMON.run(start, PassContext(0)) == start
    for limit in (1, 5, total - 1, total, total + 5):
        assert sum(_counts(start, limit).values()) == min(limit, total)


def _counts(graph: Graph, limit: int | None) -> dict[str, int]:
    context = PassContext(limit)
    COMMON.run(graph, context)
    return context.counts


def test_stages() -> None:
    start = rotary_model(layers=1)
    fused = COMMON.run(start)
    step = step_pipeline(DType.F32).run(start)
    assert [stage_of(g) for g in (start, fused, step)] == ["primitive", "fused", "step"]
    assert later_stage("fused", "primitive") == "fused"


def test_common_place() -> None:
    assert common_place(["a.b.c", "a.b.d"]) == "a.b"
    assert common_place(["a", "b"]) == ""
    assert common_place(["layers.1", "layers.10"]) == "layers"


def test_errors_keep_their_kind() -> None:
    with pytest.raises(LlmcError, match=r"^pass paged-kv\{block_size=4\}: "):
        read_pipeline("paged-kv,paged-kv{block_size=4}").run(COMMON.run(rotary_model(layers=1)))
