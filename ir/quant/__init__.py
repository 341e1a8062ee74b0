"""Quantization formats: name, bits, layout, pack, unpack and error bound."""
