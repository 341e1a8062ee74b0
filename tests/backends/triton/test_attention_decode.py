"""Decode attention: as exact as plain arithmetic, whatever lies where it must not look."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmc.backends.base import KernelSpec
from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.kernels.attention_decode import decode_spec
from llmc.backends.triton.kernels.attention_splits import grid, tickets, workspace_bytes
from llmc.ir.op import Array
from llmc.ir.ops.attention import PagedAttention
from tests.backends.triton.interpreter import TARGET, run
from tests.backends.triton.paged_batch import Batch, exact, naive, poisoned, tensor
from tests.tolerance import assert_as_good_as


def decode(batch: Batch, sequences: list[int], splits: int, tile: int = 0, times: int = 1) -> Array:
    """The last token of each of these sequences, in a bucket with a row of padding that must stay as it is."""
    count = len(sequences)
    bucket = count + 1
    spec = decode_spec(**batch.semantics, sequences=bucket, longest=1 << 20)
    changed = {"splits": splits, **({"tile": max(tile, batch.block_size)} if tile else {})}
    spec = KernelSpec.of(spec.kind, **{**dict(spec.parameters), **changed})
    width = batch.num_heads * batch.head_dim
    q = np.full((bucket, width), np.nan, np.float32)
    q[:count] = np.stack([batch.q[s][-1] for s in sequences]).reshape(count, width)
    positions = torch.full((bucket,), 2**30, dtype=torch.int32)
    positions[:count] = torch.tensor([batch.lengths[s] - 1 for s in sequences])
    out = poisoned((bucket, width), batch.dtype)
    arrived = torch.zeros(max(1, tickets(spec, bucket)), dtype=torch.int32)
    tensors: dict[str, Any] = {
        "q_ptr": tensor(q, batch.dtype),
        **batch.state_tensors(),
        "positions_ptr": positions,
        "block_tables_ptr": torch.from_numpy(batch.tables[sequences].copy()),
        **({"slopes_ptr": torch.from_numpy(batch.slopes)} if batch.slopes is not None else {}),
        **({"sinks_ptr": torch.from_numpy(batch.sinks)} if batch.sinks is not None else {}),
        "out_ptr": out,
        "workspace_ptr": torch.full((max(4, workspace_bytes(spec, bucket)) // 4,), torch.nan),
        "tickets_ptr": arrived,
        "dims_ptr": torch.tensor([count, count, batch.tables.shape[1], count], dtype=torch.int32),
    }
    before = {n: x.clone() for n, x in tensors.items() if n not in ("out_ptr", "workspace_ptr")}
    for _ in range(times):
        run(source_of(spec, TARGET), grid(spec, bucket), tensors)
    for name, x in before.items():
        assert torch.equal(x.view(torch.uint8), tensors[name].view(torch.uint8)), f"{name} was changed"
    assert out[count:].isnan().all()
    return np.asarray(out[:count].float().numpy())


def check(batch: Batch, splits: int, tile: int = 32, sequences: list[int] | None = None) -> None:
    sequences = list(range(len(batch.lengths))) if sequences is None else sequences
    got = decode(batch, sequences, splits, tile)
    last = [(s, batch.lengths[s] - 1) for s in sequences]
    assert_as_good_as(got, batch.rows(last, naive), batch.rows(last, exact))


EDGES = [1, 2, 15, 16, 17, 33, 64, 65, 100]
"""Lengths around the edges of blocks and tiles."""


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("state", ["same", "f8e4m3", "i8"])
def test_dtypes(dtype: str, state: str) -> None:
    batch = Batch(8, 2, 128, EDGES, dtype, dtype if state == "same" else state, seed=1)
    check(batch, splits=3)


@pytest.mark.parametrize("head_dim", [8, 20, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("state", ["f32", "f8e4m3", "i8"])
def test_widths_of_heads(head_dim: int, state: str) -> None:
    check(Batch(4, 2, head_dim, [1, 40, 75], "f32" if state == "f32" else "bf16", state, seed=head_dim), splits=2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 2), (7, 1), (14, 2), (16, 2), (71, 1)])
def test_groups(heads: int, kv_heads: int) -> None:
    check(Batch(heads, kv_heads, 64, [16, 50], seed=heads), splits=2)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("state", ["f32", "i8"])
def test_block_sizes(block_size: int, state: str) -> None:
    check(Batch(4, 1, 64, [1, 63, 64, 65, 200], state_dtype=state, block_size=block_size), splits=2, tile=64)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("window", [1, 16, 40])
@pytest.mark.parametrize("state", ["f32", "i8"])
def test_windows(splits: int, window: int, state: str) -> None:
    lengths = [1, window, window + 1, 31 + window, 32 + window, 33 + window, 150]
    batch = Batch(4, 2, 32, lengths, state_dtype=state, window=window)
    check(batch, splits)
    # What a window has left behind may be given to another sequence, or hold anything.
    for s, n in enumerate(lengths):
        left = max(0, n - window) // batch.block_size
        for what, state_array in enumerate(batch.states):
            if what >= 2 or state == "f32":
                state_array[batch.tables[s, :left]] = np.nan
        batch.tables[s, :left] = 0
    check(batch, splits)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("splits", [1, 3])
def test_soft_cap_and_sinks(dtype: str, splits: int) -> None:
    for soft_cap, sinks in ((5.0, False), (0.0, True), (30.0, True)):
        batch = Batch(8, 2, 64, [1, 33, 90], dtype, dtype, soft_cap=soft_cap, with_sinks=sinks, spread=2.0)
        check(batch, splits)


@pytest.mark.parametrize(("dtype", "state"), [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f8e4m3"), ("f16", "i8")])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (8, 2)])
def test_scores_that_fall_with_the_distance(heads: int, kv_heads: int, dtype: str, state: str) -> None:
    batch = Batch(heads, kv_heads, 64, EDGES, dtype, state, with_slopes=True)
    check(batch, splits=1)
    check(batch, splits=3)
    others: dict[str, Any] = {"soft_cap": 5.0, "window": 40, "with_sinks": True}
    check(Batch(heads, kv_heads, 80, [1, 33, 90], dtype, state, with_slopes=True, **others), splits=2)


def test_large_scores() -> None:
    """A softmax whose exponentials would overflow without the maximum, and queries near the end of bf16's range."""
    check(Batch(8, 4, 64, [100], spread=30.0, scale=1.0), splits=2)
    check(Batch(8, 4, 64, [100], "bf16", "f8e4m3", spread=3.0), splits=2)
    huge = Batch(8, 4, 64, [100], "bf16", "f8e4m3", scale=2.0**-103)
    huge.q = [q * np.float32(2.0**100) for q in huge.q]
    check(huge, splits=2)


