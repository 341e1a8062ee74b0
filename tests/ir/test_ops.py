"""The table of examples, for all ops alike: inference, the oracle, expansions, costs and text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph, Input
from llmc.ir.interpret import interpret
from llmc.ir.op import Array, ConstantData, Emitter, Hole, Node, Op, Value, topological
from llmc.ir.ops.attention import Attention, PagedAttention
from llmc.ir.ops.cache import KvAppend
from llmc.ir.ops.elementwise import Add, Mask, Mul
from llmc.ir.ops.embedding import Embedding
from llmc.ir.ops.linear import GatedLinear, Linear, Matmul
from llmc.ir.ops.quantized import (
    DequantizeRows,
    DequantizeWeight,
    Quantized,
    QuantizedEmbedding,
    QuantizedGatedLinear,
    QuantizedLinear,
    QuantizeRows,
    QuantizeWeight,
    boundary_bytes,
    weight_bytes,
)
from llmc.ir.ops.rope import Rope, RotaryTable
from llmc.ir.ops.shape import Concat, Constant, Expand, GatherRows, Reshape, Slice, Transpose
from llmc.ir.quant import FORMATS
from llmc.ir.text import parse
from llmc.ir.types import DType, TensorType
from llmc.ir.verify import verify
from tests.ir.example import SIZE, Example, T, f, i
from tests.ir.examples import EXAMPLES, PAGED, STATES, TABLE
from tests.ir.quantized_examples import weight_types

OURS = sorted(name for name, kind in Op.registry.items() if kind.__module__.startswith("llmc.ir.ops."))
each = pytest.mark.parametrize("example", EXAMPLES, ids=str)


def operands(example: Example, seed: int = 0) -> list[Array]:
    """Arrays of the operands' types: small whole numbers for integers, floats rounded to what their dtype holds."""
    rng = np.random.default_rng(seed)
    made = []
    for index, type in enumerate(example.types):
        shape = type.concrete({"t": SIZE})
        if index in example.given:
            array = example.given[index]
        elif type.dtype.is_float:
            array = rng.standard_normal(shape).astype(np.float16)
        else:
            array = rng.integers(0, 2, shape)
        made.append(array.astype(type.dtype.oracle))
    return made


def graph_of(example: Example) -> Graph:
    """A graph of one node, with an input for each operand."""
    inputs = tuple(Value(Node(Input(f"x{n}"), (), (t,))) for n, t in enumerate(example.types))
    node = Node(example.op, inputs, example.op.infer(*example.types), "somewhere.3.else")
    return Graph("one", inputs, (), (), tuple((f"y{v.index}", v) for v in node.results))


@pytest.mark.parametrize("name", OURS)
def test_every_op_has_an_example(name: str) -> None:
    assert name in {example.op.name for example in EXAMPLES}


@each
def test_inference_says_what_the_oracle_gives(example: Example) -> None:
    types = example.op.infer(*example.types)
    results = example.op.evaluate(example.types, operands(example), {"t": SIZE})
    assert len(types) == len(results) == example.op.result_count
    for type, result in zip(types, results, strict=True):
        assert result.shape == type.concrete({"t": SIZE})
        assert result.dtype == type.dtype.oracle or example.op.updates


@each
def test_the_oracle_says_what_numpy_says(example: Example) -> None:
    arrays = operands(example)
    before = [a.copy() for a in arrays]
    results = example.op.evaluate(example.types, arrays, {"t": SIZE})
    expected = example.expected(*(a.copy() for a in before))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for result, want in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-12, atol=1e-13)
    for array, original in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, original, err_msg="an operand was changed in place")


@each
def test_graphs_of_one_node(example: Example) -> None:
    graph = graph_of(example)
    verify(graph)
    assert parse(str(graph), graph.constants) == graph
    inputs = {f"x{n}": a for n, a in enumerate(operands(example))}
    results = interpret(graph, inputs, {})
    direct = example.op.evaluate(example.types, operands(example), {"t": SIZE})
    for array, want in zip(results.outputs.values(), direct, strict=True):
        np.testing.assert_array_equal(array, want)


@each
def test_costs(example: Example) -> None:
    types = [t.substitute({"t": SIZE}) for t in example.types]
    op = graph_of(example).substitute({"t": SIZE}).nodes[0].op
    cost = op.cost(*types)
    assert cost.flops >= 0
    assert cost.bytes_read >= 0
    assert cost.bytes_written > 0
    if op.decomposes and not op.updates:
        _, results = op.expand(types)
        inner = [n for n in topological(v.node for v in results) if not isinstance(n.op, Hole)]
        assert cost.flops == sum(n.op.cost(*(v.type for v in n.inputs)).flops for n in inner)
        assert cost.bytes_read == sum(t.bytes for t in types) or isinstance(op, Quantized)
        moved = sum(n.op.cost(*(v.type for v in n.inputs)).bytes for n in inner)
        assert cost.bytes <= moved, "fusing saves traffic"


