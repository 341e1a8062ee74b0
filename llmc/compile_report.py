"""What a compile did and how long it took. Not reproducible, so it lies beside the package, in `DIR.report/`."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.ir.graph import Graph
from llmc.passes.base import Observer, Pass, PassContext


@dataclass
class CompileReport:
    """Seconds by phase and by kernel, the passes' rows, sizes in bytes; `progress` is told of each phase."""

    package: Path
    progress: Callable[[str], None] = print
    seconds: dict[str, float] = field(default_factory=dict)
    kernel_seconds: dict[str, float] = field(default_factory=dict)
    passes: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """By entry point, bytes of the arena: `peak` as planned, `naive` if no two values shared memory."""
    tuning: Mapping[str, Any] = field(default_factory=dict)
    """What `--tune` measured (see `tuning.tune`): for each architecture its products, their candidates and times."""
    wheel: Path | None = None
    peak_memory: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is inside."""
        self.progress(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def observe_pass(self, context: PassContext) -> Observer:
        """An observer that adds a row for each pass: nodes, seconds, firings of its rules."""

        def observe(step: Pass, before: Graph, after: Graph, seconds: float) -> None:
            fired = {rule: count for rule, count in context.record.counts.items() if count}
            self.passes.append({"pass": str(step), "nodes": len(after.nodes), "seconds": seconds, "fired": fired})

        return observe

    def finish(self) -> None:
        """Note the peak memory (resident bytes of this process) and write `DIR.report/compile.json`."""
        self.peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        folder = self.package.with_name(self.package.name + ".report")
        folder.mkdir(exist_ok=True)
        (folder / "compile.json").write_text(json.dumps(self.as_json(), indent=1, sort_keys=True) + "\n")

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "package": str(self.package),
            "seconds": self.seconds,
            "kernel_seconds": self.kernel_seconds,
            "passes": self.passes,
            "sizes": self.sizes,
            "memory": self.memory,
            "tuning": self.tuning,
            "wheel": str(self.wheel) if self.wheel else None,
            "peak_memory": self.peak_memory,
        }
