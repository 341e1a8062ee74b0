"""Row-wise kernels: embeddings, normalisations, elementwise operations, row gathering, argmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.kernels import columns, elementwise, norm
from llmc.backends.tvm.kernels import rows as row_kernels
from llmc.backends.tvm.kernels.embedding import embedding, packed_embedding
from llmc.backends.tvm.packing import pack
from tests.backends.tvm.machine import DTYPES, V3, Array, Guarded, Kernel, f32, f64, needs_v3, same_bits, stored
from tests.backends.tvm.paged import rotated
from tests.tolerance import assert_as_good_as

pytestmark = needs_v3

TASKS = st.sampled_from([1, 2, 3, 7])
SEED = st.integers(0, 1000)


@settings(max_examples=8)
@given(
    vocab=st.integers(1, 70),
    hidden=st.integers(1, 60),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from(sorted(DTYPES)),
    packed=st.booleans(),
    tasks=TASKS,
    seed=SEED,
)
def test_embedding(vocab: int, hidden: int, tokens: int, dtype: str, packed: bool, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = stored(rng.standard_normal((vocab, hidden)), dtype)
    ids = rng.integers(0, vocab, tokens).astype(np.int32)
    out = Guarded((tokens, hidden), np.float32)
    kernel = Kernel(packed_embedding if packed else embedding, V3, vocab=vocab, hidden=hidden, weight_dtype=dtype)
    kernel([tokens], [ids, pack(table) if packed else table, out], tasks)
    assert same_bits(out.array, f32(table)[ids])


def test_embedding_reads_nothing_outside_its_table() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    ids = np.array([-1, -(2**31), 4, 2**31 - 1], np.int32)
    for maker, weights in ((embedding, table), (packed_embedding, pack(table))):
        out = Guarded((4, 3), np.float32)
        Kernel(maker, V3, vocab=4, hidden=3, weight_dtype="f32")([4], [ids, weights, out])
        assert (out.array == table[[0, 0, 3, 3]]).all()


def normalised(h: Array, w: Array, b: Array | None, eps: float) -> Array:
    """In the dtype of h; with `b` a layer norm, without it an RMS norm."""
    if b is not None:
        h = h - h.mean(-1, keepdims=True, dtype=h.dtype)
    scale = np.sqrt((h * h).mean(-1, keepdims=True, dtype=h.dtype) + h.dtype.type(eps))
    return np.asarray(h / scale * w + (0 if b is None else b))


@settings(max_examples=16)
@given(
    kind=st.sampled_from(["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"]),
    hidden=st.one_of(st.integers(1, 80), st.sampled_from([256, 1000])),
    count=st.integers(1, 9),
    rows_dim=st.sampled_from([0, 3]),
    offset=st.sampled_from([0.0, 30.0]),
    tasks=TASKS,
    seed=SEED,
)
def test_norms(kind: str, hidden: int, count: int, rows_dim: int, offset: float, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, r = ((rng.standard_normal((count, hidden)) + offset).astype(np.float32) for _ in range(2))
    w, b = (rng.standard_normal(hidden).astype(np.float32) for _ in range(2))
    add, centred = kind.startswith("add"), kind.endswith("layer_norm")
    kernel = Kernel(getattr(norm, kind), V3, rows_dim=rows_dim, hidden=hidden, eps=1e-5)

    def run(begin: int, end: int, tasks: int) -> tuple[Array, Array]:
        h, y = (Guarded((end - begin, hidden), np.float32) for _ in range(2))
        dims = [5, 5, 5, 5]
        dims[rows_dim] = end - begin
        inputs: list[Any] = [x[begin:end], *([r[begin:end]] if add else []), w, *([b] if centred else [])]
        kernel(dims, [*inputs, *([h] if add else []), y], tasks)
        return h.array, y.array

    h, y = run(0, count, tasks)
    total = x + r if add else x
    if add:
        assert same_bits(h, total)
    naive = normalised(total, w, b if centred else None, 1e-5)
    assert_as_good_as(y, naive, normalised(f64(total), f64(w), f64(b) if centred else None, 1e-5))
    assert same_bits(run(count - 1, count, 1)[1][0], y[-1])


def test_layer_norm_without_bias() -> None:
    x = np.random.default_rng(0).standard_normal((3, 21)).astype(np.float32)
    w = np.full(21, 2.0, np.float32)
    y = Guarded((3, 21), np.float32)
    Kernel(norm.layer_norm, V3, rows_dim=0, hidden=21, eps=1e-5, bias=False)([3], [x, w, y], 2)
    zero = np.zeros(21)
    assert_as_good_as(y.array, normalised(x, w, f32(zero), 1e-5), normalised(f64(x), f64(w), zero, 1e-5))


@settings(max_examples=8)
@given(
    kind=st.sampled_from(["add", "multiply", "scale"]),
    width=st.integers(1, 40),
    count=st.integers(1, 9),
    tasks=TASKS,
    rows_dim=st.sampled_from([0, 3]),
    seed=SEED,
)
def test_elementwise(kind: str, width: int, count: int, tasks: int, rows_dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((count, width)).astype(np.float32) for _ in range(2))
    y = Guarded((count, width), np.float32)
    dims = [0, 0, 0, 0]
    dims[rows_dim] = count
    extra = {"factor": 0.3} if kind == "scale" else {}
    Kernel(getattr(elementwise, kind), V3, rows_dim=rows_dim, width=width, **extra)(
        dims, [a, y] if kind == "scale" else [a, b, y], tasks
    )
    expected = {"add": a + b, "multiply": a * b, "scale": a * np.float32(0.3)}[kind]
    assert same_bits(y.array, expected)


@pytest.mark.parametrize("kind", ["add", "multiply"])
@pytest.mark.parametrize(("rows", "period"), [(1, 21), (3, 8), (2, 1)])
def test_elementwise_with_a_vector(kind: str, rows: int, period: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((5, rows, period)).astype(np.float32)
    b = rng.standard_normal(period).astype(np.float32)
    y = Guarded(a.shape, np.float32)
    kernel = Kernel(getattr(elementwise, kind), V3, rows_dim=0, width=rows * period, period=period)
    kernel([5], [a, b, y], 2)
    assert same_bits(y.array, a + b if kind == "add" else a * b)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("width", [20, 80])
def test_norms_of_heads(kind: str, width: int) -> None:
    """A token has as many rows as heads, each with a sum of its own."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, width)).astype(np.float32)
    w, b = (rng.standard_normal(width).astype(np.float32) for _ in range(2))
    vectors = [w, b] if kind == "layer_norm" else [w]
    y, flat = Guarded(x.shape, np.float32), Guarded((12, width), np.float32)
    Kernel(getattr(norm, kind), V3, rows_dim=0, hidden=width, eps=1e-5, heads=3)([4], [x, *vectors, y], 3)
    Kernel(getattr(norm, kind), V3, rows_dim=0, hidden=width, eps=1e-5)([12], [x, *vectors, flat], 2)
    assert same_bits(y.array.reshape(12, width), flat.array)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("queries", "query_width", "keys", "key_width"), [(3, 20, 1, 20), (1, 40, 1, 17)])
