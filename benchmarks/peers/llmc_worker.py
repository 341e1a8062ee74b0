"""A package of ours behind the protocol, by the runtime that it carries. It also measures the bandwidth for all."""

from __future__ import annotations

import statistics
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.protocol import serve
from llmc import __version__
from llmc.packages import open_package

PROBES = 5


class Package:
    """See `protocol.System`."""

    def load(self, path: str, threads: int, longest: int) -> None:
        self._folder = Path(path)
        self._model = open_package(self._folder).load(threads=threads)
        self._engine = self._model.sequence().engine
        self._executor = self._engine.executor
        # Chunks of the package's own runtime, which may not be the one beside this file.
        self._chunk = import_module(type(self._model).__module__.removesuffix(".model") + ".batch").Chunk
        if longest > self._engine.max_sequence_length:
            raise ValueError(f"a context of {longest}: the package was compiled for {self._engine.max_sequence_length}")
        self._tokens = np.random.default_rng(0).integers(0, self._executor.vocab_size, longest + 1).tolist()
        self._held: dict[tuple[int, int], list[Any]] = {}

    def facts(self) -> dict[str, Any]:
        plan, info = self._executor.plan, self._model.info
        launches = plan.entries["decode"].launches
        head = next(launch for launch in launches if any(plan.buffers[a].name == "logits" for a in launch.args))
        read = [plan.buffers[a] for a in head.args if plan.buffers[a].kind == "param"]
        fixed, token, context = (sum(launch.bytes[i] for launch in launches) for i in range(3))
        return {
            "weights_bytes": self._executor.weights.size,
            "file_bytes": self._executor.weights.size,
            "lm_head": f"{sum(buffer.bytes for buffer in read) / 1e6:.1f} MB: {', '.join(b.name for b in read)[:200]}",
            "lm_head_bytes": sum(buffer.bytes for buffer in read),
            "kv_cache": "/".join(sorted({state.dtype for state in plan.states})),
            "step_bytes": [fixed, token, context],
            "versions": {"llmc": __version__, "build": self._executor.library.build},
            "settings": {"threads": self._executor.library.threads, "quantization": info.get("quantization")},
        }

    def prefill(self, tokens: int) -> float:
        with self._model.sequence() as sequence:
            start = time.perf_counter()
            sequence.prefill(self._tokens[:tokens])
            return time.perf_counter() - start

    def decode(self, depth: int, steps: int, sequences: int) -> float:
        held = self._held.setdefault((depth, sequences), [])
        while len(held) < sequences:  # not forks: every sequence reads keys and values of its own
            held.append(self._model.sequence())
            if depth:
                held[-1].prefill(np.roll(self._tokens[:depth], len(held) - 1).tolist())
        forward, chunk, exclusive = self._engine.forward, self._chunk, self._engine.exclusive
        tokens = np.arange(1, sequences + 1, dtype=np.int32)
        start = time.perf_counter()
        for _ in range(steps):
            with exclusive():
                chunks = []
                for i, sequence in enumerate(held):
                    ids = tokens[i : i + 1]
                    sequence.begin(ids)
                    chunks.append(chunk(sequence.table, ids, 1))
                tokens = forward(chunks).greedy.copy()
        seconds = time.perf_counter() - start
        for sequence in held:
            sequence.truncate(depth)
        return seconds

    def probe(self) -> float:
        """Bytes per second at which all threads read all weights once, the median of several times."""
        read, weights = self._executor.library.read_bandwidth, self._executor.weights
        return statistics.median(read(weights) for _ in range(PROBES))


if __name__ == "__main__":
    serve(Package())
