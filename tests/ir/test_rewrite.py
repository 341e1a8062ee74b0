"""The rewrite engine: traced patterns, commutative operands, escapes, cycles, overlaps, limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from llmc.ir.builder import Builder
from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Op, Value
from llmc.ir.ops.elementwise import Add, AddScalar, Exp, Mul, MulScalar, Neg, Silu
from llmc.ir.ops.norm import AddRmsNorm, RmsNorm
from llmc.ir.pattern import Match, NoMatch, Var, trace
from llmc.ir.rewrite import Budget, Fuse, PatternRule, Rule, rewrite
from llmc.ir.types import DType
from llmc.ir.verify import verify

F32 = DType.F32


def start(*labels: str) -> tuple[Builder, list[Value]]:
    b = Builder("g")
    return b, [b.input(label, F32, (4,)) for label in labels]


def ops(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes]


class Doubled(PatternRule):
    """x + x -> 2 x."""

    name = "doubled"
    operand_names = ("x",)

    def pattern(self, b: Emitter, *operands: Value) -> Any:
        (x,) = operands
        return b.add(x, x)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        return b.mul_scalar(match["x"], value=2.0)


class Composed(PatternRule):
    """(x * k) * k -> x * k², only for one k."""

    name = "composed"
    operand_names = ("x",)

    def pattern(self, b: Emitter, *operands: Value) -> Any:
        (x,) = operands
        return b.mul_scalar(b.mul_scalar(x, value=Var("k")), value=Var("k"))

    def check(self, match: Match, graph: Graph) -> NoMatch | None:
        return NoMatch("one is left alone", match.root, 2) if match.attributes["k"] == 1.0 else None

    def rewrite(self, b: Emitter, match: Match) -> Any:
        return b.mul_scalar(match["x"], value=match.attributes["k"] ** 2)


def test_a_pattern_is_found_wherever_it_is() -> None:
    b, (x, y) = start("x", "y")
    graph = b.graph({"out": b.add(b.mul(b.add(x, x), y), b.add(x, x))})
    done = rewrite(graph, [Doubled()])
    assert done.counts == {"doubled": 2}
    assert sorted(ops(done.graph)) == ["add", "mul", "mul_scalar", "mul_scalar"]
    verify(done.graph)


def test_a_rewrite_may_make_room_for_the_next() -> None:
    b, (x,) = start("x")
    y = b.add(x, x)
    graph = b.graph({"out": b.add(y, y)})
    done = rewrite(graph, [Doubled(), Composed()])
    assert done.counts == {"doubled": 2, "composed": 1}
    assert [n.op for n in done.graph.nodes] == [MulScalar(4.0)]


def test_a_hole_that_occurs_twice_is_one_value() -> None:
    b, (x, y) = start("x", "y")
    done = rewrite(b.graph({"out": b.add(x, y)}), [Doubled()])
    assert done.counts == {"doubled": 0}
    (refusal,) = done.refusals["doubled"]
    assert "a value occurs twice in the pattern but not here" in refusal.reason


def test_attributes_bind_like_holes() -> None:
    b, (x,) = start("x")
    outputs = {
        f"{j}{k}": b.mul_scalar(b.mul_scalar(x, value=j), value=k) for j, k in ((2.0, 2.0), (2.0, 3.0), (1.0, 1.0))
    }
    done = rewrite(b.graph(outputs), [Composed()])
    assert done.counts == {"composed": 1}
    reasons = [str(r) for r in done.refusals["composed"]]
    assert any("want value=3.0, found 2.0" in r for r in reasons)
    assert any("one is left alone" in r for r in reasons)


@pytest.mark.parametrize("order", range(8))
def test_commutative_operands_in_any_order(order: int) -> None:
    """RmsNorm's own form has two products whose operands may change places."""
    b, (x, w) = start("x", "w")

    def swapped(bit: int, op: Op, one: Value, other: Value) -> Value:
        result: Value = b(op, other, one) if order >> bit & 1 else b(op, one, other)
        return result

    scale = b.rsqrt(b.add_scalar(b.mean(b.mul(x, x)), value=0.5))
    y = swapped(0, Mul(), swapped(1, Mul(), x, scale), w)
    residual = swapped(2, Add(), x, w)
    z = b.mul(b.mul(residual, b.rsqrt(b.add_scalar(b.mean(b.mul(residual, residual)), value=0.5))), w)
    done = rewrite(rewrite(b.graph({"y": y, "z": z}), [Fuse(RmsNorm)]).graph, [Fuse(AddRmsNorm)])
    assert sorted(ops(done.graph)) == ["add_rms_norm", "rms_norm"]
    verify(done.graph)


