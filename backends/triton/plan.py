"""From a lowered, specialised graph to launches for every architecture and every size of step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.backends.base import Entry, Launch
from llmc.backends.buffers import Buffers, bounds_of, is_view, linear_cost, window_of
from llmc.backends.triton.products import ProductCall
from llmc.backends.triton.select import Step, select
from llmc.backends.triton.tiling import Product, Tunings
from llmc.ir.graph import Graph
from llmc.ir.op import Node
from llmc.ir.target import GpuVariant
from llmc.passes.plan_memory import MemoryPlan, plan_memory

SMALLEST_PREFILL = 16
"""Tokens of the smallest bucket of prompts: fewer would be padded in the tiles of matrix units all the same."""


@dataclass(frozen=True)
class GpuLaunch(Launch):
    """One kernel run on a grid of programs. `workspace` bytes and `tickets` (i32, zero before and after) are what its
    programs share; `shares`: whether the kernel is given both. `product`: what is cut into tiles, where it is one."""

    grid: tuple[int, int, int] = (1, 1, 1)
    workspace: int = 0
    tickets: int = 0
    shares: bool = False
    product: ProductCall | None = None


@dataclass(frozen=True)
class Bucket:
    """The launches of steps of up to so many tokens."""

    tokens: int
    launches: tuple[GpuLaunch, ...]


@dataclass(frozen=True)
class GpuEntry(Entry):
    """An entry point; `buckets` by architecture, the smallest first. `launches` are those of all of them."""

    buckets: Mapping[str, tuple[Bucket, ...]]


def bucket_sizes(name: str, most: int) -> list[int]:
    """Powers of two up to `most`, and `most` itself."""
    size = 1 if name == "decode" else min(SMALLEST_PREFILL, most)
    sizes = []
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most]


def plan_entry(name: str, graph: Graph, variants: Sequence[GpuVariant], longest: int, tunings: Tunings) -> GpuEntry:
    """Launches in the graph's order, for sequences of `longest` tokens at most."""
    bounds = {n: bounds_of(graph, n) for n in ("tokens", "sequences", "outputs")}
    nodes = [n for n in graph.nodes if n not in graph.parameter_only and not is_view(n)]
    costs = {n: (linear_cost(n, "flops"), linear_cost(n, "bytes")) for n in nodes}
    buckets: dict[str, tuple[Bucket, ...]] = {}
    for variant in variants:
        made = []
        for tokens in bucket_sizes(name, bounds["tokens"][1]):
            sizes = {n: min(tokens, bounds[n][1]) for n in ("sequences", "outputs")}
            most = (tokens, sizes["sequences"], sizes["outputs"])
            step = Step(variant, *most, longest, name == "decode", tunings)
            made.append(Bucket(tokens, tuple(_launch(n, step, *costs[n]) for n in nodes)))
        buckets[variant.name] = tuple(made)
    launches = [launch for of in buckets.values() for bucket in of for launch in bucket.launches]
    return GpuEntry(name, bounds, graph, launches, plan_memory(graph), MemoryPlan({}, 0, 0), buckets)


def planned_products(entries: Sequence[GpuEntry], variant: str) -> list[ProductCall]:
    """Every distinct product of one architecture, in the order of the plan, as most of its launches do it."""
    buckets = [bucket for entry in entries for bucket in entry.buckets[variant]]
    counts = Counter(launch.product for bucket in buckets for launch in bucket.launches if launch.product is not None)
    most: dict[Product, ProductCall] = {}
    for call, count in counts.items():
        if call.product not in most or count > counts[most[call.product]]:
            most[call.product] = call
    return list(most.values())


def describe_entry(entry: GpuEntry, variant: str, buffers: Buffers) -> dict[str, Any]:
    """The entry for one architecture, as its plan has it."""
    return {
        **{name: list(bound) for name, bound in entry.bounds.items()},
        "buckets": [
            {"tokens": bucket.tokens, "launches": [_described(launch, entry, buffers) for launch in bucket.launches]}
            for bucket in entry.buckets[variant]
        ],
    }


def _described(launch: GpuLaunch, entry: GpuEntry, buffers: Buffers) -> dict[str, Any]:
    shared = ("workspace", "tickets") if launch.shares else ()
    return {
        "kernel": buffers.kernel(launch.spec.symbol),
        "grid": list(launch.grid),
        "args": [
            *(buffers.index(value, entry) for value in launch.arguments),
            *(buffers.number({"kind": kind}) for kind in (*shared, "dims")),
        ],
        "node": launch.node,
        "flops": list(launch.flops),
        "bytes": list(launch.bytes),
        "window": launch.window,
    }


def _launch(node: Node, step: Step, flops: tuple[int, int, int], traffic: tuple[int, int, int]) -> GpuLaunch:
    chosen = select(node, step)
    assert chosen is not None, f"{node!r} was lowered to an op without a kernel"
    where = f"{node.loc}:{node.op.name}" if node.loc else node.op.name
    return GpuLaunch(
        chosen.spec,
        chosen.arguments,
        where,
        flops,
        traffic,
        grid=chosen.grid,
        workspace=chosen.workspace,
        tickets=chosen.tickets,
        shares=chosen.shares,
        product=chosen.product,
        window=window_of(node),
    )
