"""What look-ups cost: the rows that are asked for, however large the table is."""

from __future__ import annotations

from llmc.backends.tvm.ops import PackedEmbedding
from llmc.backends.tvm.tiled_ops import TiledEmbedding
from llmc.ir.types import DType, TensorType

IDS = TensorType(DType.I32, (3,))
RESULT = 3 * 64 * 4


def test_rows_of_a_packed_table() -> None:
    table = TensorType(DType.BF16, (100, 64, 16))
    cost = PackedEmbedding(1600).cost(IDS, table)
    assert (cost.bytes_read, cost.bytes_written) == (3 * 4 + 3 * 64 * 2, RESULT)


def test_rows_of_a_quantized_table() -> None:
    codes, scales = TensorType(DType.U8, (100, 2, 4, 16, 4)), TensorType(DType.F16, (100, 2, 16))
    cost = TiledEmbedding("q4", 1600, 64).cost(IDS, codes, scales)
    assert (cost.bytes_read, cost.bytes_written) == (3 * 4 + 3 * (64 // 2 + 2 * 2), RESULT)
