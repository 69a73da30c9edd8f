# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution on NVIDIA GPUs: an implicit product of matrices whose left operand is sampled.

    block of threads: a tile of output pixels x output channels, of all the reduction or of a part of it
        plan:    where each (offset group, tap, pixel) samples: four corners, four shares
        per step of channels of a tap, overlapped with the step before:
            weights:  16-byte asynchronous copies to shared memory, in the order in which they are multiplied
            corner:   four 16-byte loads a thread and vector of channels, into registers
            product:  operands from shared memory, sums in registers
            columns:  corners times shares, to shared memory
        output:  bias and layout, straight from registers: with results staged in shared memory a block took half as
            much again (float16, 128 outputs: 68 KB for 45), and a quarter to a half fewer of them ran at a time
    where the reduction is in parts (`splits`), blocks store these, and a second kernel adds them up

Structural variants, named ``<product>-<plan>[-planes]``:

* product ``mma``: on tensor cores (float16, bfloat16; float32 rounded to tf32). ``simt``: multiply-adds of float32 and
  float64. ``gather``: groups of few channels, depthwise among them; a thread samples what it multiplies, and nothing
  goes through shared memory but the plan.
* plan ``block``: for all taps of a block's pixels, in shared memory, where all channels of an offset group share it.
  ``thread``: each thread plans its own samples, for many offset groups.
* ``planes``: NCHW without a channels-last copy of the input before (see `planes`).

The choice `splits` is for few pixels: 7 x 7 are one tile, whose 9 x 512 products are added up by no more blocks than
there are blocks of outputs, on a GPU of over a hundred multiprocessors. The default is 1: a kernel is for all sizes,
and no specification says how many pixels there will be; tuning on a layer's representative size finds what it gains.
Grouped layers (``gather``) have short sums and no such choice.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from tvmdcn.schedules.cuda import threads
from tvmdcn.schedules.cuda.plan import plan_of_block, plan_of_threads
from tvmdcn.schedules.cuda.planes import from_planes
from tvmdcn.schedules.cuda.splits import TAP_STEPS, divided
from tvmdcn.schedules.cuda.threads import BARRIER, GRID, LANES, PIPELINE, Team
from tvmdcn.space import PLANES, SPLITS, VARIANT, Choices, design_space
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.te.device_sampling import PIXELS
from tvmdcn.te.products import padded, product_of, several_steps
from tvmdcn.te.tiles import ITEM_BYTES

FUNCTION = DeformConv2dSpec.operator
VECTOR_BYTES = 16
"""The widest load of a thread."""
TILE = 16
"""Rows and columns of a tile of tensor cores."""
_MOST_THREADS = 1024
_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8)
_SPLITS = (1, 2, 3, 4, 6, 8, 9, 12, 16, 18)


def variants(spec: DeformConv2dSpec, target: Any) -> list[str]:
    """Return the names of the variants that make sense for a layer, the default first."""
    kind = product_of(spec).kind
    # The plan of a block takes 32 bytes a sample; and with few channels in an offset group, few threads share it.
    plans = ["block", "thread"] if spec.offset_groups * spec.taps <= 32 else ["thread", "block"]
    names = [f"{kind}-{plan}" for plan in plans]
    if spec.layout == "NCHW" and kind != "gather":
        names += [f"{name}-planes" for name in names]
    return names


def naive(sch: Any, spec: DeformConv2dSpec) -> None:
    """Leave everything as the algorithm is written."""


def finish(func: Any) -> Any:
    """Return a scheduled kernel as it is compiled: with its barriers and pipelines, and sums that are divided."""
    return threads.finish(divided(from_planes(func)))


