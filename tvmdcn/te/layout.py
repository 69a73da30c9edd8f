# SPDX-License-Identifier: Apache-2.0
"""The stages that change the layout, written as TIR: into channels-last, and from the product to the output.

Both are transpositions, done in registers by a network of shuffles on square blocks. Written as a TE expression they
would be strided loads, one scalar at a time, which costs about 5 % of a whole layer; and an output with a free number
of pixels could not be fused into the tile (the schedule cannot invert the division by a free tile size).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import TensorRegion

from tvmdcn.te.nests import TOKEN, block_nest, prefetch, region, sequence, serial
from tvmdcn.te.sampling import Frame
from tvmdcn.te.vectors import bits_dtype, broadcast, cast_vector, from_bits, lanes_at, strips, to_bits, transpose_into

__all__ = [
    "Blocked",
    "Epilogue",
    "copy_strip",
    "from_planes",
    "places_of",
    "store_tile",
    "to_channels_last",
    "to_planes",
    "zero_frame",
]

Expr = Any

_STRIP = 4
"""Square blocks of an image row that are transposed before the next channels: whole cache lines one behind the other.

yolact_c3 takes 7.6 ms with four and 7.9 ms with one, edvr_align 9.5 and 9.8 (Zen 5, one thread, 2026-11-22)."""
_LEAST_SIDE = 8
"""Pixels in such a block even where the product's vectors are shorter."""


@dataclass(frozen=True)
class Blocked:
    """How a channels-last copy of an image lies in memory: blocks of channels, each an image in a frame of zeros.

    Channel ``b*width + c`` of pixel ``p``, counted in the frame, is element ``(b*frame.pixels + p)*pitch + c``.
    Channels that are sampled together so lie together: the two corners of a row of a cell share a cache line
    (edvr_align, 8 groups of 8 channels: see schedules/llvm/deform_conv2d.py).

    Attributes
    ----------
    blocks, width, pitch : int
        Blocks, channels of a block, and elements between two pixels of one; those beyond `width` are zeros.
    size : expression
        Pixels of an image.
    frame : Frame
        Of an image of rows and columns.
    lanes : int
        Elements in a vector.
    """

    blocks: int
    width: int
    pitch: int
    size: Expr
    frame: Frame
    lanes: int

    @property
    def extent(self) -> Expr:
        """The elements of an image."""
        return self.blocks * self.frame.pixels * self.pitch

    @property
    def columns(self) -> Expr:
        """The pixels of a row of the image."""
        return self.frame.extents[1]

    def element(self, block: Expr, pixel: Expr, channel: Expr) -> Expr:
        """Return where a channel of a pixel lies that is counted in the frame."""
        return (block * self.frame.pixels + pixel) * self.pitch + channel

    def framed(self, pixel: Expr) -> Expr:
        """Return the number in the frame of a pixel of the image."""
        return self.frame.first + pixel + pixel // self.columns

    @property
    def side(self) -> int:
        """The side of the square blocks of pixels and channels that are transposed in registers."""
        side = max(self.lanes, _LEAST_SIDE)
        while side > self.width:
            side //= 2
        return side

    @property
    def strip(self) -> int:
        """How many square blocks of one row are transposed before the next channels."""
        # Single elements need no strips, and in a loop around them TVM's simplifier divides by zero.
        return _STRIP if self.side > 1 else 1

    @property
    def strip_pixels(self) -> int:
        """The pixels of a strip."""
        return self.strip * self.side

    @property
    def strips(self) -> Expr:
        """The strips of an image; the last may have fewer pixels."""
        return (self.size + self.strip_pixels - 1) // self.strip_pixels


def places_of(form: Blocked) -> tirx.Buffer:
    """Return memory for the numbers in the frame of the pixels of a strip: found once for all channels."""
    return tirx.decl_buffer((form.strip_pixels,), "int32", name="places")


