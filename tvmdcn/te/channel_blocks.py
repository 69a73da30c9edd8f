# SPDX-License-Identifier: Apache-2.0
"""Blocks of channels, in which gradients are computed, and the weight and its gradient in their order.

A block lies in one group and in one offset group. Whoever has it adds to its part of the input's and of the weight's
gradient alone, so nothing depends on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, inf
from typing import Any

from tvm import te, tirx

from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.te.nests import block_nest, region, sequence, serial, whole_function
from tvmdcn.te.tiles import ITEM_BYTES, cast, is_depthwise, vector_lanes
from tvmdcn.te.vectors import bits_dtype, cast_vector, from_bits, lanes_at, strips, to_bits, transpose_into

__all__ = ["ChannelBlocks", "form", "lanes_for", "pack_weight", "packed_shape", "store_weight"]

Expr = Any


def _run(spec: DeformConv2dSpec) -> int:
    """Return the channels, side by side, of one group and one offset group."""
    in_group = spec.in_channels // (1 if is_depthwise(spec) else spec.groups)
    return gcd(in_group, spec.in_channels // spec.offset_groups)


def lanes_for(spec: DeformConv2dSpec, vector_lanes: int) -> int:
    """Return how many channels a vector holds: a power of two, no more than needed for a block.

    Parameters
    ----------
    spec : DeformConv2dSpec
    vector_lanes : int
        Accumulators in a vector register of the target.
    """
    lanes = 1
    while lanes < min(vector_lanes, _run(spec)):
        lanes *= 2
    return lanes


# What a vector of channels costs in a block of some vectors. Two feed a register kernel best (r50_c3: 15.1 ms with two,
# 17.7 with one); with four, what is done once per sample and block counts half (r50_c3: 6.61 ms instead of 6.85,
# yolact_c3: 9.68 instead of 10.19). Zen 5, two threads, 2026-11-23.
_COST = {1: 1.17, 2: 1.0, 3: 0.98, 4: 0.965}


def form(spec: DeformConv2dSpec, target: Any) -> tuple[int, int]:
    """Return how channels lie in vectors on a target: the lanes of a vector, and the vectors that a block should have.

    A core has one block at a time, so that narrow ones keep more cores busy, and wide ones have less to do. Blocks of
    more than two vectors are only for weights of a block that stay in the second-level cache (r50_c5: 7.34 ms instead
    of 6.86 where they don't), and for targets whose number of cores is known.
    """
    lanes = lanes_for(spec, vector_lanes(spec, target))
    cores, l2_bytes = max(target.cores, 2), target.l2_bytes or 1 << 20

    def cost(wanted: int) -> float:
        blocks = ChannelBlocks(spec, lanes, wanted)
        weights = spec.taps * blocks.outputs * blocks.pitch * ITEM_BYTES[spec.accumulator_dtype]
        if wanted > 2 and weights > l2_bytes * 3 // 4:
            return inf
        return -(-blocks.count // cores) * blocks.vectors * _COST[blocks.vectors]

    return lanes, min((2, 4, 1), key=cost) if target.cores else 2


@dataclass(frozen=True)
class ChannelBlocks:
    """How the input's channels are divided.

    Attributes
    ----------
    spec : DeformConv2dSpec
    lanes : int
        Channels in a vector.
    wanted : int
        The vectors that a block should have.
    """

    spec: DeformConv2dSpec
    lanes: int
    wanted: int = 2

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads one input channel; blocks then have channels of several groups."""
        return is_depthwise(self.spec)

    @property
    def width(self) -> int:
        """The channels of a block."""
        run, lanes = _run(self.spec), self.lanes
        channels = self.spec.in_channels

        def badness(size: int) -> tuple[float, bool, int]:
            # What is not whole vectors wastes the rest of the last. A block feeds one thread, so one alone is only for
            # what is no more than a vector.
            waste = -(-size // lanes) * lanes / size
            return waste, size == channels and size > lanes, abs(size - self.wanted * lanes)

        return min((size for size in range(1, min(run, 4 * lanes) + 1) if run % size == 0), key=badness)

    @property
    def count(self) -> int:
        """The blocks."""
        return self.spec.in_channels // self.width

    @property
    def vectors(self) -> int:
        """The vectors of a block; the last may be partly padding."""
        return -(-self.width // self.lanes)

    @property
    def pitch(self) -> int:
        """The elements of a block's pixel."""
        return self.vectors * self.lanes

    @property
    def outputs(self) -> int:
        """The output channels that a channel is multiplied with."""
        return 1 if self.depthwise else self.spec.out_channels // self.spec.groups

    @property
    def of_offset_group(self) -> int:
        """The blocks of an offset group."""
        return self.count // self.spec.offset_groups

    @property
    def of_group(self) -> int:
        """The blocks of a group; a depthwise convolution counts as one group."""
        return self.count if self.depthwise else self.count // self.spec.groups

    def out_channel(self, block: Expr, b: Expr, v: Expr, o: Expr) -> Expr:
        """Return the `o`-th output channel that a channel (block, vector, lane) is multiplied with."""
        if self.depthwise:
            return block * self.width + te.min(b * self.lanes + v, self.width - 1)
        return block // self.of_group * self.outputs + o


def packed_shape(spec: DeformConv2dSpec, lanes: int, wanted: int = 2) -> tuple[int, int, int, int, int]:
    """Return the shape of the packed weight: (blocks of channels, taps, vectors, Cout/groups, lanes)."""
    blocks = ChannelBlocks(spec, lanes, wanted)
    return (blocks.count, spec.taps, blocks.vectors, blocks.outputs, lanes)


def _matrix(spec: DeformConv2dSpec, name: str) -> tirx.Buffer:
    """Return the weight, or its gradient, as a matrix ``[Cout, Cin/groups*K]``."""
    row = spec.in_channels // spec.groups * spec.taps
    return tirx.decl_buffer((spec.out_channels, row), spec.dtype, name=name, data_alignment=ITEM_BYTES[spec.dtype])


def pack_weight(spec: DeformConv2dSpec, lanes: int, wanted: int = 2) -> tirx.PrimFunc:
    """Return ``pack_weight(weight, packed)`` as TIR.

    From ``[Cout, Cin/groups*K]``, the weight as a matrix, to `packed_shape`; channels that fill up a block are zeros.
    """
    blocks, acc, taps = ChannelBlocks(spec, lanes, wanted), spec.accumulator_dtype, spec.taps
    weight = _matrix(spec, "weight")
    packed = tirx.decl_buffer(packed_shape(spec, lanes, wanted), acc, name="packed")

    def square(c: Expr, o: Expr, b: int, k0: int, v0: int, side: int) -> list[tirx.Stmt]:
        first = (c % blocks.of_group * blocks.width + b * lanes + v0) * taps + k0
        out = blocks.out_channel(c, 0, 0, o)
        loads = [tirx.BufferLoad(weight, [out, lanes_at(first + j * taps, side)]) for j in range(side)]

        def emit(r: int, column: Expr) -> tirx.Stmt:
            column = from_bits(column, spec.dtype, acc, side)
            return tirx.BufferStore(packed, column, [c, k0 + r, b, o, lanes_at(v0, side)])

        rows = [to_bits(load, spec.dtype, side) for load in loads]
        return transpose_into(rows, bits_dtype(spec.dtype), emit, f"w{b}_{k0}_{v0}")

    def singly(c: Expr, o: Expr) -> tirx.Stmt:
        k, i = tirx.Var("k", "int32"), tirx.Var("i", "int32")
        channel = te.min(i, blocks.width - 1)
        row, column = blocks.out_channel(c, 0, channel, o), (c % blocks.of_group * blocks.width + channel) * taps + k
        if blocks.depthwise:
            column = k
        read = cast(tirx.BufferLoad(weight, [row, column]), spec.dtype, acc)
        value = tirx.Select(i < blocks.width, read, tirx.const(0.0, acc))
        return serial(
            i, blocks.pitch, serial(k, taps, tirx.BufferStore(packed, value, [c, k, i // lanes, o, i % lanes]))
        )

    stage = block_nest(
        "packed",
        [("c", blocks.count), ("o", blocks.outputs)],
        lambda c, o: [region(weight, *((0, extent) for extent in weight.shape))],
        lambda c, o: [region(packed, c, (0, taps), (0, blocks.vectors), o, (0, lanes))],
        lambda c, o: _by_squares(blocks, lambda *at: square(c, o, *at), lambda: singly(c, o)),
        parallel=True,
    )
    return whole_function([weight, packed], stage)


def store_weight(blocks: ChannelBlocks, total: tirx.Buffer) -> tuple[tirx.Buffer, tirx.Stmt]:
    """Return ``grad_weight`` and the stage that brings the weight's gradient into the weight's order, taps innermost.

    `total` is in the order of `packed_shape`.
    """
    spec, lanes = blocks.spec, blocks.lanes
    acc, taps, out = spec.accumulator_dtype, spec.taps, _matrix(spec, "grad_weight")

    def place(o: Expr, c: Expr) -> tuple[Expr, Expr]:
        """Return the block, and the number of the output channel in it."""
        if blocks.depthwise:
            return o // blocks.width, 0
        return o // blocks.outputs * blocks.of_group + c, o % blocks.outputs

    def square(o: Expr, c: Expr, b: int, k0: int, v0: int, side: int) -> list[tirx.Stmt]:
        block, output = place(o, c)
        first = (c * blocks.width + b * lanes + v0) * taps + k0
        rows = [tirx.BufferLoad(total, [block, k0 + r, b, output, lanes_at(v0, side)]) for r in range(side)]

        def emit(j: int, column: Expr) -> tirx.Stmt:
            value = cast_vector(column, acc, spec.dtype, side)
            return tirx.BufferStore(out, value, [o, lanes_at(first + j * taps, side)])

        return transpose_into(rows, acc, emit, f"w{b}_{k0}_{v0}")

    def singly(o: Expr, c: Expr) -> tirx.Stmt:
        k, i = tirx.Var("k", "int32"), tirx.Var("i", "int32")
        block, output = place(o, c)
        channel = o % blocks.width if blocks.depthwise else i
        read = tirx.BufferLoad(total, [block, k, channel // lanes, output, channel % lanes])
        column = k if blocks.depthwise else (c * blocks.width + i) * taps + k
        store = tirx.BufferStore(out, cast(read, acc, spec.dtype), [o, column])
        return serial(i, 1 if blocks.depthwise else blocks.width, serial(k, taps, store))

    def reads(o: Expr, c: Expr) -> list[Any]:
        block, output = place(o, c)
        return [region(total, block, (0, taps), (0, blocks.vectors), output, (0, lanes))]

    def writes(o: Expr, c: Expr) -> list[Any]:
        count = taps if blocks.depthwise else blocks.width * taps
        return [region(out, o, (c * count, count))]

    stage = block_nest(
        "grad_weight",
        [("o", spec.out_channels), ("c", 1 if blocks.depthwise else blocks.of_group)],
        reads,
        writes,
        lambda o, c: _by_squares(blocks, lambda *at: square(o, c, *at), lambda: singly(o, c)),
    )
    return out, stage


def _by_squares(blocks: ChannelBlocks, square: Any, singly: Any) -> tirx.Stmt:
    """Return ``square(vector, first tap, first lane, side)`` for all of a block, or what does without vectors."""
    if blocks.depthwise or blocks.width % blocks.lanes:
        stmt: tirx.Stmt = singly()
        return stmt
    statements: list[tirx.Stmt] = []
    for b in range(blocks.vectors):
        for k0, side in strips(blocks.spec.taps, blocks.lanes):
            for v0 in range(0, blocks.lanes, side):
                statements += square(b, k0, v0, side)
    return sequence(statements)
