"""Launches that also do what follows: quantize what they make, so that most activations are written once, as codes; or
note the largest logit. Each is its decomposition, from which the rule that finds it is traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.backends.tvm.tiled_ops import TiledGatedLinear, TiledLinear
from llmc.ir.op import Emitter, Op, Value


class _Tiles(Op, abstract=True):
    """An op whose last result is quantized in the same launch: its decomposition is the op and `quantize_tiles`."""

    stage = "step"
    result_count = 3

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        *first, last = self.plain(b, *values)
        return *first, *b.quantize_tiles(last)

    def plain(self, b: Emitter, *values: Value) -> tuple[Any, ...]:
        """The results before the last one is quantized."""
        raise NotImplementedError


@dataclass(frozen=True)
class RmsNormTiles(_Tiles):
    """`rms_norm`, quantized."""

    eps: float

    def plain(self, b: Emitter, *values: Value) -> tuple[Any, ...]:
        x, weight = values
        return (b.rms_norm(x, weight, eps=self.eps),)


@dataclass(frozen=True)
class AddRmsNormTiles(_Tiles):
    """`add_rms_norm`; the sum stays in float32, the normal is quantized."""

    eps: float

    result_count = 4

    def plain(self, b: Emitter, *values: Value) -> tuple[Any, ...]:
        x, residual, weight = values
        total, normal = b.add_rms_norm(x, residual, weight, eps=self.eps)
        return total, normal


@dataclass(frozen=True)
class LayerNormTiles(_Tiles):
    """`layer_norm`, quantized."""

    eps: float

    def plain(self, b: Emitter, *values: Value) -> tuple[Any, ...]:
        x, weight, bias = values
        return (b.layer_norm(x, weight, bias, eps=self.eps),)


@dataclass(frozen=True)
class AddLayerNormTiles(_Tiles):
    """`add_layer_norm`; the sum stays in float32, the normal is quantized."""

    eps: float

    result_count = 4

    def plain(self, b: Emitter, *values: Value) -> tuple[Any, ...]:
        x, residual, weight, bias = values
        total, normal = b.add_layer_norm(x, residual, weight, bias, eps=self.eps)
        return total, normal


@dataclass(frozen=True)
class TiledGatedLinearTiles(_Tiles):
    """`tiled_gated_linear`, quantized."""

    format: str
    rows: int
    width: int
    activation: str

    def plain(self, b: Emitter, *values: Value) -> tuple[Any, ...]:
        codes, scales, offsets, panels, panel_scales = values
        op = TiledGatedLinear(self.format, self.rows, self.width, self.activation)
        return (b(op, codes, scales, offsets, panels, panel_scales),)


@dataclass(frozen=True)
class TiledLinearTiles(_Tiles):
    """`tiled_linear` with a bias and an activation, quantized."""

    format: str
    rows: int
    width: int
    activation: str

    def plain(self, b: Emitter, *values: Value) -> tuple[Any, ...]:
        codes, scales, offsets, panels, panel_scales, bias = values
        op = TiledLinear(self.format, self.rows, self.width, True, self.activation)
        return (b(op, codes, scales, offsets, panels, panel_scales, bias),)


@dataclass(frozen=True)
class TiledLinearKeys(Op):
    """`tiled_linear` of logits, and their `panel_keys`. Results: logits f32 [m, rows], keys."""

    format: str
    rows: int
    width: int

    stage = "step"
    result_count = 2

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        codes, scales, offsets, panels, panel_scales = values
        op = TiledLinear(self.format, self.rows, self.width)
        logits = b(op, codes, scales, offsets, panels, panel_scales)
        return logits, b.panel_keys(logits)


TILE_FUSIONS: tuple[type[Op], ...] = (
    RmsNormTiles,
    LayerNormTiles,
    AddRmsNormTiles,
    AddLayerNormTiles,
    TiledGatedLinearTiles,
    TiledLinearTiles,
    TiledLinearKeys,
)
