"""Every building block that descriptions can name, by its role. Importing this registers all kinds of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmc.architectures import experts, latent
from llmc.architectures.attention import Attention
from llmc.architectures.layers import Layer
from llmc.architectures.mlp import Mlp
from llmc.architectures.norms import Norm
from llmc.architectures.positions import Positions

__all__ = ["ROLES", "Layer", "experts", "latent"]

ROLES: Mapping[str, Any] = {
    "positions": Positions,
    "norm": Norm,
    "attention": Attention,
    "mlp": Mlp,
    "layer": Layer,
}
"""Their classes; the kinds of each are in its `kinds`."""
