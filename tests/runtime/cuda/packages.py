"""A package for GPUs written by hand: the model of tests/runtime/packages.py, in kernels that the fake driver has."""

from __future__ import annotations

import io
import json
import platform
import zipfile
from pathlib import Path
from typing import Any

from llmc.backends.render import render
from tests.runtime.packages import BLOCK, CONTEXT, RUNTIME, VOCAB, WINDOW, checks, weights, write_manifest

KERNELS = ("gather", "append", "mix", "mix_decode", "head", "select_token")
ARGUMENTS = {"gather": 4, "append": 4, "mix": 7, "mix_decode": 7, "head": 7, "select_token": 5}
SHARED = {"head": 100 << 10, "mix": 1024}
INPUTS = ("token_ids", "positions", "slot_mapping", "query_start", "block_tables", "logit_rows", "sampling")
TOKENS, SEQUENCES, OUTPUTS = 32, 4, 6
WORKSPACE, TICKETS = 512, 8
ROWS = TOKENS * VOCAB * 4


def kernels() -> dict[str, Any]:
    """kernels-sm_90.json."""
    return {
        name: {
            "function": f"{name}_fn",
            "threads": 128,
            "shared": SHARED.get(name, 0),
            "arguments": ARGUMENTS[name],
            "dependent": name != "append",
            "registers": 32,
            "spills": 0,
            "instructions": 100,
            "instructions_per_weight": None,
        }
        for name in KERNELS
    }


def images(capability: str = "9.0", windowed: bool = False) -> dict[str, bytes]:
    """What kernels-sm_90.zip holds: "cubins" and PTX that the fake driver reads; a launch has two hidden arguments."""
    found = {}
    for name, count in {**ARGUMENTS, "recent": 7, "recent_decode": 7}.items() if windowed else ARGUMENTS.items():
        found[f"{name}.cubin"] = f"\x7fELF{capability} {name}_fn {count + 2}".encode()
        parameters = ",\n".join(f".param .u64 p{i}" for i in range(count + 2))
        head = f".version 8.4\n.target sm_{capability.replace('.', '')}\n"
        found[f"{name}.ptx"] = f"{head}.visible .entry {name}_fn(\n{parameters}\n)\n{{ ret; }}\n".encode()
    return found


def windowed_kernels() -> dict[str, Any]:
    """kernels-sm_90.json with the kernels of a second layer, which look at a window."""
    found = kernels()
    return (
        found
        | {"recent": {**found["mix"], "function": "recent_fn"}}
        | {"recent_decode": {**found["mix_decode"], "function": "recent_decode_fn"}}
    )


def windowed_plan() -> dict[str, Any]:
    """plan-sm_90.json with a second layer, whose states are a group of their own."""
    document = plan()
    group = f"window_{WINDOW}"
    document["groups"].append({"name": group, "window": WINDOW})
    document["states"].append({**document["states"][0], "name": "second.key", "group": 1})
    first = len(document["buffers"])
    document["buffers"] += [{"kind": "input", "name": f"{n}_{group}"} for n in ("slot_mapping", "block_tables")]
    document["buffers"].append({"kind": "state", "index": 1})
    document["kernels"] += ["recent", "recent_decode"]
    for name, entry in document["entries"].items():
        for bucket in entry["buckets"]:
            _, append, mix, *_ = bucket["launches"]
            token_ids, _, _, dims = append["args"]
            positions, query_start, _, _, history, mixed, _ = mix["args"]
            kernel = document["kernels"].index("recent_decode" if name == "decode" else "recent")
            second = [token_ids, first, first + 2, dims]
            recent = [positions, query_start, first + 1, first + 2, history, mixed, dims]
            bucket["launches"][3:3] = [
                {**append, "node": "second.append", "args": second},
                {**mix, "node": "second.recent", "args": recent, "kernel": kernel},
            ]
    return document


