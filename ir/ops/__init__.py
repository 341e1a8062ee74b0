"""The ops, by subject. Importing this package registers all of them."""

from llmc.ir.ops import (
    attention,
    cache,
    elementwise,
    embedding,
    experts,
    grouped,
    linear,
    norm,
    quantized,
    quantized_experts,
    reduce,
    rope,
    routing,
    shape,
)

__all__ = [
    "attention",
    "cache",
    "elementwise",
    "embedding",
    "experts",
    "grouped",
    "linear",
    "norm",
    "quantized",
    "quantized_experts",
    "reduce",
    "rope",
    "routing",
    "shape",
]
