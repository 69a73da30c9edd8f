# SPDX-License-Identifier: Apache-2.0
"""What all operators share: tensors of free extents, how output pixels are walked, and where a sample lies.

The pixels of an output image are numbered row by row and walked in *tiles* of `tile_units` units of `GRANULE` pixels;
both counts are arguments that the caller chooses (`tvmdcn.partition`). A *task* is one tile of one image. Everything
inside a unit has a constant extent, so that neither the sampling nor the register kernels need a predicate: units that
would reach past the end of an image are moved back, and compute some pixels a second time. An output image therefore
has at least `GRANULE` pixels; the caller pads smaller ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import te, tirx

from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.te.sampling import Frame, Plan, sampling_plan

__all__ = ["GRANULE", "ITEM_BYTES", "SCALARS", "Tiles", "cast", "is_depthwise", "vector_lanes"]

Expr = Any

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

GRANULE = 24
"""Pixels in a unit: a multiple of every register tile worth having (1, 2, 3, 4, 6, 8, 12, 24 pixels)."""

SCALARS = ("height", "width", "out_width", "tasks", "tiles", "tile_units")
"""The last arguments of every kernel: the input's size, the output's width, and how the output is divided."""


def cast(value: Expr, source: str, target: str) -> Expr:
    """Convert a number, where needed."""
    return value if source == target else value.astype(target)


def is_depthwise(spec: DeformConv2dSpec) -> bool:
    """Tell whether each output channel reads one input channel."""
    return spec.groups == spec.in_channels == spec.out_channels


def vector_lanes(spec: DeformConv2dSpec, target: Any) -> int:
    """Return the accumulators in a vector register of a target."""
    lanes: int = target.vector_bits // 8 // ITEM_BYTES[spec.accumulator_dtype]
    return lanes


class Tiles:
    """The free extents of a kernel, and the walk over its output pixels.

    Parameters
    ----------
    spec : DeformConv2dSpec
    sizes : mapping of str to tirx.Var
        Of `batch`, `size` (pixels of an input image), `pixels` (of an output image) and `SCALARS`; new ones by default.
    """

    def __init__(self, spec: DeformConv2dSpec, sizes: Mapping[str, Expr] | None = None) -> None:
        if sizes is None:
            sizes = {name: tirx.Var(name, "int32") for name in ("batch", "size", "pixels", *SCALARS)}
        self.spec, self.nchw = spec, spec.layout == "NCHW"
        self.batch, self.size, self.pixels = sizes["batch"], sizes["size"], sizes["pixels"]
        self.scalars = [sizes[name] for name in SCALARS]
        self.height, self.width, self.out_width, self.tasks, self.tiles, self.tile_units = self.scalars
        self.shape = (self.tasks, self.tile_units)

    @property
    def frame(self) -> Frame:
        """How the kernel's own copy of an image lies in memory."""
        return Frame((self.height, self.width))

    def plane(self, channels: int, extent: Expr) -> tuple[Expr, ...]:
        """Return the shape of a tensor of images of `extent` pixels."""
        return (self.batch, channels, extent) if self.nchw else (self.batch, extent, channels)

    def index(self, n: Expr, channel: Expr, pixel: Expr) -> list[Expr]:
        """Return an index into such a tensor."""
        return [n, channel, pixel] if self.nchw else [n, pixel, channel]

    def read(self, tensor: te.Tensor, n: Expr, channel: Expr, pixel: Expr) -> Expr:
        """Return an element of such a tensor, for sums."""
        return cast(tensor[tuple(self.index(n, channel, pixel))], self.spec.dtype, self.spec.accumulator_dtype)

    def first_pixel(self, t: Expr, u: Expr) -> Expr:
        """Return a unit's first pixel. The last units of an image end with it, so they overlap those before them."""
        return te.min((t % self.tiles * self.tile_units + u) * GRANULE, self.pixels - GRANULE)

    def repeated(self, t: Expr, u: Expr) -> Expr:
        """Return how many pixels of a unit, its first ones, an earlier unit has done already."""
        return (t % self.tiles * self.tile_units + u) * GRANULE - self.first_pixel(t, u)

    def coordinates(self) -> list[te.Tensor]:
        """Return row and column of each output pixel, as the stages ``pixel_0`` and ``pixel_1``."""
        shape = (*self.shape, GRANULE)
        row = te.compute(shape, lambda t, u, i: (self.first_pixel(t, u) + i) // self.out_width, name="pixel_0")
        column = te.compute(
            shape, lambda t, u, i: self.first_pixel(t, u) + i - row(t, u, i) * self.out_width, name="pixel_1"
        )
        return [row, column]

    def sampling(
        self,
        coordinates: list[te.Tensor],
        offset: te.Tensor,
        mask: te.Tensor | None,
        pitch: int,
        framed: bool,
        border_inside: bool = False,
    ) -> Plan:
        """Return the sampling plan over ``(offset group, tap, task, unit, pixel)``; see `sampling.sampling_plan`."""
        spec, acc, taps = self.spec, self.spec.accumulator_dtype, self.spec.taps

        def position(axis: int, o: Expr, k: Expr, t: Expr, u: Expr, i: Expr) -> Expr:
            tap = k // spec.kernel_size[1] if axis == 0 else k % spec.kernel_size[1]
            base = coordinates[axis](t, u, i) * spec.stride[axis] - spec.padding[axis] + tap * spec.dilation[axis]
            moved = self.read(offset, t // self.tiles, (o * taps + k) * 2 + axis, self.first_pixel(t, u) + i)
            return base.astype(acc) + moved

        def modulation(o: Expr, k: Expr, t: Expr, u: Expr, i: Expr) -> Expr:
            return self.read(mask, t // self.tiles, o * taps + k, self.first_pixel(t, u) + i)

        return sampling_plan(
            (spec.offset_groups, taps, *self.shape, GRANULE),
            position,
            (self.height, self.width),
            pitch,
            acc,
            modulation=None if mask is None else modulation,
            framed=framed,
            border_inside=border_inside,
        )
