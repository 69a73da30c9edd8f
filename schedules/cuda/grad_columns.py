# SPDX-License-Identifier: Apache-2.0
"""The gradients of input, offset and mask on NVIDIA GPUs; part of the design space of `deform_conv2d_grad`.

block of threads: a tile of output pixels, some taps, an offset group
    plan:  where each (tap, pixel) samples, in shared memory
    per tap and tile of channels:
        per step of output channels, overlapped with the step before:
            near_rows, weights:  16-byte asynchronous copies to shared memory
            product:             operands from shared memory, sums in registers
        column_grads:  a warp brings its pixels' sums to shared memory, where no other warp looks
        scatter:       16-byte additions to the input's gradient, threads side by side along channels
        corner_sums:   four loads of the image a thread, products, and sums over lanes of a warp
    grad_offset:  from the corners' sums to both gradients
"""

from __future__ import annotations

from math import gcd
from typing import Any

from tvmdcn.schedules.cuda.threads import BARRIER, GRID, LANES, PIPELINE, Team
from tvmdcn.space import Choices
from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.te.column_gradients import beside, vector_of
from tvmdcn.te.device_sampling import PIXELS
from tvmdcn.te.products import column_units, product_of
from tvmdcn.te.sampling import plan_blocks
from tvmdcn.te.scattering import added_at_once
from tvmdcn.te.tiles import ITEM_BYTES

__all__ = ["schedule_columns"]

TILE = 16
_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8)
_THREADS = 256
_IMAGE_ROWS = 16
"""Pixels of the image that a block zeroes or converts."""
_ROUNDS = 4
"""How many corners' reads, or additions, of a thread are on their way at once, times four."""
# Loops around what follows the product, the product, and its steps.
_AROUND_TILE, _AROUND_PRODUCT, _AROUND_STEP = 5, 7, 9


def schedule_columns(sch: Any, spec: DeformConv2dGradSpec, target: Any, choices: Choices) -> None:
    """Schedule the gradients of input, offset and mask, those that are asked for."""
    del target
    sch.compute_inline(sch.get_sblock("image_first"))
    if spec.grad_input:
        _whole_image(sch, "grad_zero")
        if spec.layout == "NCHW":
            for loop, axis in zip(sch.get_loops(sch.get_sblock("grad_input")), "zxy", strict=True):
                sch.bind(loop, f"blockIdx.{axis}")
        elif spec.dtype != spec.accumulator_dtype or spec.deterministic:
            _whole_image(sch, "grad_input")
        if spec.deterministic:
            _whole_image(sch, "fixed_zero")
            for name in ("bound_rows", "bound_weight", *(["bound_mask"] if spec.mask else [])):
                for loop, axis in zip(sch.get_loops(sch.get_sblock(name)), ("blockIdx.x", "threadIdx.x"), strict=True):
                    sch.bind(loop, axis)
            for name in ("bound_zero", "bound_unit"):
                sch.bind(sch.get_loops(sch.get_sblock(name))[0], "threadIdx.x")
    {"mma": _tensor_cores, "simt": _multiply_adds, "gather": _gather}[product_of(spec).kind](sch, spec, choices)


def _whole_image(sch: Any, name: str) -> None:
    """Spread a stage over (pixels of all images, vectors of channels) over the device."""
    pixel, channel = sch.get_loops(sch.get_sblock(name))
    blocks, pixel = sch.split(pixel, [None, _IMAGE_ROWS])
    _, threads = sch.split(sch.fuse(pixel, channel), [None, _THREADS])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(threads, "threadIdx.x")


def _pick(choices: Choices, name: str, candidates: list[int], wish: int) -> int:
    """Return the decision of a choice; by default the largest candidate that is not above `wish`."""
    choices.pick(name, candidates, max((c for c in candidates if c <= wish), default=candidates[0]))
    return choices.made[name]


def _divisors(value: int, candidates: tuple[int, ...]) -> list[int]:
    return [c for c in candidates if value % c == 0]


