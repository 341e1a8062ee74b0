"""The systems that can be compared: what makes a model for each, and which worker runs it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.protocol import REPOSITORY, Worker

QUANTIZATION = {4: "q4", 8: "q8"}
OURS = "llmc"


@dataclass(frozen=True)
class Job:
    """What is compared: a shape, a bit width, threads, and where made models are kept."""

    config: Path
    bits: int
    threads: int
    longest: int
    work: Path
    peers_python: str | None
    quantization: str | None
    compile_options: str
    package: Path | None

    @property
    def shape(self) -> str:
        """The configuration's file name, without its ending."""
        return self.config.stem


@dataclass(frozen=True)
class Peer:
    """A module under benchmarks/peers that serves the protocol, and a way to make its model once.

    `module ARGUMENTS` makes it; `suffix` ends the model's name. `batches`: whether several sequences are measured.
    """

    module: str
    maker: str
    suffix: str
    bits: tuple[int, ...] = (4, 8)
    batches: bool = False


PEERS = {
    "llama.cpp": Peer("benchmarks.peers.llama_cpp_worker", "benchmarks.peers.gguf_model", ".gguf", batches=True),
    "openvino": Peer("benchmarks.peers.openvino_worker", "benchmarks.peers.openvino_worker", "-openvino"),
    "ctranslate2": Peer("benchmarks.peers.ctranslate2_worker", "benchmarks.peers.ctranslate2_worker", "-ct2", (8,)),
    "onnxruntime": Peer("benchmarks.peers.onnxruntime_worker", "benchmarks.peers.onnxruntime_worker", "-ort", (4,)),
}


class Unavailable(Exception):
    """A peer that cannot take part, with the reason."""


def start(name: str, job: Job, say: Callable[[str], None]) -> Worker:
    """Make the system's model where it is not there yet, and start its worker with the model loaded.

    Raises `Unavailable` or `protocol.WorkerError`.
    """
    job.work.mkdir(parents=True, exist_ok=True)
    if name == OURS:
        python, module, model = sys.executable, "benchmarks.peers.llmc_worker", _our_package(job, say)
    else:
        peer = PEERS[name]
        if job.peers_python is None:
            raise Unavailable("no interpreter that has it was named: --peers-python")
        if job.bits not in peer.bits:
            raise Unavailable(f"it is measured with {' and '.join(map(str, peer.bits))} bits, not {job.bits}")
        python, module, model = job.peers_python, peer.module, _peer_model(name, peer, job, say)
    worker = Worker(name, python, module, job.work / f"{name}.log")
    try:
        worker.ask("load", path=str(model), threads=job.threads, longest=job.longest)
    except BaseException:
        worker.__exit__(None, None, None)
        raise
    return worker


def _our_package(job: Job, say: Callable[[str], None]) -> Path:
    """Compiled anew each time, as the compiler is what changes; `--package` names one that is to be kept."""
    if job.package is not None:
        return job.package
    quantization = job.quantization or QUANTIZATION[job.bits]
    folder = job.work / f"{job.shape}_{quantization}".replace("-", "_").replace(".", "_")
    arguments = ["compile", str(job.config), "--random-weights", "--quant", quantization, "--force", "-o", str(folder)]
    arguments += ["--max-sequence-length", str(job.longest), *shlex.split(job.compile_options)]
    say("llmc " + shlex.join(arguments))
    _make([sys.executable, "-m", "llmc", *arguments], job.work / "llmc-compile.log")
    return folder


def _peer_model(name: str, peer: Peer, job: Job, say: Callable[[str], None]) -> Path:
    model = job.work / f"{job.shape}-{job.bits}bit{peer.suffix}"
    if not model.exists():
        say(f"making {model.name} for {name}")
        assert job.peers_python is not None
        command = [job.peers_python, "-m", peer.maker, str(job.config), str(model), "--bits", str(job.bits)]
        _make(command, job.work / f"{name}-make.log")
    return model


def _make(command: list[str], log: Path) -> None:
    with log.open("wb") as output:
        status = subprocess.run(command, cwd=REPOSITORY, stdout=output, stderr=output, check=False).returncode
    if status:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise Unavailable(f"{shlex.join(command)} ended with status {status}: {''.join(last)[:300]}; see {log}")
