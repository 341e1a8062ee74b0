"""Products with weights in blocks: one kernel, whose ends are chosen at compile time."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.packing import COLUMNS, ROWS, WORD_BYTES, blocks_of
from llmc.backends.triton.source import COMPUTE, POINTERS, PRECISION, KernelSource
from llmc.backends.triton.tiling import Tiling, uses_warps
from llmc.ir.errors import LlmcError
from llmc.ir.quant import FORMATS
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

MANY = 64
"""Tokens of a tile from which squares for the norm are added up by fours at once: they would not fit in registers."""

EARLY = 48 << 10
"""Bytes that a program asks for before the kernel before it has ended: with two programs on each of an H200's 132
multiprocessors 13 MB, which take 2.6 microseconds to come, and a quarter of its L2 cache."""

_DEFAULTS: dict[str, Any] = {
    "norm_eps": None,
    "bias": False,
    "activation": "none",
    "factor": 1.0,
    "soft_cap": 0.0,
    "epilogue": "store",
    "num_heads": 0,
    "num_kv_heads": 0,
    "head_dim": 2,
    "rotary_dim": 0,
    "layout": "half",
    "block_size": 1,
    "state_dtype": "f32",
    "out_dtype": "f32",
    "scale_weights": False,
}


def linear_spec(
    n: int,
    k: int,
    m: int,
    rows_dim: int,
    format: str,
    weight_dtype: DType,
    x_dtype: DType,
    compute: DType,
    tiling: Tiling,
    **options: Any,
) -> KernelSpec:
    """A product of x [m, k] with a weight [n, k]; `m` tokens at most, as many as `dims[rows_dim]`.

    `format`: of the weight, `none` or one of `llmc.ir.quant`; `weight_dtype` counts for `none`. Options: `norm_eps`
    (of an RMS norm of x f32 on the way in), `bias`, `activation`, `factor`, `soft_cap` (see `BlockLinear`), and
    `epilogue`: `store`, `residual`, `gated` or `append` (with `num_heads`, `num_kv_heads`, `head_dim`, `rotary_dim`,
    `layout`, `block_size`, `state_dtype`); `out_dtype`.
    `scale_weights`: weights are scaled before they are multiplied, not sums of products afterwards.
    """
    unknown = set(options) - set(_DEFAULTS)
    assert not unknown, unknown
    return KernelSpec.of(
        "linear",
        n=n,
        k=k,
        rows_dim=rows_dim,
        format=format,
        weight_dtype=weight_dtype.value,
        x_dtype=x_dtype.value,
        compute=compute.value,
        block_n=tiling.block_n,
        block_m=tiling.block_m,
        block_k=tiling.block_k,
        tiles_m=tiling.tiles_m(m),
        programs=tiling.programs,
        parts=tiling.parts(n, k, m),
        stages=tiling.stages,
        warps=tiling.warps,
        stream=tiling.tiles_m(m) == 1,
        **{**_DEFAULTS, **options},
    )


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """See `linear_spec`. Raises `LlmcError` where the architecture cannot read the format."""
    p: dict[str, Any] = dict(spec.parameters)
    compute = DType(p["compute"])
    format = FORMATS.get(p["format"])
    kind = "float" if format is None else "e4m3" if format.kind == "e4m3" else f"int{format.bits}"
    if target is not None and not target.has_fp8 and "e4m3" in (kind, p["state_dtype"].removeprefix("f8")):
        raise LlmcError(
            f"{target.name} has no 8-bit floats, which {p['format'] if kind == 'e4m3' else 'fp8 keys and values'} need:"
            " they come with sm_89; leave the architecture out, or take q8 weights and int8 keys and values"
        )
    assert p["block_k"] == COLUMNS or (format is None and 2 * p["block_k"] == COLUMNS), p
    assert format is None or format.group <= COLUMNS, p
    bits = format.bits if format else 8 * DType(p["weight_dtype"]).itemsize
    group = format.group if format else p["block_k"]
    columns = WORD_BYTES * 8 // bits if format else p["block_k"]  # of the words that are loaded at once
    span = min(group, columns)
    early = _prefetched(p, bits) if target and target.has_dependent_launch and p["stream"] else 0
    text = render(
        "triton/linear.py.jinja",
        name=spec.symbol,
        dequant=kind,
        compute=COMPUTE[compute],
        precision=PRECISION[compute],
        norm=p["norm_eps"] is not None,
        scaled=format is not None,
        halved=p["block_k"] < COLUMNS,
        many=p["block_m"] >= MANY,
        scale_weights=p["scale_weights"],
        bias=p["bias"],
        activation=p["activation"],
        epilogue=p["epilogue"],
        rotated=p["rotary_dim"] > 0,
        tail=p["k"] % p["block_k"] != 0,
        ragged=blocks_of(p["n"], ROWS) * ROWS % p["block_n"] != 0,
        stream=p["stream"],
        state=p["state_dtype"],
        prefetch=early > 0,
        chunk_bytes=ROWS * p["block_k"] * bits // 8,
        **_decoding(kind, bits, compute, target is not None, format is not None and _in_quads(p, target)),
    )
    return KernelSource(
        spec.symbol,
        text,
        tuple(_arguments(p, kind)),
        (
            ("N", p["n"]),
            ("K", p["k"]),
            ("BLOCK_N", p["block_n"]),
            ("BLOCK_M", p["block_m"]),
            ("BLOCK_K", p["block_k"]),
            ("TILES_M", p["tiles_m"]),
            ("PROGRAMS", p["programs"]),
            ("PARTS", p["parts"]),
            ("STAGES", p["stages"]),
            ("ROWS_DIM", p["rows_dim"]),
            ("GROUP", group),
            ("GROUPS", COLUMNS // group),
            ("SPAN", span),
            ("PIECES", columns // span),
            ("BLOCK", ROWS * COLUMNS * bits // 32 if format else ROWS * COLUMNS),
            ("EPS", p["norm_eps"] or 0.0),
            ("FACTOR", p["factor"]),
            ("SOFT_CAP", p["soft_cap"]),
            ("HEADS", p["num_heads"]),
            ("KV_HEADS", p["num_kv_heads"]),
            ("HEAD_DIM", p["head_dim"]),
            ("ROTARY_DIM", p["rotary_dim"]),
            ("INTERLEAVED", p["layout"] == "interleaved"),
            ("BLOCK_SIZE", p["block_size"]),
            ("PREFETCH", early),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
        num_warps=p["warps"],
        num_stages=p["stages"],
        weights=p["block_n"] * p["block_k"],
    )


def _decoding(kind: str, bits: int, compute: DType, assembly: bool, quads: bool) -> dict[str, Any]:
    """How codes in words become numbers in the dtype that products take, f16 where that is f32: constants of the
    templates in `dequant`, each number as it is and twice in a word.

    bf16 has 7 bits of mantissa and f16 has 10, so that 128, or 1024, + a code is made by putting the code there.
    """
    wide = compute is DType.BF16
    half = "tl.bfloat16" if wide else "tl.float16"
    order = ("0, 2, 4, 3, 1, 5", "0, 2, 4, 1, 3, 5") if bits == 4 else ("0, 2, 3, 1, 4", "0, 2, 1, 3, 4")
    magic = 128 if wide else 1024
    offset = 0 if kind == "float" or (kind == "int8" and wide) else magic + (1 << (bits - 1))
    factor = 2.0**120 if wide else 2.0**8
    return {
        "bits": bits,
        "wide": wide,
        "half": half,
        "pair": "bf16x2" if wide else "f16x2",
        "assembly": assembly,
        "quads": quads,
        "fragment": order[quads],
        "one": _twice(1.0, wide),
        "magic": _twice(magic, wide),
        "magic_value": magic,
        "offset": offset,
        "offset_bits": _twice(-offset, wide),
        "factor": factor,
        "factor_bits": _twice(factor, wide),
    }


def _twice(number: float, wide: bool) -> str:
    """A number's bits as bf16 (`wide`) or f16, in both halves of a word."""
    bits = np.array(number, DType.BF16.numpy if wide else np.float16)
    assert float(bits) == number, number
    return f"0x{int(bits.view(np.uint16)) * 0x10001:08X}"


