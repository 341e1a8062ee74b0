"""A carried package on the GPU: kernels loaded, weights and cache random, steps started without waiting.

The one module that knows the runtime's insides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bounds import plan_bytes
from benchmarks.gpu.fill import device_bytes, fill_parameters, fill_state
from benchmarks.gpu.rows import Row
from llmc.runtime.batch import Batch
from llmc.runtime.cuda_api import CudaApi
from llmc.runtime.cuda_device import CudaDevice
from llmc.runtime.cuda_driver import Device
from llmc.runtime.cuda_executor import CudaExecutor
from llmc.runtime.cuda_kernels import read_images, read_kernels
from llmc.runtime.cuda_plan import CudaPlan, read_cuda_plan
from llmc.runtime.plan import FULL, LayerGroup, slot_inputs, table_inputs

COPIES = 2
"""Nodes of a step's graph that are no kernels: inputs to the device, tokens back."""


class BenchDevice(CudaDevice):
    """A GPU whose replays wait only where `waits` is true: blocks of steps are timed by events."""

    waits = True

    def replay(self, graph: int, stream: int) -> None:
        """Start a graph; see above."""
        if self.waits:
            super().replay(graph, stream)
        else:
            with self._current():
                self._api.call("cuGraphLaunch", graph, stream, what=self.name)


class BenchExecutor(CudaExecutor):
    """An executor without a file of weights."""

    def fill(self, parameters: list[dict[str, Any]], width: int, constants: Mapping[str, torch.Tensor]) -> None:
        """Random weights, and random keys and values in every block."""
        fill_parameters(device_bytes(self._regions["weights"], self.memory.weights), parameters, width, constants)
        for place, state in zip(self._states, self.plan.states, strict=True):
            fill_state(device_bytes(place, self.memory.blocks[state.group] * state.block_bytes), state.dtype)

    def start(self, entry: str, batch: Batch, count: int) -> None:
        """Start so many steps that are all alike; whether it waits is the device's affair."""
        with self.lock, self._work():
            bucket = self._bucket(entry, batch.dims[0])
            bucket.take(batch, self._inputs)
            stream = self.device.current_stream()
            for _ in range(count):
                bucket.program.replay(stream)

    def launch(self, entry: str, batch: Batch) -> None:
        """One step without a graph, waited for: a profiler sees the plan's launches in their order."""
        with self.lock, self._work():
            bucket = self._bucket(entry, batch.dims[0])
            bucket.take(batch, self._inputs)
            stream = self.device.current_stream()
            bucket.program.run(stream)
            self.device.synchronize(stream)

    def logits(self, outputs: int) -> Any:
        """The last step's rows of logits, f32[outputs, vocab]."""
        return self._fetch(self._regions["logits"], np.float32, (outputs, self.vocab_size))


