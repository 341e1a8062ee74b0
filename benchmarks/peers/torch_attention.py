"""Ways to write the attention of one new token in PyTorch, and which of them is fastest once compiled."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bounds import Shape

WARMING, TIMED = 4, 20
LAYERS = 32
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token: the heads that share keys are rows of one product. q [batch, kv heads, group, d]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same as gpt-fast writes it: keys and values repeated for every head."""
    batch, heads, group, width = q.shape
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    y = F.scaled_dot_product_attention(q.reshape(batch, heads * group, 1, width), k, v, attn_mask=mask)
    return y.view(batch, heads, group, width)


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same as two products around a softmax, which the compiler may fuse as it likes."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    probabilities = scores.masked_fill(~mask, -math.inf).softmax(-1)
    result: Tensor = probabilities.to(v.dtype) @ v
    return result


ATTENTIONS: dict[str, Attention] = {"grouped": grouped, "repeated": repeated, "products": products}


_fastest: dict[tuple[int, ...], tuple[str, dict[str, float]]] = {}


def fastest_attention(shape: Shape, batch: int, slots: int) -> tuple[str, dict[str, float]]:
    """The way of attention that is fastest for one layer, and microseconds of each, compiled and as graphs."""
    key = (shape.kv_heads, shape.heads, shape.head_dim, batch, slots)
    if key not in _fastest:
        times: dict[str, float] = {}
        for name in ATTENTIONS:
            try:
                times[name] = _attention_microseconds(name, key)
            except RuntimeError as error:  # a way that this version does not compile; the others do
                print(f"attention {name}: {error}", file=sys.stderr)
        if not times:
            raise RuntimeError(f"none of {', '.join(ATTENTIONS)} compiles")
        _fastest[key] = (min(times, key=lambda name: times[name]), times)
    return _fastest[key]


def _attention_microseconds(name: str, key: tuple[int, ...]) -> float:
    kv_heads, heads, width, batch, slots = key
    q = torch.randn(batch, kv_heads, heads // kv_heads, width, device="cuda", dtype=torch.bfloat16)
    # Several layers' worth, so that keys and values do not stay in the cache of the chip.
    caches = torch.randn(LAYERS, 2, batch, kv_heads, slots, width, device="cuda", dtype=torch.bfloat16)
    mask = (torch.arange(slots, device="cuda") < slots - 1)[None, None, None]
    compiled = torch.compile(ATTENTIONS[name], fullgraph=True)

    def layers() -> None:
        for keys, values in caches.unbind():
            compiled(q, keys, values, mask)

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        layers()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            layers()
        for i in range(WARMING + TIMED):
            if i == WARMING:
                start.record()
            graph.replay()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / (TIMED * LAYERS)
