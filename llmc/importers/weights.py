"""Weights: parameter labels and their lazy sources, and the strict match between a description and a checkpoint."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np

from llmc.architectures.context import Initial, Parameters
from llmc.importers.json_file import ImportFailure
from llmc.importers.safetensors import DTYPES, StoredTensor
from llmc.ir.op import Array
from llmc.ir.types import DType

MAX_PARAMETERS = 1 << 42
"""More parameters than this are refused before anything is allocated."""
FLOATS = (DType.F32, DType.F16, DType.BF16)
_CHUNK = 1 << 22


@dataclass(frozen=True)
class WeightSource:
    """One parameter's tensor, not yet read. `load()` gives it in its storage dtype. `counted`: as one of the model's
    parameters, which a buffer is not."""

    dtype: DType
    shape: tuple[int, ...]
    origin: str
    load: Callable[[], Array]
    counted: bool = True

    @property
    def bytes(self) -> int:
        """Bytes in storage."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightMap(Mapping[str, WeightSource]):
    """Parameter label -> `WeightSource`; `load` reads one tensor, and nothing is kept."""

    def __init__(self, sources: Mapping[str, WeightSource]) -> None:
        self._sources = dict(sources)

    def __getitem__(self, label: str) -> WeightSource:
        return self._sources[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def load(self, label: str) -> Array:
        """One tensor in its storage dtype (bf16 by ml_dtypes)."""
        return self._sources[label].load()

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors but buffers."""
        return sum(math.prod(s.shape) for s in self._sources.values() if s.counted)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in storage."""
        return sum(s.bytes for s in self._sources.values())


class _Source(Parameters):
    """What both kinds of source share: the tensors declared so far, and the limit on their number of elements."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._declared: dict[str, WeightSource] = {}
        self._elements = 0

    def declare(self, name: str, shape: tuple[int, ...], initial: Initial) -> tuple[str, DType]:
        label = self._label(name)
        if label not in self._declared:
            self._elements += math.prod(shape)
            if self._elements > MAX_PARAMETERS:
                raise ImportFailure(
                    f"{self._source}: more than {MAX_PARAMETERS} parameters (the count ends at {name!r} {list(shape)}),"
                    " which is absurd: check the sizes in the configuration"
                )
            self._declared[label] = self._find(label, shape, initial)
        return label, self._declared[label].dtype

    def tie(self, name: str, to: str) -> str:
        return to

    def weights(self) -> WeightMap:
        """What was declared. Raises when the source has tensors that nothing declared."""
        return WeightMap(self._declared)

    def _label(self, name: str) -> str:
        return name

    @abstractmethod
    def _find(self, label: str, shape: tuple[int, ...], initial: Initial) -> WeightSource: ...


class CheckpointParameters(_Source):
    """Parameters from a checkpoint's tensors, matched strictly.

    `optional_prefix` is a part of names that the checkpoint may lack; `unused` are patterns of tensors that it may have
    although nothing reads them.
    """

    def __init__(
        self, tensors: Mapping[str, StoredTensor], source: str, unused: Iterable[str] = (), optional_prefix: str = ""
    ) -> None:
        super().__init__(source)
        self._tensors = tensors
        self._unused = list(unused)
        self._prefix = optional_prefix
        self._stripped = bool(optional_prefix) and not any(name.startswith(optional_prefix) for name in tensors)
        self._ties: dict[str, str] = {}

    def tie(self, name: str, to: str) -> str:
        """Where both are stored they must be equal; where one is, it is the one."""
        first, second = self._tensors.get(self._label(name)), self._tensors.get(self._label(to))
        if first is None:
            return to
        if second is None:
            return name
        if (first.dtype, first.shape) != (second.dtype, second.shape) or first.data != second.data:
            raise ImportFailure(
                f"{first.file}: {first.name!r} and {second.name!r} are stored both and differ, but the configuration"
                " says that they are one (tie_word_embeddings); set it to false to use both"
            )
        self._unused.append(first.name)
        return to

    def weights(self) -> WeightMap:
        known = {t.name for t in self._tensors.values()} - set(self._declared)
        idle = sorted(n for n in known if not any(fnmatchcase(n, pattern) for pattern in self._unused))
        if idle:
            more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
            raise ImportFailure(
                f"{self._tensors[idle[0]].file}: the model does not use the tensor"
                f" {', '.join(map(repr, idle[:3]))}{more}; the description lacks a block or a bias that"
                " reads it, or, if nothing does, its name in 'unused_tensors'"
            )
        return super().weights()

    def _label(self, name: str) -> str:
        return name.removeprefix(self._prefix) if self._stripped else name

    def _find(self, label: str, shape: tuple[int, ...], initial: Initial) -> WeightSource:
        tensor = self._tensors.get(label)
        if tensor is None:
            close = get_close_matches(label, sorted(set(self._tensors) - set(self._declared)), n=1, cutoff=0.0)
            hint = f"; the nearest that it has is {close[0]!r}" if close else ""
            raise ImportFailure(f"{self._source} lacks the tensor {label!r} {list(shape)}{hint}")
        where = f"{tensor.file}, tensor {label!r}"
        dtype = DTYPES.get(tensor.dtype)
        if dtype not in FLOATS or dtype is None:
            raise ImportFailure(f"{where}: the dtype must be F32, F16 or BF16, given {tensor.dtype}")
        if tensor.shape != shape:
            raise ImportFailure(f"{where}: the shape must be {list(shape)}, given {list(tensor.shape)}")
        return WeightSource(dtype, shape, str(tensor.file), tensor.load, initial != "buffer")


class RandomParameters(_Source):
    """Random weights, drawn per tensor from its name: the same for every import, made only when loaded."""

    def __init__(self, dtype: DType, source: str) -> None:
        super().__init__(source)
        self._dtype = dtype

    def _find(self, label: str, shape: tuple[int, ...], initial: Initial) -> WeightSource:
        dtype = self._dtype
        return WeightSource(
            dtype, shape, "random", lambda: random_tensor(label, shape, dtype, initial), initial != "buffer"
        )


def random_tensor(name: str, shape: tuple[int, ...], dtype: DType, initial: Initial) -> Array:
    """A tensor for its name: matrices N(0, 0.02²), norm weights near 1, biases near 0."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    draw = np.random.Generator(np.random.SFC64(seed))
    result = np.empty(math.prod(shape), dtype.numpy)
    mean, deviation = (1.0, 0.01) if initial == "ones" else (0.0, 0.02)
    for start in range(0, len(result), _CHUNK):  # a float32 copy of a whole tensor would take twice its memory
        part = draw.standard_normal(min(_CHUNK, len(result) - start), dtype=np.float32)
        part *= np.float32(deviation)
        part += np.float32(mean)
        result[start : start + _CHUNK] = part.astype(dtype.numpy)
    return result.reshape(shape)
