"""A Python that has numpy, and nothing of the compiler; it tells what it was seen doing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROLOGUE = """
import json, os, sys
for name in ("llmc", "torch", "triton", "tvm", "tvm_ffi"):
    sys.modules[name] = None  # importing it is an error
seen = []
def watch(event, args):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.system"):
        seen.append(event)
    elif event.startswith("socket."):
        seen.append(event)
    elif event == "open" and isinstance(args[0], (str, bytes)):
        mode, flags = args[1], args[2]
        if any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append(f"write {args[0]}")
    elif event == "ctypes.dlopen":
        seen.append(f"load {os.path.basename(str(args[0]))}")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        seen.append(event)
sys.path[:0] = json.loads(sys.argv[2])
import numpy
sys.addaudithook(watch)
sys.path.insert(0, sys.argv[1])
"""


def run_isolated(script: str, place: Path, **environment: str) -> Any:
    """What `script` prints, as JSON, where `place` is on its path; it has `seen`, and no PATH to a program."""
    packages = [p for p in sys.path if p.endswith("site-packages")]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", PROLOGUE + script, str(place), json.dumps(packages)],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/nonexistent", **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
