# SPDX-License-Identifier: Apache-2.0
"""How columns and weight are multiplied on a GPU, and the weight in the order in which that is done.

The forward sums up over taps and input channels; the gradients of the columns over output channels, and there the input
channels are divided into units (`ColumnUnits`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from tvm import te, tirx
from tvm.s_tir import Schedule

from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec
from tvmdcn.te.fragments import LANES, TILE, TO_TF32, WORDS, Fragments, fragments_of
from tvmdcn.te.nests import with_alignment
from tvmdcn.te.tiles import ITEM_BYTES, cast

__all__ = [
    "ColumnUnits",
    "Product",
    "column_units",
    "pack_weight",
    "packed_dtype",
    "packed_shape",
    "padded",
    "product_of",
    "several_steps",
]

Expr = Any

# Fewer channels in a group are not worth a product of matrices: each thread sums up its own.
_LEAST_GROUP = 16


@dataclass(frozen=True)
class Product:
    """How columns and weight are multiplied.

    Attributes
    ----------
    kind : {"mma", "simt", "gather"}
        On tensor cores; by threads that share columns and weight; by threads that sample for themselves (grouped and
        depthwise layers).
    depth : int
        Channels of a group are padded with zeros to a multiple of this.
    width : int
        Likewise output channels of a group.
    fragments : Fragments or None
        Of the tensor cores.
    """

    kind: str
    depth: int
    width: int
    fragments: Fragments | None = None


def product_of(spec: DeformConv2dSpec) -> Product:
    """Return how a layer's product is made."""
    narrow = min(spec.in_channels, spec.out_channels) // spec.groups < _LEAST_GROUP
    if spec.groups > 1 and narrow:
        return Product("gather", 1, 1)
    if spec.dtype in ("float16", "bfloat16") or spec.tf32:
        fragments = fragments_of(spec.dtype)
        made = Product("mma", fragments.depth, TILE, fragments)
    else:
        made = Product("simt", 4, TILE)
    # Steps of the forward's sums are to be a loop: see `several_steps`.
    is_forward = not isinstance(spec, DeformConv2dGradSpec)
    if is_forward and spec.taps == 1 and spec.in_channels // spec.groups <= made.depth:
        return Product("gather", 1, 1)
    return made


def several_steps(spec: DeformConv2dSpec, steps: int, candidates: Sequence[int]) -> list[int]:
    """Return those of the candidates that divide `steps`, of a tap, and leave more than one in all.

    A loop of one step is none: TVM then sees a straight line, in which it gives an operand the room of the sampling
    plan while other threads still read that, for it knows nothing of asynchronous copies.
    """
    return [c for c in candidates if steps % c == 0 and spec.taps * steps > c]


