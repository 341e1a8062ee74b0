"""Kernels compiled to cubins on a machine without a GPU, in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from llmc.backends.triton import sass
from llmc.backends.triton.cubin import kernel_parameters
from llmc.backends.triton.source import KernelSource
from llmc.ir.errors import LlmcError
from llmc.ir.target import GpuVariant

_HIDDEN = 2
"""Every kernel's last two parameters, pointers to scratch memory that ours have none of."""


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture: code, what a launch needs, what it takes of the chip.

    `shared` bytes of dynamic shared memory; `spills`: bytes of registers that a thread spills to memory, and
    `loop_spills` the instructions of the innermost loop that do so; `instructions` of the whole kernel;
    `instructions_per_weight` of its innermost loop, all threads counted, or None where it reads no weights.
    """

    cubin: bytes
    ptx: bytes
    function: str
    threads: int
    shared: int
    arguments: int
    dependent: bool
    registers: int
    spills: int
    loop_spills: int
    instructions: int
    instructions_per_weight: float | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """What the launcher and a reader of the package want to know, without code and without times."""
        launch = ("function", "threads", "shared", "arguments", "dependent")
        names = (*launch, "registers", "spills", "loop_spills", "instructions")
        rounded = self.instructions_per_weight and round(self.instructions_per_weight, 3)
        return {**{n: getattr(self, n) for n in names}, "instructions_per_weight": rounded}


def find_triton() -> str:
    """Triton's version. Raises `LlmcError` where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise LlmcError("compiling for a GPU needs Triton (the GPU itself is not needed): pip install 'llmc[gpu]'")
    return version("triton")


def compile_sources(
    sources: Sequence[KernelSource],
    variant: GpuVariant,
    processes: int | None = None,
    failures: dict[str, str] | None = None,
) -> dict[str, Compiled]:
    """Cubins by kernel name, of each name one. Raises `LlmcError` naming the first kernel that cannot be compiled; with
    `failures` such kernels are left out, and why is noted there by name."""
    by_name = {source.name: source for source in sources}
    count = min(len(by_name), processes or len(os.sched_getaffinity(0)))
    if not count:
        return {}
    with tempfile.TemporaryDirectory(prefix="llmc-triton-") as scratch:
        folder = Path(scratch)
        answers = list(_answers([_job(source, variant) for source in by_name.values()], folder, count, failures))
        with ThreadPoolExecutor(count) as pool:  # most of the time is spent in disassemblers, which are processes
            made = list(pool.map(lambda answer: _finish(answer, by_name[answer["name"]], variant), answers))
    by_answer = {answer["name"]: kernel for answer, kernel in zip(answers, made, strict=True)}
    return {name: by_answer[name] for name in sorted(by_answer)}


def _job(source: KernelSource, variant: GpuVariant) -> dict[str, Any]:
    return {
        "name": source.name,
        "text": source.text,
        "arguments": source.arguments,
        "constants": source.constants,
        "num_warps": source.num_warps,
        "num_stages": source.num_stages,
        "capability": 10 * variant.capability[0] + variant.capability[1],
    }


def _answers(
    jobs: Sequence[Mapping[str, Any]], folder: Path, count: int, failures: dict[str, str] | None
) -> Iterator[dict[str, Any]]:
    """What the workers say, in any order; each takes a job when it is done with the one before."""
    todo: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
    for job in jobs:
        todo.put(job)

    def work(number: int) -> list[dict[str, Any]]:
        done: list[dict[str, Any]] = []
        # Jobs must not share a module file, nor a cache, with a process that writes them at the same time.
        own = folder / str(number)
        own.mkdir()
        command = [sys.executable, "-m", "llmc.backends.triton.worker", str(own)]
        errors = own / "stderr"
        with (
            errors.open("wb") as log,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(own)
            ) as worker,
        ):
            while (job := _next(todo)) is not None:
                answer = _ask(worker, job, errors)
                if "error" not in answer:
                    done.append({**answer, "folder": str(own)})
                elif failures is not None:
                    failures[job["name"]] = str(answer["error"])
                else:
                    while _next(todo) is not None:
                        pass  # the others need not go on
                    raise LlmcError(f"cannot compile {job['name']} for sm_{job['capability']}: {answer['error']}")
        return done

    with ThreadPoolExecutor(count) as pool:
        for done in pool.map(work, range(count)):
            yield from done


def _next(todo: SimpleQueue[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """A job, or None where none is left: another worker may have taken the last a moment ago."""
    with suppress(Empty):
        return todo.get_nowait()
    return None


def _ask(worker: subprocess.Popen[str], job: Mapping[str, Any], errors: Path) -> dict[str, Any]:
    """A worker's answer to a job. Raises `LlmcError` with the last that it wrote to `errors` where it has ended."""
    assert worker.stdin is not None and worker.stdout is not None
    line = ""
    with suppress(BrokenPipeError):
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    if not line:
        with suppress(BrokenPipeError):  # it still holds what could not be written
            worker.stdin.close()
        said = errors.read_text(errors="replace").strip().splitlines()[-1:]
        raise LlmcError(f"the compiler of {job['name']} ended without an answer: {' '.join(said) or 'it said nothing'}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _environment(folder: Path) -> dict[str, str]:
    """The workers' environment: no interpreter, no line tables, and an assembler whose cubins older drivers load."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    package = _triton_folder() / "backends/nvidia/bin/ptxas"
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    # Triton has two assemblers. The one for newer chips (13.4 in 3.9) makes cubins that CUDA 12 drivers refuse, and
    # PTX that CUDA 13.0 refuses; the other knows every architecture of ours.
    environment["TRITON_PTXAS_BLACKWELL_PATH"] = str(package)
    # The same llmc as this process: it may have been found through a path that a new process would not look at.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_own_root(), environment.get("PYTHONPATH")]))
    return environment


def _finish(answer: Mapping[str, Any], source: KernelSource, variant: GpuVariant) -> Compiled:
    stem = Path(answer["folder"]) / f"{answer['name']}-{variant.name}"
    cubin = stem.with_suffix(".cubin").read_bytes()
    given = [kind for _, kind in source.arguments]
    parameters = kernel_parameters(cubin).get(answer["function"])
    expected = [8] * (len(given) + _HIDDEN)
    assert parameters is not None and [size for _, size in parameters] == expected, (answer, parameters)
    assert list(answer["arguments"]) == [name for name, _ in source.arguments], f"{source.name}: order of arguments"
    usage = sass.resource_usage(stem.with_suffix(".cubin"))
    instructions = sass.disassemble(stem.with_suffix(".cubin"))
    loop = sass.main_loop(instructions) if source.weights else []
    return Compiled(
        cubin=cubin,
        ptx=stem.with_suffix(".ptx").read_bytes(),
        function=answer["function"],
        threads=answer["threads"],
        shared=answer["shared"],
        arguments=len(given),
        dependent=answer["dependent"],
        registers=usage.registers,
        spills=usage.local,
        loop_spills=sum(i.family in ("LDL", "STL") for i in loop),
        instructions=len(instructions),
        instructions_per_weight=len(loop) * answer["threads"] / source.weights if loop else None,
        seconds=answer["seconds"],
    )


def _own_root() -> str:
    """The folder that `import llmc` looked into."""
    spec = importlib.util.find_spec("llmc")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parents[1])


def _triton_folder() -> Path:
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
