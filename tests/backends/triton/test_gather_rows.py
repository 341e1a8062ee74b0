from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.backends.base import KernelSpec
from llmc.backends.triton.kernels import source_of
from tests.backends.triton.interpreter import TARGET, run


@pytest.mark.parametrize("width", [8, 1500])
def test_rows_are_gathered_and_padding_is_not_written(width: int) -> None:
    random = np.random.default_rng(width)
    x = torch.from_numpy(random.standard_normal((7, width)).astype(np.float32))
    rows = torch.tensor([5, 0, 6, -(2**30)], dtype=torch.int32)
    out = torch.full((4, width), torch.nan)
    source = source_of(KernelSpec.of("gather_rows", width=width, dtype="f32"), TARGET)
    dims = torch.tensor([7, 1, 1, 3], dtype=torch.int32)
    run(source, (4, -(-width // 1024), 1), {"x_ptr": x, "rows_ptr": rows, "out_ptr": out, "dims_ptr": dims})
    assert torch.equal(out[:3], x[[5, 0, 6]])
    assert out[3].isnan().all()
