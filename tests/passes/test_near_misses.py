"""What is nearly a fusion and must not be one: nothing fires, and the refusal says why."""

from __future__ import annotations

import pytest

from llmc.ir.graph import Graph
from llmc.ir.op import Value
from llmc.ir.ops.elementwise import Silu
from llmc.ir.ops.norm import LayerNorm, RmsNorm
from llmc.ir.ops.rope import Rope
from llmc.ir.verify import verify
from llmc.passes.base import PassContext
from llmc.passes.observe import NumericsCheck
from llmc.passes.pipelines import read_pipeline
from tests.passes.graphs import F32, Model, counts


def rotated(b: Model, **changes: bool) -> Graph:
    """Rope of halves, written out, with one thing another way."""
    x = b.input("x", F32, (b.tokens, 8))
    cos, sin = b.table(4)
    if changes.get("sines_only"):
        cos = sin
    heads = b.reshape(x, shape=(b.tokens, 2, 4))
    c, s = (b.reshape(table, shape=(b.tokens, 1, 2)) for table in (cos, sin))
    first, second = (b.slice(heads, axis=2, start=i, stop=i + 2) for i in (0, 2))
    if changes.get("swapped"):
        first, second = second, first
    if changes.get("exp"):
        first = b.exp(first)
    turned = b.sub(b.mul(first, c), b.mul(second, s)), b.add(b.mul(second, c), b.mul(first, s))
    out = b.concat(*turned, axis=2)
    return b.graph({"out": out, **({"half": turned[0]} if changes.get("half") else {})})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"swapped": True}, "want Slice(axis=2, start=0, stop=2, step=1)"),
        ({"exp": True}, "what is rotated are no slices"),
        ({"half": True}, "its inner value is also used by a result of the graph"),
    ],
)
def test_rope(changes: dict[str, bool], reason: str) -> None:
    context = PassContext()
    read_pipeline("fuse-rope").run(rotated(Model(), **changes), context)
    assert context.counts["rope"] == 0
    assert reason in str(context.refusals["rope"][0])


def test_part_of_a_head_that_is_left_out() -> None:
    b = Model()
    x = b.input("x", F32, (b.tokens, 12))
    cos, sin = b.table(4)
    whole = b.primitive(Rope(2, 6, 4), x, cos, sin)
    concat = whole.node.inputs[0].node
    graph = b.graph({"out": b.concat(*concat.inputs[:2], axis=2)})
    context = PassContext()
    read_pipeline("fuse-rope").run(graph, context)
    assert "4 of 6 elements are rotated and the rest is left out" in str(context.refusals["rope"][0])


def test_a_table_of_sines_alone() -> None:
    context = PassContext()
    read_pipeline("fuse-rope").run(rotated(Model(), sines_only=True), context)
    assert context.counts["rotary-table"] == 0
    assert "want the sine and the cosine of one product" in str(context.refusals["rotary-table"][0])


def test_a_table_of_something_else_than_positions() -> None:
    b = Model()
    angles = b.mul(b.input("x", F32, (b.tokens, 1)), b.constant([[1.0, 0.5]], F32))
    context = PassContext()
    read_pipeline("fuse-rope").run(b.graph({"cos": b.cos(angles), "sin": b.sin(angles)}), context)
    assert "the angles are no product of positions" in str(context.refusals["rotary-table"][0])


def test_norms() -> None:
    b = Model()
    x, gate = (b.input(n, F32, (b.tokens, 4)) for n in ("x", "gate"))
    gated = b.primitive(RmsNorm(1e-5), x, gate)
    inner = b.primitive(LayerNorm(1e-5), x, b.weight(4), b.weight(4, name="bias"))
    centred = inner.node.inputs[0].node.inputs[0].node.inputs[0]
    assert centred.op.name == "sub"
    context = PassContext()
    after = read_pipeline("fuse-norm").run(b.graph({"gated": gated, "out": inner, "centred": centred}), context)
    # What it computes on the way is needed elsewhere too: that is computed once more.
    assert counts(after)["layer_norm"] == 1 and "sub" in counts(after)
    assert "no vector" in " ".join(map(str, context.refusals["rms-norm"]))


