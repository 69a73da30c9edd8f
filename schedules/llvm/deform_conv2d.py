# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution on CPUs: sampling, product and epilogue fused per tile of output pixels.

    parallel tile:
        plan:     where each (offset group, tap, pixel) samples; vectors along pixels
        columns:  the samples [pixel, tap, channel]; vectors along channels; never leaves the cache
        product:  [pixels x output channels] in registers, over taps and channels
        output:   bias and layout, transposed in registers

Structural variants, named ``<reduction>-<vectors>-<plan>``:

* reduction ``full``: all taps and channels are sampled before the product, which keeps its sums in registers from
  begin to end. ``split``: taps and channels come in chunks, whose partial sums are added to the tile in memory; for
  wide layers, whose columns would not stay in the cache.
* vectors of output channels in the register tile.
* plan: computed per ``unit`` of pixels, one offset group and tap at a time, so that it stays in registers and the
  group's part of the image in the first-level cache; per ``window``, for a unit's pixels and all taps, which of one
  pixel are sampled one behind the other, because their corners lie side by side; per ``tap``, for all offset groups;
  or per ``task``, shared by all groups of the convolution.

Read in assembly (AVX-512, r50_c3): two steps of the product's inner loop are 48 fused multiply-adds, 24 broadcasts and
4 aligned loads, 80 instructions in all, nothing spilled; a sample takes a load of its index, 4 broadcasts of its
weights and, per vector of channels, 4 multiply-adds from memory and a store. Where the time goes (``tvmdcn stages
--problem all --threads 1``, tuned schedules, Zen 5 server, 2026-11-23; the rows are in docs/measurements):

    layer       product  sampling  plan  image's layout  output's layout
    r50_c3        85 %      9 %    1 %        2 %             2 %
    deft          76 %     11 %    3 %        3 %             6 %
    yolact_c3     76 %     14 %    1 %        8 %             1 %
    edvr_align    55 %     25 %    9 %        5 %             6 %
