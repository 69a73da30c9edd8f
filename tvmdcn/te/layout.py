# SPDX-License-Identifier: Apache-2.0
"""The stages that change the layout, written as TIR: into channels-last, and from the product to the output.

Both are transpositions, done in registers by a network of shuffles on square blocks. Written as a TE expression they
would be strided loads, one scalar at a time, which costs about 5 % of a whole layer; and an output with a free number
of pixels could not be fused into the tile (the schedule cannot invert the division by a free tile size).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Range, TensorRegion, load_json, save_json
from tvm.s_tir.stmt import SBlock, SBlockRealize

__all__ = [
    "TOKEN",
    "Epilogue",
    "block_nest",
    "declare_reads",
    "pixel_strips",
    "store_tile",
    "to_channels_last",
    "transpose_into",
    "with_alignment",
]

Expr = Any

_STRIP = 4
"""Square blocks of an image row that are transposed before the next channels: whole cache lines one behind the other.

yolact_c3 takes 7.6 ms with four and 7.9 ms with one, edvr_align 9.5 and 9.8 (Zen 5, one thread, 2026-11-22)."""
_LEAST_SIDE = 8
"""Pixels in such a block even where the product's vectors are shorter."""

TOKEN = (0, 1)
"""Region in which the image's stage and its reader are said to meet.

The schedule proves that a stage writes what the next reads; of a gather from an image of free size it cannot, and need
not: ``channels_last`` stays a stage of its own before the tiles. So both sides declare one element, which keeps their
order.
"""


def block_nest(
    name: str,
    extents: Sequence[tuple[str, Expr]],
    reads: Callable[..., list[TensorRegion]],
    writes: Callable[..., list[TensorRegion]],
    body: Callable[..., tirx.Stmt],
) -> tirx.Stmt:
    """Return loops over `extents` around one data-parallel block whose `body` is opaque to the schedule."""
    loops = [tirx.Var(label, "int32") for label, _ in extents]
    axes = [
        tirx.IterVar(Range(0, extent), tirx.Var("v_" + label, "int32"), tirx.IterVar.DataPar)
        for label, extent in extents
    ]
    at = [axis.var for axis in axes]
    nest: tirx.Stmt = SBlockRealize(loops, True, SBlock(axes, reads(*at), writes(*at), name, body(*at)))
    for loop, (_, extent) in reversed(list(zip(loops, extents, strict=True))):
        nest = serial(loop, extent, nest)
    return nest


def serial(var: tirx.Var, extent: Expr, body: tirx.Stmt) -> tirx.Stmt:
    """Return a plain loop from 0."""
    return tirx.For(var, 0, extent, tirx.ForKind.SERIAL, body)


def region(buffer: tirx.Buffer, *bounds: Expr | tuple[Expr, Expr]) -> TensorRegion:
    """Return a region; a bound is an index, or a pair (begin, extent)."""
    return tirx.BufferRegion(
        buffer, [Range.from_min_extent(*b) if isinstance(b, tuple) else Range.from_min_extent(b, 1) for b in bounds]
    )


def declare_reads(stmt: tirx.Stmt, block: str, source: tirx.Buffer, bounds: Sequence[tuple[Expr, Expr]]) -> tirx.Stmt:
    """Return `stmt` with the region that `block` reads from `source` replaced.

    `bounds` is (begin, extent) for each axis of `source`. See `TOKEN` for why a gather does not describe itself.
    """
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([declare_reads(s, block, source, bounds) for s in stmt])
    if isinstance(stmt, tirx.For):
        body = declare_reads(stmt.body, block, source, bounds)
        return tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body)
    inner = stmt.block
    if inner.name_hint != block:
        return stmt
    reads = [r for r in inner.reads if not r.source.same_as(source)] + [region(source, *bounds)]
    declared = SBlock(inner.iter_vars, reads, inner.writes, block, inner.body, inner.init, inner.alloc_buffers)
    return SBlockRealize(stmt.iter_values, stmt.predicate, declared)