def test_a_norm_without_an_addition() -> None:
    b = Model()
    y = b.primitive(RmsNorm(1e-5), b.exp(b.input("x", F32, (b.tokens, 4))), b.weight(4))
    context = PassContext()
    read_pipeline("fuse-norm").run(b.graph({"out": y}), context)
    assert context.counts["rms-norm"] == 1
    assert str(context.refusals["add-rms-norm"][0]).startswith("want add, found exp")


def test_linears() -> None:
    b = Model()
    x = b.input("x", F32, (b.tokens, 4))
    batch = b.matmul(b.reshape(x, shape=(1, b.tokens, 4)), b.weight(4, 3))
    stacked = b.matmul(x, b.weight(2, 4, 3, name="stack"))
    product = b.matmul(x, b.transpose(x, axes=(1, 0)))
    context = PassContext()
    graph = b.graph({"a": batch, "b": stacked, "c": product})
    assert read_pipeline("raise-linear").run(graph, context) == graph
    reasons = " ".join(map(str, context.refusals["linear"]))
    for reason in ("a linear takes [rows, features]", "is no matrix", "does not depend on parameters alone"):
        assert reason in reasons


def test_biases() -> None:
    b = Model()
    x = b.input("x", F32, (b.tokens, 4))
    y = b.add(b.add(b.project("a", x, 4, bias=True), b.weight(4, name="second")), b.weight(1, 4, name="row"))
    context = PassContext()
    after = read_pipeline("raise-linear").run(b.graph({"out": y}), context)
    assert counts(after) == {"linear": 1, "add": 2}
    reasons = " ".join(map(str, context.refusals["linear-bias"]))
    assert "the linear has a bias or an activation already" in reasons


def test_packing() -> None:
    b = Model()
    x = b.input("x", F32, (b.tokens, 4))
    y = b.add(b.project("a", x, 4, bias=True), b.project("b", x, 4))
    z = b.primitive(Silu(), b.project("c", b.exp(x), 4))
    context = PassContext()
    after = read_pipeline("raise-linear,fuse-mlp,pack-linears").run(b.graph({"y": y, "z": z}), context)
    assert counts(after)["linear"] == 3
    reasons = " ".join(map(str, context.refusals["pack-linears"]))
    assert "another linear reads its input, but has weights of another kind" in reasons
    assert "the linear has an activation or a residual" in reasons


def residuals(b: Model) -> Graph:
    """Sums of which no addend may take the other in, each for another reason."""
    x = b.input("x", F32, (b.tokens, 4))
    wanted, row = b.linear(x, b.weight(4, 4)), b.input("row", F32, (1, 4))
    twice = b.linear(x, b.weight(4, 4, name="twice"))
    outputs = {
        "plain": b.add(b.exp(x), x),
        "wanted": wanted,
        "sum": b.add(wanted, x),
        "twice": b.add(twice, twice),
        "active": b.add(b.linear(x, b.weight(4, 4, name="active"), activation="relu"), x),
        "row": b.add(b.linear(x, b.weight(4, 4, name="row")), row),
        "second": b.add(b.linear(x, b.weight(4, 4, name="second"), x, residual=True), x),
    }
    return b.graph(outputs)


def test_residuals() -> None:
    graph = residuals(Model())
    verify(graph)
    context = PassContext()
    assert read_pipeline("fuse-residual").run(graph, context) == graph
    reasons = " ".join(map(str, context.refusals["linear-residual"]))
    for reason in (
        "want linear, found",
        "own result is also used elsewhere",
        "has the activation relu",
        "the addends f32[tokens, 4] and f32[1, 4] are broadcast",
        "has a residual already",
    ):
        assert reason in reasons, reason


