"""Every building block that descriptions can name, by its role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmc.architectures.attention import Attention
from llmc.architectures.experts import ExpertsMlp, StackedExpertsMlp
from llmc.architectures.layers import Layer
from llmc.architectures.mlp import Mlp
from llmc.architectures.norms import Norm
from llmc.architectures.positions import Positions

__all__ = ["ROLES", "Layer"]

ROLES: Mapping[str, Any] = {
    "positions": Positions,
    "norm": Norm,
    "attention": Attention,
    "mlp": Mlp,
    "layer": Layer,
}
"""Their classes; the kinds of each are in its `kinds`."""

assert {ExpertsMlp, StackedExpertsMlp} <= set(Mlp.kinds.values())
