# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution, forward (v1: offsets; v2: offsets and a modulation mask).

    y(p) = sum_k w(p_k) * x(p + p_k + dp_k) * dm(p_k)

One kernel serves every batch, height and width. The pixels of an output image are numbered row by row and walked in
*tiles* of `tile_units` units of `GRANULE` pixels; both counts are arguments that the caller chooses
(`tvmdcn.partition`). A *task* is one tile of one image. Everything inside a unit has a constant extent, so that neither
the sampling nor the register kernel needs a predicate: units that would reach past the end of an image are moved back,
and compute some pixels a second time, to the same bits. An output image therefore has at least `GRANULE` pixels; the
caller pads smaller ones.

Blocks, in order: ``channels_last`` (NCHW only), ``pixel_0``, ``pixel_1``, the sampling plan (`sampling.plan_blocks`),
``columns``, ``product``, ``output``. Their names are the contract with `schedules/`.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from tvm import te, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.te.layout import TOKEN, Epilogue, declare_reads, store_tile, to_channels_last, with_alignment
from tvmdcn.te.sampling import interpolate, sampling_plan

__all__ = ["GRANULE", "deform_conv2d", "is_depthwise", "lanes_for", "pack_weight", "packed_shape"]

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

GRANULE = 24
"""Pixels in a unit: a multiple of every register tile worth having (1, 2, 3, 4, 6, 8, 12, 24 pixels)."""


