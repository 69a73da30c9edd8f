# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution for GPUs: an implicit product of matrices.

    out[pixel, output] = sum over (tap, channel) of columns[tap, pixel, channel] * weight[tap, channel, output]

with ``columns`` sampled from a channels-last image as they are needed: the schedule makes a block's part of it in
shared memory and nothing of its size ever reaches the device's memory. The same algorithm as `deform_conv2d` in stages
that fit thousands of threads; what both share is `sampling`.

The output pixels of all images are one axis, padded to whole tiles of `PIXELS`; results of the padding are dropped.

Stages, in order: ``channels_last`` (NCHW only), ``pixel_n``, ``pixel_0``, ``pixel_1``, the sampling plan
(`sampling.plan_blocks`), ``place`` and ``share`` (the plan with the corners of a sample side by side), ``corner``,
``column``, ``columns``, ``weights``, then on tensor cores ``left``, ``product`` and ``result``, else ``product``, and
``output``.
Their names are the contract with `schedules/`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import te, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.te.fragments import BARRIER, LANES, TILE, TO_TF32, WORDS, thread_loop
from tvmdcn.te.multiply import copy_weight, in_vectors, load_left, multiply, multiply_fragments, spread
from tvmdcn.te.nests import TOKEN, block_nest, declare_reads, region, with_alignment
from tvmdcn.te.products import packed_dtype, packed_shape, padded, product_of
from tvmdcn.te.sampling import sampling_plan
from tvmdcn.te.tiles import ITEM_BYTES, cast

__all__ = ["MOST_PIXELS", "PIXELS", "SCALARS", "TRANSPOSED", "implicit_gemm"]

Expr = Any

PIXELS = 256
"""Padding of the axis of output pixels: a multiple of every tile that a block may take."""

MOST_PIXELS = 1 << 30
"""Output pixels, of all images, that a call may have."""

TRANSPOSED = 32
"""Pixels, and channels, of a tile that is transposed."""

SCALARS = ("height", "width", "out_width", "total", "tiles")
"""The last arguments: size of the input, width of the output, output pixels of all images, tiles of `PIXELS`."""


def implicit_gemm(spec: DeformConv2dSpec) -> tirx.PrimFunc:
    """Return the forward as TIR for a GPU, not yet scheduled.

    Parameters
    ----------
    spec : DeformConv2dSpec

    Returns
    -------
    tirx.PrimFunc
        ``deform_conv2d([x,] image, offset, [mask,] weight, bias, out, height, width, out_width, total, tiles)``

        * image ``[N*H*W, Cin]``, in the spec's dtype: NHWC: the input. NCHW: room for a channels-last copy of the input
          x ``[N, Cin, H*W]``;
        * offset ``[N, og*2*K, P]`` or ``[N, P, og*2*K]``, mask ``[N, og*K, P]`` or ``[N, P, og*K]``, likewise;
        * weight `packed_shape` in `packed_dtype`, bias ``[Cout]`` in the accumulator's dtype;
        * out ``[N, Cout, P]`` or ``[N*P, Cout]``, in the spec's dtype;
        * ``total == N * P`` and ``tiles == ceil(total / PIXELS)``.
    """
    stages = _Stages(spec)
    columns, params = stages.columns()
    staged = te.create_prim_func([*params, columns, *stages.scalars])
    alignment = {"x": ITEM_BYTES[spec.dtype], "image": 16, "offset": ITEM_BYTES[spec.dtype]}
    alignment.update(mask=ITEM_BYTES[spec.dtype], bias=4)
    return _with_product(with_alignment(staged, alignment), spec, stages)


