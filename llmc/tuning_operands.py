"""Device memory for a product that is being timed: operands like a model's, and a weight too large for the L2 cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.backends.triton.packing import COLUMNS, ROWS, blocks_of
from llmc.backends.triton.products import ProductCall
from llmc.backends.triton.source import POINTERS, KernelSource
from llmc.backends.triton.tiling import Tiling
from llmc.ir.op import Array
from llmc.runtime.cuda_driver import Copy, Device, address_of

ALIGNMENT = 4096
"""Bytes to whose multiple operands are aligned."""
BEYOND = 1 << 20
"""Bytes behind the last operand: a kernel may ask for some that follow its weight, and not read them."""
PATTERN = 1 << 21
"""Random elements that are drawn; larger operands repeat them."""
MAX_COPIES = 256
"""Of a weight. Beyond, weights are so small that the L2 cache holds those of any model that has them."""

_DTYPES = {pointer: dtype for dtype, pointer in POINTERS.items()}
_ZEROED, _UNSET = ("tickets_ptr",), ("workspace_ptr", "out_ptr", "key_ptr", "value_ptr")


@dataclass(frozen=True)
class Layout:
    """Where the operands of a product lie: (offset, bytes) by the names of a kernel's arguments. Of the weight there
    are `copies`, one behind the other, each of `weight_bytes`."""

    call: ProductCall
    places: dict[str, tuple[int, int]]
    kinds: dict[str, str]
    copies: int
    weight_bytes: int
    bytes: int

    def arguments(self, base: int, source: KernelSource, copy: int) -> tuple[int, ...]:
        """The addresses that a kernel of this product takes, with one of the copies of its weight."""
        skipped = copy * self.weight_bytes
        return tuple(base + self.places[n][0] + skipped * (n == "weight_ptr") for n, _ in source.arguments)


def layout_of(call: ProductCall, source: KernelSource, tilings: Sequence[Tiling], cached: int) -> Layout:
    """Places for any of the tilings; as many copies of the weight as exceed `cached` bytes, in whole."""
    p = call.product
    columns, rows = blocks_of(p.k, COLUMNS) * COLUMNS, blocks_of(p.n, ROWS) * ROWS
    options = dict(call.options)
    heads, kv_heads = options.get("num_heads", 0), options.get("num_kv_heads", 0)
    head_dim, page = options.get("head_dim", 0), options.get("block_size", 1)
    outputs = {"gated": p.n // 2, "append": heads * head_dim}.get(options["epilogue"], p.n)
    kinds = dict(source.arguments)
    coded = kinds["weight_ptr"] == "*i32"
    weight = rows * columns * p.code_bits // 8 if coded else rows * columns * _DTYPES[kinds["weight_ptr"]].itemsize
    copies = min(MAX_COPIES, cached // weight + 1)
    elements = {
        "x_ptr": p.m * p.k,
        "norm_ptr": p.k,
        "scale_ptr": rows * columns // (p.span or columns),
        "bias_ptr": p.n,
        "residual_ptr": p.m * p.n,
        "cos_ptr": p.m * options.get("rotary_dim", 0) // 2,
        "sin_ptr": p.m * options.get("rotary_dim", 0) // 2,
        "slot_ptr": p.m,
        **dict.fromkeys(("key_ptr", "value_ptr"), blocks_of(p.m, page) * page * kv_heads * head_dim),
        "out_ptr": p.m * outputs,
        "tickets_ptr": max(t.tiles(p.n, p.m) for t in tilings),
        "dims_ptr": 4,
    }
    sizes = {n: elements[n] * _DTYPES[kind].itemsize for n, kind in kinds.items() if n in elements}
    sizes |= {"weight_ptr": copies * weight, "workspace_ptr": max(t.workspace_bytes(p.n, p.k, p.m) for t in tilings)}
    places, end = {}, 0
    for name, size in sizes.items():
        places[name] = (end, size)
        end += blocks_of(size, ALIGNMENT) * ALIGNMENT
    return Layout(call, places, kinds, copies, weight, end + BEYOND)


def fill(device: Device, layout: Layout, base: int, patterns: Patterns) -> None:
    """Give every operand contents: random numbers that are no NaN, zero tickets, slots that exist, sizes; waits."""
    stream = device.current_stream()
    m, page = layout.call.product.m, dict(layout.call.options).get("block_size", 1)
    given = {
        "dims_ptr": np.array([m, m, blocks_of(m, page), m], np.int32),
        "slot_ptr": np.arange(m, dtype=np.int32),
    }
    kept = []  # a copy may still be reading them
    for name, (offset, size) in layout.places.items():
        if name in _ZEROED:
            device.zero(base + offset, size, stream)
        elif name not in _UNSET:
            array = given.get(name)
            data = (patterns.of(name, layout.kinds[name]) if array is None else _bytes(array))[:size]
            kept.append(data)
            _repeat(device, data, base + offset, size, stream)
    device.synchronize(stream)


def _repeat(device: Device, data: Array, address: int, size: int, stream: int) -> None:
    """Fill `size` bytes of device memory with `data`, again and again, each copy as long as all before it."""
    device.copy(Copy("to_device", address, address_of(data), len(data)), stream)
    done = len(data)
    while done < size:
        count = min(done, size - done)
        device.copy(Copy("on_device", address + done, address, count), stream)
        done += count


class Patterns:
    """Random elements, drawn once for each kind of operand."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._drawn: dict[tuple[str, str], Array] = {}

    def of(self, name: str, kind: str) -> Array:
        """Elements as a model has them, in Triton's type of pointer `kind`: numbers around zero, scales that are small,
        codes of any value that is a number."""
        what = name if name in ("weight_ptr", "scale_ptr") else "other"
        if (what, kind) not in self._drawn:
            self._drawn[what, kind] = _bytes(self._draw(what, kind))
        return self._drawn[what, kind]

    def _draw(self, what: str, kind: str) -> Array:
        if kind == "*i32":
            return self._random.integers(-(2**31), 2**31, PATTERN, np.int32)
        if kind == "*u8":
            codes = self._random.integers(0, 256, PATTERN, np.uint8)
            return np.where(codes & 0x7F == 0x7F, codes ^ 1, codes)  # 0x7F and 0xFF are no numbers
        if what == "scale_ptr":
            return self._random.uniform(5e-4, 1.5e-3, PATTERN).astype(np.float16)
        numbers = self._random.standard_normal(PATTERN, np.float32)
        return _DTYPES[kind].store(numbers * np.float32(0.02) if what == "weight_ptr" else numbers)


def _bytes(array: Array) -> Array:
    data: Array = np.ascontiguousarray(array).view(np.uint8)
    return data
