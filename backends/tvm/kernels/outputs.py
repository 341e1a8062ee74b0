"""What a matrix product's sums become: bias, activation, gate and residual, and where the outputs of a panel go."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.math import activate, clamp
from llmc.backends.tvm.kernels.vector import at, f32, lanes_of, let, load
from llmc.backends.tvm.packing import HALF, PANEL


def linear_result(n, bias, epilogue, residual):
    """A `result(scratch, column, lanes, B, R, col, row, which)`: outputs of a panel's sums, at (row, col) of y; matrix
    `which` has its bias at B[which · n]."""

    def result(scratch, column, lanes, B, R, col, row, which):
        value = load(scratch, column, lanes)
        value = value + load(B, which * n + col, lanes) if bias else value
        value = activate(epilogue, value)
        return value + load(R, row * n + col, lanes) if residual else value

    return result


def gated_result(activation):
    """The same for gated panels: 8 sums of gate, then the 8 of up that belong to them."""
    return _gated(lambda gate, up: activate(activation, gate) * up)


def experts_gated_result(n, activation, gating, limit, bias):
    """The same with the gatings of `ir.ops.experts`; B, if `bias`, lies as sums do: 8 of gate, then their 8 of up."""

    def clamped(gate, up):
        lanes = lanes_of(gate)
        gate, high = let(gate), f32(limit, lanes)
        raised = clamp(let(up), -limit, limit) + f32(1.0, lanes)
        return activate("gelu_sigmoid", T.Select(gate > high, high, gate)) * raised

    panels = -(-n // HALF)
    return _gated(clamped if gating == "clamped" else lambda gate, up: activate(activation, gate) * up, panels, bias)


def _gated(combine, panels=0, bias=False):
    def result(scratch, column, lanes, B, R, col, row, which):
        gate, up = load(scratch, column, lanes), load(scratch, column + HALF, lanes)
        if bias:
            place = (which * panels + T.truncdiv(col, HALF)) * PANEL + T.truncmod(col, HALF)
            gate, up = gate + load(B, place, lanes), up + load(B, place + HALF, lanes)
        return combine(gate, up)

    return result


@T.inline
def store_panel(result, S, base, row, panel, B, R, Y, place, n, columns, lanes, which):
    """Y[place..] = row `row` of a panel's outputs, whose sums are S[base..base + 16]; `which` matrix it is of.

    The last panel may have fewer than `columns`: what it has too many would read a bias and a residual that are not
    there, so its outputs are taken one by one.
    """
    if panel * columns + columns <= n:
        for c in T.serial(columns // min(lanes, columns)):
            Y[at(place + c * min(lanes, columns), min(lanes, columns))] = result(
                S,
                base + c * min(lanes, columns),
                min(lanes, columns),
                B,
                R,
                panel * columns + c * min(lanes, columns),
                row,
                which,
            )
    else:
        for c in T.serial(n - panel * columns):
            Y[place + c] = result(S, base + c, 1, B, R, panel * columns + c, row, which)