def _by_squares(
    form: Blocked, pb: Expr, places: tirx.Buffer, square: Callable[[Expr, Expr, Sequence[Expr], Expr], tirx.Stmt]
) -> tirx.Stmt:
    """Return ``square(block, first pixel, its pixels' numbers in the frame, first channel)`` for all of strip `pb`.

    The last square of a row or column overlaps its neighbour.
    """
    side, width = form.side, form.width
    g, cb, s, f, r = (tirx.Var(name, "int32") for name in ("g", "cb", "s", "f", "r"))
    c0 = cb * side if width % side == 0 else tirx.min(cb * side, width - side)

    def first(strip: Expr) -> Expr:
        return tirx.min((pb * form.strip + strip) * side, form.size - side)

    numbers = [tirx.BufferLoad(places, [s * side + j]) for j in range(side)]
    find = tirx.BufferStore(places, form.framed(first(f) + r), [f * side + r])
    squares = serial(s, form.strip, square(g, first(s), numbers, c0))
    return tirx.SeqStmt(
        [
            serial(f, form.strip, serial(r, side, find)),
            serial(g, form.blocks, serial(cb, -(-width // side), squares)),
        ]
    )


def _prefetch(form: Blocked, x: tirx.Buffer, n: Expr, channel: Expr, pixel: Expr) -> list[tirx.Stmt]:
    """Return hints for what is read of planes when a square has its turn in the next strip.

    Planes are far apart, and a strip has little of each, so that no processor foresees what comes next: yolact_c3 takes
    9.0 ms with the hints and 9.6 ms without. Where planes are written they gain nothing. (Zen 5, one thread,
    2026-11-23.)
    """
    if form.side == 1:
        return []
    then = tirx.min(pixel + form.strip_pixels, form.size - 1)
    return [prefetch(x, [n, channel + r, then]) for r in range(form.side)]


def _by_elements(form: Blocked, element: Callable[[Expr, Expr, Expr, Expr], tirx.Stmt]) -> tirx.Stmt:
    """Return ``element(block, pixel, its number in the frame, channel)`` for all of an image."""
    g, p, c = (tirx.Var(name, "int32") for name in ("h", "p", "c"))
    return serial(g, form.blocks, serial(p, form.size, serial(c, form.width, element(g, p, form.framed(p), c))))


def zero_frame(form: Blocked, image: tirx.Buffer, at: Sequence[Expr], dtype: str) -> tirx.Stmt:
    """Return the stores of each block's frame of zeros, and of the channels that fill up a block, to ``image[at]``."""
    g, y = tirx.Var("k", "int32"), tirx.Var("y", "int32")
    frame, (rows, columns) = form.frame, form.frame.extents

    def zeros(first: Expr, pixels: Expr, channel: int = 0) -> tirx.Stmt:
        p, c = tirx.Var("q", "int32"), tirx.Var("z", "int32")
        store = tirx.BufferStore(image, tirx.const(0.0, dtype), [*at, form.element(g, first + p, channel + c)])
        return serial(p, pixels, serial(c, form.pitch - channel, store))

    stride = frame.strides[0]
    stores = [zeros(0, frame.first), serial(y, rows, zeros(frame.first + y * stride + columns, 1))]
    stores.append(zeros(frame.first + rows * stride, frame.pixels - frame.first - rows * stride))
    if form.pitch > form.width:
        stores.append(zeros(0, frame.pixels, form.width))
    return serial(g, form.blocks, sequence(stores))


def from_planes(
    x: tirx.Buffer,
    image: tirx.Buffer,
    form: Blocked,
    places: tirx.Buffer,
    n: Expr,
    strip: Expr,
    at: Sequence[Expr],
    channel: Expr = 0,
) -> tirx.Stmt:
    """Return what brings a strip of the planes ``x[n, channel:]`` into the channels-last image ``image[at]``.

    `places` is the code's own, see `places_of`.
    """
    side, dtype, acc = form.side, str(x.dtype), str(image.dtype)

    def square(g: Expr, p0: Expr, framed: Sequence[Expr], c0: Expr) -> tirx.Stmt:
        first = channel + g * form.width + c0
        loads = [tirx.BufferLoad(x, [n, first + r, lanes_at(p0, side)]) for r in range(side)]
        rows = [to_bits(row, dtype, side) for row in loads]

        def emit(j: int, column: Expr) -> tirx.Stmt:
            column = from_bits(column, dtype, acc, side)
            return tirx.BufferStore(image, column, [*at, lanes_at(form.element(g, framed[j], c0), side)])

        return sequence([*_prefetch(form, x, n, first, p0), *transpose_into(rows, bits_dtype(dtype), emit, "x")])

    def element(g: Expr, p: Expr, framed: Expr, c: Expr) -> tirx.Stmt:
        value = cast_vector(tirx.BufferLoad(x, [n, channel + g * form.width + c, p]), dtype, acc, 1)
        return tirx.BufferStore(image, value, [*at, form.element(g, framed, c)])

    squares = _by_squares(form, strip, places, square)
    return tirx.IfThenElse(form.size >= side, squares, _by_elements(form, element))


def to_planes(
    image: tirx.Buffer,
    x: tirx.Buffer,
    form: Blocked,
    places: tirx.Buffer,
    n: Expr,
    strip: Expr,
    at: Sequence[Expr],
    channel: Expr = 0,
) -> tirx.Stmt:
    """Return what brings a strip of the channels-last image ``image[at]`` into the planes ``x[n, channel:]``."""
    side, dtype, acc = form.side, str(x.dtype), str(image.dtype)

    def square(g: Expr, p0: Expr, framed: Sequence[Expr], c0: Expr) -> tirx.Stmt:
        def emit(j: int, column: Expr) -> tirx.Stmt:
            value = cast_vector(column, acc, dtype, side)
            return tirx.BufferStore(x, value, [n, channel + g * form.width + c0 + j, lanes_at(p0, side)])

        rows = [tirx.BufferLoad(image, [*at, lanes_at(form.element(g, number, c0), side)]) for number in framed]
        return sequence(transpose_into(rows, acc, emit, "y"))

    def element(g: Expr, p: Expr, framed: Expr, c: Expr) -> tirx.Stmt:
        value = cast_vector(tirx.BufferLoad(image, [*at, form.element(g, framed, c)]), acc, dtype, 1)
        return tirx.BufferStore(x, value, [n, channel + g * form.width + c, p])

    squares = _by_squares(form, strip, places, square)
    return tirx.IfThenElse(form.size >= side, squares, _by_elements(form, element))


def copy_strip(
    flat: tirx.Buffer,
    image: tirx.Buffer,
    form: Blocked,
    n: Expr,
    strip: Expr,
    at: Sequence[Expr],
    channel: Expr,
    into: bool,
) -> tirx.Stmt:
    """Return what copies a strip between ``flat[n, pixel, channel:]`` and the blocked image ``image[at]``.

    `into`: to the blocked image; else from it.
    """
    g, i, framed = (tirx.Var(name, "int32") for name in ("g", "i", "framed"))
    p = strip * form.strip_pixels + i
    moves: list[tirx.Stmt] = []
    for first, side in strips(form.width, form.lanes):
        plain = (flat, [n, p, lanes_at(channel + g * form.width + first, side)])
        blocked = (image, [*at, lanes_at(form.element(g, framed, first), side)])
        (source, here), (target, there) = (plain, blocked) if into else (blocked, plain)
        value = cast_vector(tirx.BufferLoad(source, here), str(source.dtype), str(target.dtype), side)
        moves.append(tirx.BufferStore(target, value, there))
    pixels = tirx.min(form.size - strip * form.strip_pixels, form.strip_pixels)
    return serial(i, pixels, tirx.SeqStmt([tirx.Bind(framed, form.framed(p)), serial(g, form.blocks, sequence(moves))]))


def to_channels_last(x: tirx.Buffer, image: tirx.Buffer, form: Blocked) -> tirx.Stmt:
    """Return the stage ``channels_last`` from images of planes, ``x[n, channel, pixel]``, to ``image[n, element]``."""
    batch, channels, size = x.shape
    places = places_of(form)

    def body(n: Expr, strip: Expr) -> tirx.Stmt:
        zeros = zero_frame(form, image, [n], str(image.dtype))
        moved = from_planes(x, image, form, places, n, strip, [n])
        return tirx.SeqStmt([moved, tirx.IfThenElse(strip == 0, zeros, None)])

    return block_nest(
        "channels_last",
        [("n", batch), ("p", form.strips)],
        lambda n, p: [region(x, n, (0, channels), (0, size))],
        lambda n, p: [region(image, n, TOKEN)],
        body,
        [places],
    )


@dataclass(frozen=True)
class Epilogue:
    """What the last stage connects.

    Attributes
    ----------
    product : Buffer ``[groups, blocks, tasks, tile_units, granule, lanes]``
    bias : Buffer ``[Cout]``
    out : Buffer ``[N, Cout, P]`` if `nchw`, else ``[N, P, Cout]``
    tiles : expression
        Tiles in an image.
    channels : int
        Output channels of a group; the last block may be partly padding.
    first_pixel : callable
        ``first_pixel(task, unit)``, the output pixel at which a unit begins.
    nchw : bool
    """

    product: tirx.Buffer
    bias: tirx.Buffer
    out: tirx.Buffer
    tiles: Expr
    channels: int
    first_pixel: Callable[[Expr, Expr], Expr]
    nchw: bool


def store_tile(stage: Epilogue, granule: int, acc: str, dtype: str) -> tirx.Stmt:
    """Return the stage ``output``: bias, conversion and layout of one unit of pixels times one block of channels."""
    product, bias, out, channels = stage.product, stage.bias, stage.out, stage.channels
    groups, blocks, tasks, tile_units, _, lanes_expr = product.shape
    lanes = int(lanes_expr)
    whole = channels % lanes == 0

    def body(g: Expr, b: Expr, t: Expr, u: Expr, *_: Expr) -> tirx.Stmt:
        n, first, channel = t // stage.tiles, stage.first_pixel(t, u), g * channels + b * lanes

        def load(i: Expr, v: Expr) -> Expr:
            return tirx.BufferLoad(product, [g, b, t, u, i, v])

        def store(c: Expr, p: Expr, value: Expr, width: int) -> tirx.Stmt:
            value = cast_vector(value, acc, dtype, width)
            return tirx.BufferStore(out, value, [n, c, p] if stage.nchw else [n, p, c])

        def guard(v: Expr, stmt: tirx.Stmt) -> tirx.Stmt:
            return stmt if whole else tirx.IfThenElse(b * lanes + v < channels, stmt, None)

        def planar(start: int, side: int, v0: int) -> list[tirx.Stmt]:
            def emit(j: int, column: Expr) -> tirx.Stmt:
                c = channel + v0 + j
                add = tirx.BufferLoad(bias, [c])
                value = column + broadcast(add, side)
                return guard(v0 + j, store(c, lanes_at(first + start, side), value, side))

            rows = [load(start + i, lanes_at(v0, side)) for i in range(side)]
            return transpose_into(rows, acc, emit, name=f"o{start}_{v0}")

        if stage.nchw:
            return tirx.SeqStmt(
                [
                    s
                    for first_, side in strips(granule, lanes)
                    for v0 in range(0, lanes, side)
                    for s in planar(first_, side, v0)
                ]
            )
        i, v = tirx.Var("i", "int32"), tirx.Var("v", "int32")
        if whole:
            value = load(i, lanes_at(0, lanes)) + tirx.BufferLoad(bias, [lanes_at(channel, lanes)])
            return serial(i, granule, store(lanes_at(channel, lanes), first + i, value, lanes))
        one = store(channel + v, first + i, load(i, v) + tirx.BufferLoad(bias, [channel + v]), 1)
        return serial(i, granule, serial(v, lanes, guard(v, one)))

    def writes(g: Expr, b: Expr, t: Expr, u: Expr, *_: Expr) -> list[TensorRegion]:
        c = (g * channels + b * lanes, lanes if whole else 1)
        n, p = t // stage.tiles, (stage.first_pixel(t, u), granule)
        return [region(out, n, c, p) if stage.nchw else region(out, n, p, c)]

    return block_nest(
        "output",
        # Axes of extent 1, because the schedule matches each axis of the product with a variable.
        [("g", groups), ("b", blocks), ("t", tasks), ("u", tile_units), ("i", 1), ("v", 1)],
        lambda g, b, t, u, i, v: [
            region(product, g, b, t, u, (i * granule, granule), (v * lanes, lanes)),
            region(bias, (g * channels + b * lanes, lanes)),
        ],
        writes,
        body,
    )
