"""`--tune`: tilings of products chosen by their times on the GPUs of this machine, once, when a package is compiled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmc.backends.triton.compile import Compiled, compile_sources
from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.packing import blocks_of
from llmc.backends.triton.plan import GpuEntry, planned_products
from llmc.backends.triton.products import ProductCall
from llmc.backends.triton.source import KernelSource
from llmc.backends.triton.tiling import Product, Tiling, Tunings, candidates, seconds
from llmc.ir.errors import LlmcError
from llmc.ir.target import GpuVariant
from llmc.runtime.cuda_driver import KernelLaunch, Program
from llmc.runtime.cuda_kernels import Kernel
from llmc.runtime.errors import ModelError
from llmc.tuning_devices import Gpu
from llmc.tuning_operands import MAX_COPIES, Layout, Patterns, fill, layout_of

TIE = 1.02
"""Times that differ by less are equal, and the model decides."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: `budget` seconds for all products, compiling excluded; of each the model's best `most`
    tilings, each `rounds` times, by turns, for about `replay` seconds and `least` launches. There are as many copies of
    a weight as exceed `cached` bytes, twice the largest L2 cache (126 MB, of a B200)."""

    budget: float = 60.0
    most: int = 6
    rounds: int = 5
    replay: float = 2e-3
    least: int = 4
    cached: int = 256 << 20


@dataclass(frozen=True)
class Tuned:
    """What measuring gave: the choices, the architectures for which some were measured, and a report (in `DIR.report/`,
    never in the package, since times do not reproduce)."""

    tunings: Tunings = field(default_factory=Tunings)
    architectures: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Candidate:
    """A tiling, its kernel, and its median time in seconds; or why there is none."""

    tiling: Tiling
    source: KernelSource
    compiled: Compiled | None = None
    seconds: float | None = None
    failure: str | None = None


def tune(
    entries: Sequence[GpuEntry],
    variants: Sequence[GpuVariant],
    devices: Mapping[str, Gpu],
    effort: Effort | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Measure the products of planned entries on the devices, by architecture; the others keep the model's choice, and
    so does what the budget did not reach. Raises `LlmcError` where a GPU or the compiler fails."""
    effort = effort or Effort()
    chosen: dict[tuple[Product, str], Tiling] = {}
    tables: dict[str, Any] = {}
    left = effort.budget
    for variant in variants:
        if variant.name not in devices:
            tables[variant.name] = {"device": None, "note": "no such GPU here: the model's choices", "products": []}
            continue
        rows = []
        try:
            for call, measured, took in _measured(entries, variant, devices[variant.name], effort, left, clock):
                left -= took
                best = _fastest(measured)
                rows.append(_row(call, measured, best, variant))
                if best is not None:
                    chosen[call.product, variant.name] = best.tiling
        except ModelError as error:
            raise LlmcError(f"--tune: {error}") from error
        tables[variant.name] = {"device": devices[variant.name].name, "products": rows}
    architectures = tuple(v.name for v in variants if any(name == v.name for _, name in chosen))
    report = {"budget_seconds": effort.budget, "measured_seconds": effort.budget - left, "architectures": tables}
    return Tuned(Tunings(chosen), architectures, report)


def _measured(
    entries: Sequence[GpuEntry],
    variant: GpuVariant,
    device: Gpu,
    effort: Effort,
    left: float,
    clock: Callable[[], float],
) -> Iterator[tuple[ProductCall, list[_Candidate], float]]:
    """Every product in the order of the plan, its candidates as the model ranks them, and the seconds that it took.
    After `left` seconds nothing more is measured."""
    tried = {
        call: [_Candidate(t, source_of(call.spec(t), variant)) for t in candidates(call.product, variant, effort.most)]
        for call in planned_products(entries, variant.name)
    }
    failures: dict[str, str] = {}
    sources = [c.source for each in tried.values() for c in each]
    compiled = compile_sources(sources, variant, failures=failures)
    layouts = {
        call: layout_of(call, each[0].source, [c.tiling for c in each], effort.cached) for call, each in tried.items()
    }
    patterns, loaded = Patterns(), dict[str, str | None]()
    begin = clock()
    base = device.allocate(max((layout.bytes for layout in layouts.values()), default=1))
    start, end = device.create_event(), device.create_event()
    for call, each in tried.items():
        if clock() - begin <= left:
            for candidate in each:
                _load(device, candidate, compiled, failures, loaded, variant)
            fill(device, layouts[call], base, patterns)
            _time(device, [c for c in each if c.failure is None], layouts[call], base, variant, effort, (start, end))
        now = clock()
        yield call, each, now - begin
        left, begin = left - (now - begin), now


