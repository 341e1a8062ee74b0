"""CPU kernels against this machine's own limits: GEMV bytes against a plain read, GEMM operations against an FMA loop.

Run: python -m benchmarks.kernels [--threads N] [--isa x86-64-v3]. Every figure is a ratio of two measurements that were
taken in turns, the best of each: on a shared machine neither stands still alone.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmc.backends.tvm.compile import compile_kernel, link
from llmc.backends.tvm.isa import ISAS, Isa
from llmc.backends.tvm.kernels.attention import attention
from llmc.backends.tvm.kernels.decode import combine_splits, split_attention
from llmc.backends.tvm.kernels.linear import gated_linear, linear
from llmc.backends.tvm.packing import pack, pack_gated

DTYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
CONTEXT = 16384
"""Keys that one token attends to, in the decode figure."""
LAUNCH = np.dtype([("kernel", "<i4"), ("arg_count", "<i4"), ("first_arg", "<i4"), ("flags", "<i4")])

# Twelve independent chains of fused multiply-adds in registers: what a core can do at most. The instruction is written
# out, as a compiler folds what it can see through, and registers by name, as it keeps an array of them in memory.
PEAK = """
#include <stdint.h>
typedef float V __attribute__((vector_size(4 * LANES)));
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
void peak(int32_t task, int32_t tasks, const int32_t *dims, float *out) {
  (void)tasks;
  V a = (V){0} + 0.5f, b = (V){0} + 0.25f, sum = {0};
#define DEFINE(i) V v##i = {0};
#define STEP(i) __asm__ volatile("vfmadd213ps %2, %1, %0" : "+v"(v##i) : "v"(a), "v"(b));
#define ADD(i) sum += v##i;
  EACH(DEFINE)
  for (int32_t i = 0; i < dims[0]; i++) { EACH(STEP) }
  EACH(ADD)
  out[16 * task] = sum[0];
}
"""


class Machine:
    """A library of kernels and its pool."""

    def __init__(self, isa: Isa, threads: int, kernels: dict[str, Any], folder: Path) -> None:
        (folder / "peak.c").write_text(PEAK)
        flags = ["-O2", "-ffp-contract=fast", "-fPIC", f"-DLANES={isa.lanes}", *isa.gcc_flags]
        if isa.lanes == 16:
            flags.append("-mprefer-vector-width=512")
        subprocess.run(["gcc", *flags, "-c", "peak.c", "-o", "peak.o"], cwd=folder, check=True)
        objects = {name: compile_kernel(kernel, isa) for name, kernel in kernels.items()}
        link({**objects, "peak": (folder / "peak.o").read_bytes()}, isa, folder / "kernels.so")
        self.library = ctypes.CDLL(str(folder / "kernels.so"))
        self.library.llmc_pool_create.restype = ctypes.c_void_p
        self.library.llmc_read_bandwidth.restype = ctypes.c_double
        self.pool = ctypes.c_void_p(self.library.llmc_pool_create(threads))
        self.threads = int(self.library.llmc_pool_threads(self.pool))
        self.lanes = isa.lanes

    def seconds(self, kernel: str, dims: list[int], arrays: list[Any], repeat: int = 1) -> float:
        """Of one launch, averaged over `repeat` in one step."""
        launches = np.array([(0, len(arrays), 0, 1)] * repeat, LAUNCH)
        address = np.array([ctypes.cast(self.library[kernel], ctypes.c_void_p).value], np.uint64)
        args = np.array([a.ctypes.data for a in arrays], np.uint64)
        sizes = np.array(dims, np.int32)
        p = [ctypes.c_void_p(a.ctypes.data) for a in (launches, address, args, sizes)]
        start = time.perf_counter()
        self.library.llmc_step(self.pool, p[0], repeat, p[1], p[2], len(args), 0, p[3], None)
        return (time.perf_counter() - start) / repeat

    def bandwidth(self, data: Any) -> float:
        """Bytes per second of a plain read."""
        speed = self.library.llmc_read_bandwidth(
            self.pool, ctypes.c_void_p(data.ctypes.data), ctypes.c_uint64(data.nbytes)
        )
        return float(speed)

    def peak(self) -> float:
        """Floating point operations per second of the FMA loop."""
        out, steps = np.zeros(16 * self.threads, np.float32), 1 << 20
        return 24 * self.lanes * steps * self.threads / self.seconds("peak", [steps, 0, 0, 0], [out])


def turns(rounds: int, *measures: Callable[[], float]) -> list[float]:
    """The best of each, measured in turns."""
    results = [[m() for m in measures] for _ in range(rounds)]
    return [max(column) for column in zip(*results, strict=True)]


def random(shape: tuple[int, ...], dtype: str) -> Any:
    """Random storage values; a small pattern, repeated, as large arrays take long to draw."""
    part = np.random.default_rng(0).standard_normal(65521).astype(np.float32) / 16
    return np.resize(part, shape).astype(DTYPES[dtype])


def main() -> None:
    """Prints one line for each kernel and shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--isa", default="x86-64-v3", choices=sorted(ISAS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    isa = ISAS[options.isa]
    n, k = 8192, 4096  # of GEMV: far larger than a cache
    heads = {"q_heads": 16, "kv_heads": 8, "head_dim": 128, "kv_dtype": "f16"}
    kernels = {f"gemv_{d}": linear(f"gemv_{d}", isa, rows_dim=0, n=n, k=k, weight_dtype=d) for d in DTYPES}
    shapes = [(2048, 2048), (1024, 4096), (256, 256)]
    for a, b in shapes:
        kernels |= {
            f"gemm_{d}_{a}_{b}": linear(f"gemm_{d}_{a}_{b}", isa, rows_dim=0, n=a, k=b, weight_dtype=d) for d in DTYPES
        }
    kernels["gated"] = gated_linear("gated", isa, rows_dim=0, n=2048, k=1024, weight_dtype="f16", activation="silu")
    scaled = {**heads, "scale": 1 / math.sqrt(128)}
    kernels["attention"] = attention("attention", isa, **scaled)
    kernels["split_attention"] = split_attention("split_attention", isa, **scaled, splits=CONTEXT // 256)
    kernels["combine_splits"] = combine_splits("combine_splits", isa, q_heads=16, head_dim=128, splits=CONTEXT // 256)
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(isa, options.threads, kernels, Path(folder))
    print(f"{isa.name}, {machine.threads} threads; best of {options.rounds}, in turns with its limit")
    for dtype in DTYPES:
        for rows in (1, 2, 4, 8):
            gemv(machine, dtype, rows, n, k, options.rounds)
    for a, b in shapes:
        for dtype in DTYPES:
            for rows in (16, 128, 512):
                gemm(machine, f"gemm_{dtype}_{a}_{b}", rows, a, b, pack(random((a, b), dtype)), options.rounds)
    half = random((2048, 1024), "f16")
    gemm(machine, "gated", 512, 4096, 1024, pack_gated(half, half), options.rounds)
    attend(machine, heads, options.rounds)


def gemv(machine: Machine, dtype: str, rows: int, n: int, k: int, rounds: int) -> None:
    """Few rows: weights per second against a plain read."""
    w = pack(random((n, k), dtype))
    x, y = random((rows, k), "f32"), np.zeros((rows, n), np.float32)
    got, limit = turns(
        rounds,
        lambda: w.nbytes / machine.seconds(f"gemv_{dtype}", [rows, 0, 0, 0], [x, w, y]),
        lambda: machine.bandwidth(w),
    )
    print(f"gemv {dtype:4} rows {rows:3} {got / 1e9:7.1f} GB/s of {limit / 1e9:6.1f} read   {got / limit:4.0%}")


def gemm(machine: Machine, kernel: str, rows: int, n: int, k: int, w: Any, rounds: int) -> None:
    """Many rows: operations per second against the FMA loop."""
    x, y = random((rows, k), "f32"), np.zeros((rows, n), np.float32)
    repeat = max(1, (1 << 30) // (rows * n * k))
    got, limit = turns(
        rounds,
        lambda: 2 * rows * n * k / machine.seconds(kernel, [rows, 0, 0, 0], [x, w, y], repeat),
        machine.peak,
    )
    print(f"{kernel:20} rows {rows:3} {got / 1e9:7.1f} GFLOP/s of {limit / 1e9:6.1f} peak   {got / limit:4.0%}")


def attend(machine: Machine, heads: dict[str, Any], rounds: int) -> None:
    """Decode over a long context against a plain read of it; prefill against the FMA loop."""
    q_heads, kv_heads, head_dim = heads["q_heads"], heads["kv_heads"], heads["head_dim"]
    width = (q_heads + 2 * kv_heads) * head_dim
    blocks = CONTEXT // 16
    key, value = (random((blocks, kv_heads, 16 * head_dim), "f16") for _ in range(2))
    table = np.random.default_rng(0).permutation(blocks).astype(np.int32)
    positions, slots = np.array([CONTEXT - 1], np.int32), np.array([int(table[-1]) * 16 + 15], np.int32)
    qkv, out = random((1, width), "f32"), np.zeros((512, q_heads * head_dim), np.float32)
    partial = np.zeros((CONTEXT // 256, q_heads * (head_dim + 2)), np.float32)
    bytes_ = key.nbytes + value.nbytes
    dims = [1, 1, blocks, 1]
    got, limit = turns(
        rounds,
        lambda: (
            bytes_
            / (
                machine.seconds("split_attention", dims, [qkv, slots, key, value, positions, table, partial])
                + machine.seconds("combine_splits", dims, [partial, positions, out])
            )
        ),
        lambda: machine.bandwidth(key),
    )
    print(f"attention decode at {CONTEXT} {got / 1e9:7.1f} GB/s of {limit / 1e9:6.1f} read   {got / limit:4.0%}")
    tokens = 512
    positions, starts = np.arange(tokens, dtype=np.int32), np.array([0, tokens], np.int32)
    qkv = random((tokens, width), "f32")
    flops = 4 * q_heads * head_dim * tokens * (tokens + 1) // 2
    dims = [tokens, 1, blocks, 1]
    got, limit = turns(
        rounds,
        lambda: flops / machine.seconds("attention", dims, [qkv, key, value, positions, starts, table, out]),
        machine.peak,
    )
    print(f"attention prefill of {tokens} {got / 1e9:7.1f} GFLOP/s of {limit / 1e9:6.1f} peak   {got / limit:4.0%}")


if __name__ == "__main__":
    main()
