"""What a matrix product's sums become: bias, activation, gate and residual, and where the outputs of a panel go."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.math import activate
from llmc.backends.tvm.kernels.vector import at, load
from llmc.backends.tvm.packing import HALF


def linear_result(n, bias, epilogue, residual):
    """A `result(scratch, column, lanes, B, R, col, row)`: outputs of a panel's sums, at (row, col) of y."""

    def result(scratch, column, lanes, B, R, col, row):
        value = load(scratch, column, lanes)
        value = value + load(B, col, lanes) if bias else value
        value = activate(epilogue, value)
        return value + load(R, row * n + col, lanes) if residual else value

    return result


def gated_result(activation):
    """The same for gated panels: 8 sums of gate, then the 8 of up that belong to them."""

    def result(scratch, column, lanes, B, R, col, row):
        return activate(activation, load(scratch, column, lanes)) * load(scratch, column + HALF, lanes)

    return result


@T.inline
def store_panel(result, S, base, row, panel, B, R, Y, place, n, columns, lanes):
    """Y[place..] = row `row` of a panel's outputs, whose sums are S[base..base + 16].

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
            )
    else:
        for c in T.serial(n - panel * columns):
            Y[place + c] = result(S, base + c, 1, B, R, panel * columns + c, row)