def test_fixed_attributes_are_part_of_the_pattern() -> None:
    b, (x, w) = start("x", "w")
    graph = b.graph({"y": RmsNorm(0.5).decompose(b, x, w)})
    assert rewrite(graph, [Fuse(RmsNorm, eps=0.25)]).counts == {"rms-norm": 0}
    done = rewrite(graph, [Fuse(RmsNorm, eps=0.5)])
    assert [n.op for n in done.graph.nodes] == [RmsNorm(0.5)]


def test_constants_of_a_decomposition_must_be_equal() -> None:
    b, (x,) = start("x")
    half = b.mul_scalar(x, value=0.5)
    wrong = b.mul(half, b.add_scalar(b.erf(b.mul_scalar(x, value=0.7)), value=1.0))
    from_ops = Op.registry["gelu_erf"]
    done = rewrite(b.graph({"y": wrong}), [Fuse(from_ops)])
    assert done.counts == {"gelu-erf": 0}
    assert "want value=0.707" in str(done.refusals["gelu-erf"][0])


def test_several_results_are_replaced_together() -> None:
    b, (x, r, w) = start("x", "r", "w")
    total = b.add(x, r)
    graph = b.graph({"norm": b.exp(b.rms_norm(total, w, eps=0.1)), "sum": b.neg(total)})
    done = rewrite(graph, [Fuse(AddRmsNorm)])
    (fused,) = [n for n in done.graph.nodes if isinstance(n.op, AddRmsNorm)]
    outputs = dict(done.graph.outputs)
    assert outputs["sum"].node.inputs == (fused.results[0],)
    assert outputs["norm"].node.inputs == (fused.results[1],)
    verify(done.graph)


def test_an_inner_value_that_is_needed_stays() -> None:
    b, (x,) = start("x")
    s = b.sigmoid(x)
    for outputs in ({"y": b.mul(x, s), "s": s}, {"y": b.mul(x, s), "e": b.exp(s)}):
        done = rewrite(b.graph(outputs), [Fuse(Silu)])
        assert done.counts == {"silu": 0}
        assert "its inner value is also used by" in str(done.refusals["silu"][0])
        assert done.refusals["silu"][0].depth == 2


def test_what_only_parameters_need_may_be_shared() -> None:
    """A value of the pack program may be copied: it costs nothing at run time."""
    b, (x,) = start("x")
    w = b.param("w", F32, (4,))
    doubled = b.add(w, w)

    class Product(PatternRule):
        name = "product"
        operand_names = ("x", "w")

        def pattern(self, b: Emitter, *operands: Value) -> Any:
            x, w = operands
            return b.mul(x, b.add(w, w))

        def rewrite(self, b: Emitter, match: Match) -> Any:
            return b.mul(match["x"], b.mul_scalar(match["w"], value=2.0))

    done = rewrite(b.graph({"y": b.mul(x, doubled), "z": b.exp(doubled)}), [Product()])
    assert done.counts == {"product": 1}


