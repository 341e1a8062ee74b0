"""Small transformers written by hand, in other ways than transformers': what an exporter of one's own model gives."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional

VOCABULARY, WIDTH, HEADS, LONGEST = 61, 24, 4, 40
"""torch exports them for fewer than `LONGEST` tokens."""


class TriangleBlock(nn.Module):  # type: ignore[misc,name-defined]
    """Attention by a stored triangle and `masked_fill`, one joint projection, the exact GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.joint, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("triangle", torch.tril(torch.ones(LONGEST, LONGEST))[None, None])

    def forward(self, x: Any) -> Any:
        batch, tokens, width = x.shape
        q, k, v = self.joint(self.norm(x)).split(width, dim=2)
        q, k, v = (y.view(batch, tokens, HEADS, width // HEADS).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // HEADS)
        scores = scores.masked_fill(self.triangle[:, :, :tokens, :tokens] == 0, float("-inf"))
        y = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(batch, tokens, width)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TriangleModel(nn.Module):  # type: ignore[misc,name-defined]
    """Learned positions looked up by `arange`; the head is the token table."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(TriangleBlock() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, idx: Any) -> Any:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class SharedBlock(nn.Module):  # type: ignore[misc,name-defined]
    """Grouped heads by `repeat_interleave`, `is_causal`, RMS norms by torch's own, a gated product in chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
        head = WIDTH // HEADS
        self.q, self.kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * 2 * head, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Any) -> Any:
        batch, tokens, width = x.shape
        y, head = self.norm(x), width // HEADS
        q = self.q(y).unflatten(-1, (HEADS, head)).transpose(1, 2)
        k, v = self.kv(y).chunk(2, dim=-1)
        k, v = (z.reshape(batch, tokens, 2, head).permute(0, 2, 1, 3).repeat_interleave(2, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class SharedModel(nn.Module):  # type: ignore[misc,name-defined]
    """Positions are the first rows of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.table = nn.Parameter(torch.randn(1, LONGEST, WIDTH))
        self.blocks = nn.ModuleList(SharedBlock() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, idx: Any) -> Any:
        x = self.tokens(idx) + self.table[:, : idx.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LookedUp(TriangleModel):
    """Nothing but tokens and positions: the table of positions is the only bound on tokens."""

    def forward(self, idx: Any) -> Any:
        return F.linear(self.tokens(idx) + self.positions(torch.arange(idx.shape[1])), self.tokens.weight)


class Added(TriangleModel):
    """A mask of zeros and minus infinities above the diagonal, added; made in `forward`."""

    def forward(self, idx: Any) -> Any:
        x = self.tokens(idx)
        tokens = idx.shape[1]
        mask = torch.triu(torch.full((tokens, tokens), float("-inf")), diagonal=1)
        y = x.view(1, tokens, HEADS, -1).transpose(1, 2)
        y = torch.softmax(y @ y.mT * 0.5 + mask, dim=-1) @ y
        return F.linear(x + y.transpose(1, 2).reshape(1, tokens, -1), self.tokens.weight)
