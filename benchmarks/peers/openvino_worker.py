"""OpenVINO GenAI behind the protocol: int8, or int4 with an int8 head. With arguments: convert a model.

The pipeline's own metrics tell when each token was there. The first one's time is the prompt's: GenAI cuts the head to
the last row, which the plain runtime would not.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.huggingface import convert_from_arguments, folder_bytes
from benchmarks.protocol import serve

INT4_GROUP = 64
"""The largest that divides the rows of both shapes; fewer scales are faster."""


def convert(source: Path, out: Path, bits: int) -> None:
    """By optimum-intel and nncf, without calibration data: symmetric int4 groups, or int8 rows."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig  # takes seconds, and serving needs it not

    if bits == 4:
        how = OVWeightQuantizationConfig(bits=4, sym=True, group_size=INT4_GROUP, ratio=1.0)
    else:
        how = OVWeightQuantizationConfig(bits=8)
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, quantization_config=how)
    model.save_pretrained(out)


BACKENDS = ("SDPA", "PA")
"""Attention over a contiguous cache, or over pages; the one with the faster prompt is used."""
TUNING_TOKENS, TUNING_ROUNDS = 512, 3


def _pipeline(path: str, backend: str, threads: int) -> Any:
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if backend == "PA":
        # Without this a prompt that was seen before costs nothing.
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        options["scheduler_config"] = scheduler
    return openvino_genai.LLMPipeline(path, "CPU", ATTENTION_BACKEND=backend, **options)


class OpenVino:
    """See `protocol.System`."""

    def load(self, path: str, threads: int, longest: int) -> None:
        self._folder, self._threads = Path(path), threads
        self._tokens = np.random.default_rng(0).integers(3, 32000, (1, longest + 1))
        depth = min(TUNING_TOKENS, longest)
        seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        pipelines = {backend: _pipeline(path, backend, threads) for backend in BACKENDS}
        for _ in range(1 + TUNING_ROUNDS):
            for backend, self._pipeline in pipelines.items():
                seconds[backend].append(self._times(depth, 1)[0])
        # The first call makes kernels.
        best = {backend: min(values[1:]) for backend, values in seconds.items()}
        self._backend = min(best, key=lambda name: best[name])
        self._pipeline = pipelines[self._backend]
        self._tuned = {name: round(depth / value) for name, value in best.items()}

    def facts(self) -> dict[str, Any]:
        return {
            "weights_bytes": folder_bytes(self._folder, "openvino_model.bin"),
            "lm_head": "int8",
            "kv_cache": openvino.Core().get_property("CPU", "KV_CACHE_PRECISION").get_type_name(),
            "versions": {name: version(name) for name in ("openvino", "openvino-genai", "optimum-intel", "nncf")},
            "settings": {
                "threads": self._threads,
                "int4 group": INT4_GROUP,
                "ATTENTION_BACKEND": self._backend,
                "tuned": {"prefill, tokens a second by backend": self._tuned},
            },
        }

    def prefill(self, tokens: int) -> float:
        return self._times(tokens, 1)[0]

    def decode(self, depth: int, steps: int, sequences: int) -> float:
        if sequences > 1:
            raise ValueError("one sequence at a time")
        # The prompt's own pass gives the first token, and a prompt has at least one.
        times = self._times(max(depth, 1), steps + 1)
        return sum(times[1:])

    def _times(self, depth: int, tokens: int) -> list[float]:
        """Seconds until the first token, then from each to the next."""
        how = openvino_genai.GenerationConfig()
        how.max_new_tokens = how.min_new_tokens = tokens
        how.ignore_eos, how.do_sample = True, False
        # Metrics are in microseconds.
        result = self._pipeline.generate(openvino.Tensor(self._tokens[:, :depth].copy()), how)
        raw = result.perf_metrics.raw_metrics
        times = [float(raw.m_times_to_first_token[0]) / 1e6, *(float(d) / 1e6 for d in raw.m_durations)]
        if len(times) != tokens:
            raise RuntimeError(f"{len(times)} tokens came, expected {tokens}")
        return times


if __name__ == "__main__":
    if len(sys.argv) > 1:
        convert_from_arguments(convert)
    else:
        serve(OpenVino())
