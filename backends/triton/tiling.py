"""How a product is cut into tiles and dealt to programs: a model of time, from the chip's figures alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llmc.backends.triton.packing import COLUMNS, ROWS, blocks_of
from llmc.ir.target import GpuVariant

LATENCY = 1.0e-6
"""Seconds from asking for memory to having it, with the memory busy: so much of its bandwidth must be under way."""
SLACK = 1.5
"""How much more than that is asked for, since programs wait for each other and for barriers."""
LAUNCH = 1.5e-6
"""Seconds in which a launch moves nothing: its start, and the tail in which programs end one by one."""
MATRIX_RATE = 1024.0
"""Products of 16-bit numbers that a multiprocessor adds up in a cycle with the instructions of one warp; twice as many
with Hopper's of four warps, four times with Blackwell's (the datasheets' peaks by clocks and multiprocessors)."""
WARPS_TO_FILL = 3.0
"""Warps that a scheduler needs to start an instruction in every cycle."""
PASS, SUM = 95, 28
"""Instructions of each thread for a pass of the loop, whatever the tile, and for every further sum that it scales."""
RESERVED = 1024
"""Bytes of shared memory that the system keeps of each program's."""


@dataclass(frozen=True)
class Product:
    """A product as the model sees it: y [m, n] = x [m, k] · weight [n, k]ᵀ.

    `bits`: of a weight, its scale counted; `code_bits`: without; `span`: columns that share a scale, or 0; `item`:
    bytes of what products take; `norm`: whether x is f32 and normalised on the way; `instructions`: that bring a weight
    from memory into a product; `copies`: of a tile of weights in shared memory, in what products take, on the way;
    `sums`: whether scales are applied to sums.
    """

    n: int
    k: int
    m: int
    bits: float
    code_bits: int
    span: int
    item: int
    norm: bool = False
    instructions: float = 1.5
    copies: int = 0
    sums: bool = False


@dataclass(frozen=True)
class Tiling:
    """Rows of the weight, tokens and columns of a tile; programs; loads in flight, and warps of a program.

    `parts`: among how many programs a tile may be split.
    """

    block_n: int
    block_m: int
    block_k: int
    programs: int
    stages: int
    warps: int

    def tiles(self, n: int, m: int) -> int:
        """Tiles of the result."""
        return blocks_of(n, self.block_n) * self.tiles_m(m)

    def tiles_m(self, m: int) -> int:
        """Tiles side by side over tokens."""
        return blocks_of(m, self.block_m)

    def chunks(self, k: int) -> int:
        """Pieces of a tile."""
        return blocks_of(k, self.block_k)

    def per_program(self, n: int, k: int, m: int) -> int:
        """Pieces that a program takes."""
        return blocks_of(self.tiles(n, m) * self.chunks(k), self.programs)

    def parts(self, n: int, k: int, m: int) -> int:
        """Among how many programs a tile may be split, at most."""
        per, chunks = self.per_program(n, k, m), self.chunks(k)
        if chunks % per == 0 or per % chunks == 0:
            return max(1, chunks // per)
        return (chunks - 2) // per + 2

    def workspace_bytes(self, n: int, k: int, m: int) -> int:
        """What split tiles leave for each other: f32 tiles, and a row of sums."""
        return 4 * self.tiles(n, m) * self.parts(n, k, m) * (self.block_n + 1) * self.block_m

    def shared_bytes(self, product: Product) -> int:
        """Shared memory of a program: the loads in flight, and a tile of x as the matrix unit takes it."""
        weight = self.block_n * self.block_k * product.code_bits // 8
        x = self.block_k * self.block_m * (4 if product.norm else product.item)
        rounded = self.block_k * self.block_m * product.item if product.norm else 0
        copies = self.block_n * self.block_k * product.item * product.copies
        return self.stages * (weight + x) + rounded + copies + RESERVED


@dataclass(frozen=True)
class Tunings:
    """Tilings that were measured to be the fastest, by product and architecture; the model chooses the others."""

    chosen: Mapping[tuple[Product, str], Tiling] = field(default_factory=dict)

    def get(self, product: Product, variant: GpuVariant) -> Tiling | None:
        """The measured choice, or None."""
        return self.chosen.get((product, variant.name))


def uses_warps(variant: GpuVariant, warps: int) -> bool:
    """Whether Triton multiplies with the instructions of one warp (`mma`, from Ampere on), not with those of four
    together (Hopper's `wgmma`, Blackwell's `tcgen05`), which want four warps, or eight."""
    return variant.capability < (9, 0) or warps % 4 != 0


def choose(product: Product, variant: GpuVariant) -> Tiling:
    """The tiling with the least modelled time; of equals, few programs, small tiles, many loads in flight, few
    warps."""
    return candidates(product, variant)[0]


def candidates(product: Product, variant: GpuVariant, most: int = 8) -> list[Tiling]:
    """The best tilings by the model, the best first: what `--tune` measures."""
    found = {t: seconds(product, t, variant) for t in _possible(product, variant)}
    return sorted(found, key=lambda t: (found[t], t.programs, t.block_n * t.block_m, -t.stages, t.warps))[:most]


def seconds(product: Product, tiling: Tiling, variant: GpuVariant) -> float:
    """Modelled time: the slowest of memory, matrix units and schedulers, all programs as busy as any; a launch."""
    per = tiling.per_program(product.n, product.k, product.m)
    resident = _resident(product, tiling, variant)
    at_once = min(tiling.programs, resident * variant.multiprocessors)
    waves = blocks_of(tiling.programs, resident * variant.multiprocessors)
    weight = tiling.block_n * tiling.block_k * product.bits / 8
    x = tiling.block_k * tiling.block_m * product.item / 8  # out of the L2 cache, which gives several times as much
    in_flight = at_once * (tiling.stages - 1) * tiling.block_n * tiling.block_k * product.bits / 8
    bandwidth = variant.bandwidth * min(1.0, in_flight / (SLACK * variant.bandwidth * LATENCY))
    memory = waves * per * (weight + x) * at_once / bandwidth
    faster = 1 if uses_warps(variant, tiling.warps) else 2 if variant.capability < (10, 0) else 4
    rate = MATRIX_RATE * faster * variant.clock * variant.multiprocessors
    if product.item == 4:
        rate /= 16  # f32 is multiplied by ordinary units
    wide = max(tiling.block_m, 16)
    # A unit of small tiles waits for its operands: half the rate at 64 rows and 64 tokens, most of it at 128 and 256.
    share = (tiling.block_n * wide) / (tiling.block_n * wide + 64 * 64)
    matrix = waves * per * tiling.block_n * wide * tiling.block_k * at_once / (rate * share)
    # A warp waits for its own results, so that a scheduler with one warp starts an instruction every third cycle.
    busy = min(1.0, at_once / variant.multiprocessors * tiling.warps / 4 / WARPS_TO_FILL)
    weights = tiling.block_n * tiling.block_k
    sums = COLUMNS // product.span if product.span and product.sums else 1
    instructions = weights * product.instructions + (PASS + SUM * (sums - 1)) * 32 * tiling.warps
    issue = waves * per * at_once * instructions / (variant.issue_rate * busy)
    # From one tile to the next a program has nothing under way; the others of its multiprocessor go on.
    ramps = (per - 1) / tiling.chunks(product.k) * LATENCY * variant.multiprocessors / at_once
    parts = tiling.parts(product.n, product.k, product.m)
    written = tiling.workspace_bytes(product.n, product.k, product.m) if parts > 1 else 0
    return max(memory, matrix, issue) + ramps + written * 2 / (3 * variant.bandwidth) + LAUNCH


def _possible(product: Product, variant: GpuVariant) -> Iterator[Tiling]:
    few = product.m <= 64
    widest = max(8, 1 << (product.m - 1).bit_length()) if product.m > 1 else 8
    # Narrower tiles than there are tokens read weights several times: for chips with little shared memory.
    sizes_m = [m for m in (8, 16, 32, 64) if min(widest, 16) <= m <= widest] if few else [32, 64, 128, 256]
    if product.span and variant.capability < (9, 0):
        # Weights that are decoded lie in the registers of every warp that multiplies them, with all of its tokens.
        sizes_m = [m for m in sizes_m if m <= 64]
    for block_m in sizes_m:
        for block_n in (ROWS, 2 * ROWS):
            for block_k in (COLUMNS,) if product.span else (COLUMNS // 2, COLUMNS):
                for warps in _warps(product, block_n * block_m, block_m, variant):
                    for stages in (5, 4, 3, 2):
                        made = Tiling(block_n, block_m, block_k, 1, stages, warps)
                        if made.shared_bytes(product) > variant.shared_bytes or block_n * block_m > 128 * 256:
                            continue
                        yield from _dealt(product, made, variant, few)


def _warps(product: Product, size: int, block_m: int, variant: GpuVariant) -> tuple[int, ...]:
    """Of a program. Two are too few for the instructions of four warps together, which Blackwell's sums of few rows do
    without: to fetch sums out of a memory of their own takes longer than to multiply."""
    if size > 128 * 64:
        return (8,)
    if product.item == 4 or variant.capability < (9, 0):
        return (4,)  # of more, some would decode the same weights for other tokens
    if block_m > 16:
        wide = size == 128 * 64  # of these, a norm's sums of squares want the registers of 8 warps
        return (8,) if wide and product.norm else (4, 8) if wide else (4,)
    return (2,) if variant.capability >= (10, 0) else (4, 2)


def _dealt(product: Product, tiling: Tiling, variant: GpuVariant, few: bool) -> Iterator[Tiling]:
    """The tiling with its programs: as many as stay on the chip, each with as many pieces as any, or one a tile."""
    tiles = tiling.tiles(product.n, product.m)
    if not few:
        yield _with(tiling, tiles)
        return
    units = tiles * tiling.chunks(product.k)
    for resident in range(1, min(8, _resident(product, tiling, variant)) + 1):
        per = blocks_of(units, min(units, resident * variant.multiprocessors))
        yield _with(tiling, blocks_of(units, per))


def _with(tiling: Tiling, programs: int) -> Tiling:
    return Tiling(tiling.block_n, tiling.block_m, tiling.block_k, programs, tiling.stages, tiling.warps)


def _resident(product: Product, tiling: Tiling, variant: GpuVariant) -> int:
    """Programs that a multiprocessor holds at once: by shared memory, and registers for 16 warps of this kind."""
    return max(1, min(variant.shared_bytes // tiling.shared_bytes(product), 16 // tiling.warps))


def expected_bits(bits: int, group: int) -> float:
    """Bits of a weight with its part of an f16 scale."""
    return bits + 16 / group if group else float(bits)


def balance(product: Product, tiling: Tiling) -> float:
    """The mean program's pieces over the busiest one's: 1 when all end together."""
    units = tiling.tiles(product.n, product.m) * tiling.chunks(product.k)
    return units / (tiling.programs * tiling.per_program(product.n, product.k, product.m))
