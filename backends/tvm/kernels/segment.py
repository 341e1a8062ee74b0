"""Attention over one segment of 256 keys, for a unit of work: all query rows that share a kv head and a few tokens.

A query row is one head of one token: row r of a unit is head r % group of the unit's token r // group. A segment gives
each row its maximum, its sum of exponentials and its weighted values; those of a split (a fixed number of segments) are
folded together in order, and then splits are. All of that depends on the row's own position alone, so a row's bits are
the same in any batch, chunk or tile, and whether splits are folded by one task or by `combine_splits`.

With a window a row's first segment is the one of the first key that it sees, whatever the other rows of its unit see: a
segment in which it has no keys changes no bits.

What lies beyond a row's position (later keys, slots not yet written, blocks of others) never enters its arithmetic:
scores there are replaced, not multiplied, and values there are not read. The same holds before its window.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.cache import BLOCK
from llmc.backends.tvm.kernels.math import exp, exp_of_difference, tanh
from llmc.backends.tvm.kernels.tile import COLUMNS, rows_at_most, tile
from llmc.backends.tvm.kernels.vector import at, f32, fma, load, splat, tree_max, tree_sum, wide
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


def segment(
    isa,
    *,
    group,
    tokens,
    kv_heads,
    head_dim,
    scale,
    kv_dtype,
    value_dim=0,
    window=0,
    soft_cap=0.0,
    alibi=False,
    ahead=False,
):
    """`run` and what else units are made of; `rows` is how many a unit has at most, in whole vectors.

    Q f32 [rows, head_dim] queries; K, V, KS and VS the states and their scales; B block tables; SL f32 [q_heads] slopes
    (with `alibi`); W f32 [rows, COLUMNS] scores, then weights; Y f32 [rows, value_dim] weighted values so far; A f32
    [6, rows] by row: the maximum and the sum of exponentials so far, the factors of what was so far and of what was
    folded in last, the latter's maximum and sum.
    """
    L = isa.lanes
    scaled, adjusts = kv_dtype == "i8", bool(soft_cap or alibi)
    windowed = window > 0
    tiles = tiling(isa, group, tokens)
    product = tile(
        isa,
        group=group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        scale=scale,
        kv_dtype=kv_dtype,
        ahead=ahead,
        window=window,
    )
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

    def seen(j, first, valid):
        """Which of the keys j..j + L a row sees."""
        inside = at(j, L) < splat(valid, L)
        return T.And(inside, at(j, L) >= splat(first, L)) if windowed else inside

    def adjusted(score, j, slope, before):
        """Scores of the keys j..j + L with a cap and a slope; key 0 is `before` positions after the query."""
        if soft_cap:
            score = tanh(score * f32(1 / soft_cap, L)) * f32(soft_cap, L)
        if alibi:
            distance = T.Cast(wide("float32", L), at(j + before, L))
            score = fma(splat(slope, L), distance, score)
        return score

    @T.inline
    def weigh(W, A, SL, VS, B, row, position, first, valid, start, table, head):
        """W[row] = e^(score - maximum), zero but for the keys from `first` to `valid`; their maximum and sum. Values'
        scales go into weights, but not into their sum."""
        skipped: T.let = T.truncdiv(first, L) if windowed else 0
        slope: T.let = SL[head * group + T.truncmod(row, group)] if alibi else f32(0.0)
        lane = T.alloc_buffer((L,), "float32", scope="local")
        lane[at(0, L)] = f32(_LOWEST, L)
        for j_ in T.serial(T.truncdiv(valid + L - 1, L) - skipped):
            j: T.let = skipped + j_
            if adjusts:
                W[at(row * COLUMNS + j * L, L)] = adjusted(
                    load(W, row * COLUMNS + j * L, L), j * L, slope, start - position
                )
            s: T.let = T.Select(seen(j * L, first, valid), load(W, row * COLUMNS + j * L, L), f32(_LOWEST, L))
            lane[at(0, L)] = T.Select(s > load(lane, 0, L), s, load(lane, 0, L))
        highest: T.let = tree_max([lane[i] for i in range(L)])
        lane[at(0, L)] = f32(0.0, L)
        for j_ in T.serial(T.truncdiv(valid + L - 1, L) - skipped):
            j: T.let = skipped + j_
            e: T.let = exp_of_difference(load(W, row * COLUMNS + j * L, L) - splat(highest, L))
            kept: T.let = T.Select(seen(j * L, first, valid), e, f32(0.0, L))
            if scaled:
                block: T.let = T.Cast("int64", B[table + T.truncdiv(j * L, BLOCK)])
                place: T.let = (block * kv_heads + head) * T.int64(BLOCK) + T.Cast("int64", T.truncmod(j * L, BLOCK))
                W[at(row * COLUMNS + j * L, L)] = T.Select(
                    seen(j * L, first, valid), e * load(VS, place, L), f32(0.0, L)
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
    def run(Q, K, V, KS, VS, B, SL, W, Y, A, table, head, start, last, position, here, fresh, next_):
        """The segment whose first key has position `start`, for a unit of `here` rows whose tokens have the positions
        `position` to `last`. B[table] is the segment's first block. `fresh`: nothing was folded into Y yet.
        `next_`, i32 [3], says what is read next (see `tile`), where `ahead` is asked for."""
        blocks: T.let = T.min(SEGMENT // BLOCK, T.truncdiv(last - start, BLOCK) + 1)
        first_block: T.let = T.truncdiv(product.first_key(position, start), BLOCK) if windowed else 0
        for_tiles(here, product.scores, Q, K, V, KS, VS, B, W, table, first_block, blocks, head)
        for r in T.serial(here):
            own: T.let = position + T.truncdiv(r, group)
            valid: T.let = T.min(SEGMENT, own + 1 - start)
            first: T.let = product.first_key(own, start)
            if valid > first:
                weigh(W, A, SL, VS, B, r, own, first, valid, start, table, head)
            if windowed:  # noqa: SIM102 (decided while the kernel is made)
                if first == SEGMENT:  # nothing, as if the row began with the next segment
                    A[4 * rows + r] = f32(_LOWEST)
                    A[5 * rows + r] = f32(0.0)
        factors(A, A, 4 * rows, (start - position) * group, fresh)
        for_tiles(here, product.values, K, V, KS, B, W, Y, A, rows, table, head, start, position, fresh, next_, here)

    return SimpleNamespace(run=run, factors=factors, rows=rows)


def sink(sinks):
    """`with_sink(E, peak, logit)` and `finished(value, E, lanes)`: a row's results from its weighted values, their
    maximum `peak` and E f32 [2], whose first element is the sum of exponentials. A sink, the logit of nothing, is added
    to the sum once: E becomes the new sum and the factor of the values."""

    @T.inline
    def with_sink(E, peak, logit):
        high: T.let = T.Select(logit > peak, logit, peak)
        E[1] = exp(peak - high)
        E[0] = fma(E[0], E[1], exp(logit - high))

    def finished(value, E, lanes):
        return (value * splat(E[1], lanes) if sinks else value) / splat(E[0], lanes)

    return with_sink, finished