@each
def test_operands_of_another_number_are_refused(example: Example) -> None:
    if isinstance(example.op, Concat):
        return
    with pytest.raises(LlmcError, match=example.op.name):
        example.op.infer(*example.types, *[f(3)] * 4)


@pytest.mark.parametrize(
    ("op", "types", "message"),
    [
        (Add(), (f(T, 4), f(3)), r"^add: expected shapes that broadcast; given f32\[t, 4\], f32\[3\]$"),
        (Mul(), (f(4), i(4)), r"^mul: expected operands of one dtype"),
        (Matmul(), (f(T, 4), f(T, 4)), r"^matmul: expected x\[\.\.\., m, k\] and y\[\.\.\., k, n\]"),
        (Matmul(), (f(4), f(4, 2)), "^matmul: expected two operands of rank 2 or more"),
        (
            Linear(),
            (f(T, 4), f(3, 5)),
            r"^linear: expected x \[m, k\] and weight",
        ),
        (Linear(False, "swosh"), (f(T, 4), f(3, 4)), "expected a known activation; given swosh"),
        (Linear(True), (f(T, 4), f(3, 4), f(4)), r"expected bias \[n\]"),
        (Linear(residual=True), (f(T, 4), f(3, 4), f(1, 3)), r"expected residual f32\[t, 3\]"),
        (GatedLinear("silu"), (f(T, 4), f(3, 4)), "expected an even number of weight rows"),
        (Embedding(DType.F32), (f(T), f(3, 4)), "^embedding"),
        (
            QuantizeWeight("q5"),
            (f(3, 32),),
            "^quantize_weight{format=q5}: expected a format of q8, q4, q8g128, .*, fp8; given q5",
        ),
        (QuantizeWeight("q4"), (i(3, 32),), "expected a matrix of floats"),
        (DequantizeWeight("q4", 65), weight_types(4, 2), r"expected codes \[n, 96\] and scales \[n, 3\]"),
        (DequantizeWeight("q4", 64), (*weight_types(4, 2)[:1], f(4, 2)), "expected codes u8 and scales f16"),
        (QuantizeRows(), (i(T, 32),), r"expected x f32 \[m, k\]"),
        (DequantizeRows(65), (TensorType(DType.I8, (T, 64)), f(T, 2)), "expected a width of at most 64"),
        (DequantizeRows(64), (TensorType(DType.I8, (T, 64)), f(T, 3)), r"expected codes \[m, K\] and scales"),
        (QuantizedLinear("q4"), (f(T, 65), *weight_types(4, 2)), r"expected codes \[n, 96\]"),
        (
            QuantizedLinear("q4g64"),
            (f(T, 64), *weight_types(4, 1, 64)),
            "for activations in 8 bits, q8, q4; given q4g64",
        ),
        (
            QuantizedGatedLinear("fp8", "silu"),
            (f(T, 128), *weight_types(4, 1, 128)),
            "for activations in 8 bits, q8, q4; given fp8",
        ),
        (DequantizeWeight("q4g64", 64), weight_types(4, 2), r"expected codes \[n, 64\] and scales \[n, 1\]"),
        (QuantizedLinear("q4", True), (f(T, 64), *weight_types(4, 2), f(5)), r"expected bias \[n\]"),
        (QuantizedLinear("q4", residual=True), (f(T, 64), *weight_types(4, 2), f(4)), r"residual f32\[t, 4\]"),
        (QuantizedLinear("q4", False, "swosh"), (f(T, 64), *weight_types(4, 2)), "expected a known activation"),
        (QuantizedGatedLinear("q4", "silu"), (f(T, 64), *weight_types(3, 2)), "an even number of weight rows"),
        (QuantizedGatedLinear("q4", "silu", True), (f(T, 64), *weight_types(4, 2), f(2)), r"expected bias \[2n\]"),
        (QuantizedEmbedding("q4", 64), (f(T), *weight_types(4, 2)), r"expected ids i32 \[n\]"),
        (Reshape((T, 5)), (f(T, 4),), r"^reshape\{shape=\[t, 5\]\}: expected as many elements as before"),
        (Transpose((0, 0)), (f(T, 4),), "expected axes that permute rank 2"),
        (Slice(1, 2, 5), (f(T, 4),), r"^slice\{axis=1, start=2, stop=5\}: expected a range inside the axis"),
        (Slice(0, 0, 1), (f(T, 4),), "expected a range inside the axis"),
        (Slice(2, 0, 1), (f(T, 4),), "expected one operand that has the axis"),
        (Slice(1, 0, 1, 0), (f(T, 4),), "expected a step of at least 1"),
        (Concat(1), (f(T, 4), f(3, 4)), "expected operands alike but for the axis"),
        (Expand((3, 4)), (f(2, 4),), r"expected a shape that broadcasts to \[3, 4\]"),
        (GatherRows(), (f(T, 4), f(3)), "^gather_rows: expected operands x"),
        (Mask(0.0), (f(T), f(T)), "expected operands x and mask: bool"),
        (Rope(2, 4, 3), (f(T, 8), f(T, 1), f(T, 1)), "expected an even rotary_dim in a head"),
        (Rope(2, 4, 4, "third"), (f(T, 8), f(T, 2), f(T, 2)), "expected layout half or interleaved; given third"),
        (Rope(2, 4, 4), (f(T, 8), f(T, 3), f(T, 3)), r"expected cos and sin f32\[t, 2\]"),
        (RotaryTable(1.0), (f(T), f(3)), "expected positions i32"),
        (Attention(3, 2, 4, 1.0), (f(T, 12), f(T, 8), f(T, 8), i(T)), "num_heads a multiple of num_kv_heads"),
        (Attention(2, 2, 4, 1.0), (f(T, 8), f(T, 4), f(T, 8), i(T)), r"expected k f32\[t, 8\]"),
        (
            PagedAttention(2, 1, 2, 1.0),
            (f(5, 4), *PAGED, i(5), i(4), i(2, 2)),
            r"block_tables \[sequences, max_blocks\]",
        ),
        (
            PagedAttention(2, 1, 2, 1.0, window=-1),
            (f(5, 4), *PAGED, i(5), i(3), i(2, 2)),
            "a window of at least 1, or 0",
        ),
        (PagedAttention(2, 1, 2, 1.0, soft_cap=-2.0), (f(5, 4), *PAGED, i(5), i(3), i(2, 2)), "a soft_cap above 0, or"),
        (
            PagedAttention(2, 1, 2, 1.0, soft_cap=math.inf),
            (f(5, 4), *PAGED, i(5), i(3), i(2, 2)),
            "a soft_cap above 0, or",
        ),
        (
            PagedAttention(2, 1, 2, 1.0, sinks=True),
            (f(5, 4), *PAGED, i(5), i(3), i(2, 2)),
            "block_tables, sinks; given",
        ),
        (
            PagedAttention(2, 1, 2, 1.0),
            (f(5, 4), *PAGED, i(5), i(3), i(2, 2), f(2)),
            "query_start, block_tables; given",
        ),
        (
            PagedAttention(2, 1, 2, 1.0, sinks=True),
            (f(5, 4), *PAGED, i(5), i(3), i(2, 2), f(4)),
            r"expected sinks f32\[2\]; given f32\[4\]",
        ),
        (PagedAttention(2, 1, 2, 1.0), (f(5, 4), PAGED[1], PAGED[0], i(5), i(3), i(2, 2)), "key state of these heads"),
        (KvAppend(1, 2), (f(T, 4), f(T, 4), i(T), *STATES), r"expected k \[tokens, 2\]"),
        (KvAppend(1, 2), (f(T, 2), f(T, 2), i(T), STATES[0], PAGED[1]), "states of one dtype"),
        (KvAppend(1, 2), (f(T, 2), f(T, 2), i(4), *STATES), r"slot_mapping i32\[tokens\]"),
        (Constant(DType.F16, ConstantData(TABLE)), (), "expected data of dtype f16"),
    ],
    ids=lambda v: v.name if isinstance(v, Op) else "",
)
def test_what_inference_refuses(op: Op, types: tuple[TensorType, ...], message: str) -> None:
    with pytest.raises(LlmcError, match=message):
        op.infer(*types)


