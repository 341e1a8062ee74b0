"""Who may import whom: data goes one way, so there is no cycle, no late import of ours and no TYPE_CHECKING block."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

import networkx as nx
import pytest

from tests.fixtures import REPOSITORY
from tests.sources import import_path, repository_files

IMPORTING = {"llmc.importers", "llmc.architectures"}
# What each layer may import of ours, besides itself. Every other module of llmc (cli, driver, report) may import all.
LAYERS: dict[str, set[str]] = {
    "llmc.ir": set(),
    "llmc.options": {"llmc.ir"},
    "llmc.architectures": {"llmc.ir", "llmc.options", *IMPORTING},
    "llmc.importers": {"llmc.ir", "llmc.options", *IMPORTING},
    "llmc.passes": {"llmc.ir", "llmc.options"},
    "llmc.backends": {"llmc.ir", "llmc.options", "llmc.passes"},
    "llmc.templates": set(),
    "llmc.runtime": set(),
}
# Packages from elsewhere, for the layers that are held to a list.
OUTSIDE = {"llmc.ir": {"numpy", "ml_dtypes", "networkx"}, "llmc.runtime": {"numpy", "tokenizers", "jinja2"}}

MODULES = {  # import name -> (is it a package, file)
    path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): (path.endswith("/__init__.py"), name)
    for name in repository_files()
    if name.endswith(".py") and (path := import_path(name))
}


def layer(module: str) -> str:
    """The layer that a module of ours belongs to: its first two names, where LAYERS has them."""
    two = ".".join(module.split(".")[:2])
    return two if two in LAYERS else "llmc"


def imports(module: str, tree: ast.AST) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Every module that a syntax tree imports, with its statement; relative names resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - MODULES.get(module, (False, ""))[0]
            parents = module.split(".")[: -up or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from ((full if (full := f"{base}.{a.name}") in MODULES else base, node) for a in node.names)


def violations(module: str, tree: ast.Module) -> Iterator[str]:
    """What a module imports and must not."""
    mine = layer(module)
    late = {s for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for s in ast.walk(f)}
    for name, statement in imports(module, tree):
        root = name.split(".")[0]
        if root == "llmc":
            if mine in LAYERS and layer(name) not in LAYERS[mine] | {mine}:
                yield f"{module}:{statement.lineno} imports {name}; {mine} may import {sorted(LAYERS[mine])}"
            if statement in late:
                yield f"{module}:{statement.lineno} imports {name} late; at the top, or it is in the wrong layer"
            if mine == "llmc.runtime" and not getattr(statement, "level", 0):
                yield f"{module}:{statement.lineno} imports {name}; the runtime is copied, so its imports are relative"
        elif mine in OUTSIDE and root not in {*OUTSIDE[mine], *sys.stdlib_module_names}:
            yield f"{module}:{statement.lineno} imports {name}; {mine} may import {sorted(OUTSIDE[mine])}"
        if mine == "llmc.runtime" and root == "jinja2" and statement not in late:
            yield f"{module}:{statement.lineno} imports jinja2 at the top; chat alone needs it, so import it there"
    for node in ast.walk(tree):
        if "TYPE_CHECKING" in (getattr(node, "id", ""), getattr(node, "attr", "")):
            yield f"{module}: a TYPE_CHECKING block hides a cycle"


def parse(module: str) -> ast.Module:
    return ast.parse((REPOSITORY / MODULES[module][1]).read_text(encoding="utf-8"))


def test_no_layer_reaches_up() -> None:
    assert {"llmc", "llmc.ir.op"} <= MODULES.keys()
    found = [message for module in MODULES for message in violations(module, parse(module))]
    assert not found, "\n".join(found)


def test_no_cycle() -> None:
    edges = ((m, name) for m in MODULES for name, _ in imports(m, parse(m)) if name in MODULES and name != m)
    cycles = list(nx.simple_cycles(nx.DiGraph(edges)))
    assert not cycles, f"import cycles: {cycles[:3]}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("llmc.ir.x", "from llmc.passes import base"),
        ("llmc.ir.x", "import torch"),
        ("llmc.passes.x", "import llmc.backends.base"),
        ("llmc.backends.x", "from llmc import cli"),
        ("llmc.importers.x", "from llmc.passes.base import Pass"),
        ("llmc.cli", "def f():\n    from llmc.ir import op"),
        ("llmc.cli", "from typing import TYPE_CHECKING\nif TYPE_CHECKING: pass"),
        ("llmc.runtime.x", "from llmc.runtime import y"),
        ("llmc.runtime.x", "from ..ir import op"),
        ("llmc.runtime.x", "import jinja2"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert list(violations(module, ast.parse(source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("llmc.ir.x", "import math, numpy\nfrom llmc.ir import op"),
        ("llmc.backends.x", "from llmc.passes.base import Pass\ndef f():\n    import tvm"),
        ("llmc.importers.x", "from llmc.architectures import blocks"),
        ("llmc.runtime.x", "from . import y\nfrom .z import Z\ndef f():\n    import jinja2"),
        ("llmc.report.x", "from llmc.backends import base"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert not list(violations(module, ast.parse(source)))
