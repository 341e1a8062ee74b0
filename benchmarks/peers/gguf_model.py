"""Write a GGUF of random weights for a config.json: what llama.cpp reads. Runs where the `gguf` package is installed.

Run: python -m benchmarks.peers.gguf_model CONFIG.json OUT.gguf --bits 4|8
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from benchmarks.peers.shapes import Shape, head_dim, parameters, rope_factors, tensors

TYPES = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}
FILE_TYPES = {4: 2, 8: 7}
"""`general.file_type`, llama.cpp's LLAMA_FTYPE_MOSTLY_Q4_0 and _Q8_0."""
GROUP = 32
STANDARD_DEVIATION = 0.02
CHUNK = 1 << 19
"""Blocks drawn at a time: some megabytes."""


def write_model(config: dict[str, Any], path: Path, bits: int) -> None:
    """Every matrix, the embeddings too, in Q4_0 or Q8_0; norms and rotary factors in f32.

    Written piece by piece, so memory stays low; the file appears when it is whole.

    Raises `ValueError` for a matrix whose rows are no multiple of 32.
    """
    partial = path.with_suffix(".partial")
    writer = GGUFWriter(str(partial), "llama")
    _describe(writer, config, bits)
    table = tensors(config)
    for name, shape in table:
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            if shape[1] % GROUP:
                raise ValueError(f"{name} has rows of {shape[1]}, expected a multiple of {GROUP}")
            stored = (shape[0], _row_bytes(shape, bits))
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=TYPES[bits])
    factors = rope_factors(config)
    if factors:
        writer.add_tensor_info("rope_freqs.weight", (len(factors),), np.dtype(np.float32), 4 * len(factors))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    assert writer.fout is not None
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    for _, shape in table:
        if len(shape) == 1:
            size = out.write(np.ones(shape, np.float32).tobytes())
        else:
            size = 0
            blocks = shape[0] * shape[1] // GROUP
            for start in range(0, blocks, CHUNK):
                size += out.write(_blocks(rng, min(CHUNK, blocks - start), bits))
        writer.write_padding(out, size)
    if factors:
        size = out.write(np.array(factors, np.float32).tobytes())
        writer.write_padding(out, size)
    writer.close()
    partial.rename(path)


def _row_bytes(shape: Shape, bits: int) -> int:
    return shape[1] // GROUP * (2 + GROUP * bits // 8)


def _blocks(rng: np.random.Generator, count: int, bits: int) -> bytes:
    """Blocks of 32 weights: an f16 scale, then unsigned nibbles that mean n - 8, or signed bytes.

    Source of the layout: llama.cpp, ggml-common.h, `block_q4_0` and `block_q8_0`.
    """
    payload = GROUP * bits // 8
    block = np.empty(count, np.dtype([("scale", "<f2"), ("values", "u1", (payload,))]))
    # Uniform integers of 4 bits have a standard deviation of 4.6, of 8 bits 74.
    scale = STANDARD_DEVIATION * math.sqrt(12) / (1 << bits)
    block["scale"] = (scale * rng.uniform(0.5, 1.5, count)).astype(np.float16)
    block["values"] = np.frombuffer(rng.bytes(count * payload), np.uint8).reshape(count, payload)
    return block.tobytes()


def _describe(writer: GGUFWriter, config: dict[str, Any], bits: int) -> None:
    writer.add_name("random")
    writer.add_file_type(FILE_TYPES[bits])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    # Tokens go in and out as numbers, so no vocabulary is needed.
    writer.add_tokenizer_model("no_vocab")


def main() -> None:
    """Write the file, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=sorted(TYPES), required=True)
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    if not options.out.exists():
        write_model(config, options.out, options.bits)
    print(f"{options.out}: {parameters(config):,} parameters, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
