# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution for GPUs: an implicit product of matrices.

    out[pixel, output] = sum over (tap, channel) of columns[tap, pixel, channel] * weight[tap, channel, output]

with ``columns`` sampled from a channels-last image as they are needed: the schedule makes a block's part of it in
shared memory and nothing of its size ever reaches the device's memory. The same algorithm as `deform_conv2d` in stages
that fit thousands of threads; what both share is `sampling`.

The output pixels of all images are one axis, padded to whole tiles of `PIXELS`; results of the padding are dropped.

Stages, in order: ``channels_last`` (NCHW only), ``pixel_n``, ``pixel_0``, ``pixel_1``, the sampling plan
(`sampling.plan_blocks`), ``place`` and ``share`` (the plan with the corners of a sample side by side), ``corner``,
``column``, ``columns``, ``weights``, on tensor cores ``left``, then ``product`` and ``output``.
Their names are the contract with `schedules/`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import te, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.te.device_sampling import PIXELS, PixelAxes, Samples, field_shape
from tvmdcn.te.epilogue import store_fragments, store_numbers
from tvmdcn.te.fragments import LANES, TILE, TO_TF32, WORDS
from tvmdcn.te.multiply import Operand, copy_weight, in_vectors, load_left, multiply, multiply_fragments
from tvmdcn.te.nests import TOKEN, declare_reads, with_alignment
from tvmdcn.te.products import packed_dtype, packed_shape, padded, product_of
from tvmdcn.te.tiles import ITEM_BYTES, cast
from tvmdcn.te.transposition import channels_last

__all__ = ["SCALARS", "implicit_gemm"]

Expr = Any

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

        What a schedule decides may change the arguments: `KernelInterface` says whether there are ``parts`` before
        ``out``, and that there is no ``image``.
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
        spec, taps, sizes = self.spec, self.spec.taps, self.sizes
        batch, pixels = sizes["batch"], sizes["pixels"]
        image = te.placeholder((sizes["image_pixels"], spec.in_channels), spec.dtype, name="image")

        def field(channels: int, name: str) -> te.Tensor:
            return te.placeholder(field_shape(self.nchw, batch, channels, pixels), spec.dtype, name=name)

        offset = field(spec.offset_groups * 2 * taps, "offset")
        mask = field(spec.offset_groups * taps, "mask") if spec.mask else None
        column = Samples(spec, sizes, PixelAxes((self.extent,), lambda p: p), offset, mask).samples(image, self.depth)
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
    root = staged.body.block
    # One element for each image: see TOKEN.
    nests = [declare_reads(root.body, "corner", image, [(0, batch.astype("int32")), TOKEN])]
    inner = [*root.alloc_buffers, columns]
    outer: list[Any] = [p for p in staged.params if p.name != "columns"]
    scalars = [outer.pop() for _ in SCALARS][::-1]
    if stages.nchw:
        size = tirx.Var("size", "int64")
        x = tirx.decl_buffer((batch, spec.in_channels, size), spec.dtype, name="x", data_alignment=item)
        nests.insert(0, channels_last(x, image))
        outer = [x, *outer]
    near = weight
    if stages.product.kind != "gather":
        near = tirx.decl_buffer(weight.shape, weight.dtype, name="weights", data_alignment=16)
        nests.append(copy_weight(weight, near))
        inner.append(near)
    tail = (bias, out, total, per_group, pixels if stages.nchw else None)
    fragments = stages.product.fragments
    if fragments is not None:
        rows = tiles * (PIXELS // TILE)
        tiled = (spec.groups, spec.taps, rows, stages.depth // fragments.depth, LANES, WORDS)
        left = tirx.decl_buffer(tiled, "uint32", name="left")
        sums = tirx.decl_buffer((spec.groups, rows, width // TILE, LANES, 8), stages.acc, name="sums")
        operands = (
            Operand(left, ("g", "k", "r", "s")),
            Operand(near, ("g", "k", "s", "o")),
            Operand(sums, ("g", "r", "o")),
        )
        nests.append(load_left(columns, left, fragments))
        nests.append(multiply_fragments(*operands, ("k", "s"), fragments))
        nests.append(store_fragments(sums, *tail))
        inner += [left, sums]
    else:
        # A thread that gathers makes neighbouring groups, and keeps them side by side.
        gather = stages.product.kind == "gather"
        axes, ordered = (spec.groups, extent, width), ((1, 2, 0) if gather else (0, 1, 2))
        result = tirx.decl_buffer([axes[i] for i in ordered], stages.acc, name="result")
        at = (lambda g, k, c, o: [k, c, o, g]) if gather else partial(in_vectors, int(near.shape[-1]))
        nests.append(multiply(columns, near, result, spec.dtype, at, ordered))
        nests.append(store_numbers(result, ordered, *tail))
        inner.append(result)
    body = SBlockRealize([], True, SBlock([], [], [], "root", tirx.SeqStmt(nests), alloc_buffers=inner))
    return tirx.PrimFunc([*outer, weight, bias, out, *scalars], body, attrs=staged.attrs)