@design_space(FUNCTION, "cuda", variants=variants, naive=naive, finish=finish)
def deform_conv2d(sch: Any, spec: DeformConv2dSpec, target: Any, variant: str, choices: Choices) -> None:
    """Schedule the forward of a deformable convolution."""
    sch.work_on(FUNCTION)
    sch.annotate(sch.get_sblock("pixel_n"), VARIANT, variant)
    sch.compute_inline(sch.get_sblock("image_first"))
    if spec.layout == "NCHW":
        for loop, axis in zip(sch.get_loops(sch.get_sblock("channels_last")), "zxy", strict=True):
            sch.bind(loop, f"blockIdx.{axis}")
    kind, plan, *planes = variant.split("-")
    if planes:
        sch.annotate(sch.get_sblock("pixel_n"), PLANES, 1)
    if kind == "gather":
        _gather(sch, spec, plan, choices)
    else:
        {"mma": _tensor_cores, "simt": _multiply_adds}[kind](sch, spec, plan, bool(planes), choices)


def _pick(choices: Choices, name: str, candidates: list[int], wish: int) -> int:
    """Return the decision of a choice; by default the largest candidate that is not above `wish`."""
    choices.pick(name, candidates, max((c for c in candidates if c <= wish), default=candidates[0]))
    return choices.made[name]


def _divisors(value: int, candidates: tuple[int, ...]) -> list[int]:
    return [c for c in candidates if value % c == 0]


def _overlap(choices: Choices, steps: int) -> int:
    """Decide whether steps overlap: what is left of their loop when the first has begun before it is to be a loop."""
    return _pick(choices, "overlap", [0, 1] if steps > 2 else [0], 1)


