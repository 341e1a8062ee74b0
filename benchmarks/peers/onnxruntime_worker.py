"""ONNX Runtime GenAI behind the protocol: int4 in groups of 32 with f32 scales. With arguments: convert a model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from benchmarks.peers.huggingface import convert_from_arguments, folder_bytes
from benchmarks.protocol import serve

OPTIONS = ("block_size=32", "accuracy_level=4")
"""Groups of 32 weights; activations are rounded to int8, which is the faster of its ways."""


def convert(source: Path, out: Path, bits: int) -> None:
    """By the model builder that comes with it; the head and the embeddings in int4 too."""
    assert bits == 4
    module = "onnxruntime_genai.models.builder"
    where = ["-i", str(source), "-o", str(out), "-c", str(out.with_name(out.name + "-cache"))]
    subprocess.run(
        [sys.executable, "-m", module, *where, "-p", "int4", "-e", "cpu", "--extra_options", *OPTIONS], check=True
    )


class OnnxRuntime:
    """See `protocol.System`."""

    def load(self, path: str, threads: int, longest: int) -> None:
        self._folder, self._threads = Path(path), threads
        config = onnxruntime_genai.Config(path)
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = onnxruntime_genai.Model(config)
        self._tokens = np.random.default_rng(0).integers(3, 32000, longest + 1).astype(np.int32)

    def facts(self) -> dict[str, Any]:
        return {
            "weights_bytes": folder_bytes(self._folder, ".onnx.data"),
            "lm_head": "int4",
            "kv_cache": "f32",
            "versions": {name: version(name) for name in ("onnxruntime", "onnxruntime-genai")},
            "settings": {"threads": self._threads, "options": " ".join(OPTIONS)},
        }

    def prefill(self, tokens: int) -> float:
        generator = self._generator(tokens + 1)
        start = time.perf_counter()
        generator.append_tokens(self._tokens[:tokens])
        generator.generate_next_token()
        return time.perf_counter() - start

    def decode(self, depth: int, steps: int, sequences: int) -> float:
        if sequences > 1:
            raise ValueError("one sequence at a time")
        # The prompt's own pass gives the first token, and a prompt has at least one.
        prompt = max(depth, 1)
        generator = self._generator(prompt + steps + 1)
        generator.append_tokens(self._tokens[:prompt])
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        return time.perf_counter() - start

    def _generator(self, length: int) -> Any:
        how = onnxruntime_genai.GeneratorParams(self._model)
        how.set_search_options(do_sample=False, max_length=length, min_length=length)
        return onnxruntime_genai.Generator(self._model, how)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        convert_from_arguments(convert)
    else:
        serve(OnnxRuntime())
