"""Large constants beside a graph's text: one `<sha256>.npy` each, read when the text names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph
from llmc.ir.op import ConstantData
from llmc.ir.printer import INLINE
from llmc.ir.types import DType

_STORED = {"|V2": DType.BF16.numpy, "|V1": DType.F8E4M3.numpy}
"""What numpy reads of types that it does not know, and the types."""


class ConstantFolder(Mapping[str, ConstantData]):
    """The constants of a folder by sha256. Raises `LlmcError` for a file that is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, digest: str) -> ConstantData:
        path = self._path(digest)
        if not path.is_file():
            raise KeyError(digest)
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise LlmcError(f"cannot read the constant {path}: {error}") from None
        data = ConstantData(array.view(_STORED.get(array.dtype.str, array.dtype)))
        if data.sha256 != digest:
            raise LlmcError(f"the constant {path} is damaged: its sha256 is {data.sha256}")
        return data

    def __iter__(self) -> Iterator[str]:
        return (p.stem for p in sorted(self.folder.glob("*.npy")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and self._path(digest).is_file()

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest if digest.isalnum() else 'none'}.npy"


def store_constants(graph: Graph, folder: Path) -> None:
    """Write what the graph's text names by sha256 and the folder does not have yet."""
    for digest, data in graph.constants.items():
        path = folder / f"{digest}.npy"
        if data.array.size > INLINE and not path.exists():
            np.save(path, data.array)
