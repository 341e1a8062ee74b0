"""Weights: the strict match with a checkpoint, tied tensors, random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llmc.importers.json_file import ImportFailure
from llmc.importers.safetensors import SafetensorsFile
from llmc.importers.weights import CheckpointParameters, RandomParameters, random_tensor
from llmc.ir.types import DType


def checkpoint(folder: Path, arrays: dict[str, Any], **options: Any) -> CheckpointParameters:
    save_file(arrays, folder / "x.safetensors")
    return CheckpointParameters(SafetensorsFile(folder / "x.safetensors"), "the checkpoint", **options)


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


def test_a_match(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, {"a": ones(2, 3), "b": ones(4, dtype=ml_dtypes.bfloat16)})
    assert source.declare("a", (2, 3), "normal") == ("a", DType.F32)
    assert source.declare("b", (4,), "ones") == ("b", DType.BF16)
    assert source.declare("a", (2, 3), "normal") == ("a", DType.F32)
    weights = source.weights()
    assert (weights.num_parameters, weights.bytes, list(weights)) == (10, 32, ["a", "b"])
    assert weights.load("b").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.0.q", (2, 3), r"the checkpoint lacks the tensor 'layers.0.q' \[2, 3\]; the nearest .* 'layers.0.k'"),
        ("layers.0.k", (3, 2), r"tensor 'layers.0.k': the shape must be \[3, 2\], given \[2, 3\]"),
        ("ids", (2,), "tensor 'ids': the dtype must be F32, F16 or BF16, given I64"),
    ],
)
def test_a_mismatch(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    source = checkpoint(tmp_path, {"layers.0.k": ones(2, 3), "ids": ones(2, dtype=np.int64)})
    with pytest.raises(ImportFailure, match=message):
        source.declare(name, shape, "normal")


def test_unused_tensors(tmp_path: Path) -> None:
    arrays = {"a": ones(1), "m.0.inv_freq": ones(1), "m.0.more": ones(1)}
    source = checkpoint(tmp_path, arrays, unused=["*.inv_freq"])
    source.declare("a", (1,), "normal")
    with pytest.raises(ImportFailure, match=r"does not use the tensor 'm\.0\.more'; the description lacks"):
        source.weights()
    source.declare("m.0.more", (1,), "normal")
    assert set(source.weights()) == {"a", "m.0.more"}


def test_an_optional_prefix(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, {"h.a": ones(1)}, optional_prefix="model.")
    assert source.declare("model.h.a", (1,), "normal")[0] == "h.a"
    source = checkpoint(tmp_path, {"model.h.a": ones(1)}, optional_prefix="model.")
    assert source.declare("model.h.a", (1,), "normal")[0] == "model.h.a"


def test_tied_tensors(tmp_path: Path) -> None:
    assert checkpoint(tmp_path, {"table": ones(2)}).tie("head", "table") == "table"
    assert checkpoint(tmp_path, {"head": ones(2)}).tie("head", "table") == "head"
    both = checkpoint(tmp_path, {"table": ones(2), "head": ones(2)})
    assert both.tie("head", "table") == "table"
    both.declare("table", (2,), "normal")
    assert list(both.weights()) == ["table"]
    with pytest.raises(ImportFailure, match="'head' and 'table' are stored both and differ"):
        checkpoint(tmp_path, {"table": ones(2), "head": 2 * ones(2)}).tie("head", "table")


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_random_tensors(dtype: DType) -> None:
    a = random_tensor("a", (300, 200), dtype, "normal")
    assert a.dtype == dtype.numpy and a.shape == (300, 200)
    assert (a == random_tensor("a", (300, 200), dtype, "normal")).all()
    assert (a != random_tensor("b", (300, 200), dtype, "normal")).mean() > 0.9
    wide = a.astype(np.float64)
    assert wide.std() == pytest.approx(0.02, rel=0.02) and abs(wide.mean()) < 0.001
    assert random_tensor("n", (5000,), dtype, "ones").astype(np.float64).mean() == pytest.approx(1.0, abs=0.01)


def test_random_tensors_are_drawn_in_parts_and_late() -> None:
    source = RandomParameters(DType.F16, "c.json")
    source.declare("huge", (1 << 20, 1 << 20), "normal")  # 2 TB: nothing is drawn
    source.declare("a", (5_000_000,), "normal")
    weights = source.weights()
    assert weights.num_parameters == (1 << 40) + 5_000_000
    tail = weights.load("a")[1 << 22 :].astype(np.float64)
    assert tail.std() == pytest.approx(0.02, rel=0.02)
    with pytest.raises(ImportFailure, match=r"c\.json: more than .* which is absurd"):
        source.declare("more", (1 << 22, 1 << 20), "normal")