def archive(files: dict[str, bytes]) -> bytes:
    """A zip of files."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return data.getvalue()


def plan() -> dict[str, Any]:
    """plan-sm_90.json."""
    buffers: list[dict[str, Any]] = [
        *({"kind": "input", "name": name} for name in INPUTS),
        {"kind": "state", "index": 0},
        {"kind": "arena", "offset": 64, "bytes": ROWS},
        {"kind": "arena", "offset": 3008, "bytes": ROWS},
        {"kind": "param", "name": "history", "offset": 0, "bytes": VOCAB * VOCAB * 4},
        {"kind": "param", "name": "table", "offset": 2176, "bytes": VOCAB * VOCAB * 4},
        *({"kind": "output", "name": name} for name in ("logits", "greedy", "chosen")),
        *({"kind": kind} for kind in ("workspace", "tickets", "dims")),
    ]
    names = [*INPUTS, "state", "mixed", "rows", "history", "table", "logits", "greedy", "chosen"]
    names += ["workspace", "tickets", "dims"]
    number = {name: i for i, name in enumerate(names)}

    def launch(kernel: str, node: str, x: int, *args: str) -> dict[str, Any]:
        return {
            "kernel": KERNELS.index(kernel),
            "grid": [x, 1, 1],
            "args": [number[name] for name in (*args, "dims")],
            "node": node,
            "flops": [0, 2 * VOCAB, 1],
            "bytes": [8, 4, 4],
        }

    def bucket(tokens: int, mix: str) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "launches": [
                launch("gather", "gather", tokens, "token_ids", "table", "rows"),
                launch("append", "layer.append", tokens, "token_ids", "slot_mapping", "state"),
                launch(mix, "layer.mix", 3, "positions", "query_start", "block_tables", "state", "history", "mixed"),
                launch("head", "head", 2, "logit_rows", "mixed", "rows", "logits", "workspace", "tickets"),
                launch("select_token", "select", 1, "logits", "sampling", "greedy", "chosen"),
            ],
        }

    return {
        "block_size": BLOCK,
        "arena_bytes": 3008 + ROWS,
        "workspace_bytes": WORKSPACE,
        "tickets": TICKETS,
        "symbols": ["tokens", "sequences", "max_blocks", "outputs"],
        "groups": [{"name": "full", "window": 0}],
        "limits": {"tokens": TOKENS, "sequences": SEQUENCES, "outputs": OUTPUTS},
        "states": [{"name": "layer.key", "kind": "paged_kv", "dtype": "f32", "block_shape": [1, 1, BLOCK], "group": 0}],
        "buffers": buffers,
        "kernels": list(KERNELS),
        "entries": {
            "decode": {
                "tokens": [1, 4],
                "sequences": [1, 4],
                "outputs": [1, 4],
                "buckets": [bucket(tokens, "mix_decode") for tokens in (1, 2, 4)],
            },
            "prefill": {"tokens": [1, TOKENS], "buckets": [bucket(tokens, "mix") for tokens in (16, TOKENS)]},
        },
    }


def manifest(name: str, launcher: bool = True) -> dict[str, Any]:
    """manifest.json without the files."""
    variant = {
        "name": "sm_90",
        "kernels": "kernels-sm_90.zip",
        "plan": "plan-sm_90.json",
        "resources": "kernels-sm_90.json",
        "weights": "weights.bin",
        "capability": [9, 0],
        "requires": [],
    }
    target = {"kind": "cuda", "machine": platform.machine(), "variants": [variant]}
    return {
        "format_version": 3,
        "name": name,
        "llmc_version": "0.0.1",
        "model": {"architecture": "tiny", "vocab_size": VOCAB, "max_sequence_length": CONTEXT, "eos_token_ids": []},
        "target": {**target, "launcher": "launcher.so" if launcher else None},
        "requires": {"python": ">=3.10", "glibc": "2.17"},
        "quantization": {"weights": "none"},
        "versions": {},
    }


def weights_file() -> bytes:
    """weights.bin: `history` and `table`, each at a multiple of 64 bytes."""
    history, table = weights()
    return history.tobytes() + bytes(-history.nbytes % 64) + table.tobytes()


def write_cuda_package(folder: Path, launcher: bytes | None, windowed: bool = False) -> Path:
    """A whole package in `folder`, importable by its name; without `launcher` it launches by ctypes."""
    folder.mkdir(parents=True)
    (folder / "runtime").mkdir()
    files = {
        "plan-sm_90.json": json.dumps(windowed_plan() if windowed else plan()).encode(),
        "kernels-sm_90.json": json.dumps(windowed_kernels() if windowed else kernels()).encode(),
        "kernels-sm_90.zip": archive(images(windowed=windowed)),
        "checks.json": json.dumps(checks(windowed)).encode(),
        "weights.bin": weights_file(),
        **({"launcher.so": launcher} if launcher else {}),
        **{f"runtime/{path.name}": path.read_bytes() for path in RUNTIME.glob("*.py")},
        **{
            module: render(f"package/{module}.jinja", name=folder.name, version="0.0.1").encode()
            for module in ("__init__.py", "__main__.py")
        },
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    write_manifest(folder, manifest(folder.name, launcher is not None), list(files))
    return folder
