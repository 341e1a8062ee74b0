"""A package written by hand: a language model of a few C kernels, linked with the native runtime, in a folder.

The model: the logits after token t are `table[t, v]` plus the sum of `history[u, v]` over the tokens u of its context,
which are kept as f32 in paged blocks. It is small enough to compute in numpy, and uses every kind of buffer. Where it
is windowed, a second layer adds `history` of the last `WINDOW` tokens once more.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmc.backends.render import render
from tests.fixtures import REPOSITORY

RUNTIME = REPOSITORY / "llmc" / "runtime"
VOCAB, BLOCK, CONTEXT, WINDOW = 23, 4, 40, 6

KERNELS = """
#include <stdint.h>
#define EXPORT __attribute__((visibility("default")))
#define VOCAB 23
#define BLOCK 4
#define WINDOW 6

EXPORT void append(int32_t task, int32_t tasks, const int32_t *dims, const int32_t *token_ids,
                   const int32_t *slot_mapping, float *state) {
  for (int t = task; t < dims[0]; t += tasks) state[slot_mapping[t]] = (float)token_ids[t];
}

EXPORT void mix(int32_t task, int32_t tasks, const int32_t *dims, const int32_t *positions, const int32_t *query_start,
                const int32_t *block_tables, const float *state, const float *history, float *mixed) {
  for (int s = 0; s < dims[1]; s++)
    for (int t = query_start[s]; t < query_start[s + 1]; t++)
      for (int v = task; v < VOCAB; v += tasks) {
        float sum = 0;
        for (int p = 0; p <= positions[t]; p++)
          sum += history[(int)state[block_tables[s * dims[2] + p / BLOCK] * BLOCK + p % BLOCK] * VOCAB + v];
        mixed[t * VOCAB + v] = sum;
      }
}

EXPORT void recent(int32_t task, int32_t tasks, const int32_t *dims, const int32_t *positions,
                   const int32_t *query_start, const int32_t *block_tables, const float *state, const float *history,
                   float *mixed) {
  for (int s = 0; s < dims[1]; s++)
    for (int t = query_start[s]; t < query_start[s + 1]; t++)
      for (int v = task; v < VOCAB; v += tasks)
        for (int p = positions[t] < WINDOW ? 0 : positions[t] - WINDOW + 1; p <= positions[t]; p++) {
          int token = (int)state[block_tables[s * dims[2] + p / BLOCK] * BLOCK + p % BLOCK];
          mixed[t * VOCAB + v] += history[token * VOCAB + v];
        }
}

EXPORT void gather(int32_t task, int32_t tasks, const int32_t *dims, const int32_t *token_ids, const float *table,
                   float *rows) {
  for (int t = task; t < dims[0]; t += tasks)
    for (int v = 0; v < VOCAB; v++) rows[t * VOCAB + v] = table[token_ids[t] * VOCAB + v];
}

EXPORT void head(int32_t task, int32_t tasks, const int32_t *dims, const int32_t *logit_rows, const float *mixed,
                 const float *rows, float *logits, int32_t *greedy) {
  for (int o = task; o < dims[3]; o += tasks) {
    int t = logit_rows[o], best = 0;
    for (int v = 0; v < VOCAB; v++) {
      logits[o * VOCAB + v] = mixed[t * VOCAB + v] + rows[t * VOCAB + v];
      if (logits[o * VOCAB + v] > logits[o * VOCAB + best]) best = v;
    }
    greedy[o] = best;
  }
}
"""


def weights() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`history` and `table`, f32[VOCAB, VOCAB]: multiples of 1/8, so that float32 sums are exact."""
    random = np.random.default_rng(0)
    both = random.integers(-16, 17, (2, VOCAB, VOCAB)).astype(np.float32) / np.float32(8)
    return both[0], both[1]


def reference(token_ids: list[int], windowed: bool = False) -> NDArray[np.float32]:
    """All logits, in numpy."""
    history, table = weights()
    logits: NDArray[np.float32] = np.cumsum(history[token_ids], axis=0) + table[token_ids]
    for i in range(len(token_ids)) if windowed else ():
        logits[i] += history[token_ids[max(0, i + 1 - WINDOW) : i + 1]].sum(0)
    return logits


@cache
def _library(folder: Path) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("linking a test package needs gcc")
    source, library = folder / "kernels.c", folder / "kernels.so"
    source.write_text(KERNELS)
    files = [str(path) for path in sorted((RUNTIME / "native").glob("*.c"))]
    flags = [
        "-O1",
        "-std=gnu11",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        '-DLLMC_ISA="any"',
        f"-I{RUNTIME / 'native'}",
        "-pthread",
    ]
    subprocess.run([compiler, *flags, str(source), *files, "-o", str(library)], check=True)
    return library


