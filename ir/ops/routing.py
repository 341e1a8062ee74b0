"""Routing: which experts each token goes to, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.ir.op import Array, Emitter, Op, Value
from llmc.ir.ops.elementwise import MulScalar
from llmc.ir.types import DType, TensorType

SCORINGS = ("softmax", "sigmoid")
"""How logits become scores, by attribute value."""

GROUP_SCORES = {"max": 1, "top2": 2}
"""How many of a group's largest choice scores are added up for the score of the group, by attribute value."""

TINY = 1e-20
"""Added to the sum that weights are divided by, so that weights of nothing stay zero (DeepSeek-V3); below what any
other sum's last place is."""


@dataclass(frozen=True)
class TopK(Op):
    """x [..., n] -> bool [..., n]: whether an element is one of the k largest of its row. Of equal elements the first
    win; NaN is larger than all, so that it is not lost."""

    k: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank >= 1, "one operand with a last axis", *types)
        width = types[0].shape[-1]
        self.expects(isinstance(width, int) and 1 <= self.k <= width, "k from 1 to the size of the last axis", *types)
        return (TensorType(DType.BOOL, types[0].shape),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        (x,) = arrays
        falling = np.where(np.isnan(x), -np.inf, -x)
        order = np.argsort(falling, axis=-1, kind="stable")
        chosen = np.zeros(x.shape, np.bool_)
        np.put_along_axis(chosen, order[..., : self.k], True, axis=-1)
        return (chosen,)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return operands[0].elements * self.k


@dataclass(frozen=True)
class Routing(Op):
    """Weights of the k experts that each token goes to. Operands: logits f32 [t, experts], and a bias f32 [experts] if
    `bias`; result f32 [t, experts], zero for experts that are not chosen.

    `scoring`: scores are the softmax of all of a token's logits, or the sigmoid of each. Choice scores are the scores,
    plus the bias: it decides which experts are chosen, the weights are the scores without it. With `groups` above 1
    the experts are cut into so many runs of neighbours, and only those of the `top_groups` best may be chosen; a
    group's score is its largest choice score (`group_score` "max"), or the sum of its two largest ("top2"). The k
    largest choice scores are chosen (ties as in `TopK`). `normalise` divides a token's weights by their sum; then they
    are multiplied by `scale`.
    """

    k: int
    scoring: str
    normalise: bool
    scale: float
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    bias: bool = False

    stage = "fused"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(self.scoring in SCORINGS, f"a scoring of {', '.join(SCORINGS)}", self.scoring)
        self.expects(self.group_score in GROUP_SCORES, f"a group_score of {', '.join(GROUP_SCORES)}", self.group_score)
        operands = "logits f32 [t, experts]" + " and bias f32 [experts]" * self.bias
        self.expects(len(types) == 1 + self.bias and types[0].rank == 2, operands, *types)
        experts = types[0].shape[1]
        self.expects(isinstance(experts, int) and types[0].dtype is DType.F32, operands, *types)
        assert isinstance(experts, int)
        self.expects(all(t == TensorType(DType.F32, (experts,)) for t in types[1:]), operands, *types)
        fits = self.groups >= 1 and experts % self.groups == 0
        self.expects(fits, f"a number of groups that divides {experts} experts", self.groups)
        self.expects(1 <= self.top_groups <= self.groups, f"top_groups from 1 to {self.groups}", self.top_groups)
        size = experts // self.groups
        reach = size * self.top_groups
        self.expects(1 <= self.k <= reach, f"k from 1 to the {reach} experts that may be chosen", self.k)
        least = GROUP_SCORES[self.group_score] if self.groups > 1 else 1
        self.expects(size >= least, f"groups of at least {least} experts for {self.group_score}", size)
        return types[:1]

    def decompose(self, b: Emitter, *values: Value) -> Value:
        logits, *bias = values
        scores = b.softmax(logits) if self.scoring == "softmax" else b.sigmoid(logits)
        choice = b.add(scores, bias[0]) if self.bias else scores
        if self.groups > 1:
            choice = self._of_best_groups(b, choice)
        weights: Value = b.mask(scores, b.top_k(choice, k=self.k), value=0.0)
        if self.normalise:
            weights = b.div(weights, b.add_scalar(b.sum(weights), value=TINY))
        return weights if self.scale == 1.0 else b.one(MulScalar(self.scale), weights)

    def _of_best_groups(self, b: Emitter, choice: Value) -> Value:
        """Choice scores, minus infinity outside the best groups."""
        tokens, experts = choice.type.shape
        assert isinstance(experts, int)
        grouped = b.reshape(choice, shape=(tokens, self.groups, experts // self.groups))
        best = b.mask(grouped, b.top_k(grouped, k=GROUP_SCORES[self.group_score]), value=0.0)
        scores = b.reshape(b.sum(best), shape=(tokens, self.groups))
        kept = b.reshape(b.top_k(scores, k=self.top_groups), shape=(tokens, self.groups, 1))
        result: Value = b.reshape(b.mask(grouped, kept, value=-math.inf), shape=(tokens, experts))
        return result
