"""A decoder in plain PyTorch under torch.compile, as gpt-fast does it: static cache, one graph, reduce-overhead.

Random weights. bf16; int8: a scale for each row, weights widened inside the product; int4: groups of 128 through
PyTorch's own tinygemm kernel, with an lm_head of int8, as ours has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.bounds import Shape
from benchmarks.gpu.rows import Row
from benchmarks.peers.torch_attention import ATTENTIONS, WARMING, Attention, fastest_attention, grouped

GROUP = 128
INNER_TILES = 8
ROTARY_BASE = 500000.0
EPSILON = 1e-5


class Int8Linear(nn.Module):
    """Codes of 8 bits with a scale for each output; the product widens them as it reads them."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scales = weight.float().abs().amax(1) / 127
        self.register_buffer("codes", (weight.float() / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] -> [..., n]."""
        return F.linear(x, self.codes.to(x.dtype)) * self.scales


class Int4Linear(nn.Module):
    """Codes of 4 bits with a scale and a zero point for each group of 128; CUDA only."""

    packed: Tensor
    scales_and_zeros: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.outputs = weight.shape[0]
        pairs, scales_and_zeros = int4_codes(weight)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES))
        self.register_buffer("scales_and_zeros", scales_and_zeros)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] -> [..., n]."""
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = torch.ops.aten._weight_int4pack_mm(flat, self.packed, GROUP, self.scales_and_zeros)
        return y.view(*x.shape[:-1], self.outputs)


def int4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of codes u8 [n, k / 2], the first of a pair in the high bits, and (scale, zero) bf16 [k / 128, n, 2].

    A weight is (code - 8) · scale + zero, which is how the kernel reads them.
    """
    n, k = weight.shape
    groups = weight.float().view(n, k // GROUP, GROUP)
    high, low = groups.amax(-1), groups.amin(-1)
    scales = ((high - low) / 15).clamp_min(1e-6)
    codes = ((groups - low[..., None]) / scales[..., None]).round().clamp(0, 15).to(torch.int32).view(n, k)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    both = torch.stack([scales, low + 8 * scales], -1).to(torch.bfloat16)
    return pairs, both.transpose(0, 1).contiguous()


def make_linear(outputs: int, inputs: int, weights: str, device: str) -> nn.Module:
    """A product with a random matrix of standard deviation inputs^-0.5."""
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
    if weights == "int8":
        return Int8Linear(weight)
    if weights == "int4":
        return Int4Linear(weight)
    linear = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Block(nn.Module):
    """A layer with its part of the cache, [batch, kv heads, slots, head dim]."""

    keys: Tensor
    values: Tensor
    norm1: Tensor
    norm2: Tensor

    def __init__(self, shape: Shape, weights: str, batch: int, slots: int, attention: Attention, device: str) -> None:
        super().__init__()
        self.shape, self.attention = shape, attention
        heads, own = shape.heads + 2 * shape.kv_heads, shape.heads * shape.head_dim
        self.qkv = make_linear(heads * shape.head_dim, shape.hidden, weights, device)
        self.out = make_linear(shape.hidden, own, weights, device)
        self.gate_up = make_linear(2 * shape.intermediate, shape.hidden, weights, device)
        self.down = make_linear(shape.hidden, shape.intermediate, weights, device)
        for name in ("norm1", "norm2"):
            self.register_buffer(name, torch.ones(shape.hidden, device=device, dtype=torch.bfloat16))
        size = (batch, shape.kv_heads, slots, shape.head_dim)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(size, device=device, dtype=torch.bfloat16))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """x [batch, 1, hidden]; `position` [1] is the slot of all sequences' new token."""
        shape = self.shape
        batch, width = x.shape[0], shape.head_dim
        parts = [n * width for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
        q, k, v = self.qkv(F.rms_norm(x, (shape.hidden,), self.norm1, EPSILON)).split(parts, -1)
        q, k, v = (t.view(batch, 1, -1, width).transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        y = self.attention(q.reshape(batch, shape.kv_heads, -1, width), self.keys, self.values, mask)
        x = x + self.out(y.reshape(batch, 1, shape.heads * width))
        gate, up = self.gate_up(F.rms_norm(x, (shape.hidden,), self.norm2, EPSILON)).chunk(2, -1)
        down: Tensor = self.down(F.silu(gate) * up)
        return x + down


class Decoder(nn.Module):
    """Greedy tokens of one step of `batch` sequences, with room for `slots` tokens each."""

    cosine: Tensor
    sine: Tensor
    slots: Tensor
    norm: Tensor

    def __init__(
        self, shape: Shape, weights: str, batch: int, slots: int, attention: Attention = grouped, device: str = "cuda"
    ) -> None:
        super().__init__()
        self.hidden = shape.hidden
        table = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=torch.bfloat16)
        self.table = nn.Embedding.from_pretrained(table)
        self.blocks = nn.ModuleList(Block(shape, weights, batch, slots, attention, device) for _ in range(shape.layers))
        self.register_buffer("norm", torch.ones(shape.hidden, device=device, dtype=torch.bfloat16))
        self.head = make_linear(shape.vocabulary, shape.hidden, "bf16" if weights == "bf16" else "int8", device)
        powers = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        angles = torch.arange(slots, device=device)[:, None] / ROTARY_BASE**powers
        for name, value in (("cosine", angles.cos()), ("sine", angles.sin()), ("slots", torch.arange(slots))):
            self.register_buffer(name, value.to(device))

    def logits(self, tokens: Tensor, position: Tensor) -> Tensor:
        """tokens i64 [batch, 1], position i64 [1] -> [batch, 1, vocabulary]."""
        x, cosine, sine = self.table(tokens), self.cosine[position], self.sine[position]
        mask = (self.slots <= position)[None, None, None]
        for block in self.blocks:
            x = block(x, cosine, sine, position, mask)
        logits: Tensor = self.head(F.rms_norm(x, (self.hidden,), self.norm, EPSILON))
        return logits

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The tokens that follow."""
        return self.logits(tokens, position).argmax(-1)

    def step_bytes(self, context: int) -> int:
        """What a step must read: weights but the table of tokens, keys and values of `context` tokens."""
        total = 0
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            size = tensor.numel() * tensor.element_size()
            if name.endswith((".keys", ".values")):
                total += size * context // tensor.shape[2]
            elif not name.startswith(("table.", "cosine", "sine", "slots")):
                total += size
        return total


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of halves, in float32."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x.dtype)


class CompiledSteps:
    """See `timing.Steps`: the same step of a compiled decoder, at the same position. `mark` begins a step."""

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        batch: int,
        position: int,
        device: str,
        mark: Callable[[], object] = torch.compiler.cudagraph_mark_step_begin,
    ) -> None:
        self._step, self._mark = step, mark
        self._tokens = torch.ones(batch, 1, dtype=torch.long, device=device)
        self._position = torch.tensor([position], device=device)

    def start(self, count: int) -> None:
        """See `timing.Steps`."""
        with torch.no_grad():
            for _ in range(count):
                self._mark()
                self._step(self._tokens, self._position)


def start_row(row: Row) -> tuple[CompiledSteps, Mapping[str, Any]]:
    """A row's decoder, compiled and warm; and its bytes and settings."""
    import torch._inductor.config as inductor

    inductor.coordinate_descent_tuning = True  # as gpt-fast sets it
    shape = Shape.read(row.setup.config)
    slots = -(-(row.context + 1) // 8) * 8
    name, times = fastest_attention(shape, row.batch, slots)
    with torch.no_grad():
        model = Decoder(shape, row.setup.weights, row.batch, slots, ATTENTIONS[name]).eval()
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        steps = CompiledSteps(compiled, row.batch, row.context, "cuda")
        steps.start(WARMING)
    settings = {"mode": "reduce-overhead", "coordinate_descent_tuning": True, "attention": name}
    return steps, {"bytes": model.step_bytes(row.context), "settings": settings, "attention_microseconds": times}
