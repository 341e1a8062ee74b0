"""Attention over one segment of 256 keys, for a unit of work: all query rows that share a kv head and a few tokens.

A query row is one head of one token: row r of a unit is head r % group of the unit's token r // group. A segment gives
each row its maximum, its sum of exponentials and its weighted values; those of a split (a fixed number of segments) are
folded together in order, and then splits are. All of that depends on the row's own position alone, so a row's bits are
the same in any batch, chunk or tile, and whether splits are folded by one task or by `combine_splits`.

What lies beyond a row's position (later keys, slots not yet written, blocks of others) never enters its arithmetic:
scores there are replaced, not multiplied, and values there are not read.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.cache import BLOCK
from llmc.backends.tvm.kernels.math import exp, exp_of_difference
from llmc.backends.tvm.kernels.tile import COLUMNS, rows_at_most, tile
from llmc.backends.tvm.kernels.vector import at, f32, fma, load, splat, tree_max, tree_sum
from llmc.backends.tvm.splits import SEGMENT

_LOWEST = -3.0e38


def tiling(isa, group, tokens):
    """How the rows of a unit of `tokens` tokens or fewer lie in tiles: [(first row, rows)].

    A large group is cut into nearly equal tiles, all of which are run. Else a unit is one tile, the first that has as
    many rows as the unit: fewer heights than tokens, as each is a copy of the code.
    """
    most = rows_at_most(isa)
    chunks = -(-group // most)
    if chunks > 1:
        edges = [group * c // chunks for c in range(chunks + 1)]
        return [(low, high - low) for low, high in pairwise(edges)]
    return [(0, group * t) for t in sorted({1, (tokens + 1) // 2, tokens})]


def segment(isa, *, group, tokens, kv_heads, head_dim, scale, kv_dtype, ahead=False):
    """`run` and what else units are made of; `rows` is how many a unit has at most, in whole vectors.

    Q f32 [rows, head_dim] queries; K, V, KS and VS the states and their scales; B block tables; W f32 [rows, COLUMNS]
    scores, then weights; Y f32 [rows, head_dim] weighted values so far; A f32 [6, rows] by row: the maximum and the sum
    of exponentials so far, the factors of what was so far and of what was folded in last, the latter's maximum and sum.
    """
    L = isa.lanes
    scaled = kv_dtype == "i8"
    tiles = tiling(isa, group, tokens)
    product = tile(isa, group=group, kv_heads=kv_heads, head_dim=head_dim, scale=scale, kv_dtype=kv_dtype, ahead=ahead)
    rows = -(-max(low + height for low, height in tiles) // 16) * 16

    def for_tiles(here, inline, *where):
        """`inline` for the tiles of a unit that has `here` rows."""
        before = 0
        for low, height in tiles:
            if tiles[-1][0]:
                inline(*where, low, height)
                continue
            with T.If(T.And(here > before, here <= height)), T.Then():
                inline(*where, low, height)
            before = height

    @T.inline
    def weigh(W, A, VS, B, row, valid, table, head):
        """W[row] = e^(score - maximum), zero beyond the first `valid` keys; their maximum and sum. Values' scales
        go into weights, but not into their sum."""
        lane = T.alloc_buffer((L,), "float32", scope="local")
        lane[at(0, L)] = f32(_LOWEST, L)
        for j in T.serial(T.truncdiv(valid + L - 1, L)):
            s: T.let = T.Select(at(j * L, L) < splat(valid, L), load(W, row * COLUMNS + j * L, L), f32(_LOWEST, L))
            lane[at(0, L)] = T.Select(s > load(lane, 0, L), s, load(lane, 0, L))
        highest: T.let = tree_max([lane[i] for i in range(L)])
        lane[at(0, L)] = f32(0.0, L)
        for j in T.serial(T.truncdiv(valid + L - 1, L)):
            e: T.let = exp_of_difference(load(W, row * COLUMNS + j * L, L) - splat(highest, L))
            kept: T.let = T.Select(at(j * L, L) < splat(valid, L), e, f32(0.0, L))
            if scaled:
                block: T.let = T.Cast("int64", B[table + T.truncdiv(j * L, BLOCK)])
                place: T.let = (block * kv_heads + head) * T.int64(BLOCK) + T.Cast("int64", T.truncmod(j * L, BLOCK))
                W[at(row * COLUMNS + j * L, L)] = T.Select(
                    at(j * L, L) < splat(valid, L), e * load(VS, place, L), f32(0.0, L)
                )
            else:
                W[at(row * COLUMNS + j * L, L)] = kept
            lane[at(0, L)] = load(lane, 0, L) + kept
        A[4 * rows + row] = highest
        A[5 * rows + row] = tree_sum([lane[i] for i in range(L)])

    @T.inline
    def factors(A, P, next_, first_row, fresh):
        """Folds maxima and sums, P[next_..next_ + 2 · rows], into A, for rows from `first_row` on: those before have no
        keys there. `fresh`: nothing was folded into A yet."""
        for v in T.serial(rows // L):
            peak: T.let = load(P, next_ + v * L, L)
            part: T.let = load(P, next_ + rows + v * L, L)
            if fresh:
                A[at(v * L, L)] = peak
                A[at(rows + v * L, L)] = part
            else:
                top: T.let = load(A, v * L, L)
                total: T.let = load(A, rows + v * L, L)
                high: T.let = T.Select(peak > top, peak, top)
                A[at(2 * rows + v * L, L)] = exp(top - high)
                A[at(3 * rows + v * L, L)] = exp(peak - high)
                sum_: T.let = fma(load(A, 3 * rows + v * L, L), part, total * load(A, 2 * rows + v * L, L))
                A[at(v * L, L)] = T.Select(at(v * L, L) >= splat(first_row, L), high, top)
                A[at(rows + v * L, L)] = T.Select(at(v * L, L) >= splat(first_row, L), sum_, total)

    @T.inline
    def run(Q, K, V, KS, VS, B, W, Y, A, table, head, start, last, position, here, fresh, next_):
        """The segment whose first key has position `start`, for a unit of `here` rows whose tokens have the positions
        `position` to `last`. B[table] is the segment's first block. `fresh`: nothing was folded into Y yet.
        `next_`, i32 [3], says what is read next (see `tile`), where `ahead` is asked for."""
        blocks: T.let = T.min(SEGMENT // BLOCK, T.truncdiv(last - start, BLOCK) + 1)
        for_tiles(here, product.scores, Q, K, V, KS, VS, B, W, table, blocks, head)
        for r in T.serial(here):
            valid: T.let = T.min(SEGMENT, position + T.truncdiv(r, group) + 1 - start)
            if valid > 0:
                weigh(W, A, VS, B, r, valid, table, head)
        factors(A, A, 4 * rows, (start - position) * group, fresh)
        for_tiles(here, product.values, K, V, KS, B, W, Y, A, rows, table, head, start, position, fresh, next_, here)

    return SimpleNamespace(run=run, factors=factors, rows=rows)
