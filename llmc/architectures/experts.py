"""Mixtures of experts: a router, gated MLPs of which each token takes a few, and one that all tokens take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmc.architectures.context import Context
from llmc.architectures.mlp import Mlp
from llmc.architectures.settings import ConfigurationError
from llmc.ir.op import Value
from llmc.ir.ops.experts import Experts
from llmc.ir.ops.routing import Routing
from llmc.ir.types import DType


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Which experts a token takes and with which weights: see the op `routing`.

    `router`: the name of the projection to a logit for each expert. `selection_bias`: the name of what is added to
    scores for the choice alone, or empty. `shared`: an MLP for all tokens, which is added; times the sigmoid of the
    projection `shared_gate` where that has a name.
    """

    name: str
    router: str
    hidden_size: int
    num_experts: int
    experts_per_token: int
    expert_size: int
    router_bias: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False
    routed_scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    selection_bias: str = ""
    shared: Mlp | None = None
    shared_gate: str = ""

    def __post_init__(self) -> None:
        if not self.experts_per_token <= self.num_experts:
            raise ConfigurationError(f"a token cannot take {self.experts_per_token} of {self.num_experts} experts")
        if self.num_experts % self.groups:
            raise ConfigurationError(f"{self.num_experts} experts cannot be cut into {self.groups} groups")

    def weights(self, c: Context, x: Value) -> Value:
        """f32 [t, num_experts], zero for experts that a token does not take."""
        logits = c.cast(c.linear(self.router, x, self.num_experts, self.router_bias, False), DType.F32)
        biases = []
        with c.b.at(self.router):
            if self.selection_bias:
                biases.append(c.cast(c.weight((self.num_experts,), "buffer", self.selection_bias), DType.F32))
            op = Routing(
                self.experts_per_token,
                self.scoring,
                self.normalise,
                self.routed_scale,
                self.groups,
                self.top_groups,
                self.group_score,
                self.selection_bias != "",
            )
            return op.decompose(c.b, logits, *biases)

    def with_shared(self, c: Context, x: Value, routed: Value) -> Value:
        """The experts' sum, and what all tokens take."""
        if self.shared is None:
            return routed
        extra = self.shared(c, x)
        if self.shared_gate:
            gate = c.linear(self.shared_gate, x, 1, False, False)
            extra = c.b.mul(extra, c.b.sigmoid(gate))
        result: Value = c.b.add(routed, extra)
        return result


@dataclass(frozen=True, kw_only=True)
class ExpertsMlp(Routed, Mlp, kind="experts"):
    """Experts that are stored one by one: each is a gated MLP (Shazeer et al., 2017). In `expert`, `{expert}` is its
    number."""

    expert: str
    gate: str
    up: str
    down: str
    activation: str

    def __post_init__(self) -> None:
        Routed.__post_init__(self)
        Mlp.__post_init__(self)

    def __call__(self, c: Context, x: Value) -> Value:
        inner, width = self.expert_size, self.hidden_size
        with c.b.at(self.name):
            weights = self.weights(c, x)
            gate_up = self._stacked(c, (self.gate, self.up), (inner, width))
            down = self._stacked(c, (self.down,), (width, inner))
            op = Experts(c.op_activation(self.activation), experts_per_token=self.experts_per_token)
            with c.b.at("experts"):
                routed = op.decompose(c.b, x, weights, gate_up, down)
            return self.with_shared(c, x, routed)

    def _stacked(self, c: Context, names: tuple[str, ...], shape: tuple[int, int]) -> Value:
        """[num_experts, rows of all names, columns]."""
        parts = []
        for expert in range(self.num_experts):
            for name in names:
                with c.b.at(f"{self.expert.replace('{expert}', str(expert))}.{name}"):
                    parts.append(c.weight(shape))
        rows, columns = shape
        joined = c.b.concat(*parts, axis=0) if len(parts) > 1 else parts[0]
        result: Value = c.b.reshape(joined, shape=(self.num_experts, len(names) * rows, columns))
        return result


@dataclass(frozen=True, kw_only=True)
class StackedExpertsMlp(Routed, Mlp, kind="stacked_experts"):
    """Experts that are stored in one tensor: `gate_up` [num_experts, hidden_size, 2 · expert_size], columns of gate and
    up in turn, `down` [num_experts, expert_size, hidden_size], each with a bias under its name and `_bias`. Gates are
    clamped to `limit` (see the op `experts`)."""

    experts: str
    gate_up: str
    down: str
    limit: float
    activation: str

    def __post_init__(self) -> None:
        Routed.__post_init__(self)
        if self.activation not in ("silu", "swish"):
            raise ConfigurationError(f"clamped gates take the activation 'silu', given {self.activation[:80]!r}")

    def __call__(self, c: Context, x: Value) -> Value:
        count, inner, width = self.num_experts, self.expert_size, self.hidden_size
        with c.b.at(self.name):
            weights = self.weights(c, x)
            with c.b.at(self.experts):
                gate_up = c.weight((count, width, 2 * inner), suffix=self.gate_up)
                down = c.weight((count, inner, width), suffix=self.down)
                biases = (
                    self._parted(c, c.weight((count, 2 * inner), "small", f"{self.gate_up}_bias")),
                    c.weight((count, width), "small", f"{self.down}_bias"),
                )
                op = Experts(
                    "none",
                    gating="clamped",
                    bias=True,
                    limit=self.limit,
                    experts_per_token=self.experts_per_token,
                )
                matrices = (
                    self._parted(c, c.b.transpose(gate_up, axes=(0, 2, 1))),
                    c.b.transpose(down, axes=(0, 2, 1)),
                )
                routed = op.decompose(c.b, x, weights, *matrices, *biases)
            return self.with_shared(c, x, routed)

    def _parted(self, c: Context, both: Value) -> Value:
        """Rows of gate and up in turn [num_experts, 2 · expert_size, ...], put one after the other."""
        stop = 2 * self.expert_size
        parts = [c.b.slice(both, axis=1, start=start, stop=stop, step=2) for start in (0, 1)]
        result: Value = c.b.concat(*parts, axis=1)
        return result