@pytest.mark.parametrize("state", ["f32", "f8e4m3", "i8"])
def test_results_do_not_depend_on_the_rest_of_the_batch(state: str) -> None:
    batch = Batch(4, 2, 64, [70, 1, 200, 33], "f16", state)
    together = decode(batch, [0, 1, 2, 3], splits=3, times=2)
    for s in range(4):
        assert np.array_equal(decode(batch, [s], splits=3)[0], together[s])
    assert np.array_equal(decode(batch, [2, 0, 3], splits=3), together[[2, 0, 3]])


def test_against_the_ir() -> None:
    """The float64 reference of the op that the kernel computes."""
    batch = Batch(4, 2, 64, [17, 64, 5])
    states = [np.nan_to_num(x).astype(np.float64) for x in batch.states]
    q = np.stack([x[-1].reshape(-1) for x in batch.q]).astype(np.float64)
    positions = np.array([n - 1 for n in batch.lengths])
    op = PagedAttention(4, 2, 64, batch.scale)
    (truth,) = op.reference(q, *states, positions, np.arange(4), batch.tables)
    last = [(s, n - 1) for s, n in enumerate(batch.lengths)]
    assert_as_good_as(decode(batch, [0, 1, 2], splits=2, tile=32), batch.rows(last, naive), truth)