def test_a_linear_with_a_residual_is_left_as_it_is() -> None:
    """It is packed with no other, is no factor of a gate, and its activation stands before the addition."""
    b = Model()
    x = b.input("x", F32, (b.tokens, 4))

    def linear(name: str) -> Value:
        result: Value = b.linear(x, b.weight(4, 4, name=name), x, residual=True)
        return result

    gate = b.mul(b.silu(linear("gate")), b.linear(x, b.weight(4, 4, name="up")))
    context = PassContext()
    after = read_pipeline("pack-linears,fuse-mlp").run(b.graph({"gate": gate, "other": linear("other")}), context)
    assert counts(after) == {"linear": 3, "silu": 1, "mul": 1}
    assert "adds a residual after its activation" in str(context.refusals["linear-activation"][0])


def test_of_two_linears_the_later_one_takes_the_sum() -> None:
    b = Model()
    x = b.input("x", F32, (b.tokens, 4))
    first = b.linear(x, b.weight(4, 4, name="first"))
    second = b.linear(b.exp(x), b.weight(4, 4, name="second"))
    after = read_pipeline("fuse-residual").run(b.graph({"out": b.add(first, second)}), observer=NumericsCheck())
    (taking,) = (n for n in after.nodes if getattr(n.op, "residual", False))
    assert taking.inputs[2].op.name == "linear"
    assert taking is after.nodes[-1]


def test_gates() -> None:
    b = Model()
    x = b.input("x", F32, (b.tokens, 4))
    a, c = b.project("a", x, 4), b.project("c", x, 4, bias=True)
    d, e = b.project("d", b.exp(x), 4), b.project("e", x, 4)
    products = {
        "plain": b.mul(a, e),
        "bias": b.mul(b.primitive(Silu(), b.project("f", x, 4)), c),
        "inputs": b.mul(b.primitive(Silu(), b.project("g", x, 4)), d),
        "factor": b.mul(b.primitive(Silu(), b.project("h", x, 4)), x),
        "both": b.mul(b.primitive(Silu(), b.project("i", x, 4)), b.relu(b.project("j", x, 4))),
    }
    context = PassContext()
    after = read_pipeline("raise-linear,fuse-mlp").run(b.graph(products), context)
    assert counts(after)["gated_linear"] == 0
    reasons = " ".join(map(str, context.refusals["gated-linear"]))
    for reason in ("found none and none", "has a bias", "different inputs", "no linear", "found silu and relu"):
        assert reason in reasons, reason


@pytest.mark.parametrize("rest", ["other head", "other place"])
def test_a_rest_that_is_not_the_head_s_own(rest: str) -> None:
    b = Model()
    x, other = (b.input(n, F32, (b.tokens, 12)) for n in ("x", "other"))
    whole = b.primitive(Rope(2, 6, 4), x, *b.table(4))
    *turned, own = whole.node.inputs[0].node.inputs
    (heads,) = own.node.inputs
    if rest == "other head":
        tail = b.slice(b.reshape(other, shape=(b.tokens, 2, 6)), axis=2, start=4, stop=6)
    else:
        tail = b.slice(heads, axis=2, start=0, stop=2)
    context = PassContext()
    read_pipeline("fuse-rope").run(b.graph({"out": b.concat(*turned, tail, axis=2)}), context)
    assert context.counts["rope-part"] == 0
    assert "what follows the 4 rotated elements is not the head's rest" in str(context.refusals["rope-part"][0])


def test_tables_of_two_factors_keep_them() -> None:
    """Only a factor that both tables share becomes an attribute."""
    b = Model()
    angles = b.mul(b.reshape(b.cast(b.positions, dtype=F32), shape=(b.tokens, 1)), b.constant([[1.0, 0.5]], F32))
    tables = {"cos": b.mul_scalar(b.cos(angles), value=2.0), "sin": b.mul_scalar(b.sin(angles), value=3.0)}
    after = read_pipeline("fuse-rope").run(b.graph(tables), observer=NumericsCheck())
    assert counts(after) == {"rotary_table": 1, "mul_scalar": 2}
