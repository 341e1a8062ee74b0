"""What the kernels of attention share: dtypes of states, parts of a head, the parameters that say what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmc.backends.triton.source import POINTERS
from llmc.ir.errors import LlmcError
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

FP8 = "f8e4m3"
COMPUTE = ("bf16", "f16", "f32")
STATES = ("bf16", "f16", "f32", FP8, "i8")
EIGHT_BITS = (FP8, "i8")
BLOCK_SIZES = (16, 32, 64)
WIDEST = 256
"""The largest head_dim."""

LEAST = 16
"""The least size of a dimension of a product on tensor cores."""


def state_pointer(dtype: str) -> str:
    """Triton's type of a pointer to elements of a state."""
    return "*fp8e4nv" if dtype == FP8 else POINTERS[DType(dtype)]


def head_parts(head_dim: int) -> tuple[int, int]:
    """A head as two powers of two, the second 0 where one is enough: 96 = 64 + 32. Tiles of Triton have such sizes, and
    to pad 96 to 128 would be a third more work. The last is padded to fit, to 32 at least: of fewer columns, four warps
    have not one tile of a product each."""
    first = max(LEAST, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return first, max(2 * LEAST, 1 << (rest - 1).bit_length()) if rest > 0 else 0


def reads_words(state_dtype: str, head_dim: int) -> bool:
    """Whether a kernel loads states of 8 bits four at a time."""
    return state_dtype in EIGHT_BITS and head_dim % 4 == 0


def semantics(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int,
    soft_cap: float,
    alibi: bool,
    sinks: bool,
    dtype: str,
    state_dtype: str,
    block_size: int,
) -> dict[str, Any]:
    """The parameters of a spec that say what is computed. Raises `LlmcError` for what no kernel computes."""
    for what, value, known in (
        ("compute dtype", dtype, COMPUTE),
        ("dtype of keys and values", state_dtype, STATES),
        ("block size", block_size, BLOCK_SIZES),
    ):
        if value not in known:
            raise LlmcError(f"attention on GPUs: {what} {value!r}; known: {', '.join(map(str, known))}")
    if not 0 < head_dim <= WIDEST or num_heads % num_kv_heads or scale <= 0:
        raise LlmcError(
            f"attention on GPUs: {num_heads} heads over {num_kv_heads} of {head_dim}, scale {scale}; heads are at most"
            f" {WIDEST} wide, in groups of one size, and scaled by a positive number"
        )
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "scale": float(scale),
        "window": int(window),
        "soft_cap": float(soft_cap),
        "alibi": bool(alibi),
        "sinks": bool(sinks),
        "dtype": dtype,
        "state_dtype": state_dtype,
        "block_size": block_size,
    }


def expects_fp8(parameters: Mapping[str, Any], target: GpuVariant | None) -> None:
    """Raise `LlmcError` where states are 8-bit floats and the architecture does not convert those."""
    if parameters["state_dtype"] == FP8 and target is not None and not target.has_fp8:
        raise LlmcError(f"keys and values in f8e4m3 need sm_89 or newer, and {target.name} is older; int8 works there")


def arguments(parameters: Mapping[str, Any], *inputs: str) -> tuple[tuple[str, str], ...]:
    """The pointers up to `out_ptr`: q, the states with their scales, `inputs` (i32), slopes and sinks."""
    state, scaled = state_pointer(parameters["state_dtype"]), parameters["state_dtype"] == "i8"
    return (
        ("q_ptr", POINTERS[DType(parameters["dtype"])]),
        ("key_ptr", state),
        ("value_ptr", state),
        *((("key_scale_ptr", "*fp32"), ("value_scale_ptr", "*fp32")) if scaled else ()),
        *((name, "*i32") for name in inputs),
        *((("slopes_ptr", "*fp32"),) if parameters["alibi"] else ()),
        *((("sinks_ptr", "*fp32"),) if parameters["sinks"] else ()),
        ("out_ptr", POINTERS[DType(parameters["dtype"])]),
    )


def constants(parameters: Mapping[str, Any], target: GpuVariant | None) -> tuple[tuple[str, int | float | bool], ...]:
    """The constants that say what is computed, and `PDL`."""
    first, second = head_parts(parameters["head_dim"])
    if first > 128 and parameters["dtype"] == "f32":  # operands of one product are in registers
        first = second = first // 2
    return (
        ("KV_HEADS", parameters["num_kv_heads"]),
        ("GROUP", parameters["num_heads"] // parameters["num_kv_heads"]),
        ("ROWS", parameters["rows"]),
        ("HEAD_DIM", parameters["head_dim"]),
        ("FIRST", first),
        ("SECOND", second),
        # 8 bits become f16 in fewer instructions than bf16: queries in bf16 are scaled into f16's range.
        ("HALVED", parameters["state_dtype"] in EIGHT_BITS and parameters["dtype"] == "bf16"),
        ("SCALE", parameters["scale"]),
        ("SOFT_CAP", parameters["soft_cap"]),
        ("ALIBI", parameters["alibi"]),
        ("WINDOW", parameters["window"]),
        ("BLOCK_SIZE", parameters["block_size"]),
        ("BLOCK_N", parameters["tile"]),
        ("STAGES", parameters["stages"]),
        ("WORDS", parameters["words"]),
        ("PDL", target is not None and target.has_dependent_launch),
    )
