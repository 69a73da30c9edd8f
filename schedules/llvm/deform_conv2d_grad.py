# SPDX-License-Identifier: Apache-2.0
"""Gradients of a deformable convolution on CPUs: two products and the walk over the corners, fused per tile.

    parallel block of channels:
        tile of output pixels:
            image rows:       as many as the tile needs, from planes; zeros for their gradients
            column gradients: [pixels x channels] in registers, over output channels
            samples:          corners of each sample once: sums for offset and mask, added gradient, sample
            weight part:      [output channels x channels] in registers, over the pixels of the tile
        gradients of the block's weights and input, to where they belong

Structural variants, named ``<order>-<vectors>``:

* order ``stored``: blocks of channels outside and parallel, tiles inside; the sampling plan (ten numbers a sample) and
  the output's gradient, laid out for both products, are prepared for whole images beforehand. ``own``: the same, but
  each block prepares them for itself, tile by tile. In both a thread needs memory for the images of one block.
  ``shared``: tiles outside, blocks inside and parallel; plan and output's gradient are prepared once per tile for all
  blocks, images of all blocks are in memory, and threads wait for each other at each tile.
* vectors of channels in the register tile of the column gradients.

Read in assembly (AVX-512, r50_c3): the column gradients' inner loop is that of the forward (48 fused multiply-adds, 24
broadcasts, 4 aligned loads for two steps), the weight's has 32, 16 and 4. A tap of a pixel and four vectors of channels
take 131 instructions, among them 16 loads of corners, and 16 loads and stores of what is added to them. Where the time
goes (``tvmdcn stages --operator deform_conv2d_grad``, one thread of a Zen 4 server, which does half of Zen 5's
multiply-adds a cycle, 2026-11-23):

    layer      column gradients  samples  weight's product  plan  layouts, zeros, places
    r50_c3           44 %           9 %         43 %         0 %          4 %
    yolact_c3        39 %          12 %         38 %         1 %         10 %
    grouped32        19 %          44 %         21 %         3 %         13 %

yolact_c3 has stride 2: its image is four times as large as its output. With two threads, copying its rows and storing
their gradients take 12 % of the time; up to 8 % more go where some offsets lead far, so that rows are there too early.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from tvmdcn.schedules.llvm.deform_conv2d import TILE_UNIT_CHOICES, default_units, naive, vectorize_pixels
from tvmdcn.space import TILE_UNITS, UNIT_BYTES, VARIANT, Choices, design_space
from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.target import TargetInfo
from tvmdcn.te.channel_blocks import ChannelBlocks, form
from tvmdcn.te.sampling import plan_blocks
from tvmdcn.te.tiles import GRANULE, ITEM_BYTES, is_depthwise, vector_lanes

FUNCTION = DeformConv2dGradSpec.operator


def _blocks(spec: DeformConv2dGradSpec, target: TargetInfo) -> ChannelBlocks:
    return ChannelBlocks(spec, *form(spec, target))


def _needs_columns(spec: DeformConv2dGradSpec) -> bool:
    return spec.grad_input or spec.grad_offset


def variants(spec: DeformConv2dGradSpec, target: TargetInfo) -> list[str]:
    """Return the names of the variants that make sense for a layer, the default first."""
    if not (_needs_columns(spec) or spec.grad_weight):
        return ["bias"]
    blocks = _blocks(spec, target)
    # Vectors of several groups have no multiplicand in common.
    several = _needs_columns(spec) and blocks.groups == 1
    counts = [n for n in (2, 1, 4, 3) if blocks.vectors % n == 0] if several else [1]
    # Eight blocks repeat the plan eight times: r50_c4 takes 6.65 ms as `own` and 6.46 ms as `stored`; r50_c3, with
    # four, 7.57 and 7.83 (Zen 5, two threads, 2026-11-22).
    orders = ["own", "stored"] if blocks.of_offset_group < 8 else ["stored", "own"]
    orders.append("shared")
    return [f"{order}-{count}" for count in counts for order in orders]


@design_space(FUNCTION, "llvm", variants=variants, naive=naive)
def deform_conv2d_grad(
    sch: Any, spec: DeformConv2dGradSpec, target: TargetInfo, variant: str, choices: Choices
) -> None:
    """Schedule the gradients of a deformable convolution."""

    def block(name: str) -> Any:
        return sch.get_sblock(name, func_name=FUNCTION)

    first = "grad_bias" if variant == "bias" else "samples"
    sch.annotate(block(first), VARIANT, variant)
    _behind_tiles(sch, block, spec, target)
    if variant == "bias":
        return
    order, count = variant.split("-")
    shared = order == "shared"

    # The weight's gradient needs the samples of a tile, and they rows of the image: all are put under the same loops.
    for name in ("image_rows", "samples"):
        channels, task = sch.get_loops(block(name))[:2]
        if shared:
            sch.reorder(task, channels)
    sch.merge(sch.get_loops(block("image_rows"))[2], sch.get_loops(block("samples"))[2])
    if spec.grad_weight:
        part_task, part_channels = sch.get_loops(block("weight_part"))[:2]
        if not shared:
            sch.reorder(part_channels, part_task)
        sch.merge(sch.get_loops(block("samples"))[1], sch.get_loops(block("weight_part"))[1])
    outer, inner, unit = sch.get_loops(block("samples"))
    task, channels = (outer, inner) if shared else (inner, outer)

    columns_init = _column_gradients(sch, block, spec, target, choices, int(count), unit)
    weight_init = _weight_part(sch, block, spec, target, choices)
    plan_at, tile_at = {"shared": (task, task), "own": (unit, task), "stored": (None, None)}[order]
    _plan(sch, block, spec, target, plan_at, units_parallel=shared)
    _tile(sch, block("grad_tile"), spec, target, tile_at, units_parallel=shared)
    around = ["image_frame", *(name for name in ("grad_weight", "grad_input") if getattr(spec, name))]
    if shared:
        for name in around:
            sch.parallel(sch.get_loops(block(name))[0])
    else:  # What a block has added up is still in its thread's cache.
        stages = [sch.get_loops(block(name))[0] for name in around]
        channels = sch.merge(stages[0], channels, *stages[1:])
    sch.parallel(channels)

    # What a tile needs per pixel: its samples; the output's gradient; as `shared` ten numbers of the plan per sample.
    numbers = spec.taps * _blocks(spec, target).pitch + (spec.out_channels if order != "stored" else 0)
    numbers += 10 * spec.taps * spec.offset_groups if shared else 0
    unit_bytes = GRANULE * ITEM_BYTES[spec.accumulator_dtype] * numbers
    units = choices.pick("tile_units", TILE_UNIT_CHOICES, default_units(target, unit_bytes))
    sch.annotate(block("samples"), TILE_UNITS, units)
    sch.annotate(block("samples"), UNIT_BYTES, unit_bytes)
    # Last: parallel and vectorize need the reduction in one block.
    for initialised in (columns_init, weight_init):
        if initialised:
            sch.decompose_reduction(*initialised)


def _behind_tiles(sch: Any, block: Any, spec: DeformConv2dGradSpec, target: TargetInfo) -> None:
    """Schedule the stages that need what all blocks of channels have found, or no samples at all."""
    if spec.grad_offset:
        n, q, _, _ = sch.get_loops(block("grad_offset"))
        sch.parallel(sch.fuse(n, q))
    if spec.grad_bias:
        _bias(sch, block, spec, target)


def _bias(sch: Any, block: Any, spec: DeformConv2dGradSpec, target: TargetInfo) -> None:
    part = block("bias_part")
    if spec.layout == "NCHW":
        channel, i, n, q = sch.get_loops(part)
        strip, lane = sch.split(i, [None, gcd(GRANULE, vector_lanes(spec, target))])
        sch.reorder(channel, n, q, strip, lane)
        sch.unroll(strip)
        sch.reverse_compute_at(block("bias_sum"), channel)
    else:
        channel, n, q = sch.get_loops(part)
        channel, lane = sch.split(channel, [None, gcd(spec.out_channels, vector_lanes(spec, target))])
        sch.reorder(channel, n, q, lane)
    sch.vectorize(lane)
    sch.parallel(channel)
    sch.decompose_reduction(part, n)


def _column_gradients(
    sch: Any,
    block: Any,
    spec: DeformConv2dGradSpec,
    target: TargetInfo,
    choices: Choices,
    count: int,
    unit: Any,
) -> tuple[Any, Any] | None:
    """Tile the product of output gradients and weight; return where its sums begin."""
    if not _needs_columns(spec):
        return None
    columns = block("grad_columns")
    sch.compute_at(columns, unit, preserve_unit_loops=True)
    if is_depthwise(spec):
        sch.vectorize(sch.get_loops(columns)[-1])
        return None
    sums = sch.cache_write(columns, 0, "local")
    k, i, b, v, o = sch.get_loops(columns)[-5:]
    groups, v = sch.split(v, [None, _blocks(spec, target).together])
    i0, i1 = choices.tile(
        "register_pixels", i, default=12, limit=max(1, (target.vector_registers - count - 1) // count)
    )
    b0, b1 = sch.split(b, [None, count])
    o0, o1 = choices.tile("unroll", o, default=1, limit=8)
    sch.reorder(k, b0, groups, i0, o0, o1, i1, b1, v)
    sch.reverse_compute_at(sums, i0, preserve_unit_loops=True)
    _in_registers(sch, sums, 3)
    for loop in (o1, i1, b1):
        sch.unroll(loop)
    sch.vectorize(v)
    return columns, o0


def _weight_part(
    sch: Any, block: Any, spec: DeformConv2dGradSpec, target: TargetInfo, choices: Choices
) -> tuple[Any, Any] | None:
    """Tile the product of samples and output gradients; return where its sums begin."""
    if not spec.grad_weight:
        return None
    part = block("weight_part")
    sums = sch.cache_write(part, 0, "local")
    k, b, o, v, u, i = sch.get_loops(part)[-6:]
    groups, v = sch.split(v, [None, _blocks(spec, target).together])
    b0, b1 = choices.tile("weight_vectors", b, default=2, limit=4)
    limit = max(1, (target.vector_registers - 4) // choices.made["weight_vectors"])
    o0, o1 = choices.tile("register_outputs", o, default=8, limit=limit)
    i0, i1 = choices.tile("unroll_pixels", i, default=1, limit=4)
    sch.reorder(k, b0, groups, o0, u, i0, i1, o1, b1, v)
    sch.reverse_compute_at(sums, o0, preserve_unit_loops=True)
    sch.reverse_compute_at(block("weight_sum"), o0, preserve_unit_loops=True)
    _in_registers(sch, sums, 3)
    _in_registers(sch, block("weight_sum"), 3)
    for loop in (i1, o1, b1):
        sch.unroll(loop)
    sch.vectorize(v)
    return part, u


def _in_registers(sch: Any, stage: Any, count: int) -> None:
    """Unroll and vectorize the last `count` loops of a stage."""
    *loops, lane = sch.get_loops(stage)[-count:]
    for loop in loops:
        sch.unroll(loop)
    sch.vectorize(lane)


def _plan(sch: Any, block: Any, spec: DeformConv2dGradSpec, target: TargetInfo, at: Any, units_parallel: bool) -> None:
    """Place those stages of the sampling plan that are needed: at a loop, or before the tiles."""
    unused = () if spec.grad_input or spec.grad_weight else ("weight",)
    names = [name for name in plan_blocks(2, framed=True) if not name.startswith(unused or "-")]
    for name in names:
        if at is not None:
            sch.compute_at(block(name), at, preserve_unit_loops=True)
        strip, _ = vectorize_pixels(sch, block(name), spec, target)
        sch.unroll(strip)
        if at is None or units_parallel:
            group, tap, task, unit = sch.get_loops(block(name))[-6:-2]
            sch.reorder(task, unit, group, tap)
            if units_parallel:
                sch.parallel(unit)
    if at is None:
        sch.merge(*(sch.get_loops(block(name))[3] for name in reversed(names)))
    for name in ("pixel_1", "pixel_0"):
        if at is not None:
            sch.compute_at(block(name), at, preserve_unit_loops=True)
    if at is None:
        for name in (names[0], "pixel_1", "pixel_0"):
            sch.parallel(sch.fuse(*sch.get_loops(block(name))[:2]))


def _tile(sch: Any, stage: Any, spec: DeformConv2dGradSpec, target: TargetInfo, at: Any, units_parallel: bool) -> None:
    """Place the output's gradient of a unit: at a loop, or before the tiles."""
    if at is not None:
        sch.compute_at(stage, at, preserve_unit_loops=True)
    *_, task, unit, _, last = sch.get_loops(stage)
    extent = GRANULE if spec.layout == "NCHW" else spec.out_channels
    _, lane = sch.split(last, [None, gcd(extent, vector_lanes(spec, target))])
    sch.vectorize(lane)
    if at is None:
        sch.parallel(sch.fuse(task, unit))
    elif units_parallel:
        sch.parallel(unit)