def _in_quads(p: dict[str, Any], target: GpuVariant | None) -> bool:
    """Whether Triton has a thread multiply 4 neighbouring columns at a time, not 2 and 2: it does so for decoded
    weights in the matrix instructions of a warp, but not in those of four warps, which Hopper has."""
    return p["compute"] != DType.F32.value and target is not None and uses_warps(target, p["warps"])


def _arguments(p: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    weight = POINTERS[DType(p["weight_dtype"])] if kind == "float" else "*i32"
    state = POINTERS[DType(p["state_dtype"])]
    named = [("x_ptr", POINTERS[DType(p["x_dtype"])])]
    named += [("norm_ptr", "*fp32")] if p["norm_eps"] is not None else []
    named += [("weight_ptr", weight)]
    named += [("scale_ptr", "*fp16")] if kind != "float" else []
    named += [("bias_ptr", "*fp32")] if p["bias"] else []
    named += [("residual_ptr", "*fp32")] if p["epilogue"] == "residual" else []
    if p["epilogue"] == "append":
        named += [("cos_ptr", "*fp32"), ("sin_ptr", "*fp32")] if p["rotary_dim"] else []
        named += [("slot_ptr", "*i32"), ("key_ptr", state), ("value_ptr", state)]
    named += [("out_ptr", POINTERS[DType(p["out_dtype"])])]
    return [*named, ("workspace_ptr", "*fp32"), ("tickets_ptr", "*i32"), ("dims_ptr", "*i32")]


def _prefetched(p: dict[str, Any], bits: int) -> int:
    """Chunks that a program asks for before it waits: about as much as the memory brings during a launch."""
    chunk: int = p["block_n"] * p["block_k"] * bits // 8
    units = blocks_of(p["n"], p["block_n"]) * blocks_of(p["k"], p["block_k"])
    return min(blocks_of(units, p["programs"]), max(1, EARLY // chunk))