def _vector(spec: DeformConv2dSpec) -> int:
    """Return how many channels a thread samples at once: they lie in one group and one offset group."""
    run = gcd(spec.in_channels // spec.groups, spec.in_channels // spec.offset_groups)
    return gcd(run, VECTOR_BYTES // ITEM_BYTES[spec.dtype])


def _tensor_cores(sch: Any, spec: DeformConv2dSpec, plan: str, planes: bool, choices: Choices) -> None:
    """Schedule the product on tensor cores: a warp makes tiles of 16 x 16, which it keeps in 8 registers each."""
    block, product = sch.get_sblock, sch.get_sblock("product")
    made = product_of(spec)
    assert made.fragments is not None
    outputs = padded(spec.out_channels // spec.groups, made.width) // TILE
    steps = padded(spec.in_channels // spec.groups, made.depth) // made.depth
    rows = _pick(choices, "warp_rows", [1, 2, 4], 2)
    width = _pick(choices, "warp_columns", _divisors(outputs, _COUNTS), 4)
    down = _pick(choices, "warps_down", [1, 2, 4], 2)
    across = _pick(choices, "warps_across", _divisors(outputs // width, _COUNTS), 4)
    # Of planes, a thread holds more numbers a step, each in a register of its own.
    depth = _pick(choices, "step_depth", several_steps(spec, steps, (1, 2, 3, 4, 6, 8)), 1 if planes else 2)
    overlap = _overlap(choices, spec.taps * steps // depth)
    team = Team(sch, down * across)

    g, r, o, k, s, lane, _ = sch.get_loops(product)
    tiles, warp_r, r = sch.split(r, [None, down, rows])
    blocks, warp_o, o = sch.split(o, [None, across, width])
    s, inner = sch.split(s, [None, depth])
    sch.reorder(tiles, g, blocks, warp_r, warp_o, lane, k, s, inner, r, o)
    steps = _grid(sch, (tiles, g, blocks, warp_r, warp_o), lane, k, s, rows * down * TILE, overlap)
    first, step, outer = _split(sch, steps, plan, spec.taps, choices)

    # Operands of a warp's tiles, and its sums, are registers.
    for stage in (product, block("left")):
        sch.set_scope(stage, 0, "local")
    sch.compute_at(block("left"), inner)
    right = sch.cache_read(product, 2, "local")
    sch.compute_at(right, inner)
    sch.vectorize(sch.get_loops(right)[-1])
    for loop in (*sch.get_loops(block("left"))[outer:], *sch.get_loops(right)[outer:-1], inner, r, o):
        sch.unroll(loop)
    samples = _operands(sch, spec, team, step, outer, depth * made.depth, planes, overlap)

    output = block("output")
    sch.reverse_compute_at(output, lane)
    for loop in sch.get_loops(output)[4:]:
        sch.unroll(loop)
    _plan(sch, plan, team, lane, samples)
    _start(sch, product, first)


def _multiply_adds(sch: Any, spec: DeformConv2dSpec, plan: str, planes: bool, choices: Choices) -> None:
    """Schedule the product without tensor cores: a thread makes a tile of pixels x vectors of output channels."""
    block, product = sch.get_sblock, sch.get_sblock("product")
    made, vector = product_of(spec), VECTOR_BYTES // ITEM_BYTES[spec.dtype]
    outputs = padded(spec.out_channels // spec.groups, made.width) // vector
    channels = padded(spec.in_channels // spec.groups, made.depth)
    rows = _pick(choices, "thread_pixels", [1, 2, 4, 8], 4)
    width = _pick(choices, "thread_vectors", _divisors(outputs, (1, 2, 4)), 2)
    # Lanes of a warp: side by side along output channels, the rest along pixels.
    beside = _pick(choices, "lanes_across", _divisors(outputs // width, (1, 2, 4, 8, 16)), 8)
    down = _pick(choices, "warps_down", [1, 2, 4], 2)
    across = _pick(choices, "warps_across", _divisors(outputs // width // beside, _COUNTS), 2)
    depth = made.depth * _pick(choices, "step_quads", several_steps(spec, channels // made.depth, (1, 2, 4, 8)), 4)
    overlap = _overlap(choices, spec.taps * channels // depth)
    team = Team(sch, down * across)
    # A tile must divide the padding of the pixels.
    while down * (LANES // beside) * rows > PIXELS:
        rows //= 2

    g, p, o, k, c = sch.get_loops(product)
    tiles, warp_p, lane_p, p = sch.split(p, [None, down, LANES // beside, rows])
    blocks, warp_o, lane_o, o = sch.split(o, [None, across, beside, width * vector])
    c, quad, inner = sch.split(c, [None, depth // made.depth, made.depth])
    sch.reorder(tiles, g, blocks, warp_p, warp_o, lane_p, lane_o, k, c, quad, inner, p, o)
    lane = sch.fuse(lane_p, lane_o)
    steps = _grid(sch, (tiles, g, blocks, warp_p, warp_o), lane, k, c, down * LANES // beside * rows, overlap)
    first, step, outer = _split(sch, steps, plan, spec.taps, choices)
    sch.set_scope(product, 0, "local")
    near = [sch.cache_read(product, 1, "local"), sch.cache_read(product, 2, "local")]
    sch.compute_at(near[0], quad)
    sch.compute_at(near[1], inner)
    for stage in near:
        sch.vectorize(sch.get_loops(stage)[-1])
        for loop in sch.get_loops(stage)[outer:-1]:
            sch.unroll(loop)
    for loop in (inner, p, o):
        sch.unroll(loop)
    samples = _operands(sch, spec, team, step, outer, depth, planes, overlap)

    output = block("output")
    sch.reverse_compute_at(output, lane)
    p, o = sch.get_loops(output)[4:]
    if spec.layout == "NHWC":
        o, lanes = sch.split(o, [None, gcd(vector, spec.out_channels // spec.groups)])
        sch.vectorize(lanes)
    for loop in (p, o):
        sch.unroll(loop)
    _plan(sch, plan, team, lane, samples)
    _start(sch, product, first)


def _grid(sch: Any, loops: tuple[Any, ...], lane: Any, k: Any, s: Any, pixels: int, overlap: int) -> Any:
    """Bind the outer loops of the product, and return the loop over steps of its reduction."""
    tiles, g, blocks, warp_r, warp_o = loops
    blocks, warp, step = sch.fuse(g, blocks), sch.fuse(warp_r, warp_o), sch.fuse(k, s)
    for loop, axis in ((tiles, "blockIdx.x"), (blocks, "blockIdx.y"), (warp, "threadIdx.y"), (lane, "threadIdx.x")):
        sch.bind(loop, axis)
    sch.annotate(tiles, GRID, pixels)
    sch.annotate(step, PIPELINE, overlap)
    return step


def _split(sch: Any, step: Any, plan: str, taps: int, choices: Choices) -> tuple[Any, Any, int]:
    """Divide the steps of the reduction into parts, for different blocks.

    Returns the loop before which sums begin, the loop over steps, and how many loops there are down to that one.
    """
    steps = int(sch.get(step).extent)
    overlap = int(sch.get(step).annotations[PIPELINE])
    # Of each part, too, a loop is to be left; see `several_steps`.
    splits = _pick(choices, "splits", [n for n in _SPLITS if steps % n == 0 and steps // n >= 2 + overlap], 1)
    if splits == 1:
        return step, step, 5
    sch.unannotate(step, PIPELINE)
    part, step = sch.split(step, [splits, None])
    sch.annotate(step, PIPELINE, overlap)
    sch.annotate(part, SPLITS, splits)
    sch.annotate(sch.get_sblock("pixel_n"), SPLITS, splits)
    if plan == "block":
        sch.annotate(part, TAP_STEPS, steps // taps)
    return part, step, 6


def _operands(
    sch: Any, spec: DeformConv2dSpec, team: Team, step: Any, outer: int, channels: int, planes: bool, overlap: int
) -> list[Any]:
    """Schedule a step's part of both operands: ``weights``, ``corner`` and ``columns``.

    `outer`: how many loops there are down to `step`. Returns the loops of ``corner`` and ``columns`` inside which is
    all of a sample.
    """
    block, vector = sch.get_sblock, _vector(spec)
    corner, column, columns, weights = (block(name) for name in ("corner", "column", "columns", "weights"))
    for stage in (columns, weights):
        sch.set_scope(stage, 0, "shared.dyn")
        sch.compute_at(stage, step)
    team.share(sch.get_loops(weights)[outer:])
    for stage in (column, corner):
        sch.set_scope(stage, 0, "local")
        sch.compute_at(stage, step)
    # Threads side by side on one pixel, or for planes on one channel of pixels side by side.
    apart = team.threads // gcd(team.threads, int(sch.get(sch.get_loops(columns)[outer]).extent)) if planes else None
    together = gcd(channels // vector, apart or team.threads)
    samples = []
    for stage in (corner, columns):
        pixel, *corners, channel = sch.get_loops(stage)[outer:]
        # A thread's pixels side by side: what TVM takes for the size of `corner` is the distance between them.
        mine, pixel = sch.split(pixel, [team.threads // together, None])
        if planes:
            channel, rounds, lanes = sch.split(channel, [together, None, vector])
            sch.reorder(channel, mine, pixel, rounds, *corners, lanes)
            team.bind(sch.fuse(channel, mine))
        else:
            rounds, channel, lanes = sch.split(channel, [None, together, vector])
            sch.reorder(mine, channel, pixel, rounds, *corners, lanes)
            team.bind(sch.fuse(mine, channel))
        for loop in (pixel, rounds, *corners):
            sch.unroll(loop)
        if planes and stage is corner:
            sch.unroll(lanes)
        else:
            sch.vectorize(lanes)
        samples.append(rounds)
    # Sums are made one by one: TVM has no vectors of eight floats for CUDA.
    sch.compute_at(column, rounds)
    sch.unroll(sch.get_loops(column)[-1])
    # Rows of the tile begin in different banks of shared memory.
    sch.storage_align(columns, 0, -2, 32, VECTOR_BYTES // ITEM_BYTES[spec.dtype])
    if overlap:
        sch.annotate(columns, "double_buffer_scope", 0)
    return samples


def _plan(sch: Any, plan: str, team: Team, lane: Any, samples: list[Any]) -> None:
    """Schedule the sampling plan; `samples` are the loops in which ``corner`` and ``columns`` need it."""
    if plan == "block":  # for all taps of a block's pixels
        team.share([plan_of_block(sch, lane)])
    else:
        plan_of_threads(sch, team, lane, samples)


def _start(sch: Any, product: Any, step: Any) -> None:
    """Set the sums to zero before the steps."""
    init = sch.decompose_reduction(product, step)
    for loop in sch.get_loops(init)[4:]:
        sch.unroll(loop)
    sch.annotate(init, BARRIER, "block")  # the plan is made


def _gather(sch: Any, spec: DeformConv2dSpec, plan: str, choices: Choices) -> None:
    """Schedule grouped layers: a thread samples the channels of its groups and multiplies them by itself."""
    block, product = sch.get_sblock, sch.get_sblock("product")
    in_group, out_group = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    # Vectors of channels: of a group, or, where it has only one, of neighbouring groups.
    beside = _vector_of_groups(spec)
    rows = _pick(choices, "thread_pixels", [1, 2, 4, 8], 2)
    across = _pick(choices, "lanes_across", _divisors(spec.groups // beside, (1, 2, 4, 8, 16, 32)), 8)
    warps = _pick(choices, "warps", [1, 2, 4, 8], 4)
    while warps * (LANES // across) * rows > PIXELS:
        rows //= 2
    team = Team(sch, warps)

    g, p, o, k, c = sch.get_loops(product)
    tiles, warp, lane_p, p = sch.split(p, [None, warps, LANES // across, rows])
    blocks, lane_g, g = sch.split(g, [None, across, beside])
    sch.reorder(tiles, blocks, warp, lane_p, lane_g, k, c, o, p, g)
    lane = sch.fuse(lane_p, lane_g)
    for loop, axis in ((tiles, "blockIdx.x"), (blocks, "blockIdx.y"), (warp, "threadIdx.y"), (lane, "threadIdx.x")):
        sch.bind(loop, axis)
    sch.annotate(tiles, GRID, warps * LANES // across * rows)
    sch.set_scope(product, 0, "local")
    for loop in (c, o, p, g):
        sch.unroll(loop)

    samples: list[Any] = []
    if in_group == 1:  # vectors of groups lie side by side in registers, too
        sch.transform_layout(block("corner"), ("write", 0), lambda g, k, p, q, c: (k, p, q, c, g))
    for name in ("columns", "column", "corner"):
        stage = block(name)
        sch.set_scope(stage, 0, "local")
        sch.compute_at(stage, k, preserve_unit_loops=True)
        groups, _, pixel, *corners, channel = sch.get_loops(stage)[5:]
        channel, lanes = sch.split(channel, [None, 1 if in_group == 1 else _vector(spec)])
        sch.reorder(pixel, channel, *corners, groups, lanes)
        for loop in (pixel, channel, *corners, groups, lanes):
            sch.unroll(loop)
        if name == "corner":
            sch.vectorize(groups if in_group == 1 else lanes)
        if name != "columns":
            samples.insert(0, channel)
    output = block("output")
    sch.reverse_compute_at(output, lane, preserve_unit_loops=True)
    g, p, o = sch.get_loops(output)[4:]
    loops = [p, g, o] if in_group > 1 else [p, o, g]
    sch.reorder(*loops)
    if spec.layout == "NHWC" and (in_group > 1 or out_group == 1):
        vector, lanes = sch.split(loops.pop(), [None, _stored(spec, beside)])
        sch.vectorize(lanes)
        loops.append(vector)
    for loop in loops:
        sch.unroll(loop)
    _plan(sch, plan, team, lane, samples)
    _start(sch, product, k)


def _vector_of_groups(spec: DeformConv2dSpec) -> int:
    """Return how many neighbouring groups a thread does: those of a vector, where a group is one channel."""
    if spec.in_channels != spec.groups:
        return 1
    return gcd(spec.groups // spec.offset_groups, VECTOR_BYTES // ITEM_BYTES[spec.dtype])


def _stored(spec: DeformConv2dSpec, beside: int) -> int:
    """Return how many output channels a thread can store at once."""
    run = beside if spec.in_channels == spec.groups else spec.out_channels // spec.groups
    return gcd(run, VECTOR_BYTES // ITEM_BYTES[spec.dtype])
