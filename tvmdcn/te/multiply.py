# SPDX-License-Identifier: Apache-2.0
"""The stages of a product on a GPU, written as TIR: on tensor cores by fragments of a warp, or by single elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Range
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.te.fragments import COPY_16, LDMATRIX, ROUND_WORDS, SEEN, TILE, WORDS, Fragments, address_of
from tvmdcn.te.nests import block_nest, region, sequence, serial
from tvmdcn.te.tiles import cast

__all__ = ["Operand", "copy_weight", "in_vectors", "load_left", "multiply", "multiply_fragments", "reduction", "spread"]

Expr = Any

# An axis of extent 1: the schedule matches each axis of a buffer with one of a block, even where a block does it all.
_WHOLE = ("e", 1)


def reduction(name: str, axes: list[tuple[str, Expr, bool]], make: Callable[..., SBlock]) -> tirx.Stmt:
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


def load_left(
    source: tirx.Buffer, left: tirx.Buffer, fragments: Fragments, name: str = "left", copied: bool = False
) -> tirx.Stmt:
    """Return the stage ``left``: a lane's share of 16 rows times `depth` products, from shared memory.

    From ``source[*leading, row, product]`` to ``left[*leading, row tile, step, lane, word]``. `copied`: the
    source was only ever copied, so that no load or store names it, and where it is float32, it is not rounded to tf32.
    """
    *leading, rows, steps, lanes, words = left.shape
    depth = fragments.depth

    def make(name: str, iters: list[Any], *at: Expr) -> SBlock:
        *lead, r, s, lane, e = at
        reads = region(source, *lead, (r * TILE, TILE), (s * depth, depth))
        target = region(left, *lead, r, s, lane, (e * words, words))
        row, column = fragments.left_row(lane)
        address = address_of(source, *lead, r * TILE + row, s * depth + column)
        ends = [address_of(left, *lead, r, s, lane, word) for word in (0, WORDS - 1)]
        code = [LDMATRIX(*ends, address)]
        if copied:
            code.append(SEEN(tirx.BufferLoad(source, [*lead, r * TILE + row, s * depth + column])))
            if fragments.packing == 1:
                code.append(ROUND_WORDS(*ends))
        return SBlock(iters, [reads], [target], name, sequence(code))

    axes = [*zip("gk", leading, strict=False), ("r", rows), ("s", steps), ("lane", lanes), _WHOLE]
    return reduction(name, [(*axis, False) for axis in axes], make)


@dataclass(frozen=True)
class Operand:
    """A buffer of fragments, ``[*leading, lane, word]``, and where it is read or written.

    Attributes
    ----------
    buffer : tirx.Buffer
    at : tuple of str
        Names of the axes of the product, in the order of the leading axes of the buffer.
    """

    buffer: tirx.Buffer
    at: tuple[str, ...]

    def index(self, axes: Mapping[str, Expr]) -> list[Expr]:
        """Return the leading indices."""
        return [axes[name] for name in self.at]


def multiply_fragments(
    left: Operand,
    right: Operand,
    sums: Operand,
    summed: Sequence[str],
    fragments: Fragments,
    name: str = "product",
    copied: Operand | None = None,
) -> tirx.Stmt:
    """Return the stage ``product``: 16 x 16 results of a warp, `depth` products at a time.

    Its loops are the axes of `sums`, then those of `summed`, the lane, and one of extent 1. `copied`: where the left
    operand comes from, if it was only ever copied (see `load_left`), with its rows and products as "r" and "s": so that
    it keeps its room until the right operand was read, too.
    """
    extents = {
        axis: extent
        for operand in (sums, left, right)
        for axis, extent in zip(operand.at, operand.buffer.shape, strict=False)
    }
    order = [*sums.at, *summed]

    def make(name: str, iters: list[Any], *at: Expr) -> SBlock:
        *values, lane, whole = at
        axes = dict(zip(order, values, strict=True))
        of_sums, of_left, of_right = (operand.index(axes) for operand in (sums, left, right))
        reads = [
            region(sums.buffer, *of_sums, lane, (whole * 8, 8)),
            region(left.buffer, *of_left, lane, (0, WORDS)),
            region(right.buffer, *of_right, lane, (0, WORDS)),
        ]
        a = [tirx.BufferLoad(left.buffer, [*of_left, lane, word]) for word in range(WORDS)]
        b = [tirx.BufferLoad(right.buffer, [*of_right, lane, word]) for word in range(WORDS)]
        calls = [
            fragments.mma(address_of(sums.buffer, *of_sums, lane, 4 * half), *a, *b[2 * half : 2 * half + 2])
            for half in (0, 1)
        ]
        e = tirx.Var("e", "int32")
        zero = tirx.BufferStore(sums.buffer, tirx.const(0.0, sums.buffer.dtype), [*of_sums, lane, e])
        init = tirx.For(e, 0, 8, tirx.ForKind.UNROLLED, zero)
        if copied is not None:
            sizes = {"r": TILE, "s": fragments.depth}
            first = [axes[axis] * sizes.get(axis, 1) for axis in copied.at]
            bounds = [(at, sizes.get(axis, 1)) for at, axis in zip(first, copied.at, strict=True)]
            reads.append(region(copied.buffer, *bounds))
            calls.append(SEEN(tirx.BufferLoad(copied.buffer, first)))
        return SBlock(iters, reads, [reads[0]], name, tirx.SeqStmt(calls), init)

    axes = [(axis, extents[axis], axis in summed) for axis in order]
    return reduction(name, [*axes, ("lane", sums.buffer.shape[-2], False), (*_WHOLE, False)], make)


def spread(sums: tirx.Buffer, result: tirx.Buffer, fragments: Fragments, name: str = "result") -> tirx.Stmt:
    """Return the stage ``result``: from the lanes' shares to rows of pixels.

    From ``sums[*leading, row tile, column tile, lane, element]`` to ``result[*leading, row, column]``.
    """
    *leading, rows, outputs, lanes, _ = sums.shape

    def body(*at: Expr) -> tirx.Stmt:
        *lead, r, o, lane, _ = at
        stores = []
        for e in range(8):
            row, column = fragments.result_element(lane, e)
            value = tirx.BufferLoad(sums, [*lead, r, o, lane, e])
            stores.append(tirx.BufferStore(result, value, [*lead, r * TILE + row, o * TILE + column]))
        return tirx.SeqStmt(stores)

    def reads(*at: Expr) -> list[Any]:
        return [region(sums, *at[:-1], (at[-1] * 8, 8))]

    def writes(*at: Expr) -> list[Any]:
        *lead, r, o, _, _ = at
        return [region(result, *lead, (r * TILE, TILE), (o * TILE, TILE))]

    axes = [*zip("gk", leading, strict=False), ("r", rows), ("o", outputs), ("lane", lanes), _WHOLE]
    return block_nest(name, axes, reads, writes, body)


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
    return reduction("product", [*axes, ("k", taps, True), ("c", depth, True)], make)