def test_quantized_weights_cost_their_true_bits() -> None:
    x, codes, scales = f(5, 64), *weight_types(8, 2)
    weights = {"q8": 8 * 64 + 8 * 2 * 2, "q4": 8 * 64 // 2 + 8 * 2 * 2}
    for name, bytes in weights.items():
        assert QuantizedLinear(name).cost(x, codes, scales).bytes_read == x.bytes + bytes
        assert QuantizedLinear(name).cost(x, codes, scales).flops == Linear().cost(x, f(8, 64)).flops
        assert QuantizedGatedLinear(name, "relu").cost(x, codes, scales).bytes_read == x.bytes + bytes
        embedding = QuantizedEmbedding(name, 64).cost(i(3), codes, scales)
        assert embedding.bytes_read == 3 * (4 + bytes // 8), "three ids, three rows"


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("q8", 8 * 256 + 8 * 8 * 2),
        ("q4g64", 8 * 128 + 8 * 4 * 2),
        ("q4g128", 8 * 128 + 8 * 2 * 2),
        ("fp8", 8 * 256 + 8 * 2 * 2),
    ],
)
def test_a_fused_op_over_a_weight_in_a_format_reads_its_true_bits(name: str, weight: int) -> None:
    """As a GPU's product would be written: activations kept, its expansion a product with the dequantized weight."""

    @dataclass(frozen=True)
    class Product(Quantized, abstract=True):
        format: str
        name = "product"

        def decompose(self, b: Emitter, *values: Value) -> Value:
            x, bias, codes, scales = values
            wide = b.dequantize_weight(codes, scales, format=self.format, width=256)
            return b.one(Linear(bias=True), x, wide, bias)

        def bytes_read(self, operands: Sequence[TensorType]) -> int:
            return boundary_bytes(self.quant, operands, codes=2)

    group = FORMATS[name].group
    types = (f(5, 256), f(8), *weight_types(8, 256 // group, group))
    cost = Product(name).cost(*types)
    assert cost.bytes_read == types[0].bytes + types[1].bytes + weight
    assert cost.bytes_written == 5 * 8 * 4
    assert cost.flops == Linear(bias=True).cost(f(5, 256), f(8, 256), f(8)).flops
    assert weight_bytes(FORMATS[name], *types[2:]) == weight
    assert DequantizeWeight(name, 256).cost(*types[2:]).bytes_read == weight


def test_activations_that_are_not_finite_stay_so() -> None:
    codes, scales = QuantizeRows(2).reference(np.array([[np.inf, 1.0, np.nan, 1.0, 1.0, 0.5]]))
    (x,) = DequantizeRows(6).reference(codes, scales)
    assert np.isnan(x[0, :4]).all()
    assert np.isfinite(x[0, 4:]).all()


def test_rounding_of_states() -> None:
    """Keys and values round to the state's dtype once, from float32; float64 states keep them."""
    k = np.array([[1 / 3, 2 / 3]])
    for dtype, want in ((DType.F16, np.float16(1 / 3)), (DType.F32, np.float32(1 / 3)), (DType.F64, 1 / 3)):
        types = (f(1, 2), f(1, 2), i(1), TensorType(dtype, (1, 1, 2, 4)), TensorType(dtype, (1, 1, 4, 2)))
        arrays = (k, k, np.array([2]), np.zeros((1, 1, 2, 4)), np.zeros((1, 1, 4, 2)))
        key, value = KvAppend(1, 2).evaluate(types, arrays, {})
        assert key[0, 0, 0, 2] == value[0, 0, 2, 0] == want


def test_states_in_8_bit_floats_saturate() -> None:
    """3 bits of mantissa, ±448 at most, NaN as it was; a padding slot writes nothing, float64 rounds nothing."""
    given = np.array([[1.07, -0.3, 500.0, -np.inf, np.nan], [9.0, 9.0, 9.0, 9.0, 9.0]])
    want = np.array([1.125, -0.3125, 448.0, -448.0, np.nan])
    shapes = (1, 1, 5, 4), (1, 1, 4, 5)
    for dtype, stored in ((DType.F8E4M3, want), (DType.F64, given[0])):
        types = (f(2, 5), f(2, 5), i(2), *(TensorType(dtype, s) for s in shapes))
        arrays = (given, given, np.array([2, -1]), *map(np.zeros, shapes))
        assert KvAppend(1, 5).infer(*types) == types[3:]
        key, value = KvAppend(1, 5).evaluate(types, arrays, {})
        np.testing.assert_array_equal(key[0, 0, :, 2], stored)
        np.testing.assert_array_equal(value[0, 0, 2], stored)
        key[0, 0, :, 2] = value[0, 0, 2] = 0
        assert not key.any()
        assert not value.any()
    cost = KvAppend(1, 5).cost(f(2, 5), f(2, 5), i(2), *(TensorType(DType.F8E4M3, s) for s in shapes))
    assert cost.bytes_written == 2 * 2 * 5


def test_unowned_blocks_never_matter() -> None:
    example = next(e for e in EXAMPLES if isinstance(e.op, PagedAttention))
    arrays = operands(example)
    (want,) = example.op.evaluate(example.types, arrays, {})
    for state in (1, 2):
        arrays[state] = arrays[state].copy()
    arrays[1][0, :, :, 2:], arrays[2][0, :, 2:] = (
        np.nan,
        np.nan,
    )  # beyond position 5 of the only sequence that reaches it
    (got,) = example.op.evaluate(example.types, arrays, {})
    np.testing.assert_array_equal(got, want)
