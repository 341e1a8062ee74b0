"""The joint projection taken apart: queries and keys normalised and rotated, keys and values written to their slots."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.kernels.attention_parts import COMPUTE, STATES, expects_fp8, state_pointer
from llmc.backends.triton.kernels.common import power_of_two
from llmc.backends.triton.source import POINTERS, KernelSource
from llmc.ir.errors import LlmcError
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

_PER_THREAD = 16
"""Elements of a tile in one thread, as in `norm`, where a program has all heads."""


def append_spec(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    layout: str,
    input_dtype: str,
    dtype: str,
    state_dtype: str,
    block_size: int,
    norm: str = "none",
    norm_eps: float = 0.0,
    whole: bool = False,
) -> KernelSpec:
    """`rotary_dim` 0: nothing is rotated, and there are no cos and sin; `input_dtype` of qkv, `dtype` of q. `norm`, of
    queries and of keys before the rotation: `none`, `rms` or `layer`, over each head, or over all together where
    `whole`. Raises `LlmcError` for dtypes that no kernel has."""
    assert norm in ("none", "rms", "layer"), norm
    if input_dtype not in COMPUTE or dtype not in COMPUTE or state_dtype not in STATES:
        raise LlmcError(f"appending {input_dtype} to a cache of {state_dtype}, queries in {dtype}: no kernel does that")
    return KernelSpec.of(
        "rope_append",
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        layout=layout,
        input_dtype=input_dtype,
        dtype=dtype,
        state_dtype=state_dtype,
        block_size=block_size,
        norm=norm,
        norm_eps=norm_eps,
        whole=whole,
    )


def heads_of_program(num_heads: int, head_dim: int, whole: bool) -> tuple[int, int]:
    """The tile of a program, heads and elements of one, as powers of two."""
    return power_of_two(num_heads) if whole else 1, power_of_two(head_dim)


def grid(spec: KernelSpec, tokens: int) -> tuple[int, int, int]:
    """The grid of a bucket of so many tokens."""
    p = dict(spec.parameters)
    return tokens, 3 if p["whole"] else p["num_heads"] + 2 * p["num_kv_heads"], 1


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """Arguments: qkv, [weights for queries and keys, [biases,]] [cos, sin,] slot_mapping, key, value, [key_scale,
    value_scale,] q, dims; the states are changed in place. Parameters: see `append_spec`. Raises `LlmcError` for 8-bit
    floats where the architecture has none."""
    parameters = dict(spec.parameters)
    expects_fp8(parameters, target)
    rotated, scaled = parameters["rotary_dim"] > 0, parameters["state_dtype"] == "i8"
    state = state_pointer(parameters["state_dtype"])
    norm = "" if parameters["norm"] == "none" else parameters["norm"]
    vectors = {"": (), "rms": ("weight",), "layer": ("weight", "bias")}[norm]
    height, width = heads_of_program(parameters["num_heads"], parameters["head_dim"], parameters["whole"])
    return KernelSource(
        spec.symbol,
        render("triton/rope_append.py.jinja", name=spec.symbol, norm=norm, rotated=rotated, scaled=scaled),
        (
            ("qkv_ptr", POINTERS[DType(parameters["input_dtype"])]),
            *((f"{of}_{vector}_ptr", "*fp32") for vector in vectors for of in ("query", "key")),
            *((("cos_ptr", "*fp32"), ("sin_ptr", "*fp32")) if rotated else ()),
            ("slots_ptr", "*i32"),
            ("key_ptr", state),
            ("value_ptr", state),
            *((("key_scale_ptr", "*fp32"), ("value_scale_ptr", "*fp32")) if scaled else ()),
            ("q_ptr", POINTERS[DType(parameters["dtype"])]),
            ("dims_ptr", "*i32"),
        ),
        (
            ("HEADS", parameters["num_heads"]),
            ("KV_HEADS", parameters["num_kv_heads"]),
            ("HEAD_DIM", parameters["head_dim"]),
            ("H", height),
            ("D", width),
            ("ROTARY_DIM", parameters["rotary_dim"]),
            ("INTERLEAVED", parameters["layout"] == "interleaved"),
            ("EPSILON", parameters["norm_eps"]),
            ("WHOLE", parameters["whole"]),
            ("BLOCK_SIZE", parameters["block_size"]),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
        num_warps=max(1, min(16, height * width // (32 * _PER_THREAD))) if parameters["whole"] else 1,
    )