def _lanes(spec: DeformConv2dGradSpec, vector: int) -> list[int]:
    """Return how many threads may lie along a pixel's channels in the product.

    No more than read its corners, or a warp would have too few pixels for whole warps to do that.
    """
    return [c for c in _divisors(column_units(spec).width // vector, (1, 2, 4, 8, 16)) if c <= beside(spec)]


def _widths(spec: DeformConv2dGradSpec, unit: int, candidates: tuple[int, ...]) -> list[int]:
    """Return how many pieces of `unit` channels a tile may have: what threads side by side read, or a multiple."""
    pieces = column_units(spec).width // unit
    side = beside(spec) * vector_of(spec) if spec.grad_offset else 1
    least = max(1, side // unit)
    widths = [c * least for c in candidates if pieces % (c * least) == 0]
    return [c for c in widths if c in (least, *candidates)]


class _Tiles:
    """The loops around the product, and what follows it.

    Parameters
    ----------
    pieces : int
        Of ``column_grads``' third loop: pixels of a block's tile, or rows of 16.
    pixels : int
        Pixels of a block's tile.
    width : int
        Of ``column_grads``' fourth loop.
    """

    def __init__(
        self, sch: Any, spec: DeformConv2dGradSpec, team: Team, taps: int, pieces: int, pixels: int, width: int
    ) -> None:
        self.sch, self.spec, self.team = sch, spec, team
        block = sch.get_sblock
        main = block("column_grads")
        self.followers = ["scatter"] if spec.grad_input else []
        self.followers += ["corner_sums"] if spec.grad_offset else []
        # All walk in the same order: what TVM would move by itself it moves only where the plan already is.
        inner, around = [], []
        channels = column_units(spec).width // (int(sch.get(sch.get_loops(main)[3]).extent) // width)
        for name, piece, size in (
            ("column_grads", pieces, width),
            ("scatter", pixels, channels // added_at_once(spec)),
            ("corner_sums", pixels, channels // (vector_of(spec) * beside(spec))),
        ):
            if name == "column_grads" or name in self.followers:
                u, k, p, c, *rest = sch.get_loops(block(name))
                tiles, p = sch.split(p, [None, piece])
                o, u = sch.split(u, [None, column_units(spec).of_offset_group])
                o_taps, k = sch.split(k, [None, taps])
                blocks_c, c = sch.split(c, [None, size])
                sch.reorder(tiles, o, o_taps, k, u, blocks_c, p, c, *rest)
                around.append(blocks_c)
                inner.append((p, c, *rest))
        sch.merge(*around)
        if spec.grad_offset:
            o, k, p = sch.get_loops(block("grad_offset"))
            tiles, p = sch.split(p, [None, pixels])
            o_taps, k = sch.split(k, [None, taps])
            sch.reorder(tiles, o, o_taps, k, p)
            sch.merge(sch.get_loops(main)[2], o_taps)
        tiles, o, o_taps, *_ = sch.get_loops(main)
        self.grid = sch.fuse(o, o_taps)
        sch.bind(tiles, "blockIdx.x")
        sch.bind(self.grid, "blockIdx.y")
        sch.annotate(tiles, GRID, pixels)
        sch.set_scope(main, 0, "shared.dyn")
        if spec.grad_offset:
            sch.set_scope(block("corner_sums"), 0, "shared.dyn")
        # Before loops are spread over threads: of guarded ones TVM takes the whole range for what is read.
        self.planned = ["place"]
        self.planned += ["share"] if spec.grad_input else []
        self.planned += ["fraction"] if spec.grad_offset else []
        for name in reversed(self.planned):
            sch.set_scope(block(name), 0, "shared.dyn")
            sch.compute_at(block(name), self.grid, preserve_unit_loops=True, index=-2)
        p, c, *rest = inner[0]
        self.main, self.inner = main, (p, c, *rest)

    def finish(self) -> None:
        """Spread over threads what follows the product, a warp's pixels over its lanes, and make the plan."""
        sch, block = self.sch, self.sch.get_sblock
        # TVM may give a stage the memory of one that other warps still read: all wait.
        sch.annotate(self.main, BARRIER, "block")
        # Rows begin in other banks of shared memory.
        sch.storage_align(self.main, 0, -2, 32, 8)
        for name in self.followers:
            p, v, *lane = sch.get_loops(block(name))[_AROUND_TILE:]
            warp, p = sch.split(p, [self.team.warps, None])
            sch.bind(warp, "threadIdx.y")
            if lane:
                rounds, p = sch.split(p, [None, LANES // beside(self.spec)])
                sch.reorder(rounds, v, p, *lane)
                sch.bind(sch.fuse(p, *lane), "threadIdx.x")
            else:
                rounds, lanes = sch.split(sch.fuse(p, v), [None, LANES])
                sch.bind(lanes, "threadIdx.x")
            _, rounds = sch.split(rounds, [None, gcd(int(sch.get(rounds).extent), _ROUNDS)])
            sch.unroll(rounds)
        for name, barrier in zip(self.followers, ("warp", "block"), strict=False):
            sch.annotate(block(name), BARRIER, barrier)
        if self.spec.grad_offset:
            self.team.share(sch.get_loops(block("grad_offset"))[2:])
            sch.annotate(block("grad_offset"), BARRIER, "block")
        self._plan()

    def _plan(self) -> None:
        """Schedule the sampling plan, a sample a thread."""
        sch, spec, block = self.sch, self.spec, self.sch.get_sblock
        plans = []
        for name in self.planned:
            *loops, corners = sch.get_loops(block(name))[2:]
            plans.append(sch.fuse(*loops))
            sch.unroll(corners)
        merged = sch.merge(*plans) if len(plans) > 1 else plans[0]
        for name in plan_blocks(2):
            if name.startswith("weight") and not spec.grad_input:
                continue
            sch.set_scope(block(name), 0, "local")
            sch.compute_at(block(name), merged)
        for name in ("pixel_1", "pixel_0", "pixel", "pixel_n"):
            sch.set_scope(block(name), 0, "local")
            sch.compute_at(block(name), merged)
        self.team.share([merged])


def _taps(spec: DeformConv2dGradSpec, choices: Choices) -> int:
    """Return how many taps a block does: one, so that there are many blocks; by choice more, which share a plan."""
    return _pick(choices, "taps", _divisors(spec.taps, (1, 3, 5, 7, 9, 25)), 1)


def _copies(sch: Any, spec: DeformConv2dGradSpec, team: Team, step: Any) -> None:
    """Schedule a step's part of both operands."""
    for name in ("near_rows", "weights"):
        stage = sch.get_sblock(name)
        sch.set_scope(stage, 0, "shared.dyn")
        sch.compute_at(stage, step, preserve_unit_loops=True)
    for name in ("near_rows", "weights"):
        team.share(sch.get_loops(sch.get_sblock(name))[_AROUND_STEP + 1 :])
    # Rows of the tile begin in different banks.
    sch.storage_align(sch.get_sblock("near_rows"), 0, -2, 32, 16 // ITEM_BYTES[spec.dtype])


def _start(sch: Any, product: Any, step: Any) -> None:
    """Set the sums to zero before the steps, when the operands of the tile before are not needed any more."""
    init = sch.decompose_reduction(product, step)
    for loop in sch.get_loops(init)[_AROUND_STEP:]:
        sch.unroll(loop)
    sch.annotate(init, BARRIER, "block")


def _tensor_cores(sch: Any, spec: DeformConv2dGradSpec, choices: Choices) -> None:
    """Schedule the product on tensor cores: a warp makes tiles of 16 x 16, which it keeps in 8 registers each."""
    block, product = sch.get_sblock, sch.get_sblock("product")
    fragments = product_of(spec).fragments
    assert fragments is not None
    steps = column_units(spec).depth // fragments.depth
    rows = _pick(choices, "warp_rows", [1, 2], 1)
    width = _pick(choices, "warp_columns", _widths(spec, TILE, _COUNTS), 4)
    warps = _pick(choices, "warps", [1, 2, 4, 8], 4)
    depth = _pick(choices, "step_depth", _divisors(steps, (1, 2, 3, 4, 6, 8)), 2)
    taps = _taps(spec, choices)
    overlap = _pick(choices, "overlap", [0, 1], 1)
    team = Team(sch, warps)

    tiles = _Tiles(sch, spec, team, taps, warps * rows, warps * rows * TILE, width)
    r, c, lane, whole = tiles.inner
    warp, r = sch.split(r, [warps, rows])
    sch.reorder(warp, lane, r, c, whole)
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    for loop in (r, c, whole):
        sch.unroll(loop)
    sch.set_scope(product, 0, "local")
    sch.compute_at(product, lane, preserve_unit_loops=True)
    _, _, r, c, s, *_ = sch.get_loops(product)[_AROUND_PRODUCT:]
    step, inner = sch.split(s, [None, depth])
    sch.reorder(step, inner, r, c)
    sch.annotate(step, PIPELINE, overlap)
    left = block("left")
    sch.set_scope(left, 0, "local")
    sch.compute_at(left, inner, preserve_unit_loops=True)
    right = sch.cache_read(product, 2, "local")
    sch.compute_at(right, inner, preserve_unit_loops=True)
    sch.vectorize(sch.get_loops(right)[-1])
    for loop in (*sch.get_loops(left)[_AROUND_STEP + 2 :], *sch.get_loops(right)[_AROUND_STEP + 2 : -1], inner, r, c):
        sch.unroll(loop)
    _copies(sch, spec, team, step)
    tiles.finish()
    _start(sch, product, step)


def _multiply_adds(sch: Any, spec: DeformConv2dGradSpec, choices: Choices) -> None:
    """Schedule the product without tensor cores: a thread makes a tile of pixels x vectors of channels."""
    product, vector = sch.get_sblock("product"), 16 // ITEM_BYTES[spec.dtype]
    units = column_units(spec)
    rows = _pick(choices, "thread_pixels", [1, 2, 4, 8], 4)
    across = _pick(choices, "lanes_across", _lanes(spec, vector), 8)
    vectors = _pick(choices, "thread_vectors", _widths(spec, across * vector, (1, 2, 3, 4)), 2)
    warps = _pick(choices, "warps", [1, 2, 4, 8], 4)
    depth = _pick(choices, "step_outputs", _divisors(units.depth, (4, 8, 16, 32)), 16)
    taps = _taps(spec, choices)
    overlap = _pick(choices, "overlap", [0, 1], 1)
    team = Team(sch, warps)
    # A tile must divide the padding of the pixels.
    while warps * (LANES // across) * rows > PIXELS:
        rows //= 2
    pixels = warps * (LANES // across) * rows

    tiles = _Tiles(sch, spec, team, taps, pixels, pixels, across * vectors * vector)
    p, c = tiles.inner
    lane, c = _threads(sch, p, c, (warps, LANES // across, rows), across)
    _, vector_ = sch.split(c, [None, vector])
    sch.vectorize(vector_)
    sch.set_scope(product, 0, "local")
    sch.compute_at(product, lane, preserve_unit_loops=True)
    _, _, p, c, o = sch.get_loops(product)[_AROUND_PRODUCT:]
    step, quad, inner = sch.split(o, [None, depth // 4, 4])
    sch.reorder(step, quad, inner, p, c)
    sch.annotate(step, PIPELINE, overlap)
    near = [sch.cache_read(product, i, "local") for i in (1, 2)]
    sch.compute_at(near[0], quad, preserve_unit_loops=True)
    sch.compute_at(near[1], inner, preserve_unit_loops=True)
    for stage, outside in zip(near, (_AROUND_STEP + 2, _AROUND_STEP + 3), strict=True):
        sch.vectorize(sch.get_loops(stage)[-1])
        for loop in sch.get_loops(stage)[outside:-1]:
            sch.unroll(loop)
    for loop in (inner, p, c):
        sch.unroll(loop)
    _copies(sch, spec, team, step)
    tiles.finish()
    _start(sch, product, step)


def _gather(sch: Any, spec: DeformConv2dGradSpec, choices: Choices) -> None:
    """Schedule grouped layers: a thread multiplies for itself what it reads from the device's memory."""
    product, units = sch.get_sblock("product"), column_units(spec)
    vector = gcd(units.channels, 16 // ITEM_BYTES[spec.dtype])
    rows = _pick(choices, "thread_pixels", [1, 2, 4, 8], 2)
    across = _pick(choices, "lanes_across", _lanes(spec, vector), 8)
    vectors = _pick(choices, "thread_vectors", _widths(spec, across * vector, (1, 2, 3, 4)), 1)
    warps = _pick(choices, "warps", [1, 2, 4, 8], 4)
    taps = _taps(spec, choices)
    team = Team(sch, warps)
    while warps * (LANES // across) * rows > PIXELS:
        rows //= 2
    pixels = warps * (LANES // across) * rows

    tiles = _Tiles(sch, spec, team, taps, pixels, pixels, across * vectors * vector)
    p, c = tiles.inner
    lane, _ = _threads(sch, p, c, (warps, LANES // across, rows), across)
    sch.set_scope(product, 0, "local")
    sch.compute_at(product, lane, preserve_unit_loops=True)
    _, _, p, c, o = sch.get_loops(product)[_AROUND_PRODUCT:]
    sch.reorder(o, p, c)
    for loop in (p, c):
        sch.unroll(loop)
    tiles.finish()
    init = sch.decompose_reduction(product, o)
    for loop in sch.get_loops(init)[_AROUND_PRODUCT:]:
        sch.unroll(loop)


def _threads(sch: Any, p: Any, c: Any, pixels: tuple[int, int, int], across: int) -> tuple[Any, Any]:
    """Spread ``column_grads`` over threads; return the loop over lanes, and that over a thread's channels."""
    warp, lane_p, p = sch.split(p, list(pixels))
    lane_c, c = sch.split(c, [across, None])
    sch.reorder(warp, lane_p, lane_c, p, c)
    lane = sch.fuse(lane_p, lane_c)
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    for loop in (p, c):
        sch.unroll(loop)
    return lane, c
