"""Products with weights in blocks: one kernel, whose ends are chosen at compile time."""

from __future__ import annotations

from typing import Any

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.packing import COLUMNS, ROWS, blocks_of
from llmc.backends.triton.source import COMPUTE, POINTERS, PRECISION, KernelSource
from llmc.backends.triton.tiling import Tiling
from llmc.ir.errors import LlmcError
from llmc.ir.quant import FORMATS
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

_DEFAULTS: dict[str, Any] = {
    "norm_eps": None,
    "bias": False,
    "activation": "none",
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
    (of an RMS norm of x f32 on the way in), `bias`, `activation`, and `epilogue`: `store`, `residual`, `gated` or
    `append` (with `num_heads`, `num_kv_heads`, `head_dim`, `rotary_dim`, `layout`, `block_size`, `state_dtype`);
    `out_dtype`.
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
    group = format.group if format else p["block_k"]
    text = render(
        "triton/linear.py.jinja",
        name=spec.symbol,
        dequant=kind,
        compute=COMPUTE[compute],
        precision=PRECISION[compute],
        norm=p["norm_eps"] is not None,
        scaled=format is not None,
        scale_weights=p["scale_weights"],
        bias=p["bias"],
        activation=p["activation"],
        epilogue=p["epilogue"],
        rotated=p["rotary_dim"] > 0,
        tail=p["k"] % p["block_k"] != 0,
        ragged=blocks_of(p["n"], ROWS) * ROWS % p["block_n"] != 0,
        stream=p["stream"],
        block_bytes=ROWS * COLUMNS * (format.bits if format else 8 * DType(p["weight_dtype"]).itemsize) // 8,
        state=p["state_dtype"],
        assembly=target is not None and not p["scale_weights"],
        **_codes(kind, compute),
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
            ("EPS", p["norm_eps"] or 0.0),
            ("HEADS", p["num_heads"]),
            ("KV_HEADS", p["num_kv_heads"]),
            ("HEAD_DIM", p["head_dim"]),
            ("ROTARY_DIM", p["rotary_dim"]),
            ("INTERLEAVED", p["layout"] == "interleaved"),
            ("BLOCK_SIZE", p["block_size"]),
            ("PREFETCH", _prefetched(p) if target and target.has_dependent_launch and p["stream"] else 0),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
        num_warps=p["warps"],
        num_stages=p["stages"],
        weights=p["block_n"] * p["block_k"],
    )


def _codes(kind: str, compute: DType) -> dict[str, Any]:
    """How codes become numbers in the dtype that products take: by what they come out too large (`offset`), and in two
    halves or one. bf16 has 7 bits of mantissa, so that 128 + a code of 4 bits is exact; f16 has 10."""
    wide = compute is DType.BF16
    one, magic, half = (128, "0x43004300", "tl.bfloat16") if wide else (1024, "0x64006400", "tl.float16")
    values = {"halves": False, "offset": 0, "half": half, "magic": magic, "magic_value": one, "mask": "0x000F000F"}
    if kind == "int4":
        return {**values, "offset": one + 8}
    if kind == "int8" and wide:
        # (128 + low) + 16 · (128 + high) is code + 17 · 128, and a code is 128 too large.
        return {**values, "halves": True, "offset": 18 * 128}
    return {**values, "offset": one + 128, "mask": "0x00FF00FF"} if kind == "int8" else values


def _arguments(p: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    weight = {"float": POINTERS[DType(p["weight_dtype"])], "e4m3": "*u8"}.get(kind, "*i32")
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


def _prefetched(p: dict[str, Any]) -> int:
    """Blocks that a program asks for before it waits: its first pieces, as many as it has loads in flight."""
    units = blocks_of(p["n"], p["block_n"]) * blocks_of(p["k"], p["block_k"])
    pieces: int = min(blocks_of(units, p["programs"]), p["stages"]) * p["block_k"] // COLUMNS
    return max(1, pieces)
