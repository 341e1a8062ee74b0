"""Prefill attention: chunks of ragged batches, as exact as plain arithmetic, whatever lies where it must not look."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmc.backends.base import KernelSpec
from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.kernels.attention_prefill import grid, prefill_spec
from llmc.ir.op import Array
from llmc.ir.ops.attention import PagedAttention
from tests.backends.triton.interpreter import TARGET, run
from tests.backends.triton.paged_batch import Batch, exact, naive, poisoned, tensor
from tests.tolerance import assert_as_good_as

Chunk = tuple[int, int, int]
"""A sequence, the first position, how many."""


def prefill(batch: Batch, chunks: list[Chunk], rows: int = 32, tile: int = 32, spare: int = 3) -> Array:
    """These chunks, in a bucket with `spare` rows of padding that must stay as they are; `spare` sequences more than
    there are fit into the bucket."""
    lengths = [n for _, _, n in chunks]
    count, width = sum(lengths), batch.num_heads * batch.head_dim
    bucket = count + spare
    spec = prefill_spec(**batch.semantics, tokens=bucket, sequences=len(chunks) + spare)
    changed = {"tile": max(tile, batch.block_size), "rows": max(rows, batch.num_heads // batch.num_kv_heads)}
    spec = KernelSpec.of(spec.kind, **{**dict(spec.parameters), **changed})
    q = np.full((bucket, width), np.nan, np.float32)
    q[:count] = np.concatenate([batch.q[s][p : p + n].reshape(n, width) for s, p, n in chunks])
    positions = np.full(bucket, 2**30, np.int32)
    positions[:count] = np.concatenate([np.arange(p, p + n) for _, p, n in chunks])
    starts = np.full(len(chunks) + 1 + spare, -7, np.int32)
    starts[: len(chunks) + 1] = np.cumsum([0, *lengths])
    out = poisoned((bucket, width), batch.dtype)
    tensors: dict[str, Any] = {
        "q_ptr": tensor(q, batch.dtype),
        **batch.state_tensors(),
        "positions_ptr": torch.from_numpy(positions),
        "query_start_ptr": torch.from_numpy(starts),
        "block_tables_ptr": torch.from_numpy(batch.tables[[s for s, _, _ in chunks]].copy()),
        **({"slopes_ptr": torch.from_numpy(batch.slopes)} if batch.slopes is not None else {}),
        **({"sinks_ptr": torch.from_numpy(batch.sinks)} if batch.sinks is not None else {}),
        "out_ptr": out,
        "dims_ptr": torch.tensor([count, len(chunks), batch.tables.shape[1], 1], dtype=torch.int32),
    }
    run(source_of(spec, TARGET), grid(spec, bucket, len(chunks) + spare), tensors)
    assert out[count:].isnan().all()
    return np.asarray(out[:count].float().numpy())


def check(batch: Batch, chunks: list[Chunk] | None = None, rows: int = 32, tile: int = 32) -> None:
    chunks = [(s, 0, n) for s, n in enumerate(batch.lengths)] if chunks is None else chunks
    places = [(s, p + i) for s, p, n in chunks for i in range(n)]
    got = prefill(batch, chunks, rows, tile)
    assert_as_good_as(got, batch.rows(places, naive), batch.rows(places, exact))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("state", ["same", "f8e4m3", "i8"])
def test_dtypes(dtype: str, state: str) -> None:
    check(Batch(4, 2, 64, [1, 17, 70], dtype, dtype if state == "same" else state, seed=3))


@pytest.mark.parametrize("head_dim", [8, 20, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("state", ["f32", "i8", "f8e4m3"])
def test_widths_of_heads(head_dim: int, state: str) -> None:
    check(Batch(2, 1, head_dim, [40], "f32" if state == "f32" else "bf16", state, seed=head_dim))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (7, 1), (14, 2), (8, 1)])
def test_groups(heads: int, kv_heads: int) -> None:
    check(Batch(heads, kv_heads, 32, [5, 40], seed=heads))


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("rows", [16, 64])
def test_ragged_chunks(block_size: int, rows: int) -> None:
    """Beginnings, continued contexts that end and begin at edges of blocks and tiles, single tokens, no token."""
    batch = Batch(4, 2, 32, [33, 64, 90, 1, 70, 5], block_size=block_size)
    chunks = [(0, 0, 33), (1, 16, 48), (2, 31, 1), (3, 0, 1), (2, 89, 1), (4, 64, 5), (5, 0, 0), (5, 0, 0)]
    check(batch, chunks, rows, tile=64)


@pytest.mark.parametrize("window", [1, 16, 40])
@pytest.mark.parametrize("state", ["f32", "i8"])
def test_windows(window: int, state: str) -> None:
    batch = Batch(4, 2, 32, [100, window + 1, 90], state_dtype=state, window=window)
    check(batch)
    chunks = [(0, 75, 25), (2, 50, 20)]
    check(batch, chunks)
    for s, p, _ in chunks:  # what no window reaches any more may be anything
        left = max(0, p + 1 - window) // batch.block_size
        for what, array in enumerate(batch.states):
            if what >= 2 or state == "f32":
                array[batch.tables[s, :left]] = np.nan
        batch.tables[s, :left] = 0
    check(batch, chunks)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_soft_cap_and_sinks(dtype: str) -> None:
    for soft_cap, sinks in ((5.0, False), (0.0, True), (30.0, True)):
        check(Batch(4, 2, 64, [1, 50], dtype, dtype, soft_cap=soft_cap, with_sinks=sinks, spread=2.0))


@pytest.mark.parametrize(("dtype", "state"), [("f32", "f32"), ("bf16", "bf16"), ("f16", "i8")])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (8, 2)])
def test_scores_that_fall_with_the_distance(heads: int, kv_heads: int, dtype: str, state: str) -> None:
    batch = Batch(heads, kv_heads, 32, [40, 1, 70], dtype, state, with_slopes=True)
    check(batch)
    check(batch, [(0, 30, 10), (2, 17, 50)], rows=16)
    others: dict[str, Any] = {"soft_cap": 5.0, "window": 20, "with_sinks": True}
    check(Batch(heads, kv_heads, 64, [1, 50], dtype, state, with_slopes=True, **others))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter's products
def test_later_keys_never_reach_a_row() -> None:
    """Infinity and NaN at the last position leave all rows of the chunk before it as they were."""
    batch = Batch(2, 2, 16, [22])
    clean = prefill(batch, [(0, 0, 21)])
    block = batch.tables[0, 1]
    batch.states[0][block, :, :, 5], batch.states[1][block, :, 5] = np.inf, np.nan
    assert np.array_equal(prefill(batch, [(0, 0, 21)]), clean)


def test_results_do_not_depend_on_the_rest_of_the_batch() -> None:
    batch = Batch(4, 2, 32, [70, 1, 50], "f16", "i8")
    together = prefill(batch, [(0, 10, 60), (1, 0, 1), (2, 0, 50)])
    assert np.array_equal(prefill(batch, [(2, 0, 50)]), together[61:])
    assert np.array_equal(prefill(batch, [(1, 0, 1), (0, 10, 60)]), together[[60, *range(60)]])


def test_a_bucket_of_one_sequence() -> None:
    batch = Batch(4, 1, 16, [40])
    assert np.array_equal(prefill(batch, [(0, 3, 37)], spare=0), prefill(batch, [(0, 3, 37)]))


def test_against_the_ir() -> None:
    """The float64 reference of the op that the kernel computes."""
    batch = Batch(4, 2, 64, [20, 33])
    states = [np.nan_to_num(x).astype(np.float64) for x in batch.states]
    q = np.concatenate([x.reshape(len(x), -1) for x in batch.q]).astype(np.float64)
    positions = np.concatenate([np.arange(20), np.arange(33)])
    op = PagedAttention(4, 2, 64, batch.scale)
    (truth,) = op.reference(q, *states, positions, np.array([0, 20, 53]), batch.tables)
    places = [(s, p) for s, n in enumerate(batch.lengths) for p in range(n)]
    assert_as_good_as(prefill(batch, [(0, 0, 20), (1, 0, 33)]), batch.rows(places, naive), truth)
