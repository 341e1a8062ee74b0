"""A process that compiles Triton kernels: jobs in as lines of JSON, one line of JSON out for each.

Run as `python -m llmc.backends.triton.worker FOLDER`: cubin and PTX go to FOLDER/<name>-<architecture>.{cubin,ptx}. Its
own process, because Triton reads its settings from the environment when it is imported, and for a processor each.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compile one job (see `compile.compile_sources`); gives what the launcher has to know."""
    start = time.perf_counter()
    name, capability = job["name"], job["capability"]
    path = folder / f"{name}.py"
    if not path.exists():
        path.write_text(job["text"])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    constants, pointers = dict(job["constants"]), dict(job["arguments"])
    expected = [*pointers, *constants]
    assert sorted(function.arg_names) == sorted(expected), f"{name} takes {function.arg_names}, given {expected}"
    signature = {a: "constexpr" if a in constants else pointers[a] for a in function.arg_names}
    # Without this hint every access is two bytes wide.
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(function.arg_names) if a in pointers}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = {
        "num_warps": job["num_warps"],
        "num_stages": job["num_stages"],
        "enable_fp_fusion": True,
        "launch_pdl": bool(constants.get("PDL", False)),
    }
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    data = made.metadata
    for kind in ("cubin", "ptx"):
        content = made.asm[kind]
        binary = content if isinstance(content, bytes) else content.encode()
        (folder / f"{name}-sm_{capability}.{kind}").write_bytes(binary)
    unwanted = {
        "global_scratch_size": getattr(data, "global_scratch_size", 0),
        "profile_scratch_size": getattr(data, "profile_scratch_size", 0) or 0,
        "num_ctas": data.num_ctas - 1,
        "tensordesc_meta": len(getattr(data, "tensordesc_meta", None) or ()),
    }
    assert not any(unwanted.values()), f"{name} needs what the launcher does not give: {unwanted}"
    return {
        "name": name,
        "capability": capability,
        "function": data.name,
        "threads": 32 * data.num_warps,
        "shared": data.shared,
        "arguments": [a for a in function.arg_names if a in pointers],
        "dependent": options["launch_pdl"],
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Answer jobs until the input ends."""
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = compile_job(job, folder)
        except Exception as error:  # noqa: BLE001 - the parent says which kernel it was, and stops
            answer = {"name": job["name"], "capability": job["capability"], "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
