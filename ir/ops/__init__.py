"""The ops, by subject. Importing this package registers all of them."""

from llmc.ir.ops import attention, cache, elementwise, embedding, grouped, linear, norm, quantized, reduce, rope, shape

__all__ = [
    "attention",
    "cache",
    "elementwise",
    "embedding",
    "grouped",
    "linear",
    "norm",
    "quantized",
    "reduce",
    "rope",
    "shape",
]