"""

from __future__ import annotations

from math import gcd
from typing import Any

from tvmdcn.space import TILE_UNITS, UNIT_BYTES, VARIANT, Choices, design_space
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import TargetInfo
from tvmdcn.te.deform_conv2d import form
from tvmdcn.te.sampling import plan_blocks
from tvmdcn.te.tiles import GRANULE, ITEM_BYTES, is_depthwise, vector_lanes

FUNCTION = DeformConv2dSpec.operator
TILE_UNIT_CHOICES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]


def _lanes(spec: DeformConv2dSpec, target: TargetInfo) -> int:
    return form(spec, target)[0]


def _blocks(spec: DeformConv2dSpec, lanes: int) -> int:
    return -(-(spec.out_channels // spec.groups) // lanes)


def _run(spec: DeformConv2dSpec) -> int:
    """Return the channels that lie in one group and one offset group, side by side."""
    return gcd(spec.in_channels // spec.groups, spec.in_channels // spec.offset_groups)


def _column_bytes(spec: DeformConv2dSpec) -> int:
    """Return the size of the columns of one unit of pixels."""
    return GRANULE * spec.taps * spec.in_channels * ITEM_BYTES[spec.accumulator_dtype]


def variants(spec: DeformConv2dSpec, target: TargetInfo) -> list[str]:
    """Return the names of the variants that make sense for a layer, the default first."""
    if is_depthwise(spec):
        return ["depthwise"]
    blocks = _blocks(spec, _lanes(spec, target))
    # Two or four vectors amortise the broadcasts; a count that does not divide the blocks would compute padding.
    counts = [n for n in (2, 4, 1, 3) if blocks % n == 0 and (n > 1 or blocks == 1 or blocks % 2)]
    plans = ["window", "unit", "tap"]
    # A plan for few channels takes longer than their samples do from the second-level cache: one thread takes 11.7 ms
    # for edvr_align per window and 10.4 per unit, 0.71 and 0.80 for grouped32, 1.71 and 1.78 for deft (Zen 5,
    # 2026-11-23).
    if spec.in_channels // spec.offset_groups < 2 * vector_lanes(spec, target):
        plans[:2] = ["unit", "window"]
    # Groups are sampled together where they share a plan.
    if spec.groups > 1:
        plans.append("task")
    reductions = ["full", "split"] if spec.groups == 1 else ["full"]
    # Columns of four units should leave half of the second-level cache to the weights.
    if spec.groups == 1 and 4 * _column_bytes(spec) > (target.l2_bytes or 1 << 20) // 2:
        reductions.reverse()
    return [f"{reduction}-{n}-{plan}" for plan in plans for n in counts for reduction in reductions]


def default_units(target: TargetInfo, chunk_bytes: int) -> int:
    """Return how many units of columns fit into half of the second-level cache."""
    return max(1, min(16, (target.l2_bytes or 1 << 20) // 2 // chunk_bytes))


def naive(sch: Any, spec: DeformConv2dSpec) -> None:
    """Leave everything as the algorithm is written: stage after stage in memory, scalar, one thread."""


@design_space(FUNCTION, "llvm", variants=variants, naive=naive)
def deform_conv2d(sch: Any, spec: DeformConv2dSpec, target: TargetInfo, variant: str, choices: Choices) -> None:
    """Schedule the forward of a deformable convolution."""

    def block(name: str) -> Any:
        return sch.get_sblock(name, func_name=FUNCTION)

    lanes = _lanes(spec, target)
    sch.annotate(block("pixel_0"), VARIANT, variant)
    if spec.layout == "NCHW":
        sch.parallel(sch.fuse(*sch.get_loops(block("channels_last"))))
    if variant == "depthwise":
        _depthwise(sch, block, spec, target, choices, lanes)
        return
    reduction, count, plan_at = variant.split("-")
    vectors = int(count)

    # What a register tile needs: its sums, the weights' vectors, and one broadcast.
    pixels_limit = max(1, (target.vector_registers - vectors - 1) // vectors)
    product = block("product")
    _, b, t, u, i, v, k, r, c = sch.get_loops(product)
    if reduction == "full":
        chunk = _column_bytes(spec)
        sums = sch.cache_write(product, 0, "local")
        g, b, t, u, i, v, k, r, c = sch.get_loops(product)
        i0, i1 = choices.tile("register_pixels", i, default=12, limit=pixels_limit)
        b0, b1 = sch.split(b, [None, vectors])
        c0, c1 = choices.tile("unroll", c, default=1, limit=8)
        sch.reorder(t, g, b0, u, i0, k, r, c0, c1, i1, b1, v)
        sch.reverse_compute_at(sums, i0, preserve_unit_loops=True)
        *_, s_b, _, _, s_i, s_v = sch.get_loops(sums)
        sch.unroll(s_i)
        sch.unroll(s_b)
        sch.vectorize(s_v)
        body, first = product, k
        sch.reverse_compute_at(block("output"), b0, preserve_unit_loops=True)
        # Groups share a plan and whole cache lines of the image, so they are sampled together.
        columns_at = t if spec.groups > 1 else g
    else:
        k0, k1 = choices.tile("taps", k, default=1)
        c0, c1 = choices.tile("channels", c, default=512, limit=1024)
        # The columns of a chunk, and the sums of all output channels.
        sampled = choices.made["taps"] * choices.made["channels"] * (spec.in_channels // spec.groups // _run(spec))
        chunk = GRANULE * (sampled + spec.out_channels) * ITEM_BYTES[spec.accumulator_dtype]
        sch.reorder(k0, c0, k1, r, c1)
        chunks = sch.fuse(k0, c0)
        body = sch.rfactor(chunks, 0)
        product = block("product")
        g, b, t, u, i, v, chunks = sch.get_loops(product)
        i0, i1 = choices.tile("register_pixels", i, default=12, limit=pixels_limit)
        b0, b1 = sch.split(b, [None, vectors])
        sch.reorder(t, g, chunks, b0, u, i0, i1, b1, v)
        sch.reverse_compute_at(block("output"), g, preserve_unit_loops=True)
        sch.compute_at(body, i0, preserve_unit_loops=True)
        sch.set_scope(body, 0, "local")
        for loop in (i1, b1):
            sch.unroll(loop)
        sch.vectorize(v)
        _, _, b1, _, _, i1, v, k1, r, c1 = sch.get_loops(body)[-10:]
        c1, c2 = choices.tile("unroll", c1, default=1, limit=8)
        sch.reorder(k1, r, c1, c2, i1, b1, v)
        c1, first, columns_at = c2, k1, chunks

    _columns(sch, block, spec, target, t, columns_at, plan_at)
    for loop in (i1, b1, c1):
        sch.unroll(loop)
    sch.vectorize(v)
    units = choices.pick("tile_units", TILE_UNIT_CHOICES, default_units(target, chunk))
    sch.annotate(block("pixel_0"), TILE_UNITS, units)
    sch.annotate(block("pixel_0"), UNIT_BYTES, chunk)
    sch.parallel(t)
    # Last: parallel and vectorize need the reduction in one block.
    sch.decompose_reduction(body, first)
    if reduction == "split":
        sch.decompose_reduction(product, chunks)


def _columns(
    sch: Any, block: Any, spec: DeformConv2dSpec, target: TargetInfo, task: Any, at: Any, plan_at: str
) -> None:
    """Place the sampling at a loop of the product, and the plan at a loop of the sampling."""
    columns = block("columns")
    sch.compute_at(columns, at, preserve_unit_loops=True)
    u, i, k, o, c = sch.get_loops(columns)[-5:]
    c0, c1 = sch.split(c, [None, _sampling_lanes(spec, target)])
    order = {"unit": (o, k, u, i), "window": (o, u, i, k)}.get(plan_at, (k, u, i, o))
    sch.reorder(*order, c0, c1)
    sch.vectorize(c1)
    _plan(sch, block, spec, target, {"unit": u, "window": u, "tap": k, "task": task}[plan_at], task)


def _sampling_lanes(spec: DeformConv2dSpec, target: TargetInfo) -> int:
    """Return the channels in a vector of samples: all in one offset group."""
    return min(vector_lanes(spec, target), spec.in_channels // spec.offset_groups)


def _plan(sch: Any, block: Any, spec: DeformConv2dSpec, target: TargetInfo, at: Any, task: Any) -> None:
    """Compute the sampling plan in vectors along the pixels of a unit."""
    for name in plan_blocks(2, framed=spec.layout == "NCHW"):
        sch.compute_at(block(name), at, preserve_unit_loops=True)
        strip, _ = vectorize_pixels(sch, block(name), spec, target)
        sch.unroll(strip)
    for name in ("pixel_1", "pixel_0"):
        sch.compute_at(block(name), task, preserve_unit_loops=True)


def vectorize_pixels(sch: Any, stage: Any, spec: DeformConv2dSpec, target: TargetInfo) -> tuple[Any, Any]:
    """Split the pixels of a unit, a stage's last loop, into vectors; return both loops."""
    # Vectors that divide a unit: with 24 lanes LLVM builds each broadcast from scalar inserts, and edvr_align takes
    # 12.4 ms, with 8 it takes 11.7 (Zen 5, one thread, 2026-11).
    lanes = gcd(GRANULE, vector_lanes(spec, target))
    strip, lane = sch.split(sch.get_loops(stage)[-1], [None, lanes])
    sch.vectorize(lane)
    return strip, lane


