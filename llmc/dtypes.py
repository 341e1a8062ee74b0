"""In which dtypes a target computes and keeps what it computes."""

from __future__ import annotations

from llmc.ir.errors import LlmcError, nearest
from llmc.ir.graph import Graph
from llmc.ir.quant import FORMATS
from llmc.ir.target import Target
from llmc.ir.types import DType
from llmc.options import CPU_KV_DTYPES, KV_DTYPES
from llmc.passes.quantize import NONE, Quantize


def compute_dtype(graph: Graph, quant: Quantize | None, target: Target) -> DType:
    """What activations are rounded to where they enter a product: f32 on a CPU. On a GPU the 16-bit dtype of the
    weights, since its matrix units take two operands of one dtype; f32 where weights are kept in f32."""
    dtypes = {v.type.dtype for v in graph.params}
    if target.kind == "cpu" or (quant is None and not dtypes & {DType.BF16, DType.F16}):
        return DType.F32
    return DType.F16 if DType.F16 in dtypes and DType.BF16 not in dtypes else DType.BF16


def check_8_bit_floats(quant: Quantize | None, kv_quant: str | None, target: Target) -> None:
    """Raise `LlmcError` where weights or keys and values are asked for in a dtype that an architecture has not."""
    formats = () if quant is None else (quant.format, quant.head, quant.embedding)
    asked = ["--quant fp8"] if any(f in FORMATS and FORMATS[f].kind == "e4m3" for f in formats) else []
    asked += ["--kv-quant fp8"] if kv_quant == "fp8" else []
    lacking = [v.name for v in target.gpu_variants if not v.has_fp8]
    if asked and lacking:
        raise LlmcError(
            f"{' and '.join(asked)}: {', '.join(lacking)} cannot read 8-bit floats, which come with sm_89; leave"
            f" {'it' if len(lacking) == 1 else 'them'} out of --target, or take --quant q8 and --kv-quant int8"
        )


def check_kv_quant(given: str | None, target: Target) -> None:
    """Raise `LlmcError` unless the target has kernels for such a KV cache, naming those that it has."""
    choices = [NONE, *(CPU_KV_DTYPES if target.kind == "cpu" else KV_DTYPES)]
    if given is None or given in choices:
        return
    if given in KV_DTYPES:
        raise LlmcError(f"--kv-quant {given} is for GPU targets only; a CPU target takes {', '.join(choices)}")
    raise LlmcError(f"--kv-quant {given}: {nearest(given, choices)}")


def kv_dtype(given: str | None, graph: Graph, target: Target, compute: DType) -> DType:
    """The KV cache's dtype: as asked (see `check_kv_quant`), else on a CPU f16 (f32 for a model whose weights are f32),
    on a GPU that of activations."""
    if given not in (None, NONE):
        return KV_DTYPES[str(given)]
    if target.kind == "cuda":
        return compute
    return DType.F32 if all(v.type.dtype is DType.F32 for v in graph.params) else DType.F16
