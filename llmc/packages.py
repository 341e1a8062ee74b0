"""Opening a generated package by its folder, for the commands that use one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from llmc.ir.errors import LlmcError


def read_manifest(folder: Path) -> dict[str, Any]:
    """A package's manifest, without importing the package. Raises `LlmcError` where there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise LlmcError(
            f"{folder} is no package: it has no manifest.json; make one with 'llmc compile MODEL -o {folder}'"
        )
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise LlmcError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("name"), str):
        raise LlmcError(f"{path} is damaged: expected an object with a name")
    return manifest


def open_package(folder: Path) -> ModuleType:
    """Import the package in a folder, wherever it lies."""
    name = read_manifest(folder)["name"]
    init = folder.absolute() / "__init__.py"
    if not name.isidentifier() or not init.is_file():
        raise LlmcError(f"{folder} is damaged: it has no __init__.py or no valid name ({name!r})")
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder.absolute())])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
