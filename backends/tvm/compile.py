"""From TIR kernels to a shared library: object code by TVM's LLVM, then one link with the C runtime by gcc."""

from __future__ import annotations

import importlib.resources
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.backends.tvm.isa import Isa
from llmc.ir.errors import LlmcError

try:
    import tvm
    from tvm import tirx
except ImportError as error:  # pragma: no cover
    raise LlmcError(
        f"compiling for a CPU needs Apache TVM, and `import tvm` failed: {error}. "
        "Install it: pip install 'apache-tvm~=0.27.0'"
    ) from error

NATIVE = Path(str(importlib.resources.files("llmc"))) / "runtime" / "native"
COMPILE_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread")
LINK_FLAGS = (
    "-shared",
    "-s",
    "-Wl,--build-id=none",
    "-Wl,-z,relro,-z,now,-z,noexecstack",
    "-Wl,-Bsymbolic",
    "-Wl,--hash-style=gnu",
)

# Else LLVM moves the constants of an activation out of all loops, where they take registers from a matrix product's
# sums: a gated product with silu ran at 25 % of the peak, and at 93 % without.
LLVM_OPTIONS = ("-disable-machine-licm:bool=1",)


def native_sources() -> list[Path]:
    """The C files of the runtime, in name order."""
    return sorted(NATIVE.glob("*.c"))


def compile_kernel(func: Any, isa: Isa) -> bytes:
    """An ELF object with the kernel as its one strong symbol; the same bytes for the same kernel, in any process.

    The passes are the few that a kernel written at this level needs. The default pipeline would add a packed calling
    convention, and turn large local arrays into calls of TVM's runtime, which packages do not have.
    """
    target = tvm.target.Target(
        {
            "kind": "llvm",
            "mtriple": f"{isa.machine}-linux-gnu",
            "mcpu": isa.mcpu,
            "mattr": list(isa.features),
            "cl-opt": list(LLVM_OPTIONS),
        }
    )
    passes = tvm.transform.Sequential(
        [
            tirx.transform.BindTarget(target.with_host(target)),
            tirx.transform.FlattenBuffer(),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.UnrollLoop(),
            tirx.transform.LowerIntrin(),
        ]
    )
    module = passes(tvm.IRModule({func.attrs["global_symbol"]: func}))
    library = tvm.get_global_func("target.build.llvm")(module, target)
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        path = Path(folder) / "kernel.o"
        library.write_to_file(str(path))
        return path.read_bytes()


def link(objects: Mapping[str, bytes], isa: Isa, output: Path) -> None:
    """A shared library of kernels (symbol -> object) and the C runtime, exporting the kernels and `llmc_*`."""
    with tempfile.TemporaryDirectory(prefix="llmc-") as name:
        folder = Path(name)
        for symbol, data in objects.items():
            (folder / f"{symbol}.o").write_bytes(data)
        for source in native_sources():
            _gcc(
                isa.machine,
                *COMPILE_FLAGS,
                *isa.gcc_flags,
                f'-DLLMC_ISA="{isa.name}"',
                "-c",
                source,
                "-o",
                f"{source.stem}.native.o",
                cwd=folder,
            )
        exported = "".join(f"  {symbol};\n" for symbol in (*sorted(objects), "llmc_*"))
        (folder / "exports.map").write_text(f"{{\nglobal:\n{exported}local:\n  *;\n}};\n")
        parts = [f"{symbol}.o" for symbol in sorted(objects)] + [f"{s.stem}.native.o" for s in native_sources()]
        # A response file: a model with many kernels would overrun the command line.
        (folder / "parts.txt").write_text("\n".join(parts))
        _gcc(isa.machine, *LINK_FLAGS, "-Wl,--version-script=exports.map", "@parts.txt", "-o", "out.so", cwd=folder)
        output.write_bytes((folder / "out.so").read_bytes())


def find_compiler(machine: str) -> str:
    """The C compiler for a machine: $CC or gcc for this one, a cross compiler for another. Raises `LlmcError`."""
    if machine == platform.machine():
        gcc = os.environ.get("CC") or "gcc"
        advice = "install gcc, or set CC"
    else:
        gcc = f"{machine}-linux-gnu-gcc"
        advice = f"install it (Debian and Ubuntu: apt install gcc-{machine.replace('_', '-')}-linux-gnu)"
    if shutil.which(gcc) is None:
        raise LlmcError(f"compiling for {machine} needs a C compiler, and {gcc!r} was not found: {advice}")
    return gcc


def _gcc(machine: str, *arguments: str | Path, cwd: Path) -> None:
    gcc = find_compiler(machine)
    done = subprocess.run(
        [gcc, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode:
        raise LlmcError(f"{gcc} failed with exit status {done.returncode}: {done.stderr.strip()[:2000]}")
