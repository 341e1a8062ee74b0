"""What exporters write and what is nearly that: each refusal of the normalising passes says why."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from llmc.ir.graph import Graph
from llmc.ir.op import Value
from llmc.ir.types import DType
from llmc.passes.base import PassContext
from llmc.passes.observe import NumericsCheck, Verifier, together
from llmc.passes.pipelines import COMMON, read_pipeline
from tests.passes.graphs import F32, Model, counts, learned_model, rotary_model


def added(b: Model, base: float = 0.0, value: float = -1e38, moved: float = 0.0, read: bool = False) -> Graph:
    """A mask added to scores before a softmax, with one thing another way."""
    t = b.tokens
    scores = b.input("scores", F32, (2, t, t))
    row, column = b.reshape(b.positions, shape=(t, 1)), b.reshape(b.positions, shape=(1, t))
    row = b.add_scalar(row, value=moved) if moved else row
    total = b.add(scores, b.mask(b.constant(base, F32), b.greater_equal(row, column), value=value))
    outputs = {"out": b.softmax(total)}
    return b.graph({**outputs, "scores": total} if read else outputs)


def rows_of_keys(b: Model) -> Graph:
    """A mask that makes the scores of one token those of all."""
    t = b.tokens
    row, column = b.reshape(b.positions, shape=(t, 1)), b.reshape(b.positions, shape=(1, t))
    mask = b.mask(b.constant(0.0, F32), b.greater_equal(row, column), value=-math.inf)
    return b.graph({"out": b.softmax(b.add(b.input("scores", F32, (1, t)), mask))})


def rotated(
    b: Model, table: Callable[[Model, Value], Value] | None = None, other: bool = False, axes: tuple[int, ...] = ()
) -> Graph:
    """A rotation by tables of doubled width, with one thing another way."""
    t = b.tokens
    x = b.input("x", F32, (t, 2, 4))
    x = b.transpose(x, axes=axes) if axes else x
    angles = b.input("angles", F32, (t, 2))
    doubled = b.concat(angles, angles, axis=1)
    cos, sin = b.cos(doubled), b.sin(table(b, angles) if table else doubled)
    shape = (1, t, 4) if axes else (t, 1, 4)
    cos, sin = b.reshape(cos, shape=shape), b.reshape(sin, shape=shape)
    turned = b.concat(b.neg(b.slice(x, axis=2, start=2, stop=4)), b.slice(x, axis=2, start=0, stop=2), axis=2)
    straight = b.input("y", F32, (t, 2, 4)) if other else x
    return b.graph({"out": b.add(b.mul(straight, cos), b.mul(turned, sin))})


NEAR: dict[str, tuple[str, Callable[[Model], Graph], str]] = {
    "not zero": ("added-mask", lambda b: added(b, base=1.0), "what the mask leaves is not 0"),
    "mild": ("added-mask", lambda b: added(b, value=-5.0), r"the mask adds -5.0, which hides nothing"),
    "strict": ("added-mask", lambda b: added(b, moved=-1.0), "a token may not see itself"),
    "read": ("added-mask", lambda b: added(b, read=True), "another reader than a softmax"),
    "plain": ("added-mask", lambda b: b.graph({"out": b.add(b.positions, b.positions)}), "neither operand is a mask"),
    "other value": ("doubled-tables", lambda b: rotated(b, other=True), "no product with the same value"),
    "other halves": (
        "doubled-tables",
        lambda b: rotated(b, lambda b, a: b.concat(a, b.mul_scalar(a, value=2.0), axis=1)),
        "the halves of the sines are not seen to be the same",
    ),
    "no halves": ("doubled-tables", lambda b: b.graph({"out": b.add(b.positions, b.positions)}), "exchanged halves"),
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses(case: str) -> None:
    rule, make, reason = NEAR[case]
    context = PassContext()
    graph = make(Model())
    after = read_pipeline("normalize-masks,normalize-rotations").run(
        graph, context, together(Verifier(), NumericsCheck())
    )
    assert counts(after) == counts(graph)
    assert any(reason in refusal.reason for refusal in context.refusals[rule]), context.refusals[rule]


def test_a_mask_larger_than_the_scores_still_chooses() -> None:
    context = PassContext()
    after = read_pipeline("normalize-masks").run(rows_of_keys(Model()), context, together(Verifier(), NumericsCheck()))
    assert context.counts["added-mask"] == 1 and counts(after)["add"] == 0


@pytest.mark.parametrize("moved", [0.0, 3.0])
def test_an_added_mask_chooses(moved: float) -> None:
    graph = added(Model(), moved=moved, value=-3.4e38)
    after = read_pipeline("normalize-masks").run(graph, observer=together(Verifier(), NumericsCheck()))
    assert counts(after)["add"] == 0 and [n.op.value for n in after.nodes if n.op.name == "mask"] == [-math.inf]  # type: ignore[attr-defined]


@pytest.mark.parametrize("axes", [(), (1, 0, 2)])
def test_doubled_tables_become_pairs(axes: tuple[int, ...]) -> None:
    graph = rotated(Model(), axes=axes)
    after = read_pipeline("normalize-rotations,canonicalize").run(graph, observer=together(Verifier(), NumericsCheck()))
    assert (counts(after)["concat"], counts(after)["sub"], counts(after)["neg"]) == (1, 1, 0)


@pytest.mark.parametrize(
    "model",
    [
        rotary_model(),
        rotary_model(kv_heads=1),
        rotary_model(heads=1, kv_heads=1),
        rotary_model(dynamic=True),
        learned_model(),
    ],
    ids=["grouped", "one-kv-head", "one-head", "dynamic", "learned"],
)
def test_descriptions_need_no_normalising(model: Graph) -> None:
    """What blocks write is in normal form already."""
    context = PassContext()
    COMMON.run(model, context)
    assert not {"unit-axis", "added-mask", "expanded-mask", "doubled-tables"} & {
        k for k, n in context.counts.items() if n
    }


def test_an_axis_of_one_that_is_no_batch_stays() -> None:
    b = Model()
    t = b.tokens
    heads = b.reshape(b.transpose(b.input("x", F32, (t, 1, 4)), axes=(1, 0, 2)), shape=(1, 1, t, 4))
    graph = b.graph({"out": b.expand(heads, shape=(1, 3, t, 4)), "mask": b.cast(b.positions, dtype=DType.F32)})
    assert read_pipeline("drop-unit-axes").run(graph) == graph
