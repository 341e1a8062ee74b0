"""A package for GPUs from end to end, on the fake driver: generation, sampling on the device, isolation."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.runtime.arguments import parse_options
from llmc.runtime.load import load_model
from llmc.runtime.sampler import sampling_row
from tests.runtime.cuda.fake import FakeCuda
from tests.runtime.cuda.packages import write_cuda_package
from tests.runtime.isolated import run_isolated
from tests.runtime.packages import CONTEXT, VOCAB, reference


def launcher_of(package: Path) -> str:
    return "native" if (package / "launcher.so").exists() else "ctypes"


def test_kernels_compute_the_reference(package: Path, cuda: FakeCuda) -> None:
    ids = np.random.default_rng(2).integers(0, VOCAB, CONTEXT).tolist()
    with load_model(package, check=True) as model:
        np.testing.assert_array_equal(model.logits(ids), reference(ids))
        prompts = [ids[:n] for n in (1, 7, 20, 3, 11, 2)]
        for completion in model.generate(prompts, 15):
            whole = completion.prompt_token_ids + completion.token_ids
            start = len(completion.prompt_token_ids) - 1
            assert completion.token_ids == [int(row.argmax()) for row in reference(whole)[start:-1]]
        assert model.verify().ok
        assert model.perplexity(ids, 8) > 1
        loaded = model.info["loaded"]
        assert {name: loaded[name] for name in ("device", "capability", "driver", "variant", "code", "launcher")} == {
            "device": "cuda:0 (Fake GPU 0)",
            "capability": "9.0",
            "driver": "12.8",
            "variant": "sm_90",
            "code": "cubin",
            "launcher": launcher_of(package),
        }
        assert model.info["kernels"] == ["gather", "append", "mix", "mix_decode", "head", "select_token"]


def drawn(ids: list[int], count: int, key: int, options: dict[str, Any]) -> list[int]:
    """What the fake's `select_token` gives: a sum over the words of each row of `sampling`."""
    parsed = parse_options(
        VOCAB, count, options["temperature"], options.get("top_k"), options.get("top_p"), options.get("min_p"), 1.0,
        options["seed"], None, False,
    )  # fmt: skip
    tokens = []
    for position in range(len(ids), len(ids) + count):
        total = 0
        for word in sampling_row(parsed, options["seed"], key, position):
            total = (31 * total + word) % (1 << 32)
        tokens.append(total % VOCAB)
    return tokens


def test_a_device_draws_with_the_keys_of_the_host(package: Path, cuda: FakeCuda) -> None:
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": (1 << 63) + 12345}
    prompts = [[1, 2, 3], [4], [1, 2, 3], list(range(20))]
    with load_model(package) as model:
        found = [c.token_ids for c in model.generate(prompts, 6, **options)]
        assert found == [drawn(ids, 6, key, options) for ids, key in zip(prompts, (0, 0, 1, 0), strict=True)]
        assert found[0] != found[2], "a copy of a prompt has a key of its own"
        assert "".join(str(p.token_id) for p in model.stream([4], 6, **options)) == "".join(map(str, found[1]))
        assert "cuMemcpyDtoHAsync_v2" not in cuda.calls() or all(
            x.how != "eager" for x in cuda.log() if x.call == "cuMemcpyDtoHAsync_v2"
        ), "the logits stay on the device"


def test_a_repetition_penalty_is_paid_by_the_host(package: Path, cuda: FakeCuda) -> None:
    with load_model(package) as model:
        found = model.generate([3, 1, 4], 8, repetition_penalty=1.5, temperature=0.8, seed=9).token_ids
        read = [x for x in cuda.log() if x.call == "cuMemcpyDtoHAsync_v2" and x.how == "eager"]
        assert len(read) == 8 and {x.bytes for x in read} == {VOCAB * 4}
        greedy = model.generate([3, 1, 4], 8, repetition_penalty=1.5).token_ids
    assert len(found) == 8
    seen, whole = {3, 1, 4}, [3, 1, 4]
    for token in greedy:
        row = reference(whole)[-1].copy()
        for t in seen:
            row[t] = row[t] / np.float32(1.5) if row[t] > 0 else row[t] * np.float32(1.5)
        assert token == int(row.argmax())
        whole.append(token)
        seen.add(token)


