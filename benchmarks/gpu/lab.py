"""The real thing: a GPU with torch, packages of `prepare` in a folder, peers from benchmarks.peers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import first_token
from benchmarks.gpu.ceilings import TorchClock, machine_facts, measure_ceilings, nvidia_smi
from benchmarks.gpu.measure import Ours
from benchmarks.gpu.package import OpenPackage
from benchmarks.gpu.rows import COMPILED, EAGER, Row, Setup
from benchmarks.gpu.timing import Clock, Steps
from benchmarks.peers import torch_compile, transformers_eager

Peer = Callable[[Row], tuple[Steps, Mapping[str, Any]]]

PEERS: dict[str, Peer] = {COMPILED: torch_compile.start_row, EAGER: transformers_eager.start_row}


class TorchLab:
    """See `measure.Lab`. A package stays open until a row of another comes, or one with a peer has been measured."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        torch.manual_seed(0)
        torch.cuda.init()
        self.clock: Clock = TorchClock()
        self._folder, self._scratch = folder, scratch
        self._open: tuple[Setup, OpenPackage] | None = None
        self._peer: Steps | None = None

    def ceilings(self) -> Mapping[str, Any]:
        """See `Lab`."""
        found = measure_ceilings(self.clock)
        self._collect()
        return found

    def machine(self) -> Mapping[str, Any]:
        """See `Lab`."""
        return machine_facts()

    def peer(self, row: Row) -> tuple[Steps, Mapping[str, Any]]:
        """See `Lab`."""
        assert row.peer is not None
        self._close()
        self._peer, facts = PEERS[row.peer](row)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return self._peer, facts

    def ours(self, row: Row) -> tuple[Ours, Mapping[str, Any]]:
        """See `Lab`."""
        if self._open is None or self._open[0] != row.setup:
            self._close()
            self._open = (row.setup, OpenPackage(self._folder / row.setup.name))
        package = self._open[1]
        return package.steps(row), package.facts(row)

    def first_token(self, row: Row) -> Mapping[str, Any]:
        """See `Lab`."""
        self._close()
        return first_token.measure(self._folder / row.setup.name, self._scratch, row.context)

    def release(self) -> None:
        """See `Lab`."""
        if self._peer is not None:
            self._peer = None
            self._close()
            torch.compiler.reset()
            self._collect()

    def clocks(self) -> Mapping[str, str]:
        """See `Lab`."""
        try:
            found = {"clocks.sm": f"{torch.cuda.clock_rate()} MHz", "power.draw": f"{torch.cuda.power_draw()} mW"}
            return {**found, "temperature.gpu": str(torch.cuda.temperature())}
        except (ImportError, RuntimeError):  # they go through another library, which may not be there
            return nvidia_smi()

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
