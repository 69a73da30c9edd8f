# SPDX-License-Identifier: Apache-2.0
"""What a block of channels has of an image and its gradient, and the stages that fill it and bring it back.

A block's thread copies the image row by row, as its output pixels come to need them, and sets as many rows of the
gradient to zero: both are still in its cache when the samples read them and add to them. How far it must be is what the
sampling plan says, so that an offset may lead anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from tvm import tirx

from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.te.channel_blocks import ChannelBlocks
from tvmdcn.te.layout import Blocked, copy_strip, from_planes, places_of, to_planes, zero_frame
from tvmdcn.te.nests import TOKEN, block_nest, region, sequence, serial
from tvmdcn.te.tiles import GRANULE, Tiles
from tvmdcn.te.vectors import broadcast, lanes_at

__all__ = ["image_buffers", "image_stages", "somewhere", "store_image"]

Expr = Any

_PLACES = 8
"""Samples, side by side, whose places are compared at once: divides a unit."""


def _form(tiles: Tiles, blocks: ChannelBlocks) -> Blocked:
    return Blocked(1, blocks.width, blocks.pitch, tiles.size, tiles.frame, blocks.lanes)


def image_buffers(spec: DeformConv2dGradSpec, tiles: Tiles, blocks: ChannelBlocks) -> dict[str, tirx.Buffer]:
    """Return ``image`` and ``grad_image``, [block, N, element], as far as they are needed, and ``strips_done``."""
    acc = spec.accumulator_dtype
    shape = (blocks.count, tiles.batch, _form(tiles, blocks).extent)
    names = ["image"] if spec.grad_offset or spec.grad_weight else []
    names += ["grad_image"] if spec.grad_input else []
    found = {name: tirx.decl_buffer(shape, acc, name=name) for name in names}
    return found | {"strips_done": tirx.decl_buffer((blocks.count, tiles.batch), "int32", name="strips_done")}


def somewhere(buffer: tirx.Buffer, block: Expr) -> Any:
    """Return the region of an image of a block in which the stages that write and read it are said to meet: `TOKEN`."""
    return region(buffer, block, *[TOKEN] * (len(buffer.shape) - 1))


class _Pixels:
    """The pixels of a block's images: code that zeros and fills them."""

    def __init__(
        self, spec: DeformConv2dGradSpec, tiles: Tiles, blocks: ChannelBlocks, buffers: Mapping[str, tirx.Buffer]
    ) -> None:
        self.spec, self.tiles, self.blocks, self.buffers = spec, tiles, blocks, buffers
        self.form, self.done = _form(tiles, blocks), buffers["strips_done"]
        self.image, self.gradient = buffers.get("image"), buffers.get("grad_image")
        self.places = places_of(self.form)
        self.farthest = tirx.decl_buffer((_PLACES,), "int32", name="farthest")

    def zeros(self, at: list[Expr], first: Expr, count: Expr, name: str) -> tirx.Stmt:
        """Return what sets pixels of the gradient to zero; `first` is counted in the frame."""
        i, form, gradient = tirx.Var(name, "int32"), self.form, self.gradient
        assert gradient is not None
        zero = broadcast(tirx.const(0.0, gradient.dtype), form.lanes)
        stores = [
            tirx.BufferStore(gradient, zero, [*at, lanes_at((first + i) * form.pitch + lane, form.lanes)])
            for lane in range(0, form.pitch, form.lanes)
        ]
        return serial(i, count, sequence(stores))

    def frame(self, c: Expr, n: Expr) -> tirx.Stmt:
        """Return what is done once for an image."""
        form, at = self.form, [c, n]
        stores: list[tirx.Stmt] = [tirx.BufferStore(self.done, tirx.const(0, "int32"), at)]
        if self.image is not None:
            stores.append(zero_frame(form, self.image, at, str(self.image.dtype)))
        if self.gradient is not None:
            behind = form.framed(form.size)
            stores.append(self.zeros(at, 0, form.framed(0), "before"))
            stores.append(self.zeros(at, behind, form.frame.pixels - behind, "behind"))
        return sequence(stores)

    def strip(self, c: Expr, n: Expr, number: Expr) -> tirx.Stmt:
        """Return what fills a strip."""
        form, channel, code = self.form, c * self.form.width, []
        if self.image is not None:
            source = self.buffers["input"]
            code.append(
                from_planes(source, self.image, form, self.places, n, number, [c, n], channel)
                if self.tiles.nchw
                else copy_strip(source, self.image, form, n, number, [c, n], channel, into=True)
            )
        if self.gradient is not None:
            # No pixel twice: what was added to it would be lost.
            first, end = (form.framed(tirx.min((number + b) * form.strip_pixels, form.size)) for b in (0, 1))
            code.append(self.zeros([c, n], first, end - first, "zeroed"))
        return sequence(code)

    def farthest_place(self, c: Expr, t: Expr, u: Expr) -> tuple[tirx.Stmt, Expr]:
        """Return code that compares the places of a unit's samples, and the largest."""
        k, whole = tirx.Var("k_place", "int32"), lanes_at(0, _PLACES)
        found = tirx.BufferLoad(self.farthest, [whole])
        for first in range(0, GRANULE, _PLACES):
            at = [c // self.blocks.of_offset_group, k, t, u, lanes_at(first, _PLACES)]
            found = tirx.max(found, tirx.BufferLoad(self.buffers["index"], at))
        zero = tirx.BufferStore(self.farthest, broadcast(tirx.const(0, "int32"), _PLACES), [whole])
        lanes = [tirx.BufferLoad(self.farthest, [lane]) for lane in range(_PLACES)]
        compare = serial(k, self.spec.taps, tirx.BufferStore(self.farthest, found, [whole]))
        return tirx.SeqStmt([zero, compare]), reduce(tirx.max, lanes)

    def rows(self, c: Expr, t: Expr, u: Expr) -> tirx.Stmt:
        """Return what fills the rows that a unit needs, and with the last one those that nobody has needed."""
        form, tiles, n = self.form, self.tiles, t // self.tiles.tiles
        j, row, needed, before = (tirx.Var(name, "int32") for name in ("j", "row", "needed", "before"))
        compare, place = self.farthest_place(c, t, u)
        # Of the sample's last corner, which may be in the frame.
        pixel = tirx.floordiv(place, form.pitch) + form.frame.step((1, 1)) - form.frame.first
        pixels = tirx.min(row + 1, form.frame.extents[0]) * form.columns
        strips = (pixels + form.strip_pixels - 1) // form.strip_pixels
        last = tirx.all(t % tiles.tiles == tiles.tiles - 1, u == tiles.tile_units - 1)
        return sequence(
            [
                compare,
                tirx.Bind(row, tirx.floordiv(tirx.max(pixel, 0), form.frame.strides[0])),
                tirx.Bind(before, tirx.BufferLoad(self.done, [c, n])),
                tirx.Bind(needed, tirx.max(tirx.Select(last, form.strips, strips), before)),
                serial(j, needed - before, self.strip(c, n, before + j)),
                tirx.BufferStore(self.done, needed, [c, n]),
            ]
        )

    def writes(self, c: Expr) -> list[Any]:
        """Return the regions of the images of a block."""
        return [somewhere(buffer, c) for buffer in (self.image, self.gradient, self.done) if buffer is not None]


def image_stages(
    spec: DeformConv2dGradSpec, tiles: Tiles, blocks: ChannelBlocks, buffers: Mapping[str, tirx.Buffer]
) -> list[tirx.Stmt]:
    """Return the stages ``image_frame`` and ``image_rows``.

    The first zeros what lies around an image, the second fills what a unit of pixels needs and is not there yet.

    Parameters
    ----------
    spec : DeformConv2dGradSpec
    tiles : Tiles
    blocks : ChannelBlocks
    buffers : mapping of str to Buffer
        ``input`` and those of `image_buffers`, as far as they are needed, and ``index`` of the sampling plan.
    """
    code = _Pixels(spec, tiles, blocks, buffers)

    def reads(c: Expr, t: Expr, u: Expr) -> list[Any]:
        found = [region(buffers["index"], c // blocks.of_offset_group, (0, spec.taps), t, u, (0, GRANULE))]
        if code.image is not None:
            found.append(region(buffers["input"], t // tiles.tiles, *((0, e) for e in buffers["input"].shape[1:])))
        return found

    # A stage of its own also because TVM allocates an image where all that name it are: outside of the walk.
    frame = block_nest(
        "image_frame",
        [("c", blocks.count), ("n", tiles.batch)],
        lambda *_: [],
        lambda c, n: code.writes(c),
        code.frame,
    )
    rows = block_nest(
        "image_rows",
        [("c", blocks.count), ("t", tiles.tasks), ("u", tiles.tile_units)],
        reads,
        lambda c, t, u: code.writes(c),
        code.rows,
        [code.places, code.farthest],
    )
    return [frame, rows]


def store_image(tiles: Tiles, blocks: ChannelBlocks, gradient: tirx.Buffer, out: tirx.Buffer) -> tirx.Stmt:
    """Return the stage ``grad_input``, which brings the gradient of a block's images into the layout of `out`."""
    form = _form(tiles, blocks)
    places = places_of(form)

    def body(c: Expr, n: Expr, strip: Expr) -> tirx.Stmt:
        if tiles.nchw:
            return to_planes(gradient, out, form, places, n, strip, [c, n], c * form.width)
        return copy_strip(out, gradient, form, n, strip, [c, n], c * form.width, into=False)

    return block_nest(
        "grad_input",
        [("c", blocks.count), ("n", tiles.batch), ("p", form.strips)],
        lambda c, n, p: [somewhere(gradient, c)],
        lambda c, n, p: [region(out, *tiles.index(n, (c * form.width, form.width), (0, tiles.size)))],
        body,
        [places],
    )