def _depthwise(sch: Any, block: Any, spec: DeformConv2dSpec, target: TargetInfo, choices: Choices, lanes: int) -> None:
    """Gather and multiply-add in one: there is no product of matrices to feed."""
    product = block("product")
    sums = sch.cache_write(product, 0, "local")
    sch.compute_inline(block("columns"))
    g, b, t, u, i, v, k = sch.get_loops(product)
    b0, b1 = choices.tile("register_blocks", b, default=4, limit=target.vector_registers // 2)
    sch.reorder(t, u, i, g, b0, k, b1, v)
    sch.reverse_compute_at(sums, b0, preserve_unit_loops=True)
    *_, s_b, _, _, _, s_v = sch.get_loops(sums)
    sch.unroll(s_b)
    sch.vectorize(s_v)
    sch.reverse_compute_at(block("output"), t, preserve_unit_loops=True)
    _plan(sch, block, spec, target, u, t)
    sch.unroll(b1)
    sch.vectorize(v)
    plan_bytes = GRANULE * ITEM_BYTES[spec.accumulator_dtype] * (16 + spec.out_channels)
    units = choices.pick("tile_units", TILE_UNIT_CHOICES, default_units(target, plan_bytes))
    sch.annotate(block("pixel_0"), TILE_UNITS, units)
    sch.annotate(block("pixel_0"), UNIT_BYTES, plan_bytes)
    sch.parallel(t)
    sch.decompose_reduction(product, k)
