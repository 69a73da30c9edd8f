# SPDX-License-Identifier: Apache-2.0
"""Gradients of a deformable convolution on CPUs: two products and the walk over the corners, fused per tile.

    parallel block of channels:
        tile of output pixels:
            column gradients: [pixels x channels] in registers, over output channels
            samples:          corners of each sample once: sums for offset and mask, added gradient, sample
            weight part:      [output channels x channels] in registers, over the pixels of the tile

Structural variants, named ``<order>-<vectors>-<place>``:

* order ``shared``: tiles outside, blocks of channels inside and parallel; the sampling plan and the output's gradient
  of a tile are prepared once for all blocks. ``own``: blocks outside and parallel, each prepares them for itself; no
  thread waits for another, and a block's weights stay in its cache.
* vectors of channels in the register tile of the column gradients.
* place: column gradients are computed one ``tap`` at a time, just before they are used, or for a whole ``unit``.

Read in assembly (AVX-512, r50_c3): the column gradients' inner loop is that of the forward (48 fused multiply-adds, 24
broadcasts, 4 aligned loads for two steps), the weight's 32 with 16 and 4. A sample and two vectors of channels take 91
instructions, and most of the time waits for the second-level cache. Where the time goes (share of samples of perf
record, shared-2-tap, Zen 5 server, one thread, 2026-11-22):

    layer    column gradients  samples  weight part  the rest
    r50_c3        35 %           19 %       36 %       10 %
"""

from __future__ import annotations

from math import gcd
from typing import Any

from tvmdcn.schedules.llvm.deform_conv2d import ITEM_BYTES, TILE_UNIT_CHOICES, default_units, naive, place_plan_stage
from tvmdcn.space import TILE_UNITS, UNIT_BYTES, VARIANT, Choices, design_space
from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.target import TargetInfo
from tvmdcn.te.channel_blocks import ChannelBlocks, lanes_for
from tvmdcn.te.sampling import plan_blocks
from tvmdcn.te.tiles import GRANULE, is_depthwise

FUNCTION = DeformConv2dGradSpec.operator


def _vector_lanes(spec: DeformConv2dGradSpec, target: TargetInfo) -> int:
    return target.vector_bits // 8 // ITEM_BYTES[spec.accumulator_dtype]


def _blocks(spec: DeformConv2dGradSpec, target: TargetInfo) -> ChannelBlocks:
    return ChannelBlocks(spec, lanes_for(spec, _vector_lanes(spec, target)))


def _needs_columns(spec: DeformConv2dGradSpec) -> bool:
    return spec.grad_input or spec.grad_offset


def variants(spec: DeformConv2dGradSpec, target: TargetInfo) -> list[str]:
    """Return the names of the variants that make sense for a layer, the default first."""
    if not (_needs_columns(spec) or spec.grad_weight):
        return ["bias"]
    vectors = _blocks(spec, target).vectors
    counts = [n for n in (2, 1, 4, 3) if vectors % n == 0] if _needs_columns(spec) else [1]
    places = ["tap", "unit"] if _needs_columns(spec) else ["unit"]
    # Few blocks of channels cannot be shared out within each tile without waiting.
    orders = ["shared", "own"]
    return [f"{order}-{count}-{place}" for count in counts for place in places for order in orders]


@design_space(FUNCTION, "llvm", variants=variants, naive=naive)
def deform_conv2d_grad(
    sch: Any, spec: DeformConv2dGradSpec, target: TargetInfo, variant: str, choices: Choices
) -> None:
    """Schedule the gradients of a deformable convolution."""

    def block(name: str) -> Any:
        return sch.get_sblock(name, func_name=FUNCTION)

    first = "grad_bias" if variant == "bias" else "samples"
    sch.annotate(block(first), VARIANT, variant)
    _whole_images(sch, block, spec, target)
    if variant == "bias":
        return
    order, count, place = variant.split("-")
    shared = order == "shared"

    # The weight's gradient needs the samples of a tile: both stages are put under the same loops.
    channels, task = sch.get_loops(block("samples"))[:2]
    if shared:
        sch.reorder(task, channels)
    if spec.grad_weight:
        part_task, part_channels = sch.get_loops(block("weight_part"))[:2]
        if not shared:
            sch.reorder(part_channels, part_task)
        sch.merge(sch.get_loops(block("samples"))[1], sch.get_loops(block("weight_part"))[1])
    outer, inner, unit, tap = sch.get_loops(block("samples"))
    task, channels = (outer, inner) if shared else (inner, outer)

    columns_init = _column_gradients(sch, block, spec, target, choices, int(count), tap if place == "tap" else unit)
    weight_init = _weight_part(sch, block, spec, target, choices)
    plan_at = task if shared else unit
    _plan(sch, block, spec, target, plan_at, units_parallel=shared)
    for name, at in (("grad_tile", plan_at), ("weight_tile", task)):
        if (name == "grad_tile" and columns_init) or (name == "weight_tile" and weight_init):
            _tile(sch, block(name), spec, target, at, units_parallel=shared)
    sch.parallel(channels)

    pitch = _blocks(spec, target).pitch
    unit_bytes = GRANULE * ITEM_BYTES[spec.accumulator_dtype]
    # Samples and the output's gradient of the tile, and with a shared plan its ten numbers per sample.
    unit_bytes *= spec.taps * pitch + 2 * spec.out_channels + (10 * spec.taps * spec.offset_groups if shared else 0)
    units = choices.pick("tile_units", TILE_UNIT_CHOICES, default_units(target, unit_bytes))
    sch.annotate(block("samples"), TILE_UNITS, units)
    sch.annotate(block("samples"), UNIT_BYTES, unit_bytes)
    # Last: parallel and vectorize need the reduction in one block.
    for initialised in (columns_init, weight_init):
        if initialised:
            sch.decompose_reduction(*initialised)


