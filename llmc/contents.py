"""What goes into a package beside kernels and weights: manifest, plan, runtime, graphs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llmc import __version__
from llmc.backends.base import Kernels
from llmc.backends.package import LAUNCHER
from llmc.backends.render import render
from llmc.importers.hf import ImportedModel
from llmc.ir.graph import Graph, StateInput
from llmc.ir.printer import INLINE
from llmc.ir.target import Target
from llmc.ir.types import DType

RUNTIME = Path(__file__).parent / "runtime"


def make_manifest(
    name: str,
    imported: ImportedModel,
    kernels: Kernels,
    formats: Mapping[str, str],
    kv_dtype: DType,
    target: Target,
    versions: Mapping[str, str],
    sizes: Mapping[str, int],
    tuned: Sequence[str] = (),
) -> dict[str, Any]:
    """manifest.json, but for the files' hashes. `formats`: see `quantization.described`; `tuned`: the architectures
    some of whose tilings were measured."""
    info = imported.info
    packages = ["numpy", "tokenizers"] if imported.tokenizer_files else ["numpy"]
    return {
        "name": name,
        "llmc_version": __version__,
        "model": {k: v for k, v in asdict(info).items() if k not in ("generation", "chat_templates")},
        "generation": dict(info.generation),
        "target": {
            "kind": target.kind,
            "machine": target.machine,
            "variants": list(kernels.variants),
            **(_of_gpus(kernels, tuned) if target.kind == "cuda" else {}),
        },
        "quantization": {
            **formats,
            "kv": kv_dtype.value,
            "bits_per_weight": round(8 * sizes["weights"] / max(1, info.num_parameters), 3),
        },
        "requires": {"python": ">=3.10", "packages": packages, "glibc": "2.28"},
        "sizes": dict(sizes),
        "versions": dict(versions),
    }


def _of_gpus(kernels: Kernels, tuned: Sequence[str]) -> dict[str, Any]:
    """What only a target of GPUs has."""
    return {"launcher": LAUNCHER if LAUNCHER in kernels.files else None, "tuned": list(tuned)}


def runtime_files(name: str) -> dict[str, bytes]:
    """The runtime, copied verbatim, and the package's own two small modules."""
    files = {f"runtime/{p.name}": p.read_bytes() for p in sorted(RUNTIME.glob("*.py"))}
    files["runtime/py.typed"] = b""
    for module in ("__init__.py", "__main__.py"):
        files[module] = render(f"package/{module}.jinja", name=name, version=__version__).encode()
    return files


def graph_files(graphs: Mapping[str, Graph]) -> dict[str, bytes]:
    """The graph at each stage as text, for `llmc inspect` and `llmc verify`, with its large constants beside it."""
    files = {f"graph/{stage}.ir": str(graph).encode() for stage, graph in graphs.items()}
    for graph in graphs.values():
        for digest, data in graph.constants.items():
            if data.array.size > INLINE:
                buffer = io.BytesIO()
                np.save(buffer, data.array)
                files[f"graph/{digest}.npy"] = buffer.getvalue()
    return files


def state_sizes(step: Graph, block_size: int) -> dict[str, int]:
    """Bytes of state: `kv_bytes_per_token` for each token of context in layers that keep all of them, and
    `kv_bytes_of_windows` for the last tokens of a sequence in the others, when they fill their windows."""
    sizes = {"kv_bytes_per_token": 0, "kv_bytes_of_windows": 0}
    for value in step.states:
        assert isinstance(value.op, StateInput)
        elements = 1
        for dim in value.type.shape[1:]:
            assert isinstance(dim, int)
            elements *= dim
        token = elements * value.type.dtype.itemsize // block_size
        window = value.op.state.window
        sizes["kv_bytes_of_windows" if window else "kv_bytes_per_token"] += token * (window or 1)
    return sizes
