"""launcher.so of a package for GPUs: the C half of the runtime, which starts launches; the same for all packages."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(str(importlib.resources.files("llmc"))) / "runtime" / "native" / "cuda" / "launcher.c"
FLAGS = (
    "-std=gnu11",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-shared",
    "-s",
    "-Wl,--build-id=none",
    "-Wl,-z,relro,-z,now,-z,noexecstack",
    "-Wl,--hash-style=gnu",
)


def build_launcher(scratch: Path) -> bytes | None:
    """The library, built by $CC or gcc in a folder; the same bytes for the same compiler.

    None where there is no C compiler or it does not build this: the runtime then does the same in Python, at some
    microseconds for each launch that is not in a graph.
    """
    compiler = shutil.which(os.environ.get("CC") or "gcc")
    if compiler is None:
        return None
    # It calls nothing, so it is linked with nothing, and loads with any C library.
    command = [compiler, *FLAGS, "-nostdlib", str(SOURCE), "-o", "launcher.so"]
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, cwd=scratch, capture_output=True, check=False, env=environment)
    return None if done.returncode else (scratch / "launcher.so").read_bytes()