def test_norms_in_a_joint_row(queries: int, query_width: int, keys: int, key_width: int, centred: bool) -> None:
    """The bits of a norm of each piece; what follows is copied."""
    rng = np.random.default_rng(0)
    edge = queries * query_width
    x = rng.standard_normal((4, edge + keys * key_width + 13)).astype(np.float32)
    vectors = [rng.standard_normal(w).astype(np.float32) for w in (query_width, key_width) * (1 + centred)]
    y = Guarded(x.shape, np.float32)
    sizes = {"queries": queries, "query_width": query_width, "keys": keys, "key_width": key_width, "centred": centred}
    Kernel(norm.norm_heads, V3, rows_dim=0, width=x.shape[1], eps=1e-5, **sizes)([4], [x, *vectors, y], 3)
    want = x.copy()
    for i, (begin, count, width) in enumerate(((0, queries, query_width), (edge, keys, key_width))):
        columns = slice(begin, begin + count * width)
        pieces = Guarded((4, count, width), np.float32)
        kernel = Kernel(
            norm.layer_norm if centred else norm.rms_norm, V3, rows_dim=0, hidden=width, eps=1e-5, heads=count
        )
        kernel([4], [np.ascontiguousarray(x[:, columns]), *vectors[i::2], pieces])
        want[:, columns] = pieces.array.reshape(4, -1)
    assert same_bits(y.array, want)