def test_a_draw_from_what_is_no_number_is_an_error(tmp_path: Path, cuda: FakeCuda) -> None:
    """The fake's `select_token` gives -1 where it finds a NaN, as logits that overflowed have."""
    package = write_cuda_package(tmp_path / "tiny", None)
    data = bytearray((package / "weights.bin").read_bytes())
    data[2176 : 2176 + 4 * VOCAB * VOCAB] = np.full(VOCAB * VOCAB, np.nan, np.float32).tobytes()
    (package / "weights.bin").write_bytes(bytes(data))
    with load_model(package) as model, pytest.raises(RuntimeError, match="the logits are not finite"):
        model.generate([1], 2, temperature=1.0)


def test_tensors_and_arrays_are_prompts(package: Path, cuda: FakeCuda) -> None:
    class Tensor:
        """As torch's: not a sequence, but it has a list."""

        def __init__(self, values: Any) -> None:
            self.values, self.ndim = np.array(values), np.array(values).ndim

        def tolist(self) -> Any:
            return self.values.tolist()

    with load_model(package) as model:
        expected = model.generate([1, 2, 3], 4).token_ids
        assert model.generate(Tensor([1, 2, 3]), 4).token_ids == expected
        assert model.generate([Tensor([1, 2, 3])], 4)[0].token_ids == expected
        assert model.generate(Tensor([[1, 2, 3]]), 4)[0].token_ids == expected
        assert model.generate(np.array([1, 2, 3]), 4).token_ids == expected
        np.testing.assert_array_equal(model.logits(Tensor([1, 2, 3])), reference([1, 2, 3]))
        with pytest.raises(ValueError, match="token id at position 0"):
            model.logits(Tensor([1.5]))
        with pytest.raises(ValueError, match="token id at position 0"):
            model.logits(Tensor([[1, 2]]))
        with pytest.raises(ValueError, match="prompt: given 3"):
            model.generate(Tensor(3), 4)


def test_two_models_at_once(package: Path, tmp_path: Path, cuda: FakeCuda) -> None:
    other = write_cuda_package(tmp_path / "other_model", None)
    with load_model(package) as model:
        before = cuda.alive
        with load_model(other) as second:
            assert cuda.alive[4] == 2, "both hold the context"
            assert second.generate([1, 2], 5).token_ids == model.generate([1, 2], 5).token_ids
        second.close()
        assert cuda.alive[:3] == before[:3], "one gives back what is its own"
        assert len(model.generate([1, 2], 5).token_ids) == 5


def test_threads_use_one_model(package: Path, cuda: FakeCuda) -> None:
    found = {}
    with load_model(package) as model:

        def work(i: int) -> None:
            found[i] = [model.generate([i, j], 12).token_ids for j in range(4)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {i: [model.generate([i, j], 12).token_ids for j in range(4)] for i in range(3)}


ISOLATED = """
import tiny_gpu_model
model = tiny_gpu_model.load()
assert model.verify().ok
print(json.dumps({
    "seen": seen,
    "tokens": [c.token_ids for c in model.generate([[1, 2, 3], [4]], 8)],
    "launcher": model.info["loaded"]["launcher"],
    "modules": sorted(m for m in sys.modules if m.split(".")[0] in ("subprocess", "socket", "multiprocessing")),
}))
model.close()
"""


def test_a_package_stands_alone(package: Path, fake_driver: FakeCuda) -> None:
    """In an isolated Python with numpy and the driver: nothing of ours, no child process, nothing compiled."""
    found = run_isolated(ISOLATED, package.parent, LD_LIBRARY_PATH=str(fake_driver.path.parent))
    libraries = ["libcuda.so.1", *(["launcher.so"] if launcher_of(package) == "native" else [])]
    assert [x for x in found["seen"] if x != "load None"] == [f"load {x}" for x in libraries]
    assert found["launcher"] == launcher_of(package)
    assert found["modules"] == []
    for ids, tokens in zip([[1, 2, 3], [4]], found["tokens"], strict=True):
        whole = ids + tokens
        assert tokens == [int(row.argmax()) for row in reference(whole)[len(ids) - 1 : -1]]
