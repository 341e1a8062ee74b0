"""Products of groups of columns, each with a weight of its own."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.grouped_ops import PackedGroupedLinear, PackGroups
from llmc.backends.tvm.kernels.grouped import grouped_linear
from llmc.backends.tvm.packing import pack
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.types import DType, TensorType
from tests.backends.tvm.machine import DTYPES, V3, Array, Kernel, f32, f64, needs_v3, same_bits, stored
from tests.backends.tvm.test_linear import chained, rows_to_judge, run
from tests.ir.example import f
from tests.tolerance import assert_as_good_as

pytestmark = needs_v3


@settings(max_examples=12)
@given(
    groups=st.integers(1, 7),
    n=st.integers(1, 50),
    k=st.integers(1, 100),
    rows=st.sampled_from([1, 2, 3, 5, 17, 64]),
    dtype=st.sampled_from(sorted(DTYPES)),
    tasks=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 1000),
)
@example(groups=16, n=512, k=128, rows=1, dtype="bf16", tasks=2, seed=0)
@example(groups=16, n=128, k=512, rows=3, dtype="f16", tasks=2, seed=1)
def test_grouped_linear(groups: int, n: int, k: int, rows: int, dtype: str, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    many = max(rows, rows_to_judge(groups * n))
    x = rng.standard_normal((many, groups, k)).astype(np.float32)
    w = stored(rng.standard_normal((groups, n, k)) / math.sqrt(k), dtype)
    packed = np.stack([pack(group) for group in w])
    kernel = Kernel(grouped_linear, V3, rows_dim=0, groups=groups, n=n, k=k, weight_dtype=dtype)

    def product(part: Array, tasks: int) -> Array:
        return run(kernel, [part.reshape(len(part), -1), packed], len(part), groups * n, 0, tasks)

    y = product(x, tasks)
    truth = np.einsum("tgk,gnk->tgn", f64(x), f64(w)).reshape(many, -1)
    naive = np.hstack([chained(x[:, g], f32(w[g]), None, "none", None) for g in range(groups)])
    assert_as_good_as(y, naive, truth)
    assert same_bits(product(x[:rows], tasks), y[:rows])
    assert same_bits(product(x[-1:], 1)[0], y[-1])


def test_panels_mean_the_weight() -> None:
    """The op over packed panels is `grouped_linear`, whatever n is."""
    b = Emitter()
    x, weight = (Value(Node(PackGroups(), (), (t,))) for t in (f(5, 6), TensorType(DType.BF16, (2, 19, 3))))
    panels = b.one(PackGroups(), weight)
    assert panels.type == TensorType(DType.BF16, (2, 2, 3, 16))
    op = PackedGroupedLinear(2, 19)
    assert op.infer(x.type, panels.type) == (f(5, 38),)
    rng = np.random.default_rng(0)
    given_x, given_w = rng.standard_normal((5, 6)), rng.standard_normal((2, 19, 3))
    (packed,) = PackGroups().reference(given_w)
    (y,) = op.evaluate((x.type, panels.type), (given_x, packed), {})
    assert np.allclose(y, np.einsum("tgk,gnk->tgn", given_x.reshape(5, 2, 3), given_w).reshape(5, 38))
