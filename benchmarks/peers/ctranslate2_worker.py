"""CTranslate2 behind the protocol: int8 weights, one scale for each row. With arguments: convert a model.

It gives logits through `generate_batch`; its callback tells when each token is there. The first one's time is the
prompt's, as the prompt is read in one pass.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np

from benchmarks.peers.huggingface import TOKEN, convert_from_arguments, folder_bytes
from benchmarks.protocol import serve


def convert(source: Path, out: Path, bits: int) -> None:
    """By CTranslate2's own converter, all matrices in int8."""
    assert bits == 8
    from_transformers = ctranslate2.converters.TransformersConverter(str(source), low_cpu_mem_usage=True)
    from_transformers.convert(str(out), quantization="int8")


class CTranslate2:
    """See `protocol.System`."""

    def load(self, path: str, threads: int, longest: int) -> None:
        self._folder, self._threads = Path(path), threads
        self._generator = ctranslate2.Generator(path, device="cpu", intra_threads=threads, compute_type="int8")
        vocabulary = len(json.loads((self._folder / "vocabulary.json").read_text()))
        ids = np.random.default_rng(0).integers(3, vocabulary - 3, longest + 1)
        self._tokens = [TOKEN.format(i) for i in ids]

    def facts(self) -> dict[str, Any]:
        return {
            "weights_bytes": folder_bytes(self._folder, "model.bin"),
            "lm_head": "int8",
            "kv_cache": "f32",
            "versions": {"ctranslate2": ctranslate2.__version__},
            "settings": {"threads": self._threads, "compute_type": self._generator.compute_type},
        }

    def prefill(self, tokens: int) -> float:
        return self._times(tokens, 1)[0]

    def decode(self, depth: int, steps: int, sequences: int) -> float:
        if sequences > 1:
            raise ValueError("one sequence at a time")
        # The prompt's own pass gives the first token, and a prompt has at least one.
        times = self._times(max(depth, 1), steps + 1)
        return times[-1] - times[0]

    def _times(self, depth: int, tokens: int) -> list[float]:
        """When each token was there, in seconds from the call."""
        times: list[float] = []
        start = time.perf_counter()

        def note(_: Any) -> bool:
            times.append(time.perf_counter() - start)
            return False

        self._generator.generate_batch(
            [self._tokens[:depth]],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note,
        )
        if len(times) != tokens:
            raise RuntimeError(f"{len(times)} tokens came, expected {tokens}")
        return times


if __name__ == "__main__":
    if len(sys.argv) > 1:
        convert_from_arguments(convert)
    else:
        serve(CTranslate2())