class Pair(Rule):
    """A rule over two nodes that need not hang together: exp(a) and neg(b) become one node with two results."""

    name = "pair"
    roots = (Neg,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        exps = [n for n in graph.nodes if isinstance(n.op, Exp)]
        if not exps:
            return NoMatch("there is no exp", root)
        operands = {"a": exps[0].inputs[0], "b": root.inputs[0]}
        return Match(root, operands, {}, frozenset({root, exps[0]}), (exps[0].results[0], root.results[0]))

    def rewrite(self, b: Emitter, match: Match) -> Any:
        both = b(Both(), match["a"], match["b"])
        return both[0], both[1]


@dataclass(frozen=True)
class Both(Op):
    """exp(a), -b."""

    result_count = 2

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        x, y = values
        return b.exp(x), b.neg(y)


@pytest.mark.parametrize("between", [True, False])
def test_a_rewrite_that_would_depend_on_itself_is_refused(between: bool) -> None:
    """With b made from exp(a), the joined node would need its own result."""
    b, (x, y) = start("x", "y")
    first = b.exp(x)
    second = b.neg(b.add_scalar(first, value=1.0) if between else b.add_scalar(y, value=1.0))
    graph = b.graph({"first": first, "second": second})
    done = rewrite(graph, [Pair()])
    assert done.counts == {"pair": 0 if between else 1}
    if between:
        assert "an operand depends on a value that would be replaced" in str(done.refusals["pair"][0])
    verify(done.graph)


class Joined(Rule):
    """Two nodes named by their places become one `Both`; used to make two matches wait for each other."""

    roots = (Exp,)
    name = "joined"

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        partner = [n for n in graph.nodes if isinstance(n.op, Neg) and n.loc == root.loc]
        if not partner:
            return NoMatch("no partner", root)
        operands = {"a": root.inputs[0], "b": partner[0].inputs[0]}
        replaced = (root.results[0], partner[0].results[0])
        return Match(root, operands, {}, frozenset({root, partner[0]}), replaced)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        return tuple(b(Both(), match["a"], match["b"]))


def test_two_matches_that_wait_for_each_other() -> None:
    """exp at place 1 feeds neg at place 2, exp at place 2 feeds neg at place 1: one of the two can be done."""
    b, (x, y) = start("x", "y")
    with b.at("1"):
        one = b.exp(x)
    with b.at("2"):
        two = b.exp(y)
        later = b.neg(one)
    with b.at("1"):
        last = b.neg(two)
    graph = b.graph({"a": later, "b": last})
    budget = Budget(5)
    done = rewrite(graph, [Joined()], budget)
    assert budget.remaining == 4
    verify(done.graph)
    assert ops(done.graph).count("both") == 1
    assert sorted(ops(done.graph)) == ["both", "exp", "neg"]
    assert done.counts == {"joined": 1}


class Chain(PatternRule):
    """neg(neg(x)) -> x + 0."""

    name = "chain"
    operand_names = ("x",)

    def pattern(self, b: Emitter, *operands: Value) -> Any:
        (x,) = operands
        return b.neg(b.neg(x))

    def rewrite(self, b: Emitter, match: Match) -> Any:
        return b.add_scalar(match["x"], value=0.0)


def test_overlapping_matches_go_to_the_first_root() -> None:
    b, (x,) = start("x")
    graph = b.graph({"out": b.neg(b.neg(b.neg(x)))})
    done = rewrite(graph, [Chain()])
    assert done.counts == {"chain": 1}
    assert [n.op for n in done.graph.nodes] == [AddScalar(0.0), Neg()]
    done = rewrite(b.graph({"out": b.neg(b.neg(b.neg(b.neg(x))))}), [Chain()])
    assert done.counts == {"chain": 2}
    assert [n.op for n in done.graph.nodes] == [AddScalar(0.0), AddScalar(0.0)]


def test_the_first_rule_that_fires_wins() -> None:
    class Tripled(Doubled):
        name = "tripled"

        def rewrite(self, b: Emitter, match: Match) -> Any:
            return b.mul_scalar(match["x"], value=3.0)

    b, (x,) = start("x")
    done = rewrite(b.graph({"out": b.add(x, x)}), [Tripled(), Doubled()])
    assert done.counts == {"tripled": 1, "doubled": 0}


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 9])
def test_a_budget_is_never_exceeded(limit: int) -> None:
    b, (x, y) = start("x", "y")
    graph = b.graph({"a": b.add(x, x), "b": b.add(y, y), "c": b.exp(b.add(b.neg(x), b.neg(x)))})
    graph = rewrite(graph, []).graph
    budget = Budget(limit)
    done = rewrite(graph, [Doubled()], budget)
    possible = 2  # neg(x) + neg(x) are two nodes, not one value twice
    assert done.counts == {"doubled": min(limit, possible)}
    assert ops(done.graph).count("mul_scalar") == min(limit, possible)
    assert budget.spent is (limit <= possible)
    verify(done.graph)


def test_places_and_order_are_kept() -> None:
    b, (x,) = start("x")
    with b.at("layers.3"):
        y = b.add(x, x)
    done = rewrite(b.graph({"out": b.exp(y)}), [Doubled()])
    assert [n.loc for n in done.graph.nodes] == ["layers.3", ""]


def test_refusals_are_of_the_last_round_and_the_deepest_first() -> None:
    b, (x,) = start("x")
    graph = b.graph({"a": b.mul_scalar(b.mul_scalar(x, value=2.0), value=3.0), "b": b.mul_scalar(x, value=5.0)})
    done = rewrite(graph, [Composed()])
    depths = [r.depth for r in done.refusals["composed"]]
    assert depths == sorted(depths, reverse=True)
    assert len(depths) == 3


def test_a_pattern_with_a_result_of_its_own_is_refused() -> None:
    """Results are found from the last one; one that it does not reach cannot be bound."""

    def pattern(b: Emitter, *operands: Value) -> Any:
        x, y = operands
        return b.exp(x), b.neg(y)

    b, (x, y) = start("x", "y")
    graph = b.graph({"a": b.exp(x), "b": b.neg(y)})
    root = next(n for n in graph.nodes if isinstance(n.op, Neg))
    found = trace(pattern, ["x", "y"]).match(root)
    assert isinstance(found, NoMatch)
    assert "hangs on nothing that the root reaches" in found.reason


def test_a_rewrite_of_another_type_is_a_mistake() -> None:
    class Wrong(Doubled):
        def rewrite(self, b: Emitter, match: Match) -> Any:
            return b.mean(match["x"])

    b, (x,) = start("x")
    with pytest.raises(AssertionError, match=r"doubled: f32\[4\] became f32\[1\]"):
        rewrite(b.graph({"out": b.add(x, x)}), [Wrong()])


def test_deep_graphs_do_not_recurse() -> None:
    b, (x,) = start("x")
    for _ in range(3000):
        x = b.exp(b.add(x, x))
    done = rewrite(b.graph({"out": x}), [Doubled()])
    assert done.counts == {"doubled": 3000}
