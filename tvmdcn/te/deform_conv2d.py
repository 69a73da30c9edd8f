# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution, forward (v1: offsets; v2: offsets and a modulation mask).

    y(p) = sum_k w(p_k) * x(p + p_k + dp_k) * dm(p_k)

One kernel serves every batch, height and width. Output pixels are walked in tiles of units (`te/tiles.py`); those of a
unit that was moved back are computed a second time, to the same bits.

Blocks, in order: ``channels_last`` (NCHW only), ``pixel_0``, ``pixel_1``, the sampling plan (`sampling.plan_blocks`),
``columns``, ``product``, ``output``. Their names are the contract with `schedules/`.
"""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import Any

from tvm import te, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.te.layout import Blocked, Epilogue, store_tile, to_channels_last
from tvmdcn.te.nests import TOKEN, block_nest, declare_reads, region, sequence, serial, whole_function, with_alignment
from tvmdcn.te.sampling import interpolate
from tvmdcn.te.tiles import GRANULE, ITEM_BYTES, SCALARS, Tiles, cast, is_depthwise, vector_lanes
from tvmdcn.te.vectors import bits_dtype, broadcast, from_bits, lanes_at, to_bits, transpose_into

__all__ = ["GRANULE", "deform_conv2d", "form", "is_depthwise", "lanes_for", "pack_weight", "packed_shape"]


def packed_shape(spec: DeformConv2dSpec, lanes: int) -> tuple[int, int, int, int, int]:
    """Return the shape of the packed weight: (groups, blocks of `lanes` output channels, taps, Cin/groups, lanes)."""
    if is_depthwise(spec):
        return (1, spec.in_channels // lanes, spec.taps, 1, lanes)
    per_group = spec.out_channels // spec.groups
    return (spec.groups, -(-per_group // lanes), spec.taps, spec.in_channels // spec.groups, lanes)


def lanes_for(spec: DeformConv2dSpec, vector_lanes: int) -> int:
    """Return how many output channels a vector of the register kernel holds.

    Parameters
    ----------
    spec : DeformConv2dSpec
    vector_lanes : int
        Accumulators in a vector register of the target.
    """
    if is_depthwise(spec):
        # A vector must lie in one offset group.
        return gcd(vector_lanes, spec.in_channels // spec.offset_groups)
    lanes = 1
    while lanes < min(vector_lanes, spec.out_channels // spec.groups):
        lanes *= 2
    return lanes


def form(spec: DeformConv2dSpec, target: Any) -> tuple[int]:
    """Return how channels lie in vectors on a target: the output channels of a vector."""
    return (lanes_for(spec, vector_lanes(spec, target)),)


def deform_conv2d(spec: DeformConv2dSpec, lanes: int) -> tirx.PrimFunc:
    """Return the forward as TIR, not yet scheduled.

    Parameters
    ----------
    spec : DeformConv2dSpec
    lanes : int
        Output channels in a block of the packed weight: the vector width of the target in accumulators.

    Returns
    -------
    tirx.PrimFunc
        ``deform_conv2d(x, offset, [mask,] weight, bias, out, height, width, out_width, tasks, tiles, tile_units)`` with

        * x ``[N, Cin, H*W]`` (NCHW) or ``[N, H*W*Cin]`` (NHWC), in the spec's dtype;
        * offset ``[N, og*2*K, P]`` or ``[N, P, og*2*K]``, mask ``[N, og*K, P]`` or ``[N, P, og*K]``, likewise;
        * weight `packed_shape`, bias ``[Cout]``, in the accumulator's dtype;
        * out ``[N, Cout, P]`` or ``[N, P, Cout]``, in the spec's dtype;
        * ``tiles * tile_units * GRANULE >= P >= GRANULE`` and ``tasks == N * tiles``.
    """
    acc, tiles = spec.accumulator_dtype, Tiles(spec)
    nchw, batch, size, taps = tiles.nchw, tiles.batch, tiles.size, spec.taps
    channels, groups, offset_groups = spec.in_channels, spec.groups, spec.offset_groups
    in_group, per_offset_group = channels // groups, channels // offset_groups
    # Channels are walked in runs that lie in one group and one offset group.
    run = gcd(in_group, per_offset_group)
    runs = in_group // run

    # NHWC: one row of numbers, gathered from as such; `size` counts numbers there, and pixels in NCHW.
    x = te.placeholder((batch, channels, size) if nchw else (batch, size), spec.dtype, name="x")
    offset = te.placeholder(tiles.plane(offset_groups * 2 * taps, tiles.pixels), spec.dtype, name="offset")
    mask = None
    if spec.mask:
        mask = te.placeholder(tiles.plane(offset_groups * taps, tiles.pixels), spec.dtype, name="mask")
    weight = te.placeholder(packed_shape(spec, lanes), acc, name="weight")
    bias = te.placeholder((spec.out_channels,), acc, name="bias")
    # The copy of an NCHW image has, for each offset group, a frame of zeros from which corners outside are read.
    image = x if not nchw else te.placeholder((batch, tiles.frame.pixels * channels), spec.dtype, name="image")

    pitch = per_offset_group if nchw else channels
    plan = tiles.sampling(tiles.coordinates(), offset, mask, pitch, framed=nchw)
    tile_shape = (*tiles.shape, GRANULE)

    def sample(t: Any, u: Any, i: Any, k: Any, o: Any, c: Any) -> Any:
        group = o * (tiles.frame.pixels if nchw else 1) * per_offset_group

        def read(index: Any) -> Any:
            return cast(image[t // tiles.tiles, index + group + c], spec.dtype, acc)

        return interpolate(plan, (o, k, t, u, i), read)

    columns = te.compute((*tile_shape, taps, offset_groups, per_offset_group), sample, name="columns")

    def column_at(t: Any, u: Any, i: Any, k: Any, first: Any, c: Any) -> Any:
        return columns[t, u, i, k, first // per_offset_group, first % per_offset_group + c]

    k = te.reduce_axis((0, taps), name="k")
    if is_depthwise(spec):  # no product of matrices: vectors run over the channels themselves
        result = te.compute(
            (1, channels // lanes, *tile_shape, lanes),
            lambda g, b, t, u, i, v: te.sum(column_at(t, u, i, k, b * lanes, v) * weight[g, b, k, 0, v], axis=[k]),
            name="product",
        )
    else:
        r, c = te.reduce_axis((0, runs), name="r"), te.reduce_axis((0, run), name="c")
        result = te.compute(
            (groups, packed_shape(spec, lanes)[1], *tile_shape, lanes),
            lambda g, b, t, u, i, v: te.sum(
                column_at(t, u, i, k, g * in_group + r * run, c) * weight[g, b, k, r * run + c, v], axis=[k, r, c]
            ),
            name="product",
        )

    tensors = [x, offset, *([mask] if spec.mask else []), weight, bias]
    staged = te.create_prim_func([*tensors, *([image] if nchw else []), result, *tiles.scalars])
    # A caller's tensors lie anywhere; the packed weight is the runtime's own.
    given = dict.fromkeys(("x", "offset", "mask"), ITEM_BYTES[spec.dtype])
    staged = with_alignment(staged, {**given, "bias": ITEM_BYTES[acc]})
    return _with_layout_stages(staged, spec, lanes)


def _with_layout_stages(staged: tirx.PrimFunc, spec: DeformConv2dSpec, lanes: int) -> tirx.PrimFunc:
    """Put ``channels_last`` before and ``output`` behind the TE stages; image and product become intermediate."""
    params = {p.name: p for p in staged.params}
    nchw, pixel_axis = spec.layout == "NCHW", 2 if spec.layout == "NCHW" else 1
    sizes = {"batch": params["x"].shape[0], "size": params["x"].shape[-1]}
    sizes["pixels"] = params["offset"].shape[pixel_axis]
    tiles = Tiles(spec, {**sizes, **{name: params[name] for name in SCALARS}})
    shape = tiles.plane(spec.out_channels, tiles.pixels)
    out = tirx.decl_buffer(shape, spec.dtype, name="out", data_alignment=ITEM_BYTES[spec.dtype])
    root, image = staged.body.block, params["image" if nchw else "x"]
    stages = [declare_reads(root.body, "columns", image, [(0, tiles.batch), TOKEN])]
    if nchw:
        width = spec.in_channels // spec.offset_groups
        form = Blocked(spec.offset_groups, width, width, tiles.size, tiles.frame, lanes)
        stages.insert(0, to_channels_last(params["x"], image, form))

    per_group = spec.out_channels if is_depthwise(spec) else spec.out_channels // spec.groups
    epilogue = Epilogue(params["product"], params["bias"], out, tiles.tiles, per_group, tiles.first_pixel, nchw)
    stages.append(store_tile(epilogue, GRANULE, spec.accumulator_dtype, spec.dtype))
    inner = [params[name] for name in ("image", "product") if name in params]
    block = SBlock([], [], [], "root", tirx.SeqStmt(stages), alloc_buffers=[*root.alloc_buffers, *inner])
    outer = [out if p.name == "product" else p for p in staged.params if p.name != "image"]
    return tirx.PrimFunc(outer, SBlockRealize([], True, block), attrs=staged.attrs)


def pack_weight(spec: DeformConv2dSpec, lanes: int) -> tirx.PrimFunc:
    """Return ``pack_weight(weight, packed)`` as TIR.

    From ``[Cout, Cin/groups*K]``, the weight as a matrix, to `packed_shape`; channels that fill up a block are zeros.
    """
    acc, taps, dtype = spec.accumulator_dtype, spec.taps, spec.dtype
    per_group = spec.out_channels if is_depthwise(spec) else spec.out_channels // spec.groups
    in_group = spec.in_channels // spec.groups
    row = in_group * taps
    weight = tirx.decl_buffer((spec.out_channels, row), dtype, name="weight", data_alignment=ITEM_BYTES[dtype])
    packed = tirx.decl_buffer(packed_shape(spec, lanes), acc, name="packed")
    groups, blocks = packed_shape(spec, lanes)[:2]
    # Rows of as many filters as a vector has lanes, transposed a square at a time; the last square overlaps.
    side = lanes if row >= lanes else 1

    def body(g: Any, b: Any) -> tirx.Stmt:
        e = tirx.Var("e", "int32")
        first = te.min(e * side, row - side)

        def load(v: int) -> Any:
            out = b * lanes + v
            at = [g * per_group + te.min(out, per_group - 1), lanes_at(first, side)]
            read = to_bits(tirx.BufferLoad(weight, at), dtype, side)
            if per_group % lanes == 0:
                return read
            return tirx.Select(out < per_group, read, broadcast(tirx.const(0, bits_dtype(dtype)), side))

        def emit(j: int, column: Any, v: int | None = None) -> tirx.Stmt:
            # A column has all filters, or is a single element of one.
            place = lanes_at(0, lanes) if v is None else v
            at = [g, b, (first + j) % taps, (first + j) // taps, place]
            return tirx.BufferStore(packed, from_bits(column, dtype, acc, side), at)

        if side == lanes:
            moves = transpose_into([load(v) for v in range(lanes)], bits_dtype(dtype), emit)
        else:
            moves = []
            for v in range(lanes):
                moves += transpose_into([load(v)], bits_dtype(dtype), partial(emit, v=v), f"r{v}")
        return serial(e, -(-row // side), sequence(moves))

    def everything(g: Any, b: Any) -> list[Any]:
        return [region(packed, g, b, *((0, extent) for extent in packed.shape[2:]))]

    stage = block_nest(
        "packed",
        [("g", groups), ("b", blocks)],
        lambda g, b: [region(weight, (0, spec.out_channels), (0, row))],
        everything,
        body,
        parallel=True,
    )
    return whole_function([weight, packed], stage)
