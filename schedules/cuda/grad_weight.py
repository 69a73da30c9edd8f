# SPDX-License-Identifier: Apache-2.0
"""The gradients of weight and bias on NVIDIA GPUs; part of the design space of `deform_conv2d_grad`.

    block of threads: a split of the output pixels, a tap, a tile of output channels x input channels
        plan:  where each (offset group, pixel) of some hundred pixels samples, in shared memory
            per step of pixels, overlapped with the step before:
                rows:     16-byte asynchronous copies of the output's gradient to shared memory
                corner:   four 16-byte loads a thread and vector of channels, into registers
                product:  operands from shared memory, sums in registers
                columns:  corners times shares, to shared memory
        part:  the sums to the device's memory
    then: the parts of all splits added up in order (`grad_sums`)

Decisions, besides those of tiles:

* weight_tile_units: pixels of a split, in tiles of 256. More splits fill more multiprocessors, and each is as many
  bytes as a weight of the accumulator's dtype, written and read.
* weight_warps_down: by default all output channels, up to 256 of them, are of one block: a tile of them samples anew.
* weight_plan_pixels: see `_Steps.of`.
* Without tensor cores, the same; groups of few channels (``gather``) share nothing but the plan: a thread sums up what
  it samples, for some of the pixels, and threads on different pixels add up in order in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

from tvmdcn.schedules.cuda.grad_sums import add_parts, sum_bias
from tvmdcn.schedules.cuda.plan import plan_of_block
from tvmdcn.schedules.cuda.threads import BARRIER, BOUND, LANES, PIPELINE, Team
from tvmdcn.space import TILE_UNITS, Choices
from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.te.device_sampling import MOST_PIXELS, PIXELS
from tvmdcn.te.pixel_sums import BIAS_PREFIX
from tvmdcn.te.products import product_of
from tvmdcn.te.tiles import ITEM_BYTES
from tvmdcn.te.weight_gradients import PREFIX, groups_fit

__all__ = ["schedule_weight"]

VECTOR_BYTES = 16
TILE = 16
_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8)
_WARPS = (1, 2, 4, 8)
_FIRST = -2  # of the places in a loop
_UNITS = [1, 2, 4, 8, 16, 32]


def schedule_weight(sch: Any, spec: DeformConv2dGradSpec, target: Any, choices: Choices) -> None:
    """Schedule the gradients of weight and bias, those that are asked for."""
    units = _pick(choices, "weight_tile_units", _UNITS, 8)
    if spec.grad_weight:
        sch.compute_inline(_stage_of(sch, "image_first"))
        kind = product_of(spec).kind
        {"mma": _tensor_cores, "simt": _multiply_adds, "gather": _gather}[kind](sch, spec, choices)
        add_parts(sch)
    if spec.grad_bias:
        sum_bias(sch)
    sch.annotate(sch.get_sblock((PREFIX if spec.grad_weight else BIAS_PREFIX) + "total"), TILE_UNITS, units)


def _stage_of(sch: Any, name: str) -> Any:
    return sch.get_sblock(PREFIX + name)


def _pick(choices: Choices, name: str, candidates: list[int], wish: int) -> int:
    """Return the decision of a choice; by default the largest candidate that is not above `wish`."""
    choices.pick(name, candidates, max((c for c in candidates if c <= wish), default=candidates[0]))
    return choices.made[name]


def _divisors(value: int, candidates: tuple[int, ...]) -> list[int]:
    return [c for c in candidates if value % c == 0]


def _vector(spec: DeformConv2dGradSpec) -> int:
    """Return how many channels a thread samples at once: they lie in one group and one offset group."""
    run = gcd(spec.in_channels // spec.groups, spec.in_channels // spec.offset_groups)
    return gcd(run, VECTOR_BYTES // ITEM_BYTES[spec.dtype])


def _fitting(spec: DeformConv2dGradSpec, candidates: list[int], channels: int) -> list[int]:
    """Return the candidates that make tiles, of so many times `channels`, begin and end with offset groups."""
    size = spec.in_channels // spec.offset_groups
    if spec.offset_groups == 1 or not groups_fit(spec):
        return candidates
    return [c for c in candidates if c * channels % size == 0 or size % (c * channels) == 0]


def _even(warps: list[int], across: int, vectors: int, lengths: list[int]) -> list[int]:
    """Return the numbers of warps, times `across`, among which the longest step's vectors of a pixel can be divided."""
    return [w for w in warps if w * across * LANES // gcd(vectors, w * across * LANES) <= lengths[-1]]


def _extent(sch: Any, loop: Any) -> int:
    return int(sch.get(loop).extent)


def _tensor_cores(sch: Any, spec: DeformConv2dGradSpec, choices: Choices) -> None:
    """Schedule the product on tensor cores: a warp makes tiles of 16 x 16, which it keeps in 8 registers each."""
    block = partial(_stage_of, sch)

    product = block("product")
    fragments = product_of(spec).fragments
    assert fragments is not None
    n, g, k, r, c, s, lane, _ = sch.get_loops(product)
    outputs, channels = _extent(sch, r), _extent(sch, c)
    # What is odd is done by each warp, so that the number of threads is a power of two.
    odd = outputs // (outputs & -outputs)
    wish = odd if 1 < odd <= _COUNTS[-1] else 4 if outputs % (8 * fragments.packing) == 0 else 2
    rows = _pick(choices, "weight_warp_rows", _divisors(outputs, _COUNTS), wish)
    # Tiles of tf32 take more registers: where half as many outputs are a block's, its warps are narrow.
    columns, warps = (1, 4) if fragments.packing == 1 and outputs % 16 == 8 else (2, 2)
    width = _pick(choices, "weight_warp_columns", _fitting(spec, _divisors(channels, (1, 2, 3, 4)), TILE), columns)
    beside = _fitting(spec, _divisors(channels // width, (1, 2, 4)), width * TILE)
    across = _pick(choices, "weight_warps_across", beside, warps)
    vectors, lengths = across * width * TILE // _vector(spec), [16, 32, 64]
    tall = _even(_divisors(outputs // rows, _WARPS), across, vectors, lengths)
    down = _pick(choices, "weight_warps_down", tall, 4)
    team = Team(sch, down * across)
    lengths = [length for length in lengths if length >= team.threads // gcd(vectors, team.threads)]
    pixels = _pick(choices, "weight_step_pixels", lengths, 16 * fragments.packing)
    steps = _Steps.of(sch, spec, choices, pixels, across * width * TILE, team.threads)

    blocks_r, warp_r, r = sch.split(r, [None, down, rows])
    blocks_c, warp_c, c = sch.split(c, [None, across, width])
    *around, inner = sch.split(s, [None, *steps.factors, pixels // fragments.depth])
    sch.reorder(n, g, blocks_r, blocks_c, k, warp_r, warp_c, lane, *around, inner, r, c)
    _grid(sch, (n, g, blocks_r, blocks_c, k), (warp_r, warp_c), lane)
    sch.set_scope(product, 0, "local")
    for name in ("left", "right"):
        sch.set_scope(block(name), 0, "local")
        sch.compute_at(block(name), inner)
        for loop in sch.get_loops(block(name))[4 + len(around) :]:
            sch.unroll(loop)
    for loop in (inner, r, c):
        sch.unroll(loop)
    skew = 8 if fragments.packing == 1 else VECTOR_BYTES // ITEM_BYTES[spec.dtype]
    _operands(sch, spec, team, around, steps, skew)

    part = block("part")
    sch.reverse_compute_at(part, lane)
    for loop in sch.get_loops(part)[3:]:
        sch.unroll(loop)
    init = sch.decompose_reduction(product, around[0])
    for loop in sch.get_loops(init)[3:]:
        sch.unroll(loop)


def _multiply_adds(sch: Any, spec: DeformConv2dGradSpec, choices: Choices) -> None:
    """Schedule the product without tensor cores: a thread makes a tile of vectors of output x input channels."""
    product, vector = sch.get_sblock(PREFIX + "product"), VECTOR_BYTES // ITEM_BYTES[spec.dtype]
    n, g, k, o, c, q = sch.get_loops(product)
    outputs, channels = (_extent(sch, loop) // vector for loop in (o, c))
    width = _pick(choices, "weight_thread_columns", [1, 2], 2)
    tall = [rows for rows in (1, 2) if _lanes(channels // width, outputs // rows)]
    rows = _pick(choices, "weight_thread_rows", tall, 2)
    # Lanes of a warp: side by side along input channels, the rest along output channels.
    lanes = _fitting(spec, _lanes(channels // width, outputs // rows), width * vector)
    beside = _pick(choices, "weight_lanes_across", lanes, 8)
    warps = _fitting(spec, _divisors(channels // width // beside, (1, 2, 4)), width * beside * vector)
    across = _pick(choices, "weight_warps_across", warps, 2)
    vectors, lengths = across * beside * width * vector // _vector(spec), [8, 16, 32]
    warps = _even(_divisors(outputs // rows // (LANES // beside), _WARPS), across, vectors, lengths)
    down = _pick(choices, "weight_warps_down", warps, 4)
    team = Team(sch, down * across)
    lengths = [length for length in lengths if length >= team.threads // gcd(vectors, team.threads)]
    pixels = _pick(choices, "weight_step_pixels", lengths, 16)
    steps = _Steps.of(sch, spec, choices, pixels, across * beside * width * vector, team.threads)

    blocks_o, warp_o, lane_o, o = sch.split(o, [None, down, LANES // beside, rows * vector])
    blocks_c, warp_c, lane_c, c = sch.split(c, [None, across, beside, width * vector])
    *around, pixel = sch.split(q, [None, *steps.factors, pixels])
    sch.reorder(n, g, blocks_o, blocks_c, k, warp_o, warp_c, lane_o, lane_c, *around, pixel, o, c)
    lane = sch.fuse(lane_o, lane_c)
    _grid(sch, (n, g, blocks_o, blocks_c, k), (warp_o, warp_c), lane)
    sch.set_scope(product, 0, "local")
    for operand in (1, 2):
        near = sch.cache_read(product, operand, "local")
        sch.compute_at(near, pixel)
        channel = sch.get_loops(near)[-1]
        vectors, elements = sch.split(channel, [None, vector])
        sch.unroll(vectors)
        sch.vectorize(elements)
    for loop in (pixel, o, c):
        sch.unroll(loop)
    _operands(sch, spec, team, around, steps, vector)

    part = sch.get_sblock(PREFIX + "part")
    sch.reverse_compute_at(part, lane)
    o, c = sch.get_loops(part)[-2:]
    vectors, elements = sch.split(c, [None, gcd(vector, spec.in_channels // spec.groups)])
    sch.vectorize(elements)
    for loop in (o, vectors):
        sch.unroll(loop)
    init = sch.decompose_reduction(product, around[0])
    for loop in sch.get_loops(init)[3:]:
        sch.unroll(loop)


def _lanes(across: int, down: int) -> list[int]:
    """Return how many of a warp's lanes may lie side by side so that the rest has its rows."""
    return [c for c in (1, 2, 4, 8, 16, 32) if across % c == 0 and down % (LANES // c) == 0]


def _gather(sch: Any, spec: DeformConv2dGradSpec, choices: Choices) -> None:
    """Schedule grouped layers: a thread samples what it multiplies, for some of a step's pixels."""
    block = partial(_stage_of, sch)

    in_group, out_group = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    # Vectors of channels: of a group, or, where it has only one, of neighbouring groups.
    vector = 1 if in_group == 1 else _vector(spec)
    beside = gcd(spec.groups // spec.offset_groups, VECTOR_BYTES // ITEM_BYTES[spec.dtype]) if in_group == 1 else 1
    outputs = _pick(choices, "weight_thread_outputs", _divisors(out_group, _COUNTS), 4)
    counts = (1, 2, 4, 8, 16, 32)
    of_channels = _fitting(spec, _divisors(in_group // vector, counts), vector)
    lanes_c = _pick(choices, "weight_lanes_channels", of_channels, 8)
    of_groups = _fitting(spec, _divisors(spec.groups // beside, counts), beside * in_group)
    lanes_g = _pick(choices, "weight_lanes_groups", of_groups, 8 // lanes_c)
    mine = _pick(choices, "weight_thread_pixels", [1, 2, 4], 2)
    warps = _pick(choices, "weight_warps", [1, 2, 4, 8], 4)
    team = Team(sch, warps)
    while lanes_g * lanes_c > team.threads:
        lanes_g //= 2
    down = team.threads // (lanes_g * lanes_c)  # threads on different pixels
    while down * mine > PIXELS:
        mine //= 2

    product = block("product")
    n, g, k, o, c, q = sch.get_loops(product)
    pixels = down * mine
    groups = max(1, lanes_c * vector * lanes_g * beside * spec.offset_groups // spec.in_channels)
    candidates = [count for count in (16, 32, 64, 128, 256) if count >= pixels]
    planned = _pick(choices, "weight_plan_pixels", candidates, PIXELS // groups)
    unit, step, lane_q, q = sch.split(q, [None, planned // pixels, down, mine])
    sch.rfactor(lane_q, 0)
    summed = block("product_rf")
    n, g, k, o, c, unit, step, lane_q, q = sch.get_loops(summed)
    blocks_g, lane_g, g = sch.split(g, [None, lanes_g, beside])
    blocks_c, lane_c, c = sch.split(c, [None, lanes_c, vector])
    blocks_o, o = sch.split(o, [None, outputs])
    sch.reorder(n, blocks_g, blocks_c, blocks_o, k, lane_q, lane_g, lane_c, unit, step, q, o, g, c)
    tile = sch.fuse(n, blocks_g, blocks_c, blocks_o, k)
    sch.bind(tile, "blockIdx.x")
    lane = team.bind(sch.fuse(lane_q, lane_g, lane_c))
    sch.annotate(unit, PIPELINE, 0)
    sch.annotate(unit, BOUND, MOST_PIXELS // planned)
    for loop in (q, o, g, c):
        sch.unroll(loop)

    # Sums of a thread are registers; those of threads on other pixels meet in shared memory.
    registers = sch.cache_write(summed, 0, "local")
    sch.set_scope(registers, 0, "shared.dyn")
    sch.reverse_compute_at(registers, lane)
    for loop in sch.get_loops(registers)[3:]:
        sch.unroll(loop)
    part = block("part")
    sch.reverse_compute_at(product, tile)
    sch.reverse_compute_at(part, tile, preserve_unit_loops=True)
    element = sch.fuse(*sch.get_loops(part)[1:])
    sch.set_scope(product, 0, "local")
    sch.compute_at(product, element)
    team.share([element])
    sch.annotate(sch.get_loops(part)[1], BARRIER, "block")

    near = block("rows")
    if in_group == 1:  # vectors of groups lie side by side in registers, too
        sch.transform_layout(block("corner"), ("write", 0), lambda g, k, n, q, p, c: (k, n, q, p, c, g))
        sch.transform_layout(near, ("write", 0), lambda g, n, q, o: (n, q, o, g))
    for name in ("columns", "operand", "column", "corner"):
        stage = block(name)
        sch.set_scope(stage, 0, "local")
        sch.compute_at(stage, step, preserve_unit_loops=True)
        groups, _, _, pixel, *corners, channel = sch.get_loops(stage)[5:]
        sch.reorder(pixel, *corners, groups, channel)
        for loop in (pixel, *corners, groups, channel):
            sch.unroll(loop)
        if name == "corner":
            sch.vectorize(groups if in_group == 1 else channel)
    sch.set_scope(near, 0, "local")
    sch.compute_at(near, step, preserve_unit_loops=True)
    groups, _, pixel, output = sch.get_loops(near)[5:]
    sch.reorder(pixel, output, groups)
    for loop in (pixel, output, groups):
        sch.unroll(loop)
    if out_group == 1:
        sch.vectorize(groups)
    elif in_group > 1:
        sch.vectorize(sch.split(output, [None, gcd(outputs, VECTOR_BYTES // ITEM_BYTES[spec.dtype])])[1])
    team.share([plan_of_block(sch, unit, PREFIX, _FIRST)])
    init = sch.decompose_reduction(summed, unit)
    for loop in sch.get_loops(init)[3:]:
        sch.unroll(loop)


def _grid(sch: Any, blocks: tuple[Any, ...], warps: tuple[Any, ...], lane: Any) -> None:
    """Bind the outer loops of the product. Blocks side by side share their pixels."""
    sch.bind(sch.fuse(*blocks), "blockIdx.x")
    sch.bind(sch.fuse(*warps), "threadIdx.y")
    sch.bind(lane, "threadIdx.x")


@dataclass(frozen=True)
class _Steps:
    """How a block of threads walks over its pixels.

    Attributes
    ----------
    pixels : int
        Of a step.
    planned : int
        Pixels whose samples are planned at once; those of a step only if steps overlap with the plan of another.
    channels : int
        Input channels of the block.
    overlap : bool
    """

    pixels: int
    planned: int
    channels: int
    overlap: bool

    @classmethod
    def of(
        cls, sch: Any, spec: DeformConv2dGradSpec, choices: Choices, pixels: int, channels: int, threads: int
    ) -> _Steps:
        """Return what is chosen.

        By default a step's samples are planned two steps ahead if most of the threads have one to plan. If only a few
        have, all wait for them: for divisions and loads of offsets one after another, as long as a step takes. Then
        they are planned for many steps at once, between which nothing overlaps.
        """
        overlap = _pick(choices, "weight_overlap", [0, 1], 1)
        groups = max(1, channels * spec.offset_groups // spec.in_channels)
        # One step after the other: TVM would give a step's plan and its operands the same memory.
        candidates = [count for count in (8, 16, 32, 64, 128, 256) if count >= pixels + (not overlap)]
        wish = pixels if 2 * groups * pixels >= threads else PIXELS
        return cls(pixels, _pick(choices, "weight_plan_pixels", candidates, wish), channels, bool(overlap))

    @property
    def factors(self) -> list[int]:
        """Extents of the loops over steps inside the first."""
        return [] if self.planned == self.pixels else [self.planned // self.pixels]


def _operands(sch: Any, spec: DeformConv2dGradSpec, team: Team, around: list[Any], steps: _Steps, skew: int) -> None:
    """Schedule a step's part of both operands: the plan, ``rows``, ``corner`` and ``columns``.

    `around` are the loops over plans and steps, or over steps that have a plan each.
    """
    block = partial(_stage_of, sch)

    vector, step, outer = _vector(spec), around[-1], 3 + len(around)
    sch.annotate(step, PIPELINE, int(steps.overlap))
    sch.annotate(around[0], BOUND, MOST_PIXELS // steps.planned)
    names = ("corner", "column", "operand", "columns", "rows")
    corner, column, operand, columns, rows = (block(name) for name in names)
    for stage in (columns, rows):
        sch.set_scope(stage, 0, "shared.dyn")
        sch.compute_at(stage, step)
    for stage in (operand, column, corner):
        sch.set_scope(stage, 0, "local")
        sch.compute_at(stage, step)
    plan = plan_of_block(sch, around[0], PREFIX, _FIRST)
    for stage in (rows, columns):
        # Rows begin in different banks of shared memory.
        sch.storage_align(stage, 0, -2, 32, skew)
    # No number of vectors but a power of two divides threads: TVM loses the extent of what is indexed otherwise.
    pixel, output = sch.get_loops(rows)[outer:]
    side = gcd(_extent(sch, output), team.threads)
    pixel_rounds, pixel = sch.split(pixel, [None, team.threads // side])
    output_rounds, output = sch.split(output, [None, side])
    sch.reorder(pixel_rounds, output_rounds, pixel, output)
    team.bind(sch.fuse(pixel, output))
    for loop in (pixel_rounds, output_rounds):
        sch.unroll(loop)
    together = gcd(steps.channels // vector, team.threads)  # threads side by side on one pixel
    down = team.threads // together
    for stage in (corner, columns):
        pixel, *corners, channel = sch.get_loops(stage)[outer:]
        # A thread's pixels side by side: what TVM takes for the size of `corner` is the distance between them.
        mine, pixel = sch.split(pixel, [down, None])
        rounds, channel, lanes = sch.split(channel, [None, together, vector])
        sch.reorder(mine, channel, pixel, rounds, *corners, lanes)
        team.bind(sch.fuse(mine, channel))
        for loop in (pixel, rounds, *corners):
            sch.unroll(loop)
        sch.vectorize(lanes)
    for stage in (operand, column):
        sch.compute_at(stage, rounds)
        sch.unroll(sch.get_loops(stage)[-1])
    team.share([plan])
    if len(around) > 1:
        sch.annotate(step, BARRIER, "block")
    double = [columns] if len(around) > 1 else [columns, block("place"), block("share")]
    for stage in double if steps.overlap else ():
        sch.annotate(stage, "double_buffer_scope", 0)