@pytest.mark.parametrize("widths", [(3, 40), (8, 16, 1), (20, 7, 24, 9)])
@pytest.mark.parametrize("rows", [1, 3])
def test_concat(widths: tuple[int, ...], rows: int) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((5, rows, w)).astype(np.float32) for w in widths]
    y = Guarded((5, rows, sum(widths)), np.float32)
    Kernel(columns.concat, V3, rows_dim=0, rows=rows, widths=",".join(map(str, widths)))([5], [*parts, y], 2)
    assert same_bits(y.array, np.concatenate(parts, -1))


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 9, 1), (3, 24, 1), (1, 24, 2)])
@pytest.mark.parametrize("rows", [1, 3])
def test_columns(start: int, stop: int, step: int, rows: int) -> None:
    x = np.random.default_rng(0).standard_normal((5, rows, 24)).astype(np.float32)
    want = np.ascontiguousarray(x[..., start:stop:step])
    y = Guarded(want.shape, np.float32)
    sizes = {"rows": rows, "width": 24, "start": start, "count": want.shape[2], "step": step}
    Kernel(columns.columns, V3, rows_dim=0, **sizes)([5], [x, y], 3)
    assert same_bits(y.array, want)


def test_repeat() -> None:
    x = np.random.default_rng(0).standard_normal((5, 2, 11)).astype(np.float32)
    y = Guarded((5, 2, 3, 11), np.float32)
    Kernel(columns.repeat, V3, rows_dim=0, rows=2, width=11, times=3)([5], [x, y], 2)
    assert same_bits(y.array, np.ascontiguousarray(np.repeat(x[:, :, None], 3, 2)))


@pytest.mark.parametrize(("rot_dim", "layout"), [(20, "half"), (8, "interleaved")])
def test_rope(rot_dim: int, layout: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 20)).astype(np.float32)
    angle = rng.uniform(0, 6, (5, rot_dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    y = Guarded(x.shape, np.float32)
    kernel = Kernel(columns.rope, V3, rows_dim=0, heads=3, head_dim=20, rot_dim=rot_dim, layout=layout)
    kernel([5], [x, cos, sin, y], 2)
    truth = rotated(f64(x), f64(cos), f64(sin), rot_dim, layout)
    assert_as_good_as(y.array, rotated(x, cos, sin, rot_dim, layout), truth)


@pytest.mark.parametrize("width", [1, 7, 40])
def test_unary(width: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
    y = Guarded((3, width), np.float32)
    Kernel(elementwise.unary, V3, rows_dim=0, width=width, activation="silu")([3], [x, y], 2)
    assert_as_good_as(y.array, x / (np.float32(1) + np.exp(-x)), f64(x) / (1 + np.exp(-f64(x))))


@settings(max_examples=5)
@given(width=st.integers(1, 40), tokens=st.integers(1, 9), outputs=st.integers(1, 9), tasks=TASKS, seed=SEED)
def test_gather_rows(width: int, tokens: int, outputs: int, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    chosen = rng.integers(0, tokens, outputs).astype(np.int32)
    y = Guarded((outputs, width), np.float32)
    Kernel(row_kernels.gather_rows, V3, width=width)([tokens, 1, 1, outputs], [x, chosen, y], tasks)
    assert same_bits(y.array, x[chosen])


def greedy(logits: Array, tasks: int = 1) -> list[int]:
    out = Guarded((len(logits),), np.int32)
    Kernel(row_kernels.argmax, V3, n=logits.shape[1])([9, 9, 9, len(logits)], [logits, out], tasks)
    return [int(i) for i in out.array]


@settings(max_examples=15)
@given(n=st.sampled_from([1, 7, 8, 16, 41, 1021]), levels=st.sampled_from([2, 5, 10**6]), tasks=TASKS, seed=SEED)
def test_argmax_is_the_first_maximum(n: int, levels: int, tasks: int, seed: int) -> None:
    logits = (np.random.default_rng(seed).integers(-levels, levels, (5, n)) / 7).astype(np.float32)
    assert greedy(logits, tasks) == list(logits.argmax(-1))


def test_argmax_of_special_values() -> None:
    nan, inf = np.nan, np.inf
    cases = [
        [nan] * 17,
        [nan, -inf] + [nan] * 15,
        [-0.0, 0.0] + [-1.0] * 15,
        [nan] * 16 + [-5.0],
        [-inf] * 17,
        [1.0, inf] * 8 + [inf],
    ]
    assert greedy(np.array(cases, np.float32)) == [0, 1, 0, 16, 0, 1]
    assert greedy(-np.array([cases[0]], np.float32)) == [0]