def _whole_images(sch: Any, block: Any, spec: DeformConv2dGradSpec, target: TargetInfo) -> None:
    """Schedule the stages before and behind the tiles."""
    blocks = _blocks(spec, target)
    if spec.grad_offset or spec.grad_weight:
        sch.parallel(sch.fuse(*sch.get_loops(block("channels_last"))))
    if spec.grad_input:
        n, element = sch.get_loops(block("grad_image"))
        pixel, element = sch.split(element, [None, blocks.pitch])
        _, lane = sch.split(element, [None, blocks.lanes])
        sch.vectorize(lane)
        sch.parallel(sch.fuse(n, pixel))
        sch.parallel(sch.fuse(*sch.get_loops(block("grad_input"))))
    if spec.grad_offset:
        n, q, _, _ = sch.get_loops(block("grad_offset"))
        sch.parallel(sch.fuse(n, q))
    if spec.grad_weight:
        sch.parallel(sch.get_loops(block("grad_weight"))[0])
    if spec.grad_bias:
        _bias(sch, block, spec, target)


def _bias(sch: Any, block: Any, spec: DeformConv2dGradSpec, target: TargetInfo) -> None:
    part = block("bias_part")
    if spec.layout == "NCHW":
        channel, i, n, q = sch.get_loops(part)
        strip, lane = sch.split(i, [None, gcd(GRANULE, _vector_lanes(spec, target))])
        sch.reorder(channel, n, q, strip, lane)
        sch.unroll(strip)
        sch.reverse_compute_at(block("bias_sum"), channel)
    else:
        channel, n, q = sch.get_loops(part)
        channel, lane = sch.split(channel, [None, gcd(spec.out_channels, _vector_lanes(spec, target))])
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
    at: Any,
) -> tuple[Any, Any] | None:
    """Tile the product of output gradients and weight; return where its sums begin."""
    if not _needs_columns(spec):
        return None
    columns = block("grad_columns")
    sch.compute_at(columns, at, preserve_unit_loops=True)
    if is_depthwise(spec):
        sch.vectorize(sch.get_loops(columns)[-1])
        return None
    sums = sch.cache_write(columns, 0, "local")
    k, i, b, v, o = sch.get_loops(columns)[-5:]
    i0, i1 = choices.tile(
        "register_pixels", i, default=12, limit=max(1, (target.vector_registers - count - 1) // count)
    )
    b0, b1 = sch.split(b, [None, count])
    o0, o1 = choices.tile("unroll", o, default=1, limit=8)
    sch.reorder(k, b0, i0, o0, o1, i1, b1, v)
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
    b0, b1 = choices.tile("weight_vectors", b, default=2, limit=4)
    limit = max(1, (target.vector_registers - 4) // choices.made["weight_vectors"])
    o0, o1 = choices.tile("register_outputs", o, default=8, limit=limit)
    i0, i1 = choices.tile("unroll_pixels", i, default=1, limit=4)
    sch.reorder(k, b0, o0, u, i0, i1, o1, b1, v)
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
    """Place those stages of the sampling plan that are needed."""
    unused = set() if spec.grad_input or spec.grad_weight else {"weight"}
    if not (spec.grad_offset or spec.grad_input or spec.grad_weight):
        return
    for name in plan_blocks(2):
        if name.split("_")[0] in unused:
            continue
        place_plan_stage(sch, block(name), spec, target, at)
        if units_parallel:
            o, k, _, unit, *_ = sch.get_loops(block(name))[-6:]
            sch.reorder(unit, o, k)
            sch.parallel(unit)
    for name in ("pixel_1", "pixel_0"):
        sch.compute_at(block(name), at, preserve_unit_loops=True)


def _tile(sch: Any, stage: Any, spec: DeformConv2dGradSpec, target: TargetInfo, at: Any, units_parallel: bool) -> None:
    """Place the output's gradient of a unit, or of a tile's units."""
    sch.compute_at(stage, at, preserve_unit_loops=True)
    *_, unit, _, last = sch.get_loops(stage)
    extent = GRANULE if spec.layout == "NCHW" else spec.out_channels
    _, lane = sch.split(last, [None, gcd(extent, _vector_lanes(spec, target))])
    sch.vectorize(lane)
    if units_parallel:
        sch.parallel(unit)