def plan() -> dict[str, Any]:
    """plan.json."""
    buffers: list[dict[str, Any]] = [
        *({"kind": "input", "name": n} for n in ("token_ids", "positions", "slot_mapping", "query_start")),
        *({"kind": "input", "name": n} for n in ("block_tables", "logit_rows")),
        {"kind": "state", "index": 0},
        {"kind": "arena", "offset": 64, "bytes": 16 * VOCAB * 4},
        {"kind": "param", "name": "history", "offset": 0, "bytes": VOCAB * VOCAB * 4},
        {"kind": "param", "name": "table", "offset": 2176, "bytes": VOCAB * VOCAB * 4},
        {"kind": "output", "name": "logits"},
        {"kind": "output", "name": "greedy"},
        {"kind": "private", "offset": 64, "bytes": 16 * VOCAB * 4},
    ]
    costs = {"flops": [0, 2 * VOCAB, 1], "bytes": [8, 4, 4]}
    launches = [
        {"kernel": kernel, "args": args, "barrier": True, "each": each, "node": node, **costs}
        for kernel, args, each, node in (
            (3, [0, 9, 12], True, "gather"),
            (0, [0, 2, 6], False, "layer.append"),
            (1, [1, 3, 4, 6, 8, 7], False, "layer.mix"),
            (2, [5, 7, 12, 10, 11], False, "head"),
        )
    ]
    return {
        "block_size": BLOCK,
        "arena_bytes": 64 + 16 * VOCAB * 4,
        "private_bytes": 64 + 16 * VOCAB * 4,
        "each_tokens": 8,
        "symbols": ["tokens", "sequences", "max_blocks", "outputs"],
        "groups": [{"name": "full", "window": 0}],
        "limits": {"tokens": 16, "sequences": 4, "outputs": 4},
        "states": [{"name": "layer.key", "kind": "paged_kv", "dtype": "f32", "block_shape": [1, 1, BLOCK], "group": 0}],
        "buffers": buffers,
        "kernels": ["append", "mix", "head", "gather"],
        "entries": {
            "decode": {"tokens": [1, 4], "sequences": [1, 4], "launches": launches},
            "prefill": {"tokens": [1, 16], "outputs": [1, 4], "launches": launches},
        },
    }


def windowed_plan() -> dict[str, Any]:
    """plan.json with a second layer, whose states are a group of their own."""
    document = plan()
    group = f"window_{WINDOW}"
    document["groups"].append({"name": group, "window": WINDOW})
    document["states"].append({**document["states"][0], "name": "second.key", "group": 1})
    first = len(document["buffers"])
    document["buffers"] += [{"kind": "input", "name": f"{n}_{group}"} for n in ("slot_mapping", "block_tables")]
    document["buffers"].append({"kind": "state", "index": 1})
    document["kernels"].append("recent")
    for entry in document["entries"].values():
        gather, append, mix, head = entry["launches"]
        second = {**append, "args": [0, first, first + 2], "node": "second.append"}
        recent = {
            **mix,
            "kernel": 4,
            "args": [1, 3, first + 1, first + 2, 8, 7],
            "node": "second.recent",
            "window": WINDOW,
        }
        entry["launches"] = [gather, append, mix, second, recent, head]
    return document


def manifest(name: str) -> dict[str, Any]:
    """manifest.json without the files."""
    variant = {"name": "any", "kernels": "kernels-any.so", "weights": "weights.bin", "requires": []}
    return {
        "format_version": 3,
        "name": name,
        "llmc_version": "0.0.1",
        "model": {"architecture": "tiny", "vocab_size": VOCAB, "max_sequence_length": CONTEXT, "eos_token_ids": []},
        "target": {"kind": "cpu", "machine": platform.machine(), "variants": [variant]},
        "requires": {"python": ">=3.10", "glibc": "2.17"},
        "quantization": {"weights": "none"},
        "versions": {},
    }


def checks(windowed: bool = False) -> dict[str, Any]:
    """checks.json, from the numpy reference."""
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5] if windowed else [3, 1, 4, 1, 5]
    row = reference(ids, windowed)[-1]
    top = [[int(t), float(row[t])] for t in np.argsort(-row, kind="stable")[:8]]
    case = {"token_ids": ids, "top": top, "max_abs": float(np.abs(row).max())}
    return {"cases": [case], "tolerance": 1e-5, "reference": "numpy"}


def write_package(folder: Path, scratch: Path, windowed: bool = False) -> Path:
    """A whole package in `folder`, importable by its name; the linked library is kept in `scratch`."""
    folder.mkdir(parents=True)
    history, table = weights()
    padding = bytes(-history.nbytes % 64)
    files: dict[str, bytes] = {
        "plan.json": json.dumps(windowed_plan() if windowed else plan()).encode(),
        "checks.json": json.dumps(checks(windowed)).encode(),
        "weights.bin": history.tobytes() + padding + table.tobytes(),
        "kernels-any.so": _library(scratch).read_bytes(),
        **{f"runtime/{path.name}": path.read_bytes() for path in RUNTIME.glob("*.py")},
        **{
            module: render(f"package/{module}.jinja", name=folder.name, version="0.0.1").encode()
            for module in ("__init__.py", "__main__.py")
        },
    }
    (folder / "runtime").mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    write_manifest(folder, manifest(folder.name), list(files))
    return folder


def write_manifest(folder: Path, document: dict[str, Any], names: list[str] | None = None) -> None:
    """Write manifest.json with the files' hashes as they now are."""
    if names is None:
        names = list(json.loads((folder / "manifest.json").read_text())["files"])
    listed = {}
    for name in names:
        data = (folder / name).read_bytes()
        listed[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps({**document, "files": listed}))
