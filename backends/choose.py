"""The backend of a kind of target, by name: one is loaded when it is asked for, since what another is built on may not
be installed (TVM is not on every machine with a GPU)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import resolve_name
from typing import Any

from llmc.backends.base import Backend
from llmc.ir.op import Node, Value
from llmc.ir.target import Target
from llmc.ir.types import DType

MODULES = {"cpu": "llmc.backends.tvm", "cuda": "llmc.backends.triton"}
"""By kind of target, where `backend.make` and `select.arguments` are."""


def backend_for(target: Target, longest: int, compute: DType, **options: Any) -> Backend[Any]:
    """The backend for sequences of `longest` tokens at most. `compute`: the dtype in
    which activations enter products; `options`: what only this kind of target has, as `tunings` of GPUs."""
    make: Callable[..., Backend[Any]] = resolve_name(f"{MODULES[target.kind]}.backend:make")
    return make(target, longest, compute, **options)


def know_ops(kind: str) -> None:
    """Make the ops of a kind of target known, for graphs that are read as text."""
    import_module(f"{MODULES[kind]}.lower")


def arguments_of(kind: str) -> Callable[[Node], tuple[Value, ...] | None]:
    """For packages of a kind of target: from a lowered node to its launch's arguments, None where it has no launch."""
    arguments: Callable[[Node], tuple[Value, ...] | None] = resolve_name(f"{MODULES[kind]}.select:arguments")
    return arguments