class _Stages:
    """The free extents, and the TE stages up to the columns."""

    def __init__(self, spec: DeformConv2dSpec) -> None:
        self.spec, self.product = spec, product_of(spec)
        self.nchw, self.acc = spec.layout == "NCHW", spec.accumulator_dtype
        self.depth = padded(spec.in_channels // spec.groups, self.product.depth)
        names = ("batch", "pixels", "image_pixels", *SCALARS)
        self.sizes = {name: tirx.Var(name, "int32" if name in SCALARS else "int64") for name in names}
        self.scalars = [self.sizes[name] for name in SCALARS]
        self.extent = self.sizes["tiles"] * PIXELS

    def columns(self) -> tuple[te.Tensor, list[te.Tensor]]:
        """Return ``columns[group, tap, pixel, channel]``, and the tensors it is made of in the order of the call."""
        spec, acc, taps, sizes = self.spec, self.acc, self.spec.taps, self.sizes
        batch, pixels, total = sizes["batch"], sizes["pixels"], sizes["total"]
        image = te.placeholder((sizes["image_pixels"], spec.in_channels), spec.dtype, name="image")

        def plane(channels: int) -> tuple[Expr, ...]:
            return (batch, channels, pixels) if self.nchw else (batch, pixels, channels)

        offset = te.placeholder(plane(spec.offset_groups * 2 * taps), spec.dtype, name="offset")
        mask = te.placeholder(plane(spec.offset_groups * taps), spec.dtype, name="mask") if spec.mask else None

        # The padding repeats the last pixel.
        number = te.compute((self.extent,), lambda p: te.min(p, total - 1) // pixels.astype("int32"), name="pixel_n")
        within = te.compute(
            (self.extent,), lambda p: te.min(p, total - 1) - number[p] * pixels.astype("int32"), name="pixel"
        )
        row = te.compute((self.extent,), lambda p: within[p] // sizes["out_width"], name="pixel_0")
        column = te.compute((self.extent,), lambda p: within[p] - row[p] * sizes["out_width"], name="pixel_1")

        def read(tensor: te.Tensor, channel: Expr, p: Expr) -> Expr:
            at = (number[p], channel, within[p]) if self.nchw else (number[p], within[p], channel)
            return cast(tensor[at], spec.dtype, acc)

        def position(axis: int, o: Expr, k: Expr, p: Expr) -> Expr:
            tap = k // spec.kernel_size[1] if axis == 0 else k % spec.kernel_size[1]
            base = (row, column)[axis][p] * spec.stride[axis] - spec.padding[axis] + tap * spec.dilation[axis]
            return base.astype(acc) + read(offset, (o * taps + k) * 2 + axis, p)

        def modulation(o: Expr, k: Expr, p: Expr) -> Expr:
            return read(mask, o * taps + k, p)

        plan = sampling_plan(
            (spec.offset_groups, taps, self.extent),
            position,
            (sizes["height"], sizes["width"]),
            1,
            acc,
            modulation=modulation if spec.mask else None,
        )

        def side_by_side(parts: tuple[te.Tensor, ...], finish: Any, name: str) -> te.Tensor:
            def choose(o: Expr, k: Expr, p: Expr, q: Expr) -> Expr:
                value = parts[3](o, k, p)
                for corner in (2, 1, 0):
                    value = tirx.Select(q == corner, parts[corner](o, k, p), value)
                return finish(value, p)

            return te.compute((spec.offset_groups, taps, self.extent, 4), choose, name=name)

        first = te.compute((self.extent,), lambda p: number[p] * (sizes["height"] * sizes["width"]), name="image_first")
        place = side_by_side(plan.indices, lambda at, p: tirx.Select(at >= 0, at + first[p], -1), "place")
        share = side_by_side(plan.weights, lambda weight, p: weight, "share")

        in_group, per_offset_group = spec.in_channels // spec.groups, spec.in_channels // spec.offset_groups

        def offset_group(channel: Expr) -> Expr:
            if spec.offset_groups == 1:
                return tirx.const(0, "int32")
            o = channel // per_offset_group
            # The padding's channels belong to none.
            return o if self.depth == in_group else te.min(o, spec.offset_groups - 1)

        def corner_value(g: Expr, k: Expr, p: Expr, q: Expr, c: Expr) -> Expr:
            channel = g * in_group + c
            at = place[offset_group(channel), k, p, q]
            there = at >= 0 if self.depth == in_group else tirx.all(at >= 0, c < in_group)
            return tirx.if_then_else(there, image[at.astype("int64"), channel], tirx.const(0.0, spec.dtype))

        corner = te.compute((spec.groups, taps, self.extent, 4, self.depth), corner_value, name="corner")

        def interpolated(g: Expr, k: Expr, p: Expr, c: Expr) -> Expr:
            o = offset_group(g * in_group + c)
            terms = [share[o, k, p, q] * cast(corner[g, k, p, q, c], spec.dtype, acc) for q in range(4)]
            return terms[0] + terms[1] + terms[2] + terms[3]

        column = te.compute((spec.groups, taps, self.extent, self.depth), interpolated, name="column")
        columns = te.compute(
            (spec.groups, taps, self.extent, self.depth), lambda *i: self._operand(column(*i)), name="columns"
        )
        return columns, [image, offset, *([mask] if spec.mask else [])]

    def _operand(self, value: Expr) -> Expr:
        """Convert a sample to what is multiplied."""
        if self.spec.tf32 and self.product.kind == "mma":
            return TO_TF32(value)
        return cast(value, self.acc, self.spec.dtype)


def _with_product(staged: tirx.PrimFunc, spec: DeformConv2dSpec, stages: _Stages) -> tirx.PrimFunc:
    """Put ``channels_last`` before the TE stages, and product and ``output`` behind them."""
    params = {p.name: p for p in staged.params}
    image, columns, offset = params["image"], params["columns"], params["offset"]
    batch, pixels = offset.shape[0], offset.shape[2 if stages.nchw else 1]
    total, tiles = params["total"], params["tiles"]
    extent, per_group, item = tiles * PIXELS, spec.out_channels // spec.groups, ITEM_BYTES[spec.dtype]
    width = padded(per_group, stages.product.width)

    weight = tirx.decl_buffer(packed_shape(spec), packed_dtype(spec), name="weight", data_alignment=16)
    bias = tirx.decl_buffer((spec.out_channels,), stages.acc, name="bias", data_alignment=4)
    shape = (batch, spec.out_channels, pixels) if stages.nchw else (tirx.Var("out_pixels", "int64"), spec.out_channels)
    out = tirx.decl_buffer(shape, spec.dtype, name="out", data_alignment=item)
    # A thread that gathers makes neighbouring groups, and keeps them side by side.
    axes = (spec.groups, extent, width)
    ordered = (1, 2, 0) if stages.product.kind == "gather" else (0, 1, 2)
    result = tirx.decl_buffer([axes[i] for i in ordered], stages.acc, name="result")

    root = staged.body.block
    # One element for each image: see TOKEN.
    nests = [declare_reads(root.body, "corner", image, [(0, batch.astype("int32")), TOKEN])]
    inner = [*root.alloc_buffers, columns, result]
    outer: list[Any] = [p for p in staged.params if p.name != "columns"]
    scalars = [outer.pop() for _ in SCALARS][::-1]
    if stages.nchw:
        size = tirx.Var("size", "int64")
        x = tirx.decl_buffer((batch, spec.in_channels, size), spec.dtype, name="x", data_alignment=item)
        nests.insert(0, _channels_last(x, image))
        outer = [x, *outer]
    if stages.product.kind == "gather":
        nests.append(multiply(columns, weight, result, spec.dtype, lambda g, k, c, o: [k, c, o, g], ordered))
    else:
        near = tirx.decl_buffer(weight.shape, weight.dtype, name="weights", data_alignment=16)
        nests.append(copy_weight(weight, near))
        inner.append(near)
    if stages.product.kind == "simt":
        vector = int(near.shape[-1])
        at = partial(in_vectors, vector)
        nests.append(multiply(columns, near, result, spec.dtype, at, ordered))
    elif stages.product.fragments is not None:
        fragments = stages.product.fragments
        blocks = (spec.groups, spec.taps, tiles * (PIXELS // TILE), stages.depth // fragments.depth, LANES, WORDS)
        left = tirx.decl_buffer(blocks, "uint32", name="left")
        sums = tirx.decl_buffer(
            (spec.groups, tiles * (PIXELS // TILE), width // TILE, LANES, 8), stages.acc, name="sums"
        )
        nests += [
            load_left(columns, left, fragments),
            multiply_fragments(left, near, sums, fragments),
            spread(sums, result, fragments),
        ]
        inner += [left, sums]
    nests.append(_output(result, ordered, bias, out, total, per_group, pixels if stages.nchw else None))
    body = SBlockRealize([], True, SBlock([], [], [], "root", tirx.SeqStmt(nests), alloc_buffers=inner))
    return tirx.PrimFunc([*outer, weight, bias, out, *scalars], body, attrs=staged.attrs)


class _Registers:
    """Parts of an index that go through registers.

    In an index that multiplies them with free extents, TVM's simplifier takes their coefficients times the largest
    extent, and gives up where that is more than an integer.
    """

    def __init__(self, stage: str, count: int) -> None:
        self.buffers = [tirx.decl_buffer((1,), "int32", name=f"{stage}_{i}", scope="local") for i in range(count)]

    def __getitem__(self, i: int) -> Expr:
        return tirx.BufferLoad(self.buffers[i], [0])

    def before(self, values: list[Expr], stmt: tirx.Stmt) -> tirx.Stmt:
        """Return `stmt` after the values are set, in order."""
        stores = [tirx.BufferStore(buffer, value, [0]) for buffer, value in zip(self.buffers, values, strict=True)]
        return tirx.SeqStmt([*stores, stmt])


def _channels_last(x: tirx.Buffer, image: tirx.Buffer) -> tirx.Stmt:
    """Return the stage ``channels_last`` from ``x[n, channel, pixel]`` to ``image[n*size + pixel, channel]``.

    A block of 8 x 32 threads transposes a square through shared memory; the schedule binds the loops over squares.
    """
    batch, channels, size = x.shape[0].astype("int32"), x.shape[1], x.shape[2].astype("int32")
    side, rows = TRANSPOSED, 8
    # One more element a row, so that the elements of a column lie in different banks.
    square = tirx.decl_buffer((side, side + 1), x.dtype, name="square", scope="shared.dyn")
    registers = _Registers("square", 3)

    def body(n: Expr, p: Expr, c: Expr) -> tirx.Stmt:
        down, across = tirx.Var("down", "int32"), tirx.Var("across", "int32")
        moves = []
        for i in range(0, side, rows):
            pixel, channel = p * side + across, c * side + down + i
            value = tirx.BufferLoad(x, [registers[0], registers[1], pixel])
            load = tirx.BufferStore(square, value, [down + i, across])
            guarded = tirx.IfThenElse(tirx.all(pixel < size, channel < channels), load, None)
            moves.append(registers.before([n, channel, n * size + p * side], guarded))
        moves.append(BARRIER())
        for i in range(0, side, rows):
            pixel, channel = down + i, c * side + across
            at = [(registers[2] + pixel).astype("int64"), channel]
            store = tirx.BufferStore(image, tirx.BufferLoad(square, [across, pixel]), at)
            moves.append(tirx.IfThenElse(tirx.all(p * side + pixel < size, channel < channels), store, None))
        lanes = thread_loop(across, side, "threadIdx.x", tirx.SeqStmt(moves))
        return thread_loop(down, rows, "threadIdx.y", lanes)

    return block_nest(
        "channels_last",
        [("n", batch), ("p", (size + side - 1) // side), ("c", -(-int(channels) // side))],
        lambda *_: [region(x, *((0, extent) for extent in x.shape))],
        lambda n, p, c: [region(image, n, TOKEN)],
        body,
        [square, *registers.buffers],
    )


def _output(
    result: tirx.Buffer,
    ordered: tuple[int, ...],
    bias: tirx.Buffer,
    out: tirx.Buffer,
    total: Expr,
    per_group: int,
    pixels: Expr | None,
) -> tirx.Stmt:
    """Return the stage ``output``: bias, conversion and layout; padding is dropped.

    `pixels`: those of an image, where the output is one of planes.
    """
    groups, extent, width = (result.shape[ordered.index(i)] for i in range(3))
    registers = _Registers("output", 3)

    def body(g: Expr, p: Expr, o: Expr) -> tirx.Stmt:
        channel = g * per_group + o
        value = tirx.BufferLoad(result, [(g, p, o)[i] for i in ordered]) + tirx.BufferLoad(bias, [channel])
        inside = p < total if int(width) == per_group else tirx.all(p < total, o < per_group)
        at = [p, channel] if pixels is None else [registers[i] for i in range(3)]
        store = tirx.IfThenElse(inside, tirx.BufferStore(out, cast(value, str(result.dtype), str(out.dtype)), at), None)
        if pixels is None:
            return store
        return registers.before(
            [p // pixels.astype("int32"), channel, p - registers[0] * pixels.astype("int32")], store
        )

    everything = [(0, extent) for extent in out.shape]
    return block_nest(
        "output",
        [("g", groups), ("p", extent), ("o", width)],
        lambda g, p, o: [region(result, *((g, p, o)[i] for i in ordered)), region(bias, (0, bias.shape[0]))],
        lambda g, p, o: [region(out, *everything)],
        body,
        [] if pixels is None else registers.buffers,
    )
