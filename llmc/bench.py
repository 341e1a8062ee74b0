"""Timing a package: prefill and decode, each beside the bandwidth that the same memory gives in the same run."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.ir.errors import LlmcError
from llmc.packages import open_package, read_manifest
from llmc.runtime.batch import Chunk
from llmc.runtime.timings import Profile


@dataclass(frozen=True)
class BenchReport:
    """Medians over the runs. Tokens per second count all sequences; bandwidths are bytes per second."""

    package: str
    threads: int
    prefill: int
    decode: int
    depth: int
    batch: int
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_bytes_per_step: int
    decode_bandwidth: float
    read_bandwidth: float

    def as_json(self) -> dict[str, Any]:
        """All figures as one JSON object."""
        return {**asdict(self), "share_of_bandwidth": self.share}

    @property
    def share(self) -> float:
        """Decode's bytes per second over the probe's: 1 is the roofline of a memory-bound step."""
        return self.decode_bandwidth / self.read_bandwidth if self.read_bandwidth else 0.0

    def __str__(self) -> str:
        return (
            f"{self.package}, {self.threads} threads, batch {self.batch}, decode at depth {self.depth + self.prefill}\n"
            f"load    {self.load_seconds * 1e3:>13.0f} ms\n"
            f"prefill {self.prefill:>6} tokens  {self.prefill_tokens_per_second:>10.1f} tokens/s\n"
            f"decode  {self.decode:>6} tokens  {self.decode_tokens_per_second:>10.1f} tokens/s"
            f"  {self.decode_bandwidth / 1e9:.1f} GB/s of {self.read_bandwidth / 1e9:.1f} read ({self.share:.0%})"
        )


def bench_package(
    folder: Path, *, prefill: int, decode: int, depth: int, batch: int, repeat: int, threads: int | None
) -> BenchReport:
    """Run `repeat` times: fill `depth` tokens of context, time `prefill` more, then `decode` steps of `batch`.

    A probe of read bandwidth over the weights stands before and after every decode. Raises `LlmcError` when the
    context or the batch is larger than the package's.
    """
    start = time.perf_counter()
    model = open_for(folder, depth + prefill + decode, batch, threads)
    load_seconds = time.perf_counter() - start
    executor = model.sequence().engine.executor
    tokens = np.random.default_rng(0).integers(0, executor.vocab_size, depth + prefill + decode).tolist()
    rows = [_run(model, tokens, prefill, decode, depth, batch) for _ in range(repeat)]
    prefill_seconds, decode_seconds, bandwidth = (statistics.median(column) for column in zip(*rows, strict=True))
    entry = executor.plan.entries["decode"]
    context = depth + prefill + decode // 2
    moved = 0
    for launch in entry.launches:
        counts = (1, batch, batch * (min(context, launch.window) if launch.window else context))
        moved += sum(a * b for a, b in zip(launch.bytes, counts, strict=True))
    report = BenchReport(
        package=model.info["name"],
        threads=executor.library.threads,
        prefill=prefill,
        decode=decode,
        depth=depth,
        batch=batch,
        load_seconds=load_seconds,
        prefill_tokens_per_second=prefill / prefill_seconds,
        decode_tokens_per_second=decode * batch / decode_seconds,
        decode_bytes_per_step=moved,
        decode_bandwidth=moved * decode / decode_seconds,
        read_bandwidth=bandwidth,
    )
    model.close()
    return report


def open_for(folder: Path, tokens: int, batch: int, threads: int | None) -> Any:
    """A package's model, when its context holds `tokens` tokens and it decodes `batch` sequences together.

    Raises `LlmcError` otherwise.
    """
    if (kind := read_manifest(folder)["target"]["kind"]) != "cpu":
        raise LlmcError(
            f"{folder} is a package for {kind!r}, and this command times packages for CPUs, beside the bandwidth of"
            " their memory; for GPUs there is benchmarks/gpu.py in llmc's repository"
        )
    model = open_package(folder).load(threads=threads)
    limit, most = model.info["model"]["max_sequence_length"], model.sequence().engine.max_sequences
    if tokens > limit:
        raise LlmcError(f"{tokens} tokens of context and decode are more than the package's context of {limit} tokens")
    if batch > most:
        raise LlmcError(f"batch {batch}: the package decodes at most {most} sequences together")
    return model


def filled_sequences(model: Any, tokens: list[int], batch: int) -> list[Any]:
    """`batch` sequences that hold the tokens; no forks: every one reads keys and values of its own."""
    sequences = [model.sequence() for _ in range(batch)]
    for sequence in sequences if tokens else ():
        sequence.prefill(tokens)
    return sequences


def decode_steps(sequences: list[Any], tokens: list[int], profile: Profile | None = None) -> float:
    """Seconds for a step of all sequences with each of the tokens."""
    engine = sequences[0].engine
    start = time.perf_counter()
    for token in tokens:
        ids = np.array([token], np.int32)
        with engine.exclusive():
            for sequence in sequences:
                sequence.begin(ids)
            engine.forward([Chunk(sequence.table, ids, 1) for sequence in sequences], profile)
    return time.perf_counter() - start


def _run(
    model: Any, tokens: list[int], prefill: int, decode: int, depth: int, batch: int
) -> tuple[float, float, float]:
    """Seconds of one prefill and of all decode steps, and the bandwidth around the latter."""
    executor = model.sequence().engine.executor
    library, weights = executor.library, executor.weights
    first = model.sequence()
    if depth:
        first.prefill(tokens[:depth])
    start = time.perf_counter()
    first.prefill(tokens[depth : depth + prefill])
    prefill_seconds = time.perf_counter() - start
    sequences = [first, *filled_sequences(model, tokens[: depth + prefill], batch - 1)]
    before = library.read_bandwidth(weights)
    decode_seconds = decode_steps(sequences, tokens[depth + prefill :])
    after = library.read_bandwidth(weights)
    for sequence in sequences:
        sequence.free()
    return prefill_seconds, decode_seconds, (before + after) / 2