class OpenPackage:
    """A package of `prepare`, with memory for its weights and as much of a cache as fits.

    `device`: None for the first GPU. `close` gives everything back.
    """

    def __init__(self, folder: Path, device: BenchDevice | None = None) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text())
        (variant,) = self.manifest["target"]["variants"]
        launcher = self.manifest["target"]["launcher"]
        self.device = device or BenchDevice(CudaApi(), 0, folder / launcher if launcher else None)
        try:
            self.weights_bytes = self.manifest["files"][variant["weights"]]["bytes"]
            kernels = read_kernels(folder / variant["resources"])
            self.plan: CudaPlan = read_cuda_plan(folder / variant["plan"], self.weights_bytes, kernels)
            self.document = json.loads((folder / variant["plan"]).read_text())
            used = {symbol: kernels[symbol] for symbol in self.plan.kernels}
            for kernel, image in read_images(folder / variant["kernels"], used, False):
                self.device.load(kernel, image)
            model = self.manifest["model"]
            longest = -(-model["max_sequence_length"] // self.plan.block_size)
            on: Device = self.device
            self.executor = BenchExecutor(self.plan, used, on, None, self.weights_bytes, model["vocab_size"], longest)
            self.executor.fill(self.parameters, model["hidden_size"], read_constants(folder, self.parameters))
        except BaseException:
            self.device.close()
            raise

    @property
    def parameters(self) -> list[dict[str, Any]]:
        """The plan's buffers that are weights."""
        return [row for row in self.document["buffers"] if row["kind"] == "param"]

    def launches(self, row: Row) -> list[dict[str, Any]]:
        """The launches of a row's step, as the plan describes them."""
        bucket = self.plan.entries[row.entry].bucket(row.tokens)
        return [asdict(launch) for launch in bucket.launches]

    def facts(self, row: Row) -> dict[str, Any]:
        """Of a row's step: bytes by the plan, kernels, nodes of its graph, and the memory that it needs."""
        launches, memory, context = self.launches(row), self.executor.memory, row.context if row.kind == "decode" else 0
        size, groups = self.plan.block_size, self.plan.groups
        parts = {name: getattr(memory, name) for name in ("weights", "arena", "workspace", "inputs", "outputs")}
        parts["cache"] = sum(
            row.batch * len(seen_blocks(row, size, groups[state.group])) * state.block_bytes
            for state in self.plan.states
        )
        return {
            "plan_bytes": plan_bytes(launches, row.tokens, row.batch * context, row.batch),
            "kernels": len(launches),
            "graph_nodes": len(launches) + COPIES,
            "memory": parts,
            "memory_planned": sum(parts.values()),
            "launcher": self.device.launcher,
        }

    def steps(self, row: Row) -> PackageSteps:
        """A row's step. Raises `ValueError` where the cache that fits has too few blocks for it."""
        for group, have in zip(self.plan.groups, self.executor.num_blocks, strict=True):
            need = row.batch * len(seen_blocks(row, self.plan.block_size, group))
            if need > have:
                raise ValueError(
                    f"{row.name} needs {need} blocks of keys and values, and the GPU's memory holds {have}"
                )
        return PackageSteps(self, row)

    def close(self) -> None:
        """Give the device back."""
        self.executor.close()


class PackageSteps:
    """See `timing.Steps`. Steps are all alike: each writes its token's keys and values anew."""

    def __init__(self, package: OpenPackage, row: Row) -> None:
        self._package, self._entry = package, row.entry
        self._batch = make_batch(row, package.plan.block_size, package.executor.vocab_size, package.plan.groups)

    def start(self, count: int) -> None:
        """See `timing.Steps`."""
        device = self._package.device
        device.waits = False
        try:
            self._package.executor.start(self._entry, self._batch, count)
        finally:
            device.waits = True

    def take(self) -> None:
        """One step as `model.generate` takes it: waited for, its token copied."""
        self._package.executor.step(self._entry, self._batch)

    def launch(self) -> None:
        """One step without a graph; see `BenchExecutor.launch`."""
        self._package.executor.launch(self._entry, self._batch)

    def check(self) -> None:
        """Raise `ValueError` unless a step's logits are finite and not all alike: else something was not computed."""
        self.take()
        logits = self._package.executor.logits(self._batch.dims[3])
        if not np.isfinite(logits).all() or float(logits.std()) == 0.0:
            raise ValueError(f"a step's logits are not finite, or all alike: {logits.min()} to {logits.max()}")


def make_batch(row: Row, block_size: int, vocabulary: int, groups: tuple[LayerGroup, ...] = (FULL,)) -> Batch:
    """A row's inputs: every sequence has blocks of its own, scattered over the cache."""
    draw = np.random.default_rng(0)
    if row.kind == "decode":
        positions = np.full(row.batch, row.context, np.int32)
        owners, query_start = np.arange(row.batch), np.arange(row.batch + 1, dtype=np.int32)
        rows = np.arange(row.batch, dtype=np.int32)
    else:
        positions = np.arange(row.context, dtype=np.int32)
        owners, query_start = np.zeros(row.context, np.int64), np.array([0, row.context], np.int32)
        rows = np.array([row.context - 1], np.int32)
    pages: dict[str, Any] = {}
    for group, slot_input, table_input in zip(groups, slot_inputs(groups), table_inputs(groups), strict=True):
        seen = seen_blocks(row, block_size, group)
        tables = np.zeros((row.batch, seen.stop), np.int32)
        tables[:, seen.start :] = draw.permutation(row.batch * len(seen)).reshape(row.batch, len(seen))
        slots = tables[owners, positions // block_size] * block_size + positions % block_size
        pages |= {slot_input: slots.astype(np.int32), table_input: tables}
    tokens = draw.integers(0, vocabulary, len(positions)).astype(np.int32)
    slot_mapping, block_tables = pages.pop("slot_mapping"), pages.pop("block_tables")
    return Batch(tokens, positions, slot_mapping, query_start, block_tables, rows, others=pages)


def seen_blocks(row: Row, block_size: int, group: LayerGroup = FULL) -> range:
    """The blocks of one sequence of a row that its step sees in a group of layers, the step's tokens among them."""
    first = max(0, row.context - group.window + 1) if group.window and row.kind == "decode" else 0
    return range(first // block_size, -(-(row.context + (row.kind == "decode")) // block_size))


def read_constants(folder: Path, parameters: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Tables that are no weights, by parameter name, u8: those that the package has beside its graphs."""
    files = {f"constant:{path.stem[:16]}": path for path in (folder / "graph").glob("*.npy")}
    return {
        p["name"]: torch.from_numpy(np.load(files[p["name"]], allow_pickle=False).reshape(-1).view(np.uint8).copy())
        for p in parameters
        if p["name"] in files
    }
