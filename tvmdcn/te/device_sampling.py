# SPDX-License-Identifier: Apache-2.0
"""The sampling of layers in the form for GPUs: from output pixels of all images to samples, in stages of TE.

The output pixels of all images are one axis, padded to whole tiles of `PIXELS` (or two axes, see `PixelAxes`). The
image is channels-last; a plan says where each (offset group, tap, pixel) samples, and is `sampling.sampling_plan`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.te.sampling import Plan, sampling_plan
from tvmdcn.te.tiles import cast

__all__ = ["MOST_PIXELS", "PIXELS", "PixelAxes", "Samples", "field_shape"]

Expr = Any

PIXELS = 256
"""Padding of the axis of output pixels: a multiple of every tile that a block may take."""

MOST_PIXELS = 1 << 30
"""Output pixels, of all images, that a call may have."""


@dataclass(frozen=True)
class PixelAxes:
    """The axis, or axes, of padded output pixels.

    Attributes
    ----------
    shape : tuple of expressions
    number : callable
        ``number(*index)`` is the number of the pixel among those of all images; beyond the last one in the padding.
    """

    shape: tuple[Expr, ...]
    number: Callable[..., Expr]


def field_shape(nchw: bool, batch: Expr, channels: int, pixels: Expr) -> tuple[Expr, ...]:
    """Return the shape of offset, mask or output's gradient as the caller has it."""
    return (batch, channels, pixels) if nchw else (batch, pixels, channels)


class Samples:
    """The stages, up to samples of the image.

    Stages: ``pixel_n``, ``pixel``, ``pixel_0``, ``pixel_1``, the sampling plan (`sampling.plan_blocks`),
    ``image_first``, ``place`` and ``share`` (the plan with the corners of a sample side by side); of `samples`:
    ``corner`` and ``column``. Each name begins with `prefix`.

    Parameters
    ----------
    spec : DeformConv2dSpec
    sizes : mapping of str to expression
        "pixels" of an output image (int64), "height", "width", "out_width" and "total", see `implicit_gemm`.
    axes : PixelAxes
    offset, mask : te.Tensor
        As the caller has them; no mask for a layer without.
    prefix : str
        Where a function samples in two places.
    border_inside : bool
        See `sampling_plan`.
    no_padding : bool
        Whether samples of the padding are worth 0. Otherwise they repeat those of the last pixel.
    """

    def __init__(
        self,
        spec: DeformConv2dSpec,
        sizes: Mapping[str, Expr],
        axes: PixelAxes,
        offset: te.Tensor,
        mask: te.Tensor | None,
        *,
        prefix: str = "",
        border_inside: bool = False,
        no_padding: bool = False,
    ) -> None:
        self.spec, self.axes, self.prefix = spec, axes, prefix
        self.acc = spec.accumulator_dtype
        nchw, acc, taps = spec.layout == "NCHW", self.acc, spec.taps
        pixels, total = sizes["pixels"].astype("int32"), sizes["total"]

        def stage(name: str, value: Callable[..., Expr]) -> te.Tensor:
            return te.compute(axes.shape, value, name=prefix + name)

        def last(*p: Expr) -> Expr:
            return te.min(axes.number(*p), total - 1)

        number = stage("pixel_n", lambda *p: last(*p) // pixels)
        within = stage("pixel", lambda *p: last(*p) - number(*p) * pixels)
        row = stage("pixel_0", lambda *p: within(*p) // sizes["out_width"])
        column = stage("pixel_1", lambda *p: within(*p) - row(*p) * sizes["out_width"])

        def read(tensor: te.Tensor, channel: Expr, *p: Expr) -> Expr:
            at = (number(*p), channel, within(*p)) if nchw else (number(*p), within(*p), channel)
            return cast(tensor[at], spec.dtype, acc)

        def position(axis: int, o: Expr, k: Expr, *p: Expr) -> Expr:
            tap = k // spec.kernel_size[1] if axis == 0 else k % spec.kernel_size[1]
            base = (row, column)[axis](*p) * spec.stride[axis] - spec.padding[axis] + tap * spec.dilation[axis]
            return base.astype(acc) + read(offset, (o * taps + k) * 2 + axis, *p)

        def modulation(o: Expr, k: Expr, *p: Expr) -> Expr:
            return read(mask, o * taps + k, *p)

        self.plan: Plan = sampling_plan(
            (spec.offset_groups, taps, *axes.shape),
            position,
            (sizes["height"], sizes["width"]),
            1,
            acc,
            modulation=modulation if mask is not None else None,
            border_inside=border_inside,
            prefix=prefix,
        )
        first = stage("image_first", lambda *p: number(*p) * (sizes["height"] * sizes["width"]))

        def there(at: Expr, *p: Expr) -> Expr:
            inside = tirx.all(at >= 0, axes.number(*p) < total) if no_padding else at >= 0
            return tirx.Select(inside, at + first(*p), -1)

        self.place = self._side_by_side(self.plan.indices, there, "place")
        self.share = self._side_by_side(self.plan.weights, lambda weight, *p: weight, "share")

    def _side_by_side(self, parts: tuple[te.Tensor, ...], finish: Callable[..., Expr], name: str) -> te.Tensor:
        def choose(o: Expr, k: Expr, *at: Expr) -> Expr:
            *p, q = at
            value = parts[3](o, k, *p)
            for corner in (2, 1, 0):
                value = tirx.Select(q == corner, parts[corner](o, k, *p), value)
            return finish(value, *p)

        shape = (self.spec.offset_groups, self.spec.taps, *self.axes.shape, 4)
        return te.compute(shape, choose, name=self.prefix + name)

    def offset_group(self, channel: Expr, padded: bool) -> Expr:
        """Return the offset group of an input channel; `padded`: whether there may be channels beyond the last."""
        if self.spec.offset_groups == 1:
            return tirx.const(0, "int32")
        o = channel // (self.spec.in_channels // self.spec.offset_groups)
        # The padding's channels belong to none.
        return te.min(o, self.spec.offset_groups - 1) if padded else o

    def samples(self, image: te.Tensor, depth: int) -> te.Tensor:
        """Return ``column[group, tap, *pixel, channel]`` in the accumulator's dtype.

        `image` is ``[N*H*W, Cin]``; channels of a group are padded with zeros to `depth`.
        """
        spec, acc, shape = self.spec, self.acc, (self.spec.groups, self.spec.taps, *self.axes.shape)
        in_group = spec.in_channels // spec.groups
        padded = depth != in_group

        def corner_value(g: Expr, k: Expr, *at: Expr) -> Expr:
            *p, q, c = at
            channel = g * in_group + c
            place = self.place(self.offset_group(channel, padded), k, *p, q)
            there = tirx.all(place >= 0, c < in_group) if padded else place >= 0
            return tirx.if_then_else(there, image[place.astype("int64"), channel], tirx.const(0.0, spec.dtype))

        corner = te.compute((*shape, 4, depth), corner_value, name=self.prefix + "corner")

        def interpolated(g: Expr, k: Expr, *at: Expr) -> Expr:
            *p, c = at
            o = self.offset_group(g * in_group + c, padded)
            terms = [self.share(o, k, *p, q) * cast(corner(g, k, *p, q, c), spec.dtype, acc) for q in range(4)]
            return terms[0] + terms[1] + terms[2] + terms[3]

        return te.compute((*shape, depth), interpolated, name=self.prefix + "column")