def vector_dtype(dtype: str, lanes: int) -> str:
    """Return the TIR name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def lanes_at(first: Expr, count: int) -> Expr:
    """Return the index of `count` consecutive elements."""
    return first if count == 1 else tirx.Ramp(first, tirx.const(1, "int32"), count)


def cast_vector(value: Expr, source: str, target: str, lanes: int) -> Expr:
    """Convert a vector, where needed."""
    return value if source == target else tirx.Cast(vector_dtype(target, lanes), value)


def reinterpreted(value: Expr, source: str, target: str, lanes: int) -> Expr:
    """Return the same bits as another type of the same width, where needed."""
    return value if source == target else tirx.reinterpret(vector_dtype(target, lanes), value)


def transpose_into(
    rows: Sequence[Expr], dtype: str, emit: Callable[[int, Expr], tirx.Stmt], name: str = "r"
) -> list[tirx.Stmt]:
    """Transpose a square block held in vectors.

    Parameters
    ----------
    rows : sequence of expressions
        ``S`` vectors of ``S`` lanes, S a power of two.
    dtype : str
        Element type.
    emit : callable
        ``emit(j, vector)`` is the statement that consumes column ``j``.

    Returns
    -------
    list of tirx.Stmt
        ``S * log2(S)`` shuffles between the loads and the consumers: 64 for 16 x 16, a quarter of one per element.
    """
    size = len(rows)
    statements: list[tirx.Stmt] = []

    def bind(stage: int, row: int, value: Expr) -> tirx.Var:
        var = tirx.Var(f"{name}_{stage}_{row}", vector_dtype(dtype, size))
        statements.append(tirx.Bind(var, value))
        return var

    current = [bind(0, i, row) for i, row in enumerate(rows)]
    distance = size // 2
    while distance:
        following = list(current)
        for low in range(size):
            if low & distance:
                continue
            high = low + distance
            pair = [current[low], current[high]]
            keep = [c if not c & distance else size + c - distance for c in range(size)]
            cross = [c + distance if not c & distance else size + c for c in range(size)]
            following[low] = bind(distance, low, tirx.Shuffle(pair, keep))
            following[high] = bind(distance, high, tirx.Shuffle(pair, cross))
        current = following
        distance //= 2
    return statements + [emit(j, column) for j, column in enumerate(current)]


def pixel_strips(count: int, lanes: int) -> list[tuple[int, int]]:
    """Split `count` pixels into (first, size) strips of powers of two, none longer than `lanes`."""
    strips, first = [], 0
    size = lanes
    while first < count:
        while size > count - first:
            size //= 2
        strips.append((first, size))
        first += size
    return strips


def to_channels_last(x: tirx.Buffer, image: tirx.Buffer, groups: int, dtype: str, lanes: int) -> tirx.Stmt:
    """Return the stage ``channels_last``: each group's pixels one behind the other, then a pixel of zeros.

    ``image[n, (g*(size + 1) + p)*width + c] = x[n, g*width + c, p]`` for groups of `width` channels. With several
    offset groups the channels that are sampled together so lie together: the two corners of a row of a cell share a
    cache line (edvr_align, 8 groups of 8 channels: see schedules/llvm/deform_conv2d.py).

    Square blocks; the last block of a row or column overlaps its neighbour.
    """
    batch, channels, size = x.shape
    width = int(channels) // groups
    # TVM lowers no shuffle of bfloat16; what is only moved can as well be an integer.
    bits = "uint16" if dtype == "bfloat16" else dtype
    side = max(lanes, _LEAST_SIDE)
    while side > width:
        side //= 2

    # Single elements need no strips, and in a loop around them TVM's simplifier divides by zero.
    strip = _STRIP if side > 1 else 1

    def body(n: Expr, pb: Expr) -> tirx.Stmt:
        g, cb, s = (tirx.Var(name, "int32") for name in ("g", "cb", "s"))
        c0 = cb * side if width % side == 0 else tirx.min(cb * side, width - side)
        p0 = tirx.min((pb * strip + s) * side, size - side)
        loads = [tirx.BufferLoad(x, [n, g * width + c0 + r, lanes_at(p0, side)]) for r in range(side)]
        rows = [reinterpreted(row, dtype, bits, side) for row in loads]

        def emit(j: int, column: Expr) -> tirx.Stmt:
            first = (g * (size + 1) + p0 + j) * width + c0
            column = reinterpreted(column, bits, dtype, side)
            return tirx.BufferStore(image, column, [n, lanes_at(first, side)])

        block = serial(s, strip, tirx.SeqStmt(transpose_into(rows, bits, emit, "x")))
        blocks = serial(g, groups, serial(cb, -(-width // side), block))
        p, c, h = (tirx.Var(name, "int32") for name in ("p", "c", "h"))
        read = tirx.BufferLoad(x, [n, h * width + c, p])
        small = tirx.BufferStore(image, read, [n, (h * (size + 1) + p) * width + c])
        z, k = tirx.Var("z", "int32"), tirx.Var("k", "int32")
        zero = tirx.BufferStore(image, tirx.const(0.0, dtype), [n, (k * (size + 1) + size) * width + z])
        return tirx.SeqStmt(
            [
                tirx.IfThenElse(size >= side, blocks, serial(h, groups, serial(p, size, serial(c, width, small)))),
                tirx.IfThenElse(pb == 0, serial(k, groups, serial(z, width, zero)), None),
            ]
        )

    return block_nest(
        "channels_last",
        [("n", batch), ("p", (size + strip * side - 1) // (strip * side))],
        lambda n, p: [region(x, n, (0, channels), (0, size))],
        lambda n, p: [region(image, n, TOKEN)],
        body,
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
                value = column + (add if side == 1 else tirx.Broadcast(add, side))
                return guard(v0 + j, store(c, lanes_at(first + start, side), value, side))

            rows = [load(start + i, lanes_at(v0, side)) for i in range(side)]
            return transpose_into(rows, acc, emit, name=f"o{start}_{v0}")

        if stage.nchw:
            strips = pixel_strips(granule, lanes)
            return tirx.SeqStmt(
                [s for first_, side in strips for v0 in range(0, lanes, side) for s in planar(first_, side, v0)]
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


def with_alignment(func: tirx.PrimFunc, alignments: Mapping[str, int]) -> tirx.PrimFunc:
    """Return `func` with another alignment, in bytes, promised for the data of its buffer parameters.

    TE promises 64 for all, and the code generator then emits aligned loads that fault on a NumPy array.
    """
    graph = json.loads(save_json(func))
    nodes = graph["nodes"]
    for index in nodes[nodes[graph["root_index"]]["data"]["params"]]["data"]:
        param = nodes[index]["data"]
        name, kind = nodes[param["name"]]["data"], nodes[param["ty"]]
        if kind["type"] == "tirx.BufferType" and name in alignments:
            kind["data"]["data_alignment"] = alignments[name]
    return load_json(json.dumps(graph))