def padded(value: int, multiple: int) -> int:
    """Return `value` rounded up."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class ColumnUnits:
    """How the input channels are divided for the gradients of the columns.

    A unit's channels lie side by side, in one offset group, and in one group but where each thread gathers.

    Attributes
    ----------
    count : int
        Units of all channels.
    channels : int
        Of a unit.
    width : int
        The same with those that fill it up for the product.
    depth : int
        Output channels of a group, likewise.
    of_offset_group : int
        Units of an offset group.
    of_group : int
        Units of a group; 0 where groups are smaller than units.
    """

    count: int
    channels: int
    width: int
    depth: int
    of_offset_group: int
    of_group: int


def column_units(spec: DeformConv2dSpec) -> ColumnUnits:
    """Return the units of a layer."""
    product = product_of(spec)
    in_group, together = spec.in_channels // spec.groups, spec.in_channels // spec.offset_groups
    per_group = spec.out_channels // spec.groups
    if product.kind == "gather":
        return ColumnUnits(spec.offset_groups, together, together, per_group, 1, 0)
    channels = gcd(in_group, together)
    # Sums run over output channels here, in steps of what they are for input channels in the forward.
    width, depth = padded(channels, TILE), padded(per_group, product.depth)
    return ColumnUnits(spec.in_channels // channels, channels, width, depth, together // channels, in_group // channels)


def packed_shape(spec: DeformConv2dSpec) -> tuple[int, ...]:
    """Return the shape of the packed weight.

    * mma: (groups, taps, channel blocks, output blocks, lanes, words), each lane's share of a 16-column operand side by
      side;
    * simt: (groups, taps, channels of a group, output channels of a group in vectors of 16 bytes, their elements);
    * gather: (taps, channels of a group, output channels of a group, groups), so that threads side by side, which work
      on neighbouring groups, read side by side.

    For gradients:

    * mma: (units, taps, blocks of the output channels of a group, blocks of the channels of a unit, lanes, words);
    * simt: (units, taps, output channels of a group, channels of a unit in vectors of 16 bytes, their elements);
    * gather: (taps, output channels of a group, channels).
    """
    product = product_of(spec)
    if isinstance(spec, DeformConv2dGradSpec):
        units = column_units(spec)
        outer, depth, width = units.count, units.depth, units.width
        if product.kind == "gather":
            return (spec.taps, depth, spec.in_channels)
    else:
        outer, depth = spec.groups, padded(spec.in_channels // spec.groups, product.depth)
        width = padded(spec.out_channels // spec.groups, product.width)
        if product.kind == "gather":
            return (spec.taps, depth, width, spec.groups)
    if product.fragments is not None:
        return (outer, spec.taps, depth // product.fragments.depth, width // TILE, LANES, WORDS)
    vector = 16 // ITEM_BYTES[spec.dtype]
    return (outer, spec.taps, depth, width // vector, vector)


def packed_dtype(spec: DeformConv2dSpec) -> str:
    """Return the dtype of the packed weight: that of sums, or words of 32 bits for tensor cores."""
    return spec.accumulator_dtype if product_of(spec).fragments is None else "uint32"


def _element(spec: DeformConv2dSpec, weight: te.Tensor) -> Callable[..., Expr]:
    """Return the weight at (group, tap, input channel, output channel); zeros fill up the channels of a group."""
    in_group, per_group = spec.in_channels // spec.groups, spec.out_channels // spec.groups

    def element(g: Expr, k: Expr, c: Expr, o: Expr) -> Expr:
        row = g * per_group + te.min(o, per_group - 1)
        value = weight[row, te.min(c, in_group - 1) * spec.taps + k]
        return tirx.Select(tirx.all(c < in_group, o < per_group), value, tirx.const(0.0, spec.dtype))

    return element


def _column_element(spec: DeformConv2dSpec, weight: te.Tensor) -> Callable[..., Expr]:
    """Return the weight at (unit, tap, output channel of the group, channel of the unit); zeros fill them up."""
    in_group, per_group = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    units = column_units(spec)

    def element(u: Expr, k: Expr, o: Expr, c: Expr) -> Expr:
        channel = u * units.channels + te.min(c, units.channels - 1)
        g = channel // in_group
        value = weight[g * per_group + te.min(o, per_group - 1), (channel - g * in_group) * spec.taps + k]
        return tirx.Select(tirx.all(c < units.channels, o < per_group), value, tirx.const(0.0, spec.dtype))

    return element


def pack_weight(spec: DeformConv2dSpec) -> tirx.PrimFunc:
    """Return ``pack_weight(weight, packed)`` as TIR, with its threads.

    From ``[Cout, Cin/groups*K]``, the weight as a matrix, to `packed_shape`; what fills up channels is zeros.
    """
    product, taps = product_of(spec), spec.taps
    weight = te.placeholder((spec.out_channels, spec.in_channels // spec.groups * taps), spec.dtype, name="weight")
    element = _column_element(spec, weight) if isinstance(spec, DeformConv2dGradSpec) else _element(spec, weight)

    def word(*at: Expr) -> Expr:
        g, k, s, block, lane, number = at
        fragments = product.fragments
        assert fragments is not None
        parts = []
        for part in range(fragments.packing):
            row, column = fragments.right_element(lane, number, part)
            value = element(g, k, s * fragments.depth + row, block * TILE + column)
            if fragments.packing == 1:
                return tirx.reinterpret("uint32", TO_TF32(value))
            parts.append(tirx.reinterpret("uint16", value).astype("uint32"))
        return parts[0] | (parts[1] << tirx.const(16, "uint32"))

    def number(*at: Expr) -> Expr:
        if product.kind == "gather" and isinstance(spec, DeformConv2dGradSpec):
            k, o, channel = at
            in_unit = column_units(spec).channels
            return cast(element(channel // in_unit, k, o, channel % in_unit), spec.dtype, spec.accumulator_dtype)
        if product.kind == "gather":
            k, c, o, g = at
        else:
            g, k, c, vector, lane = at
            o = vector * (16 // ITEM_BYTES[spec.dtype]) + lane
        return cast(element(g, k, c, o), spec.dtype, spec.accumulator_dtype)

    compute = number if product.fragments is None else word
    packed = te.compute(packed_shape(spec), compute, name="packed")
    func = with_alignment(te.create_prim_func([weight, packed]), {"weight": ITEM_BYTES[spec.dtype]})
    sch = Schedule(func)
    loop = sch.fuse(*sch.get_loops(sch.get_sblock("packed")))
    blocks, threads = sch.split(loop, [None, 256])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(threads, "threadIdx.x")
    return sch.mod["main"]