def packed_shape(spec: DeformConv2dSpec, lanes: int) -> tuple[int, int, int, int, int]:
    """Return the shape of the packed weight: (groups, blocks of `lanes` output channels, taps, Cin/groups, lanes)."""
    if is_depthwise(spec):
        return (1, spec.in_channels // lanes, spec.taps, 1, lanes)
    per_group = spec.out_channels // spec.groups
    return (spec.groups, -(-per_group // lanes), spec.taps, spec.in_channels // spec.groups, lanes)


def is_depthwise(spec: DeformConv2dSpec) -> bool:
    """Tell whether each output channel reads one input channel."""
    return spec.groups == spec.in_channels == spec.out_channels


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


def first_pixel_of_unit(task: Any, unit: Any, tiles: Any, tile_units: Any, pixels: Any) -> Any:
    """Return the first pixel of a unit. The last units of an image end with it, so they overlap those before them."""
    return te.min((task % tiles * tile_units + unit) * GRANULE, pixels - GRANULE)


def _cast(value: Any, source: str, target: str) -> Any:
    return value if source == target else value.astype(target)


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
    acc, nchw = spec.accumulator_dtype, spec.layout == "NCHW"
    kernel_width, taps = spec.kernel_size[1], spec.taps
    channels, groups, offset_groups = spec.in_channels, spec.groups, spec.offset_groups
    in_group, per_offset_group = channels // groups, channels // offset_groups
    # Channels are walked in runs that lie in one group and one offset group.
    run = gcd(in_group, per_offset_group)
    runs = in_group // run

    batch, size = (tirx.Var(name, "int32") for name in ("batch", "size"))
    height, width, out_width = (tirx.Var(name, "int32") for name in ("height", "width", "out_width"))
    pixels, tasks, tiles, tile_units = (tirx.Var(name, "int32") for name in ("pixels", "tasks", "tiles", "tile_units"))

    def plane(channels: int) -> tuple[Any, ...]:
        return (batch, channels, pixels) if nchw else (batch, pixels, channels)

    def at(tensor: te.Tensor, n: Any, channel: Any, pixel: Any) -> Any:
        return tensor[n, channel, pixel] if nchw else tensor[n, pixel, channel]

    # NHWC: one row of numbers, gathered from as such; `size` counts numbers there, and pixels in NCHW.
    x = te.placeholder((batch, channels, size) if nchw else (batch, size), spec.dtype, name="x")
    offset = te.placeholder(plane(offset_groups * 2 * taps), spec.dtype, name="offset")
    mask = te.placeholder(plane(offset_groups * taps), spec.dtype, name="mask") if spec.mask else None
    weight = te.placeholder(packed_shape(spec, lanes), acc, name="weight")
    bias = te.placeholder((spec.out_channels,), acc, name="bias")
    # The copy of an NCHW image has, for each offset group, a pixel of zeros from which corners outside are read.
    image = x if not nchw else te.placeholder((batch, (size + 1) * channels), spec.dtype, name="image")

    def first_pixel(t: Any, u: Any) -> Any:
        return first_pixel_of_unit(t, u, tiles, tile_units, pixels)

    tile_shape = (tasks, tile_units, GRANULE)
    row = te.compute(tile_shape, lambda t, u, i: (first_pixel(t, u) + i) // out_width, name="pixel_0")
    column = te.compute(tile_shape, lambda t, u, i: first_pixel(t, u) + i - row(t, u, i) * out_width, name="pixel_1")

    def position(axis: int, o: Any, k: Any, t: Any, u: Any, i: Any) -> Any:
        tap = k // kernel_width if axis == 0 else k % kernel_width
        base = (row, column)[axis](t, u, i) * spec.stride[axis] - spec.padding[axis] + tap * spec.dilation[axis]
        moved = at(offset, t // tiles, (o * taps + k) * 2 + axis, first_pixel(t, u) + i)
        return base.astype(acc) + _cast(moved, spec.dtype, acc)

    def modulation(o: Any, k: Any, t: Any, u: Any, i: Any) -> Any:
        return _cast(at(mask, t // tiles, o * taps + k, first_pixel(t, u) + i), spec.dtype, acc)

    plan = sampling_plan(
        (offset_groups, taps, *tile_shape),
        position,
        (height, width),
        per_offset_group if nchw else channels,
        acc,
        modulation=modulation if spec.mask else None,
        zero_pixel=size if nchw else None,
    )

    def sample(t: Any, u: Any, i: Any, k: Any, o: Any, c: Any) -> Any:
        group = o * (size + 1) * per_offset_group if nchw else o * per_offset_group

        def read(index: Any) -> Any:
            return _cast(image[t // tiles, index + group + c], spec.dtype, acc)

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
    scalars = [height, width, out_width, tasks, tiles, tile_units]
    staged = te.create_prim_func([*tensors, *([image] if nchw else []), result, *scalars])
    # A caller's tensors lie anywhere; the packed weight is the runtime's own.
    given = dict.fromkeys(("x", "offset", "mask"), _ITEM_BYTES[spec.dtype])
    staged = with_alignment(staged, {**given, "bias": _ITEM_BYTES[acc]})
    return _with_layout_stages(staged, spec, lanes)


def _with_layout_stages(staged: tirx.PrimFunc, spec: DeformConv2dSpec, lanes: int) -> tirx.PrimFunc:
    """Put ``channels_last`` before and ``output`` behind the TE stages; image and product become intermediate."""
    params = {p.name: p for p in staged.params}
    nchw, batch = spec.layout == "NCHW", params["x"].shape[0]
    pixels = params["offset"].shape[2 if nchw else 1]
    shape = (batch, spec.out_channels, pixels) if nchw else (batch, pixels, spec.out_channels)
    out = tirx.decl_buffer(shape, spec.dtype, name="out", data_alignment=_ITEM_BYTES[spec.dtype])
    root, image = staged.body.block, params["image" if nchw else "x"]
    stages = [declare_reads(root.body, "columns", image, [(0, batch), TOKEN])]
    if nchw:
        stages.insert(0, to_channels_last(params["x"], image, spec.offset_groups, spec.dtype, lanes))

    def first_pixel(t: Any, u: Any) -> Any:
        return first_pixel_of_unit(t, u, params["tiles"], params["tile_units"], pixels)

    per_group = spec.out_channels if is_depthwise(spec) else spec.out_channels // spec.groups
    epilogue = Epilogue(params["product"], params["bias"], out, params["tiles"], per_group, first_pixel, nchw)
    stages.append(store_tile(epilogue, GRANULE, spec.accumulator_dtype, spec.dtype))
    inner = [params[name] for name in ("image", "product") if name in params]
    block = SBlock([], [], [], "root", tirx.SeqStmt(stages), alloc_buffers=[*root.alloc_buffers, *inner])
    outer = [out if p.name == "product" else p for p in staged.params if p.name != "image"]
    return tirx.PrimFunc(outer, SBlockRealize([], True, block), attrs=staged.attrs)


def pack_weight(spec: DeformConv2dSpec, lanes: int) -> tirx.PrimFunc:
    """Return ``pack_weight(weight, packed)`` as TIR.

    From ``[Cout, Cin/groups, kh, kw]`` to `packed_shape`; channels that fill up a block are zeros.
    """
    per_group = spec.out_channels if is_depthwise(spec) else spec.out_channels // spec.groups
    kernel_width, acc = spec.kernel_size[1], spec.accumulator_dtype
    shape = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel_size)
    weight = te.placeholder(shape, spec.dtype, name="weight")

    def value(g: Any, b: Any, k: Any, c: Any, v: Any) -> Any:
        channel = b * lanes + v
        read = weight[g * per_group + te.min(channel, per_group - 1), c, k // kernel_width, k % kernel_width]
        return tirx.Select(channel < per_group, _cast(read, spec.dtype, acc), tirx.const(0.0, acc))

    packed = te.compute(packed_shape(spec, lanes), value, name="packed")
    return with_alignment(te.create_prim_func([weight, packed]), {"weight": 2})
