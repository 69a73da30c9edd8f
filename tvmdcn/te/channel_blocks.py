# SPDX-License-Identifier: Apache-2.0
"""Blocks of channels, in which gradients are computed, and the weight and its gradient in their order.

A block lies in one offset group, and in one group or holds several whole ones. Whoever has it adds to its part of the
input's and of the weight's gradient alone, so nothing depends on the number of threads.
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


def _in_group(spec: DeformConv2dSpec) -> int:
    """Return the channels of a group; a depthwise convolution counts as one."""
    return spec.in_channels // (1 if is_depthwise(spec) else spec.groups)


def _run(spec: DeformConv2dSpec) -> int:
    """Return the channels, side by side, that a block may have some of.

    Those of one group and one offset group; or of one offset group that consists of groups which divide a vector, or
    vectors divide them: so much less is done per sample and block (grouped32, where a group has 8 channels, takes
    0.83 ms with blocks of eight groups and 1.77 ms with blocks of one; Zen 5, two threads, 2026-11-23).
    """
    in_group, in_offset_group = _in_group(spec), spec.in_channels // spec.offset_groups
    whole_groups = in_offset_group % in_group == 0 and in_group & (in_group - 1) == 0
    return in_offset_group if whole_groups else gcd(in_group, in_offset_group)


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
        channels, in_group = self.spec.in_channels, _in_group(self.spec)

        def badness(size: int) -> tuple[float, bool, int]:
            # What is not whole vectors wastes the rest of the last. A block feeds one thread, so one alone is only for
            # what is no more than a vector.
            waste = -(-size // lanes) * lanes / size
            return waste, size == channels and size > lanes, abs(size - self.wanted * lanes)

        sizes = [size for size in range(1, min(run, 4 * lanes) + 1) if run % size == 0]
        return min((size for size in sizes if size % in_group == 0 or in_group % size == 0), key=badness)

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
    def groups(self) -> int:
        """The groups that a block has channels of; a depthwise convolution counts as one group."""
        return max(self.width // _in_group(self.spec), 1)

    @property
    def of_group(self) -> int:
        """The blocks that have channels of a group."""
        return max(_in_group(self.spec) // self.width, 1)

    @property
    def together(self) -> int:
        """The lanes of a vector, side by side, that are multiplied with the same output channels."""
        return self.lanes if self.groups == 1 else min(self.lanes, _in_group(self.spec))

    def group(self, block: Expr, channel: Expr) -> tuple[Expr, Expr]:
        """Return the group in which a channel of a block is, and the channel's number there."""
        if self.groups == 1:
            return block // self.of_group, block % self.of_group * self.width + channel
        in_group = _in_group(self.spec)
        return block * self.groups + self._whole(channel // in_group, self.groups), channel % in_group

    def _whole(self, number: Expr, count: int) -> Expr:
        """Return a number that lanes which fill up a vector would bring to `count` or above; these get the last."""
        return number if self.width % self.lanes == 0 else te.min(number, count - 1)

    def out_channel(self, block: Expr, b: Expr, v: Expr, o: Expr) -> Expr:
        """Return the `o`-th output channel that a channel (block, vector, lane) is multiplied with."""
        if self.depthwise:
            return block * self.width + self._whole(b * self.lanes + v, self.width)
        return self.group(block, b * self.lanes + v)[0] * self.outputs + o


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
        loads = []
        for channel in range(b * lanes + v0, b * lanes + v0 + side):
            group, inside = blocks.group(c, channel)
            loads.append(tirx.BufferLoad(weight, [group * blocks.outputs + o, lanes_at(inside * taps + k0, side)]))

        def emit(r: int, column: Expr) -> tirx.Stmt:
            column = from_bits(column, spec.dtype, acc, side)
            return tirx.BufferStore(packed, column, [c, k0 + r, b, o, lanes_at(v0, side)])

        rows = [to_bits(load, spec.dtype, side) for load in loads]
        return transpose_into(rows, bits_dtype(spec.dtype), emit, f"w{b}_{k0}_{v0}")

    def singly(c: Expr, o: Expr) -> tirx.Stmt:
        k, i = tirx.Var("k", "int32"), tirx.Var("i", "int32")
        channel = te.min(i, blocks.width - 1)
        row, column = blocks.out_channel(c, 0, channel, o), k
        if not blocks.depthwise:
            column = blocks.group(c, channel)[1] * taps + k
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

    `total` is in the order of `packed_shape`. Blocks of channels come first, so that each can be stored where it was
    added up.
    """
    spec, lanes = blocks.spec, blocks.lanes
    acc, taps, out = spec.accumulator_dtype, spec.taps, _matrix(spec, "grad_weight")

    def square(c: Expr, o: Expr, b: int, k0: int, v0: int, side: int) -> list[tirx.Stmt]:
        rows = [tirx.BufferLoad(total, [c, k0 + r, b, o, lanes_at(v0, side)]) for r in range(side)]

        def emit(j: int, column: Expr) -> tirx.Stmt:
            value = cast_vector(column, acc, spec.dtype, side)
            group, inside = blocks.group(c, b * lanes + v0 + j)
            at = [group * blocks.outputs + o, lanes_at(inside * taps + k0, side)]
            return tirx.BufferStore(out, value, at)

        return transpose_into(rows, acc, emit, f"w{b}_{k0}_{v0}")

    def singly(c: Expr, o: Expr) -> tirx.Stmt:
        k, i = tirx.Var("k", "int32"), tirx.Var("i", "int32")
        read = tirx.BufferLoad(total, [c, k, i // lanes, o, i % lanes])
        column = k if blocks.depthwise else blocks.group(c, i)[1] * taps + k
        store = tirx.BufferStore(out, cast(read, acc, spec.dtype), [blocks.out_channel(c, 0, i, o), column])
        return serial(i, blocks.width, serial(k, taps, store))

    def writes(c: Expr, o: Expr) -> list[Any]:
        if blocks.depthwise:
            return [region(out, (c * blocks.width, blocks.width), (0, taps))]
        if blocks.groups > 1:
            rows = blocks.groups * blocks.outputs
            return [region(out, (c * rows, rows), (0, out.shape[1]))]
        group, inside = blocks.group(c, 0)
        return [region(out, group * blocks.outputs + o, (inside * taps, blocks.width * taps))]

    stage = block_nest(
        "grad_weight",
        [("c", blocks.count), ("o", blocks.outputs)],
        lambda c, o: [region(total, c, (0, taps), (0, blocks.vectors), o, (0, lanes))],
        writes,
        lambda c, o: _by_squares(blocks, lambda *at: square(c, o, *at), lambda: singly(c, o)),
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
