# SPDX-License-Identifier: Apache-2.0
"""The stages of a product on a GPU, written as TIR: on tensor cores by fragments of a warp, or by single elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Range
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.te.fragments import COPY_16, LDMATRIX, TILE, WORDS, Fragments, address_of
from tvmdcn.te.nests import block_nest, region, serial
from tvmdcn.te.tiles import cast

__all__ = ["copy_weight", "in_vectors", "load_left", "multiply", "multiply_fragments", "spread"]

Expr = Any

# An axis of extent 1: the schedule matches each axis of a buffer with one of a block, even where a block does it all.
_WHOLE = ("e", 1)


def _reduction(name: str, axes: list[tuple[str, Expr, bool]], make: Callable[..., SBlock]) -> tirx.Stmt:
    """Return loops around one block; axes are (name, extent, whether it is summed over)."""
    loops = [tirx.Var(label, "int32") for label, _, _ in axes]
    iters = [
        tirx.IterVar(
            Range(0, extent),
            tirx.Var("v_" + label, "int32"),
            tirx.IterVar.CommReduce if summed else tirx.IterVar.DataPar,
        )
        for label, extent, summed in axes
    ]
    nest: tirx.Stmt = SBlockRealize(loops, True, make(name, iters, *(axis.var for axis in iters)))
    for loop, (_, extent, _) in reversed(list(zip(loops, axes, strict=True))):
        nest = serial(loop, extent, nest)
    return nest


def copy_weight(weight: tirx.Buffer, near: tirx.Buffer) -> tirx.Stmt:
    """Return the stage ``weights``: each lane's 16 bytes of a right operand to shared memory, not waited for."""
    *axes, elements = weight.shape

    def share(buffer: tirx.Buffer) -> Callable[..., list[Any]]:
        return lambda *at: [region(buffer, *at[:-1], (at[-1] * elements, elements))]

    labels = ("g", "k", "s", "o", "lane")
    return block_nest(
        "weights",
        [*zip(labels, axes, strict=False), _WHOLE],
        share(weight),
        share(near),
        lambda *at: COPY_16(address_of(near, *at[:-1], 0), address_of(weight, *at[:-1], 0)),
    )


def load_left(columns: tirx.Buffer, left: tirx.Buffer, fragments: Fragments) -> tirx.Stmt:
    """Return the stage ``left``: a lane's share of 16 pixels times `depth` channels, from shared memory."""
    groups, taps, rows, steps, lanes, words = left.shape
    depth = fragments.depth

    def make(name: str, iters: list[Any], g: Expr, k: Expr, r: Expr, s: Expr, lane: Expr, e: Expr) -> SBlock:
        source = region(columns, g, k, (r * TILE, TILE), (s * depth, depth))
        target = region(left, g, k, r, s, lane, (e * words, words))
        row, column = fragments.left_row(lane)
        address = address_of(columns, g, k, r * TILE + row, s * depth + column)
        ends = [address_of(left, g, k, r, s, lane, word) for word in (0, WORDS - 1)]
        body = LDMATRIX(*ends, address)
        return SBlock(iters, [source], [target], name, body)

    axes = [("g", groups), ("k", taps), ("r", rows), ("s", steps), ("lane", lanes), _WHOLE]
    return _reduction("left", [(*axis, False) for axis in axes], make)


def multiply_fragments(left: tirx.Buffer, weight: tirx.Buffer, sums: tirx.Buffer, fragments: Fragments) -> tirx.Stmt:
    """Return the stage ``product``: 16 x 16 results of a warp, `depth` products at a time."""
    groups, taps, rows, steps, lanes, words = left.shape

    def make(name: str, iters: list[Any], *at: Expr) -> SBlock:
        g, r, o, k, s, lane, whole = at
        reads = [
            region(sums, g, r, o, lane, (whole * 8, 8)),
            region(left, g, k, r, s, lane, (0, words)),
            region(weight, g, k, s, o, lane, (0, words)),
        ]

        a = [tirx.BufferLoad(left, [g, k, r, s, lane, word]) for word in range(WORDS)]
        b = [tirx.BufferLoad(weight, [g, k, s, o, lane, word]) for word in range(WORDS)]
        calls = [
            fragments.mma(address_of(sums, g, r, o, lane, 4 * half), *a, *b[2 * half : 2 * half + 2]) for half in (0, 1)
        ]
        e = tirx.Var("e", "int32")
        zero = tirx.BufferStore(sums, tirx.const(0.0, sums.dtype), [g, r, o, lane, e])
        init = tirx.For(e, 0, 8, tirx.ForKind.UNROLLED, zero)
        return SBlock(iters, reads, [reads[0]], name, tirx.SeqStmt(calls), init)

    outputs = sums.shape[2]
    axes = [("g", groups, False), ("r", rows, False), ("o", outputs, False)]
    axes += [("k", taps, True), ("s", steps, True), ("lane", lanes, False), (*_WHOLE, False)]
    return _reduction("product", axes, make)


def spread(sums: tirx.Buffer, result: tirx.Buffer, fragments: Fragments) -> tirx.Stmt:
    """Return the stage ``result``: from the lanes' shares to rows of pixels."""
    groups, rows, outputs, lanes, _ = sums.shape

    def body(g: Expr, r: Expr, o: Expr, lane: Expr, _: Expr) -> tirx.Stmt:
        stores = []
        for e in range(8):
            row, column = fragments.result_element(lane, e)
            value = tirx.BufferLoad(sums, [g, r, o, lane, e])
            stores.append(tirx.BufferStore(result, value, [g, r * TILE + row, o * TILE + column]))
        return tirx.SeqStmt(stores)

    return block_nest(
        "result",
        [("g", groups), ("r", rows), ("o", outputs), ("lane", lanes), _WHOLE],
        lambda g, r, o, lane, e: [region(sums, g, r, o, lane, (e * 8, 8))],
        lambda g, r, o, *_: [region(result, g, (r * TILE, TILE), (o * TILE, TILE))],
        body,
    )


def in_vectors(vector: int, g: Expr, k: Expr, c: Expr, o: Expr) -> list[Expr]:
    """Return where a weight lies whose output channels are in vectors."""
    return [g, k, c, o // vector, o % vector]


def multiply(
    columns: tirx.Buffer,
    weight: tirx.Buffer,
    result: tirx.Buffer,
    dtype: str,
    place: Callable[..., list[Expr]],
    ordered: tuple[int, ...],
) -> tirx.Stmt:
    """Return the stage ``product`` without tensor cores.

    ``place(g, k, c, o)`` is where a weight lies; `ordered` the order of (group, pixel, output) in the result.
    """
    groups, taps, extent, depth = columns.shape
    acc = str(result.dtype)

    def make(name: str, iters: list[Any], g: Expr, p: Expr, o: Expr, k: Expr, c: Expr) -> SBlock:
        at, of_weight = [(g, p, o)[i] for i in ordered], place(g, k, c, o)
        left, right = tirx.BufferLoad(columns, [g, k, p, c]), tirx.BufferLoad(weight, of_weight)
        body = tirx.BufferStore(result, tirx.BufferLoad(result, at) + cast(left, dtype, acc) * right, at)
        init = tirx.BufferStore(result, tirx.const(0.0, acc), at)
        reads = [region(result, *at), region(columns, g, k, p, c), region(weight, *of_weight)]
        return SBlock(iters, reads, [region(result, *at)], name, body, init)

    axes = [("g", groups, False), ("p", extent, False), ("o", result.shape[ordered.index(2)], False)]
    return _reduction("product", [*axes, ("k", taps, True), ("c", depth, True)], make)
