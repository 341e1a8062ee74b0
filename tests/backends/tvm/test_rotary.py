from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.kernels.rotary import dynamic_rotary_table, rotary_table
from tests.backends.tvm.machine import V3, Array, Guarded, Kernel, f64, needs_v3

pytestmark = needs_v3

POSITIONS = np.array([0, 1, 2, 3, 63, 64, 65, 511, 4095, 131071, 1048575], np.int32)


@settings(max_examples=4)
@given(
    rot_dim=st.integers(1, 64).map(lambda h: 2 * h),
    scaling=st.sampled_from([1.0, 1.2]),
    tasks=st.sampled_from([1, 2, 5]),
)
def test_rotary_table(rot_dim: int, scaling: float, tasks: int) -> None:
    frequencies = (10000.0 ** -(np.arange(0, rot_dim, 2) / rot_dim)).astype(np.float32)
    cos, sin = (Guarded((len(POSITIONS), rot_dim // 2), np.float32) for _ in range(2))
    kernel = Kernel(rotary_table, V3, rot_dim=rot_dim, attention_scaling=scaling)
    kernel([len(POSITIONS)], [POSITIONS, frequencies, cos, sin], tasks)
    # The angle itself is a float32 product: that is what frameworks take the cosine of.
    angle = f64(POSITIONS.astype(np.float32)[:, None] * frequencies)
    assert np.abs(cos.array - np.cos(angle) * scaling).max() <= 1e-7 * scaling
    assert np.abs(sin.array - np.sin(angle) * scaling).max() <= 1e-7 * scaling


def test_angles_in_every_quadrant() -> None:
    frequencies = np.array([0.25], np.float32)
    positions = np.arange(0, 200, dtype=np.int32)
    cos, sin = (Guarded((200, 1), np.float32) for _ in range(2))
    Kernel(rotary_table, V3, rot_dim=2)([200], [positions, frequencies, cos, sin])
    angle = positions[:, None] * 0.25
    assert np.abs(cos.array - np.cos(angle)).max() <= 1e-7 and np.abs(sin.array - np.sin(angle)).max() <= 1e-7


@settings(max_examples=4)
@given(
    rot_dim=st.sampled_from([2, 4, 20, 64, 128]),
    base=st.sampled_from([1e4, 5e5]),
    factor=st.sampled_from([1.0, 2.0, 7.5]),
    longest=st.sampled_from([64, 2048]),
)
def test_dynamic_rotary_table(rot_dim: int, base: float, factor: float, longest: int) -> None:
    cos, sin = (Guarded((len(POSITIONS), rot_dim // 2), np.float32) for _ in range(2))
    kernel = Kernel(
        dynamic_rotary_table, V3, rot_dim=rot_dim, base=base, factor=factor, max_position_embeddings=longest
    )
    kernel([len(POSITIONS)], [POSITIONS, cos, sin], 2)
    angle = f64(POSITIONS.astype(np.float32)[:, None] * dynamic(POSITIONS, rot_dim, base, factor, longest))
    # The frequency is rounded to float32 before the product: the last bit may fall either way on a tie.
    slack = 1e-7 + np.abs(angle) * np.finfo(np.float32).eps
    close = (np.abs(cos.array - np.cos(angle)) <= 1e-7) & (np.abs(sin.array - np.sin(angle)) <= 1e-7)
    assert close.mean() > 0.99
    assert (np.abs(cos.array - np.cos(angle)) <= slack).all() and (np.abs(sin.array - np.sin(angle)) <= slack).all()


def dynamic(positions: Array, rot_dim: int, base: float, factor: float, longest: int) -> Array:
    """Inverse frequencies f32 [tokens, rot_dim / 2] of dynamic NTK scaling, from float64."""
    length = np.maximum(positions.astype(np.float64) + 1, longest)
    stretch = factor * length / longest - (factor - 1)
    power = rot_dim / (rot_dim - 2) if rot_dim > 2 else 0.0
    bases = base * stretch**power
    return np.asarray(bases[:, None] ** -(np.arange(0, rot_dim, 2) / rot_dim)[None]).astype(np.float32)
