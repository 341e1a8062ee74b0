"""llama.cpp behind the protocol, by its C interface: `llama_decode` on batches made by hand, no Python in between.

Its best settings are used: the flash attention setting that decodes faster at depth, and for several sequences the
layout of the cache (one for all, or one for each) that is faster. Prompts and decoding have the same number of threads.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGUFReader

from benchmarks.protocol import serve

FLASH = {"off": 0, "on": 1, "auto": -1}
F16 = 1
"""`GGML_TYPE_F16`, of the cache."""
TUNING_DEPTH, TUNING_STEPS, TUNING_ROUNDS = 512, 16, 5


@dataclass(frozen=True)
class Settings:
    """How a context is made."""

    flash: str = "auto"
    unified: bool = False


class Context:
    """`sequences` sequences of up to `length` tokens."""

    def __init__(self, model: Any, vocab_size: int, threads: int, length: int, sequences: int, how: Settings) -> None:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = -(-length // 256) * 256 * sequences
        parameters.n_batch = max(512, length)
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = F16
        parameters.flash_attn_type = FLASH[how.flash]
        parameters.kv_unified = how.unified
        parameters.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {length} tokens, {sequences} sequences, {how}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size, self._sequences = vocab_size, sequences
        capacity = max(length, sequences)
        self._batch = llama_cpp.llama_batch_init(capacity, 0, 1)
        self._token = np.ctypeslib.as_array(self._batch.token, (capacity,))
        self._position = np.ctypeslib.as_array(self._batch.pos, (capacity,))
        self._logits = np.ctypeslib.as_array(self._batch.logits, (capacity,))
        self._held = 0

    def free(self) -> None:
        """Give its memory back."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def _run(self, rows: int) -> Any:
        """Decode the batch as it stands; the last `rows` tokens' greedy choices."""
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        # The address is where the logits lie: [rows, vocabulary] of f32, in the order of the batch.
        address = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.c_void_p).value
        logits = np.frombuffer((ctypes.c_float * (rows * self._vocab_size)).from_address(address), np.float32)
        return logits.reshape(rows, self._vocab_size).argmax(1)

    def fill(self, sequence: int, tokens: Any) -> float:
        """Seconds to read a sequence's first tokens, with logits for the last."""
        count = len(tokens)
        self._batch.n_tokens = count
        self._token[:count], self._position[:count] = tokens, np.arange(count)
        self._logits[:count] = 0
        self._logits[count - 1] = 1
        for i in range(count):
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, sequence
        start = time.perf_counter()
        self._run(1)
        return time.perf_counter() - start

    def prefill(self, tokens: Any) -> float:
        """Seconds to read the tokens from nothing."""
        llama_cpp.llama_memory_clear(self._memory, False)
        self._held = 0
        return self.fill(0, tokens)

    def decode(self, tokens: Any, steps: int) -> float:
        """Seconds for steps after `tokens`, which every sequence holds; the cache keeps them for the next call."""
        depth, many = len(tokens), self._sequences
        if self._held != depth:
            llama_cpp.llama_memory_clear(self._memory, False)
            for sequence in range(many):
                self.fill(sequence, np.roll(tokens, sequence))
            self._held = depth
        batch, position = self._batch, self._position[:many]
        batch.n_tokens = many
        self._token[:many], position[:], self._logits[:many] = np.arange(many) + 1, depth, 1
        for i in range(many):
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i
        start = time.perf_counter()
        for _ in range(steps):
            self._token[:many] = self._run(many)
            position += 1
        seconds = time.perf_counter() - start
        for sequence in range(many):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, depth, -1)
        return seconds


class LlamaCpp:
    """See `protocol.System`."""

    def load(self, path: str, threads: int, longest: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._path, self._threads = Path(path), threads
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._tokens = np.random.default_rng(0).integers(0, self._vocab_size, longest + 1).astype(np.int32)
        self._contexts: dict[tuple[int, int, int], Context] = {}
        self._unified: dict[int, bool] = {}
        depth = max(0, min(TUNING_DEPTH, longest - TUNING_STEPS))
        self._flash, tuned = self._best({name: Settings(name) for name in FLASH}, depth, 1)
        self._tuned = {f"decode at {depth}, tokens a second by flash attention": tuned}

    def facts(self) -> dict[str, Any]:
        return {**_file_facts(self._path), "versions": _versions(), "settings": self._settings()}

    def prefill(self, tokens: int) -> float:
        return self._context(0, tokens, 1).prefill(self._tokens[:tokens])

    def decode(self, depth: int, steps: int, sequences: int) -> float:
        if sequences > 1 and sequences not in self._unified:
            self._choose_layout(depth, sequences)
        return self._context(depth, depth + steps, sequences).decode(self._tokens[:depth], steps)

    def _context(self, depth: int, length: int, sequences: int) -> Context:
        """A context for each depth, so that its prompt is read once and not in every round."""
        key = (depth, length, sequences)
        if key not in self._contexts:
            how = Settings(self._flash, self._unified.get(sequences, False))
            self._contexts[key] = Context(self._model, self._vocab_size, self._threads, length, sequences, how)
        return self._contexts[key]

    def _best(self, candidates: dict[Any, Settings], depth: int, sequences: int) -> tuple[Any, dict[str, float]]:
        """The candidate with the shortest decode, in turns; and the tokens per second of all."""
        tokens, seconds = self._tokens[:depth], dict.fromkeys(candidates, float("inf"))
        length = depth + TUNING_STEPS
        contexts = {
            key: Context(self._model, self._vocab_size, self._threads, length, sequences, how)
            for key, how in candidates.items()
        }
        for _ in range(TUNING_ROUNDS):
            for key, context in contexts.items():
                seconds[key] = min(seconds[key], context.decode(tokens, TUNING_STEPS))
        for context in contexts.values():
            context.free()
        rates = {str(key): round(sequences * TUNING_STEPS / value, 1) for key, value in seconds.items()}
        return min(seconds, key=lambda key: seconds[key]), rates

    def _choose_layout(self, depth: int, sequences: int) -> None:
        candidates = {unified: Settings(self._flash, unified) for unified in (False, True)}
        self._unified[sequences], rates = self._best(candidates, depth, sequences)
        self._tuned[f"{sequences} sequences at {depth}, tokens a second by kv_unified"] = rates

    def _settings(self) -> dict[str, Any]:
        unified = {str(sequences): value for sequences, value in self._unified.items()}
        return {"threads": self._threads, "flash_attn": self._flash, "kv_unified": unified, "tuned": self._tuned}


def _versions() -> dict[str, str]:
    return {
        "llama-cpp-python": version("llama-cpp-python"),
        "system info": llama_cpp.llama_print_system_info().decode().strip(),
    }


def _file_facts(path: Path) -> dict[str, Any]:
    """What the file says about itself: bytes, the head's type, and the bytes of a step."""
    reader = GGUFReader(str(path))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    read = weights - (int(tensors["token_embd.weight"].n_bytes) if "output.weight" in tensors else 0)
    # Shapes are in GGUF's order, columns first.
    keys = sum(int(t.shape[1]) for name, t in tensors.items() if name.endswith(("attn_k.weight", "attn_v.weight")))
    return {
        "weights_bytes": weights,
        "file_bytes": path.stat().st_size,
        "lm_head": head.tensor_type.name,
        "kv_cache": "f16",
        "step_bytes": [read, 2 * keys, 2 * keys],
    }


if __name__ == "__main__":
    serve(LlamaCpp())
