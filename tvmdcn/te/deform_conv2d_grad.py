# SPDX-License-Identifier: Apache-2.0
"""Gradients of a deformable convolution by its input, offset, mask, weight and bias; those that are asked for.

With g the gradient of the output, w the weight, and v(p, k, c) the sample of output pixel p, tap k and channel c, which
is mask * sum over corners of share * x[corner]::

    column gradients  d(p, k, c) = sum over output channels o of g(p, o) w(o, k, c)
    input             gx[corner] += mask * share * d(p, k, c), for each corner of (p, k)
    mask              gm(p, k) = sum over c of d(p, k, c) * sum over corners of share * x[corner]
    offset            go(p, k) = mask * sum over c of d(p, k, c) * sum over corners of (share's derivative) * x[corner]
    weight            gw(o, k, c) = sum over p of g(p, o) v(p, k, c)
    bias              gb(o) = sum over p of g(p, o)

Work is divided into blocks of channels (`te/channel_blocks.py`), and output pixels are walked in tiles of units
(`te/tiles.py`). Column gradients and samples exist for one tile and one block at a time. Pixels that a unit repeats
count once: they are left out of what is added to the input's gradient, and their samples are zeros for the weight's.

Blocks, in order, those that are needed: ``pixel_0``, ``pixel_1``, the sampling plan, ``grad_tile`` (the output's
gradient of a unit), ``image_frame``, ``image_rows`` (`te/image_rows.py`), ``grad_columns``, ``samples``
(`te/samples.py`), ``weight_part`` (a tile's part of the weight's gradient), ``weight_sum``, ``grad_weight``,
``grad_input``, ``grad_offset``, ``bias_part``, ``bias_sum`` (NCHW only), ``grad_bias``. Their names are the contract
with `schedules/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.te.channel_blocks import ChannelBlocks, form, pack_weight, packed_shape, store_weight
from tvmdcn.te.image_rows import image_buffers, image_stages, store_image
from tvmdcn.te.nests import block_name, block_nest, region, sequence, with_alignment
from tvmdcn.te.samples import part_buffers, samples_stage, store_places
from tvmdcn.te.tiles import GRANULE, ITEM_BYTES, SCALARS, Tiles, cast

__all__ = ["GRANULE", "deform_conv2d_grad", "form", "pack_weight", "packed_shape"]

Expr = Any

_PIXEL_LANES = 8
"""Pixels in a vector of what is stored per pixel: divides a unit."""


def deform_conv2d_grad(spec: DeformConv2dGradSpec, lanes: int, wanted: int = 2) -> tirx.PrimFunc:
    """Return the gradients as TIR, not yet scheduled.

    Parameters
    ----------
    spec : DeformConv2dGradSpec
    lanes : int
        Channels in a vector.
    wanted : int
        The vectors that a block of channels should have.

    Returns
    -------
    tirx.PrimFunc
        ``deform_conv2d_grad(*spec.inputs, *spec.outputs, height, width, out_width, tasks, tiles, tile_units)`` with

        * grad_output ``[N, Cout, P]`` (NCHW) or ``[N, P, Cout]`` (NHWC), in the spec's dtype;
        * input and grad_input ``[N, Cin, H*W]`` or ``[N, H*W, Cin]``, likewise; offset and grad_offset
          ``[N, og*2*K, P]`` or ``[N, P, og*2*K]``; mask and grad_mask the same with ``og*K``;
        * weight `packed_shape`, in the accumulator's dtype; grad_weight ``[Cout, Cin/groups*K]`` and grad_bias
          ``[Cout]``, in the spec's dtype;
        * ``tiles * tile_units * GRANULE >= P >= GRANULE`` and ``tasks == N * tiles``.
    """
    acc, dtype, taps = spec.accumulator_dtype, spec.dtype, spec.taps
    tiles, blocks = Tiles(spec), ChannelBlocks(spec, lanes, wanted)
    shapes = {
        "grad_output": (tiles.plane(spec.out_channels, tiles.pixels), dtype),
        "input": (tiles.plane(spec.in_channels, tiles.size), dtype),
        "offset": (tiles.plane(spec.offset_groups * 2 * taps, tiles.pixels), dtype),
        "mask": (tiles.plane(spec.offset_groups * taps, tiles.pixels), dtype),
        "weight": (packed_shape(spec, lanes, wanted), acc),
    }
    given = {name: te.placeholder(*shapes[name], name=name) for name in spec.inputs}
    grad_output = given["grad_output"]
    # What passes between the stages of TE and those of TIR, which `_assemble` puts between them.
    between: list[te.Tensor] = []
    results: list[te.Tensor] = []
    if spec.grad_input or spec.grad_offset or spec.grad_weight:
        tile = _tile(tiles, grad_output)
        coordinates = tiles.coordinates()
        border_inside = spec.grad_offset and spec.border == "torchvision"
        mask = given.get("mask")
        plan = tiles.sampling(coordinates, given["offset"], mask, blocks.pitch, True, border_inside)
        results += plan.indices
        if spec.grad_input or spec.grad_weight:
            results += plan.weights
        if spec.grad_offset:
            results += [*plan.fractions, *coordinates]
    if spec.grad_input or spec.grad_offset:
        results.append(_grad_columns(tiles, blocks, tile, given["weight"]))
    if spec.grad_input:
        between.append(te.placeholder(tiles.plane(spec.in_channels, tiles.size), dtype, name="grad_input"))
    if spec.grad_weight:
        shape = (blocks.count, *tiles.shape, taps, GRANULE, blocks.vectors, lanes)
        columns = te.placeholder(shape, acc, name="columns")
        total = te.placeholder(packed_shape(spec, lanes, wanted), acc, name="weight_sum")
        between += [columns, total]
        results.append(_weight_part(tiles, blocks, tile, columns))
    if spec.grad_bias:
        results.append(_grad_bias(tiles, grad_output))
    staged = te.create_prim_func([*given.values(), *between, *results, *tiles.scalars])
    # A caller's tensors lie anywhere; the packed weight is the runtime's own.
    callers = ("grad_output", "input", "offset", "mask", "grad_input", "grad_bias")
    return _assemble(with_alignment(staged, dict.fromkeys(callers, ITEM_BYTES[dtype])), spec, blocks)


def _tile(tiles: Tiles, grad_output: te.Tensor) -> Callable[..., Expr]:
    """Return the output's gradient at (task, unit, output channel, pixel), staged as it lies in memory."""
    channels = tiles.spec.out_channels

    def value(t: Expr, u: Expr, o: Expr, i: Expr) -> Expr:
        return tiles.read(grad_output, t // tiles.tiles, o, tiles.first_pixel(t, u) + i)

    if tiles.nchw:
        staged = te.compute((*tiles.shape, channels, GRANULE), value, name="grad_tile")
        return lambda t, u, o, i: staged[t, u, o, i]
    staged = te.compute((*tiles.shape, GRANULE, channels), lambda t, u, i, o: value(t, u, o, i), name="grad_tile")
    return lambda t, u, o, i: staged[t, u, i, o]


def _grad_columns(tiles: Tiles, blocks: ChannelBlocks, tile: Callable[..., Expr], weight: te.Tensor) -> te.Tensor:
    o = te.reduce_axis((0, blocks.outputs), name="o")

    def value(c: Expr, t: Expr, u: Expr, k: Expr, i: Expr, b: Expr, v: Expr) -> Expr:
        if blocks.depthwise:
            return tile(t, u, blocks.out_channel(c, b, v, 0), i) * weight[c, k, b, 0, v]
        return te.sum(tile(t, u, blocks.out_channel(c, b, v, o), i) * weight[c, k, b, o, v], axis=[o])

    shape = (blocks.count, *tiles.shape, tiles.spec.taps, GRANULE, blocks.vectors, blocks.lanes)
    return te.compute(shape, value, name="grad_columns")


def _weight_part(tiles: Tiles, blocks: ChannelBlocks, tile: Callable[..., Expr], columns: te.Tensor) -> te.Tensor:
    u, i = te.reduce_axis((0, tiles.tile_units), name="u"), te.reduce_axis((0, GRANULE), name="i")
    return te.compute(
        (tiles.tasks, *packed_shape(tiles.spec, blocks.lanes, blocks.wanted)),
        lambda t, c, k, b, o, v: te.sum(
            columns[c, t, u, k, i, b, v] * tile(t, u, blocks.out_channel(c, b, v, o), i), axis=[u, i]
        ),
        name="weight_part",
    )


def _weight_sum(part: tirx.Buffer, total: tirx.Buffer, acc: str) -> tirx.Stmt:
    """Return the stage that adds a tile's part to the weight's gradient; tiles come one after the other."""

    def body(t: Expr, *at: Expr) -> tirx.Stmt:
        old = tirx.Select(t == 0, tirx.const(0.0, acc), tirx.BufferLoad(total, list(at)))
        return tirx.BufferStore(total, old + tirx.BufferLoad(part, [t, *at]), list(at))

    extents = list(zip(("t", "c", "k", "b", "o", "v"), part.shape, strict=True))
    return block_nest("weight_sum", extents, lambda *at: [region(part, *at)], lambda t, *at: [region(total, *at)], body)


def _grad_bias(tiles: Tiles, grad_output: te.Tensor) -> te.Tensor:
    """Return the sums over pixels. In planes, vectors run along the pixels of a unit, and their lanes come last."""
    spec, acc, channels = tiles.spec, tiles.spec.accumulator_dtype, tiles.spec.out_channels
    n = te.reduce_axis((0, tiles.batch), name="n")
    if tiles.nchw:
        q = te.reduce_axis((0, (tiles.pixels + GRANULE - 1) // GRANULE), name="q")

        def value(o: Expr, i: Expr) -> Expr:
            pixel = te.min(q * GRANULE, tiles.pixels - GRANULE) + i
            read = tiles.read(grad_output, n, o, pixel)
            return te.sum(tirx.Select(pixel >= q * GRANULE, read, tirx.const(0.0, acc)), axis=[n, q])

        part = te.compute((channels, GRANULE), value, name="bias_part")
        i = te.reduce_axis((0, GRANULE), name="i")
        total = te.compute((channels,), lambda o: te.sum(part[o, i], axis=[i]), name="bias_sum")
    else:
        p = te.reduce_axis((0, tiles.pixels), name="p")
        total = te.compute(
            (channels,), lambda o: te.sum(tiles.read(grad_output, n, o, p), axis=[n, p]), name="bias_part"
        )
    return te.compute((channels,), lambda o: cast(total[o], acc, spec.dtype), name="grad_bias")


def _assemble(staged: tirx.PrimFunc, spec: DeformConv2dGradSpec, blocks: ChannelBlocks) -> tirx.PrimFunc:
    """Put the stages written in TIR between those of TE; what passes between them becomes intermediate."""
    buffers = {p.name: p for p in staged.params}
    axis = 2 if spec.layout == "NCHW" else 1
    pixels = buffers["grad_output"]
    image = buffers.get("input", buffers.get("grad_input", pixels))
    sizes = {"batch": pixels.shape[0], "size": image.shape[axis], "pixels": pixels.shape[axis]}
    tiles = Tiles(spec, {**sizes, **{name: buffers[name] for name in SCALARS}})
    parts = part_buffers(spec, tiles, blocks)

    root = staged.body.block
    nests = {block_name(n): n for n in (root.body if isinstance(root.body, tirx.SeqStmt) else [root.body])}
    late = ["grad_columns", "weight_part", "bias_part", "bias_sum", "grad_bias"]
    stages = [nest for name, nest in nests.items() if name not in late]
    scratch = dict(parts)
    if "index" in buffers:
        scratch |= image_buffers(spec, tiles, blocks)
        buffers |= scratch
        stages += image_stages(spec, tiles, blocks, buffers)
        stages += [nests["grad_columns"]] if "grad_columns" in nests else []
        stages.append(samples_stage(spec, tiles, blocks, buffers, parts))
    if spec.grad_weight:
        stages.append(nests["weight_part"])
        stages.append(_weight_sum(buffers["weight_part"], buffers["weight_sum"], spec.accumulator_dtype))
        buffers["grad_weight"], stage = store_weight(blocks, buffers["weight_sum"])
        stages.append(stage)
    if spec.grad_input:
        stages.append(store_image(tiles, blocks, buffers["grad_image"], buffers["grad_input"]))
    if spec.grad_offset:
        places, stage = store_places(spec, tiles, blocks, buffers.get("mask"), parts, _PIXEL_LANES)
        buffers |= places
        stages.append(stage)
    stages += [nests[name] for name in late[2:] if name in nests]

    outer = [buffers[name] for name in (*spec.inputs, *spec.outputs, *SCALARS)]
    named = {*spec.inputs, *spec.outputs, *SCALARS}
    inner = [p for p in staged.params if p.name not in named]
    block = SBlock([], [], [], "root", sequence(stages), alloc_buffers=[*root.alloc_buffers, *inner, *scratch.values()])
    return tirx.PrimFunc(outer, SBlockRealize([], True, block), attrs=staged.attrs)
