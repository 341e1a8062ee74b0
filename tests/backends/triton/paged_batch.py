"""A ragged batch for the GPU's attention kernels: shuffled block tables, anything past their ends, NaN in all other
slots; what is right in float64, and what a plain implementation in the same dtypes gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from llmc.ir.ops.cache import quantize_rows
from llmc.ir.target import GPU_VARIANTS

Array = NDArray[Any]
VARIANT = GPU_VARIANTS["sm_90"]
NUMPY: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "i8": np.dtype(np.int8),
}
TORCH = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn,
    "i8": torch.int8,
}


def rounded(x: Array, dtype: str) -> Array:
    """x as float32 numbers that the dtype has."""
    return x.astype(NUMPY[dtype]).astype(np.float32)


def tensor(x: Array, dtype: str) -> torch.Tensor:
    """A torch tensor of x's numbers, rounded by ml_dtypes (torch has 8-bit floats only by their bits)."""
    stored = np.ascontiguousarray(x).astype(NUMPY[dtype])
    if dtype in ("bf16", "f8e4m3"):
        bits = np.int16 if dtype == "bf16" else np.uint8
        return torch.from_numpy(stored.view(bits).copy()).view(TORCH[dtype])
    return torch.from_numpy(stored.copy())


def poisoned(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """NaN everywhere."""
    return tensor(np.full(shape, np.nan, np.float32), dtype)


@dataclass
class Batch:
    """Sequences of the given lengths. q, keys, values: for each sequence [length, heads, head_dim] f32, of numbers that
    the compute dtype (`dtype`) or the states have."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    lengths: list[int]
    dtype: str = "f32"
    state_dtype: str = "f32"
    block_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    with_slopes: bool = False
    with_sinks: bool = False
    seed: int = 0
    spread: float = 1.0
    scale: float = 0.0
    states: list[Array] = field(init=False)
    keys: list[Array] = field(init=False, default_factory=list)
    values: list[Array] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.scale = self.scale or self.head_dim**-0.5
        self.sinks = rng.standard_normal(self.num_heads).astype(np.float32) if self.with_sinks else None
        falling = np.exp2(-8 * np.arange(1, self.num_heads + 1) / self.num_heads).astype(np.float32)
        self.slopes = falling if self.with_slopes else None
        self.q = [
            rounded(self.spread * rng.standard_normal((n, self.num_heads, self.head_dim)), self.dtype)
            for n in self.lengths
        ]
        needed = [-(-n // self.block_size) for n in self.lengths]
        blocks = sum(needed) + 3
        # Block 0 is nobody's, so that a kernel which looks at it instead of what it must not look at finds NaN.
        free = [int(b) for b in rng.permutation(np.arange(1, blocks))]
        self.tables = rng.integers(0, blocks, (len(self.lengths), max(needed) + 5)).astype(np.int32)
        for s, count in enumerate(needed):
            self.tables[s, :count] = [free.pop() for _ in range(count)]
            self.tables[s, count + 1 :] = rng.choice([-(2**31), -1, blocks, 2**31 - 1])
        heads, width, size = self.num_kv_heads, self.head_dim, self.block_size
        self.states = [np.full((blocks, heads, width, size), np.nan), np.full((blocks, heads, size, width), np.nan)]
        if self.state_dtype == "i8":
            self.states = [np.full(x.shape, -77.0) for x in self.states]
            self.states += [np.full((blocks, heads, size), np.nan) for _ in range(2)]
        for s, n in enumerate(self.lengths):
            pair = [self.spread * rng.standard_normal((n, heads, width)).astype(np.float32) for _ in range(2)]
            for what, x in enumerate(pair):
                slot = self.tables[s, np.arange(n) // size], np.arange(n) % size
                if self.state_dtype == "i8":
                    codes, scales = quantize_rows(x.reshape(-1, width))
                    stored, scales = codes.reshape(x.shape), scales.reshape(n, heads)
                    self.states[2 + what][slot[0], :, slot[1]] = scales
                    x = (stored * scales[:, :, None]).astype(np.float32)
                else:
                    stored = x = rounded(x, self.state_dtype)
                if what == 0:
                    self.states[0][slot[0], :, :, slot[1]] = stored
                else:
                    self.states[1][slot[0], :, slot[1]] = stored
                (self.keys, self.values)[what].append(x)

    @property
    def semantics(self) -> dict[str, Any]:
        """What specs have in common."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "scale": self.scale,
            "window": self.window,
            "soft_cap": self.soft_cap,
            "alibi": self.with_slopes,
            "sinks": self.with_sinks,
            "dtype": self.dtype,
            "state_dtype": self.state_dtype,
            "block_size": self.block_size,
            "variant": VARIANT,
        }

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The states as kernels take them."""
        kinds = [self.state_dtype] * 2 + ["f32"] * 2
        names = ("key_ptr", "value_ptr", "key_scale_ptr", "value_scale_ptr")
        return {n: tensor(x, kind) for n, x, kind in zip(names, self.states, kinds, strict=False)}

    def rows(self, chosen: list[tuple[int, int]], implementation: Callable[..., Array]) -> Array:
        """An implementation's results for (sequence, position) pairs, [rows, num_heads * head_dim]."""
        group, results = self.num_heads // self.num_kv_heads, []
        for s, p in chosen:
            begin = max(0, p + 1 - self.window) if self.window else 0
            for h in range(self.num_heads):
                k, v = (x[s][begin : p + 1, h // group] for x in (self.keys, self.values))
                sink = None if self.sinks is None else self.sinks[h]
                bias = np.arange(begin - p, 1) * (np.float32(0) if self.slopes is None else self.slopes[h])
                q = self.q[s][p, h]
                results.append(implementation(q, k, v, self.scale, self.soft_cap, bias, sink, self.dtype))
        return np.stack(results).reshape(len(chosen), -1)


def exact(q: Array, k: Array, v: Array, scale: float, soft_cap: float, bias: Array, sink: Any, dtype: str) -> Array:
    """One head of one token in float64: q [head_dim], k and v [n, head_dim], bias [n] of scores."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = k @ q * scale
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
    scores = scores + bias
    top = scores.max() if sink is None else max(scores.max(), float(sink))
    weights = np.exp(scores - top)
    total = weights.sum() + (0.0 if sink is None else np.exp(float(sink) - top))
    return np.asarray(weights @ v / total)


def naive(q: Array, k: Array, v: Array, scale: float, soft_cap: float, bias: Array, sink: Any, dtype: str) -> Array:
    """The same in float32, sums one after another, probabilities and the result rounded to the compute dtype."""
    scores = np.cumsum(k * q, axis=1, dtype=np.float32)[:, -1] * np.float32(scale)
    if soft_cap:
        scores = np.float32(soft_cap) * np.tanh(scores / np.float32(soft_cap))
    scores = scores + bias.astype(np.float32)
    top = scores.max() if sink is None else max(scores.max(), sink)
    weights = np.exp(scores - top)
    total = np.cumsum(weights, dtype=np.float32)[-1] + (np.float32(0) if sink is None else np.exp(sink - top))
    weights = rounded(weights / total, dtype)
    return rounded(np.cumsum(weights[:, None] * v, axis=0, dtype=np.float32)[-1], dtype)
