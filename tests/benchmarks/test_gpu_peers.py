"""The peers' models on a CPU, tiny and eager."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.bounds import Shape
from benchmarks.peers.torch_attention import ATTENTIONS
from benchmarks.peers.torch_compile import Block, CompiledSteps, Decoder, int4_codes, rotate
from benchmarks.peers.transformers_eager import EagerSteps, make_model
from tests.fixtures import REPOSITORY

TINY = Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocabulary=101, tied=False)
SLOTS, POSITION = 24, 17
CONFIG = REPOSITORY / "benchmarks/configs/llama-3.1-8b.json"


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_step(weights: str) -> None:
    torch.manual_seed(0)
    model = Decoder(TINY, weights, batch=3, slots=SLOTS, device="cpu").eval()
    tokens, position = torch.tensor([[1], [2], [1]]), torch.tensor([POSITION])
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    before = blocks[0].keys.clone()
    with torch.no_grad():
        logits = model.logits(tokens, position)
        assert logits.shape == (3, 1, 101) and torch.isfinite(logits.float()).all()
        assert torch.equal(model(tokens, position), logits.argmax(-1))
        changed = blocks[0].keys.ne(before).any(-1).any(1).any(0)
        assert changed.nonzero().flatten().tolist() == [POSITION]
        # Slots after the position are not looked at.
        for block in blocks:
            block.keys[:, :, POSITION + 1 :] = 1e4
        assert torch.equal(model.logits(tokens, position), logits)
        CompiledSteps(model, 3, POSITION, "cpu", mark=lambda: None).start(2)


def test_int8_is_close_to_bf16() -> None:
    """The same matrices in both: the products differ by the codes' rounding."""
    models = []
    for weights in ("bf16", "int8"):
        torch.manual_seed(0)
        models.append(Decoder(TINY, weights, batch=1, slots=SLOTS, device="cpu").eval())
    with torch.no_grad():
        wide, narrow = (m.logits(torch.tensor([[5]]), torch.tensor([POSITION])).float() for m in models)
    assert (wide - narrow).norm() < 0.1 * wide.norm()


def test_int4_codes() -> None:
    """tinygemm itself runs on CUDA only; this is what it reads."""
    torch.manual_seed(0)
    weight = torch.randn(16, 256).to(torch.bfloat16)
    pairs, scales_and_zeros = int4_codes(weight)
    assert pairs.shape == (16, 128) and pairs.dtype is torch.uint8 and scales_and_zeros.shape == (2, 16, 2)
    codes = torch.stack([pairs >> 4, pairs & 15], -1).view(16, 2, 128).float()
    scales, zeros = scales_and_zeros.float().transpose(0, 1).unbind(-1)
    read = ((codes - 8) * scales[..., None] + zeros[..., None]).view(16, 256)
    assert ((read - weight.float()).abs() <= 0.6 * scales.repeat_interleave(128, 1) + 0.02).all()


def test_attentions_agree() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 8, 16), torch.randn(2, 3, 8, 16)
    mask = (torch.arange(8) < 6)[None, None, None]
    results = [attention(q, k, v, mask) for attention in ATTENTIONS.values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_rotation_keeps_lengths() -> None:
    x, angle = torch.randn(1, 2, 1, 16), torch.randn(1, 8)
    turned = rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned, x)


def test_bytes_of_a_step() -> None:
    model = Decoder(TINY, "bf16", batch=2, slots=SLOTS, device="cpu")
    weights = 2 * (TINY.layer_weights + TINY.head_weights + (2 * TINY.layers + 1) * TINY.hidden)
    assert model.step_bytes(16) == weights + 2 * 16 * TINY.cache_bytes("bf16")


def test_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": json.loads(CONFIG.read_text())["rope_scaling"],
        "torch_dtype": "bfloat16",
        "vocab_size": 101,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = make_model(tmp_path / "config.json", "cpu")
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    steps = EagerSteps(model, 2, 8, 101, "cpu")
    steps.start(3)
    assert steps.tokens.shape == (2, 1) and steps._cache.get_seq_length() == 11
