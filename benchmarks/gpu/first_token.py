"""Seconds to the first token in a new process, beside the seconds that reading the weights alone takes."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.fill import fill_parameters
from benchmarks.gpu.package import read_constants

PIECE = 32 << 20
PROGRAM = """
import importlib, json, sys, time
start = time.time()
sys.path.insert(0, sys.argv[1])
package = importlib.import_module(sys.argv[2])
imported = time.time()
model = package.load()
loaded = time.time()
completion = model.generate(json.loads(sys.argv[3]), max_new_tokens=1, ignore_eos=True)
done = time.time()
print(json.dumps({"start": start, "import": imported - start, "load": loaded - imported, "prefill": done - loaded,
                  "done": done, "tokens": len(completion.token_ids)}))
"""
"""Run with: folder of the package's folder, its name, the prompt's token ids."""


def measure(package: Path, scratch: Path, prompt: int, device: str = "cuda") -> dict[str, Any]:
    """With random weights written to a file in `scratch`: once from the disk's cache, once after the cache was dropped
    (which the machine may not honour).

    Seconds: `process` from its start to its first line, then `import`, `load`, `prefill`; `total` of all;
    `read_weights` is a plain read of the file under the same conditions.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    complete = scratch / package.name
    try:
        size = write_complete(package, complete, device)
        found: dict[str, Any] = {"weights_bytes": size}
        run(complete, prompt)  # Python's own files come from the disk the first time
        for name in ("cached", "dropped"):
            prepare = drop_cache if name == "dropped" else keep_cache
            prepare(complete / "weights.bin")
            alone = read_seconds(complete / "weights.bin")
            prepare(complete / "weights.bin")
            found[name] = {**run(complete, prompt), "read_weights": alone}
        return found
    finally:
        shutil.rmtree(complete, ignore_errors=True)


def write_complete(package: Path, target: Path, device: str) -> int:
    """A copy of a package with random weights and their hash, such that it loads; gives the weights' bytes."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(package, target)
    manifest = json.loads((package / "manifest.json").read_text())
    (variant,) = manifest["target"]["variants"]
    entry = manifest["files"][variant["weights"]]
    plan = json.loads((package / variant["plan"]).read_text())
    parameters = [row for row in plan["buffers"] if row["kind"] == "param"]
    memory = torch.zeros(entry["bytes"], dtype=torch.uint8, device=device)
    fill_parameters(memory, parameters, manifest["model"]["hidden_size"], read_constants(package, parameters))
    digest = hashlib.sha256()
    with (target / variant["weights"]).open("wb") as file:
        for part in memory.split(PIECE):
            data = part.cpu().numpy().data
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    del memory
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    entry["sha256"] = digest.hexdigest()
    (target / "manifest.json").write_text(json.dumps(manifest))
    return int(entry["bytes"])


def run(package: Path, prompt: int) -> dict[str, float]:
    """One new process: import, load, a prompt, a token."""
    ids = json.dumps([1 + i for i in range(prompt)])
    command = [sys.executable, "-c", PROGRAM, str(package.parent.absolute()), package.name, ids]
    before = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process ended with status {done.returncode}: {done.stderr.strip()[-800:]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    if said["tokens"] != 1:
        raise RuntimeError(f"expected one token, got {said['tokens']}")
    return {
        "total": said["done"] - before,
        "process": said["start"] - before,
        **{name: said[name] for name in ("import", "load", "prefill")},
    }


def read_seconds(path: Path) -> float:
    """Reading a file from beginning to end into one buffer."""
    buffer = memoryview(bytearray(PIECE))
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def keep_cache(path: Path) -> None:
    """Leave a file's pages as they are."""


def drop_cache(path: Path) -> None:
    """Ask the system to forget a file's pages."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