def _load(
    device: Gpu,
    candidate: _Candidate,
    compiled: Mapping[str, Compiled],
    failures: Mapping[str, str],
    loaded: dict[str, str | None],
    variant: GpuVariant,
) -> None:
    """Make a candidate's kernel known to the device, or note why it cannot be. `loaded`: what was tried before."""
    symbol = candidate.source.name
    if symbol in failures:
        candidate.failure = failures[symbol]
        return
    made = candidate.compiled = compiled[symbol]
    if symbol not in loaded:
        loaded[symbol] = None
        if made.shared > variant.shared_bytes:
            loaded[symbol] = f"{made.shared} bytes of shared memory, of {variant.shared_bytes}"
        else:
            try:
                device.load(_kernel(symbol, made), made.cubin)
            except ModelError as error:
                loaded[symbol] = str(error)
    candidate.failure = loaded[symbol]


def _kernel(symbol: str, made: Compiled) -> Kernel:
    return Kernel(symbol, made.function, made.threads, made.shared, made.arguments, made.dependent)


def _time(
    device: Gpu,
    tried: Sequence[_Candidate],
    layout: Layout,
    base: int,
    variant: GpuVariant,
    effort: Effort,
    events: tuple[int, int],
) -> None:
    """Set the candidates' times: medians of replays of many launches, the candidates by turns."""
    stream = device.current_stream()
    expected = min((seconds(layout.call.product, c.tiling, variant) for c in tried), default=1.0)
    count = max(effort.least, min(MAX_COPIES, round(effort.replay / expected)))
    # As many for each, so that to start a graph is the same part of their times; each copy as often as any.
    count = blocks_of(count, layout.copies) * layout.copies
    programs: list[tuple[_Candidate, Program]] = []
    for candidate in tried:
        assert candidate.compiled is not None
        kernel, grid = _kernel(candidate.source.name, candidate.compiled), (candidate.tiling.programs, 1, 1)
        launches = [
            KernelLaunch(kernel, grid, layout.arguments(base, candidate.source, i % layout.copies))
            for i in range(count)
        ]
        programs.append((candidate, device.prepare(launches)))
    for _, program in programs:
        program.replay(stream)  # records the graph, and warms up
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(effort.rounds):
        for (_, program), taken in zip(programs, times, strict=True):
            device.record(events[0], stream)
            program.replay(stream)
            device.record(events[1], stream)
            device.wait(events[1])
            taken.append(device.nanoseconds(*events) * 1e-9 / count)
    for (candidate, _), taken in zip(programs, times, strict=True):
        candidate.seconds = statistics.median(taken)


def _fastest(tried: Sequence[_Candidate]) -> _Candidate | None:
    """The one that the model ranks first of those as fast as the fastest; None where nothing was measured."""
    timed = [(c, c.seconds) for c in tried if c.seconds is not None]
    least = min((s for _, s in timed), default=0.0)
    return next((c for c, s in timed if s <= least * TIE), None)


def _row(
    call: ProductCall, tried: Sequence[_Candidate], best: _Candidate | None, variant: GpuVariant
) -> dict[str, Any]:
    """A product as the report has it. `bandwidth`: the share of the architecture's that its weights took."""
    product = call.product
    weights = product.n * product.k * product.bits / 8
    rows = []
    for candidate in tried:
        row: dict[str, Any] = {
            **asdict(candidate.tiling),
            "modelled": seconds(product, candidate.tiling, variant) * 1e6,
        }
        if candidate.seconds is not None:
            row["microseconds"] = candidate.seconds * 1e6
            row["bandwidth"] = weights / candidate.seconds / variant.bandwidth if candidate.seconds else None
        if candidate.failure is not None:
            row["failure"] = candidate.failure
        rows.append(row)
    kind = dict(call.options)["epilogue"]
    return {
        "product": {"n": product.n, "k": product.k, "m": product.m, "format": call.format, "epilogue": kind},
        "candidates": rows,
        "chosen": tried.index(best) if best is not None else 0,
        "by": "measurement" if best is not None else "model",
    }
