# SPDX-License-Identifier: Apache-2.0
"""From planes to channels-last and back on a GPU, and what index arithmetic with free extents needs there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from tvmdcn.te.fragments import BARRIER, thread_loop
from tvmdcn.te.nests import TOKEN, block_nest, region

__all__ = ["Registers", "channels_last", "planes"]

Expr = Any

_SIDE = 32
"""Pixels, and channels, of a tile that is transposed."""


class Registers:
    """Parts of an index that go through registers.

    In an index that multiplies them with free extents, TVM's simplifier takes their coefficients times the largest
    extent, and gives up where that is more than an integer.
    """

    def __init__(self, stage: str, count: int) -> None:
        self.buffers = [tirx.decl_buffer((1,), "int32", name=f"{stage}_{i}", scope="local") for i in range(count)]

    def __getitem__(self, i: int) -> Expr:
        """Return the value of one."""
        return tirx.BufferLoad(self.buffers[i], [0])

    def before(self, values: list[Expr], stmt: tirx.Stmt) -> tirx.Stmt:
        """Return `stmt` after the values are set, in order."""
        stores = [tirx.BufferStore(buffer, value, [0]) for buffer, value in zip(self.buffers, values, strict=True)]
        return tirx.SeqStmt([*stores, stmt])


def channels_last(x: tirx.Buffer, image: tirx.Buffer, name: str = "channels_last") -> tirx.Stmt:
    """Return the stage `name` from ``x[n, channel, pixel]`` to ``image[n*size + pixel, channel]``.

    A block of 8 x 32 threads transposes a square through shared memory; the schedule binds the loops over squares.
    """
    batch, channels, size = x.shape[0].astype("int32"), x.shape[1], x.shape[2].astype("int32")
    side, rows = _SIDE, 8
    # One more element a row, so that the elements of a column lie in different banks.
    square = tirx.decl_buffer((side, side + 1), x.dtype, name="square", scope="shared.dyn")
    registers = Registers("square", 3)

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
        name,
        [("n", batch), ("p", (size + side - 1) // side), ("c", -(-int(channels) // side))],
        lambda *_: [region(x, *((0, extent) for extent in x.shape))],
        lambda n, p, c: [region(image, n, TOKEN)],
        body,
        [square, *registers.buffers],
    )


def planes(image: tirx.Buffer, x: tirx.Buffer, name: str, finish: Callable[..., Expr]) -> tirx.Stmt:
    """Return the stage `name` from ``image[n*size + pixel, channel]`` to ``x[n, channel, pixel]``.

    ``finish(value, n*size + pixel, channel)`` is what becomes of an element.

    It does not say that it reads the image: TVM cannot prove that all of it was written.
    """
    batch, channels, size = x.shape[0].astype("int32"), x.shape[1], x.shape[2].astype("int32")
    side, rows = _SIDE, 8
    square = tirx.decl_buffer((side, side + 1), x.dtype, name="square", scope="shared.dyn")
    registers = Registers("square", 3)

    def body(n: Expr, p: Expr, c: Expr) -> tirx.Stmt:
        down, across = tirx.Var("down", "int32"), tirx.Var("across", "int32")
        moves = []
        for i in range(0, side, rows):
            pixel, channel = down + i, c * side + across
            at = [(registers[2] + pixel).astype("int64"), channel]
            load = tirx.BufferStore(square, finish(tirx.BufferLoad(image, at), *at), [across, pixel])
            guarded = tirx.IfThenElse(tirx.all(p * side + pixel < size, channel < channels), load, None)
            moves.append(registers.before([n, channel, n * size + p * side], guarded))
        moves.append(BARRIER())
        for i in range(0, side, rows):
            pixel, channel = p * side + across, c * side + down + i
            store = tirx.BufferStore(
                x, tirx.BufferLoad(square, [down + i, across]), [registers[0], registers[1], pixel]
            )
            guarded = tirx.IfThenElse(tirx.all(pixel < size, channel < channels), store, None)
            moves.append(registers.before([n, channel, n * size + p * side], guarded))
        lanes = thread_loop(across, side, "threadIdx.x", tirx.SeqStmt(moves))
        return thread_loop(down, rows, "threadIdx.y", lanes)

    return block_nest(
        name,
        [("n", batch), ("p", (size + side - 1) // side), ("c", -(-int(channels) // side))],
        lambda *_: [],
        lambda *_: [region(x, *((0, extent) for extent in x.shape))],
        body,
        [square, *registers.buffers],
    )
