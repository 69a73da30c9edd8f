# SPDX-License-Identifier: Apache-2.0
"""Gradients of a deformable convolution for GPUs; those that are asked for. See `deform_conv2d_grad` for the formulas.

Two implicit products, in parts that know nothing of each other:

* `column_gradients`: the gradients of input, offset and mask. A block of threads makes the column gradients of a tile
  of pixels, and walks over the corners of their samples.
* `weight_gradients`: the gradients of weight and bias: sums over pixels, split over blocks of threads, whose parts are
  then added up in a fixed order.

Both read channels-last copies of input and output's gradient, which come first where the layout is NCHW.

Stages, in order, those that are needed: ``channels_last_rows``, ``channels_last`` (NCHW only), those of
`column_gradients`, those of `weight_gradients`. Their names are the contract with `schedules/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tvm import te, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.grad_scratch import scratch_tensors
from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.te.column_gradients import ColumnGradients
from tvmdcn.te.device_sampling import field_shape
from tvmdcn.te.nests import sequence, with_alignment
from tvmdcn.te.products import packed_dtype, packed_shape
from tvmdcn.te.tiles import ITEM_BYTES
from tvmdcn.te.transposition import channels_last
from tvmdcn.te.weight_gradients import WeightGradients

__all__ = ["SCALARS", "GradCall", "Part", "implicit_gemm_grad"]

Expr = Any

SCALARS = ("height", "width", "out_width", "total", "tiles", "splits", "tile_units")
"""The last arguments: size of the input, width of the output, output pixels of all images, tiles of `PIXELS`, and into
how many parts of how many tiles the sums over pixels are split."""


class GradCall:
    """What the parts share: the sizes of a call, and its tensors.

    Attributes
    ----------
    spec : DeformConv2dGradSpec
    sizes : dict of str to tirx.Var
        "batch", "pixels" (of an output image), "image_pixels" (of all images): int64; and `SCALARS`: int32.
    tensors : dict of str to te.Tensor
        "rows" ``[N*P, Cout]``: the output's gradient, channels-last. "image" ``[N*H*W, Cin]``: the input, likewise (not
        if only the input's gradient is asked for). "offset", "mask": as the caller has them.
    """

    def __init__(self, spec: DeformConv2dGradSpec) -> None:
        self.spec, self.nchw, self.acc = spec, spec.layout == "NCHW", spec.accumulator_dtype
        names = ("batch", "pixels", "image_pixels", "out_pixels", *SCALARS)
        self.sizes = {name: tirx.Var(name, "int32" if name in SCALARS else "int64") for name in names}
        batch, pixels = self.sizes["batch"], self.sizes["pixels"]
        shapes = {
            "rows": (self.sizes["out_pixels"], spec.out_channels),
            "image": (self.sizes["image_pixels"], spec.in_channels),
            "offset": field_shape(self.nchw, batch, spec.offset_groups * 2 * spec.taps, pixels),
            "mask": field_shape(self.nchw, batch, spec.offset_groups * spec.taps, pixels),
        }
        read = {"rows", *({"input": "image"}.get(name, name) for name in spec.inputs)}
        self.tensors = {n: te.placeholder(s, spec.dtype, name=n) for n, s in shapes.items() if n in read}


class Part(Protocol):
    """Some of the gradients.

    Attributes
    ----------
    buffers : list of tirx.Buffer
        Intermediates of the stages written in TIR, once `stages` was called.
    """

    buffers: list[tirx.Buffer]

    def tensors(self) -> list[te.Tensor]:
        """Return results of stages written in TE, which stages written in TIR read."""

    def stages(self, staged: tirx.PrimFunc, buffers: Mapping[str, tirx.Buffer]) -> list[tirx.Stmt]:
        """Return this part's stages, in order; those of TE are in `staged`.

        `buffers` are the function's parameters by name ("rows" and "image" among them also where they are
        memory for a copy), and the results of `tensors`.
        """


def implicit_gemm_grad(spec: DeformConv2dGradSpec) -> tirx.PrimFunc:
    """Return the gradients as TIR for a GPU, not yet scheduled.

    Parameters
    ----------
    spec : DeformConv2dGradSpec

    Returns
    -------
    tirx.PrimFunc
        ``deform_conv2d_grad(*spec.inputs, *scratch_shapes, *spec.outputs, *SCALARS)``

        * grad_output ``[N, Cout, P]`` (NCHW) or ``[N*P, Cout]`` (NHWC), in the spec's dtype;
        * input and grad_input ``[N, Cin, H*W]`` or ``[N*H*W, Cin]``, likewise; offset and grad_offset
          ``[N, og*2*K, P]`` or ``[N, P, og*2*K]``; mask and grad_mask the same with ``og*K``;
        * weight `packed_shape` in `packed_dtype`; grad_weight ``[Cout, Cin/groups*K]`` and grad_bias ``[Cout]`` in the
          spec's dtype;
        * memory that the call may use, see `tvmdcn.grad_scratch.scratch_tensors`;
        * ``total == N * P``, ``tiles == ceil(total / PIXELS)``, ``splits == ceil(tiles / tile_units)``.
    """
    call = GradCall(spec)
    parts: list[Part] = []
    if spec.grad_input or spec.grad_offset:
        parts.append(ColumnGradients(call))
    if spec.grad_weight or spec.grad_bias:
        parts.append(WeightGradients(call))
    results = [tensor for part in parts for tensor in part.tensors()]
    scalars = [call.sizes[name] for name in SCALARS]
    staged = te.create_prim_func([*call.tensors.values(), *results, *scalars])
    alignment = {"rows": 16, "image": 16} | dict.fromkeys(("offset", "mask"), ITEM_BYTES[spec.dtype])
    staged = with_alignment(staged, alignment)
    return _assemble(staged, call, parts)


def _assemble(staged: tirx.PrimFunc, call: GradCall, parts: list[Part]) -> tirx.PrimFunc:
    """Put the stages of the parts one after the other, behind the copies; what is no argument becomes intermediate."""
    spec, item = call.spec, ITEM_BYTES[call.spec.dtype]
    buffers = {param.name: param for param in staged.params}
    rows, image, offset = buffers["rows"], buffers.get("image"), buffers.get("offset")
    axis = 2 if call.nchw else 1
    # TVM may have made variables of its own.
    out_pixels = rows.shape[0]
    image_pixels = call.sizes["image_pixels"] if image is None else image.shape[0]
    batch, pixels = (offset.shape[0], offset.shape[axis]) if offset is not None else (call.sizes["batch"], None)
    if pixels is None:
        pixels = call.sizes["pixels"]
    size = tirx.Var("size", "int64")

    def declare(name: str, shape: tuple[Expr, ...], dtype: str, alignment: int) -> None:
        if name not in buffers:
            buffers[name] = tirx.decl_buffer(shape, dtype, name=name, data_alignment=alignment)

    def images(channels: int, count: Expr, flat: Expr) -> tuple[Expr, ...]:
        return (batch, channels, count) if call.nchw else (flat, channels)

    if call.nchw:
        declare("grad_output", images(spec.out_channels, pixels, out_pixels), spec.dtype, item)
        declare("input", images(spec.in_channels, size, image_pixels), spec.dtype, item)
    else:
        buffers["grad_output"] = rows
        if image is not None:
            buffers["input"] = image
    if "weight" in spec.inputs:
        declare("weight", packed_shape(spec), packed_dtype(spec), 16)
    scratch = scratch_tensors(spec, image_pixels, out_pixels, buffers["splits"])
    for name, (shape, dtype) in scratch.items():
        declare(name, shape, dtype, 16)
    fields = {"grad_offset": 2 * spec.offset_groups * spec.taps, "grad_mask": spec.offset_groups * spec.taps}
    for name, channels in fields.items():
        declare(name, field_shape(call.nchw, batch, channels, pixels), spec.dtype, item)
    # Where the sums are of the result's dtype and layout it is added to, in vectors.
    declare(
        "grad_input", images(spec.in_channels, size, image_pixels), spec.dtype, item if "grad_image" in scratch else 16
    )
    declare("grad_weight", (spec.out_channels, spec.in_channels // spec.groups * spec.taps), spec.dtype, item)
    declare("grad_bias", (spec.out_channels,), spec.dtype, item)

    stages = []
    if call.nchw:
        stages.append(channels_last(buffers["grad_output"], rows, "channels_last_rows"))
        if image is not None:
            stages.append(channels_last(buffers["input"], image))
    for part in parts:
        stages += part.stages(staged, buffers)
    outer = [*spec.inputs, *scratch, *spec.outputs, *SCALARS]
    inner = [param for name, param in ((p.name, p) for p in staged.params) if name not in {*outer, "rows", "image"}]
    # The gradient of the bias alone has no stage in TE.
    made = staged.body.block.alloc_buffers if isinstance(staged.body, SBlockRealize) else []
    allocated = [*made, *inner, *(b for part in parts for b in part.buffers)]
    block = SBlock([], [], [], "root", sequence(stages), alloc_buffers=allocated)
    return tirx.PrimFunc([buffers[name] for name in outer], SBlockRealize([], True, block), attrs=staged.attrs)
