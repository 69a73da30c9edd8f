# SPDX-License-Identifier: Apache-2.0
"""Stages of the gradients on a GPU that add to the input's gradient in the device's memory, and its first and last."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING, Any

from tvm import tirx

from tvmdcn.te.fixed_point import add_fixed, from_fixed, unit_of
from tvmdcn.te.fragments import add_in_memory, address_of
from tvmdcn.te.nests import block_nest, region, sequence
from tvmdcn.te.products import column_units
from tvmdcn.te.sampling import on_border
from tvmdcn.te.tiles import ITEM_BYTES, cast
from tvmdcn.te.transposition import planes
from tvmdcn.te.vectors import broadcast, lanes_at

if TYPE_CHECKING:
    from tvmdcn.spec import DeformConv2dGradSpec

__all__ = ["added_at_once", "finish_image", "scatter", "zero_image"]

Expr = Any


def added_at_once(spec: DeformConv2dGradSpec) -> int:
    """Return how many channels one addition in memory takes: 16 bytes of float32; one float64, or fixed."""
    if spec.accumulator_dtype != "float32" or spec.deterministic:
        return 1
    return gcd(column_units(spec).channels, 4)


def zero_image(image: tirx.Buffer, name: str = "grad_zero") -> tirx.Stmt:
    """Return the stage `name`, which sets sums to zero."""
    pixels, channels = image.shape
    # TVM 0.27 writes only the first of two integers of 64 bits.
    vector = gcd(int(channels), 16 // ITEM_BYTES[str(image.dtype)]) if image.dtype != "int64" else 1

    def at(i: Expr, c: Expr) -> list[Any]:
        return [region(image, i, (c * vector, vector))]

    def body(i: Expr, c: Expr) -> tirx.Stmt:
        zero = broadcast(tirx.const(0, image.dtype), vector)
        return tirx.BufferStore(image, zero, [i.astype("int64"), lanes_at(c * vector, vector)])

    axes = [("i", pixels.astype("int32")), ("c", int(channels) // vector)]
    return block_nest(name, axes, lambda *_: [], at, body)


def scatter(
    spec: DeformConv2dGradSpec, at: Mapping[str, tirx.Buffer], image: tirx.Buffer, border_inside: bool
) -> tirx.Stmt:
    """Return the stage ``scatter``: each corner of a sample gets its share of the column gradient.

    It does not say that it writes the image: TVM lets a schedule move only what alone writes something, and this stays
    between the stages before and after it anyhow. Samples in the padding have no corner.
    """
    units, acc, vector = column_units(spec), spec.accumulator_dtype, added_at_once(spec)
    grads, place, share = (at[name] for name in ("column_grads", "place", "share"))
    fraction = at["fraction"] if border_inside else None
    add, fixed = add_in_memory(acc, vector), at.get("fixed")

    near = {
        buffer.name: tirx.decl_buffer((count,), buffer.dtype, name="near_" + buffer.name, scope="local")
        for buffer, count in ((place, 4), (share, 4), (fraction, 2))
        if buffer is not None
    }

    near_grads = tirx.decl_buffer((vector,), acc, name="near_grads", scope="local", data_alignment=16)

    def body(u: Expr, k: Expr, p: Expr, v: Expr) -> tirx.Stmt:
        o, c = u // units.of_offset_group, v * vector

        def load(buffer: tirx.Buffer, count: int) -> tirx.Stmt:
            whole = lanes_at(0, count)
            return tirx.BufferStore(near[buffer.name], tirx.BufferLoad(buffer, [o, k, p, whole]), [whole])

        whole = lanes_at(0, vector)
        code = [load(place, 4), load(share, 4)]
        code.append(tirx.BufferStore(near_grads, tirx.BufferLoad(grads, [u, k, p, lanes_at(c, vector)]), [whole]))
        value = tirx.BufferLoad(near_grads, [whole])
        for q in range(4):
            pixel = tirx.BufferLoad(near["place"], [q])
            part = value * broadcast(tirx.BufferLoad(near["share"], [q]), vector)
            target = address_of(image, pixel.astype("int64"), u * units.channels + c)
            there = pixel >= 0 if units.channels == units.width else tirx.all(pixel >= 0, c < units.channels)
            if fixed is None:
                addition = add(target, part)
            else:
                integer = address_of(fixed, pixel.astype("int64"), u * units.channels + c)
                addition = add_fixed(acc)(integer, target, part, unit_of(at["bounds"]))
            code.append(tirx.IfThenElse(there, addition, None))
        if not border_inside:
            return sequence(code)
        # The corners inside of a sample on the border have shares of 0, and 0 times an infinite gradient is NaN.
        fractions = [tirx.BufferLoad(near["fraction"], [axis]) for axis in (0, 1)]
        fresh = tirx.Not(on_border(fractions, acc))
        return sequence([load(fraction, 2), tirx.IfThenElse(fresh, sequence(code), None)])

    def reads(u: Expr, k: Expr, p: Expr, v: Expr) -> list[Any]:
        of_sample = (u // units.of_offset_group, k, p)
        found = [region(grads, u, k, p, (v * vector, vector)), region(place, *of_sample, (0, 4))]
        found.append(region(share, *of_sample, (0, 4)))
        return [*found, region(fraction, *of_sample, (0, 2))] if border_inside else found

    axes = [("u", units.count), ("k", spec.taps), ("p", grads.shape[2]), ("v", units.width // vector)]
    return block_nest("scatter", axes, reads, lambda *_: [], body, [*near.values(), near_grads])


def finish_image(spec: DeformConv2dGradSpec, at: Mapping[str, tirx.Buffer]) -> tirx.Stmt:
    """Return the stage ``grad_input``: from sums ``[N*H*W, Cin]`` to the result's layout and dtype."""
    sums, target, fixed, acc = at["grad_image"], at["grad_input"], at.get("fixed"), spec.accumulator_dtype

    def total(value: Expr, i: Expr, c: Expr) -> Expr:
        if fixed is not None:
            value = from_fixed(acc)(tirx.BufferLoad(fixed, [i, c]), value, unit_of(at["bounds"]))
        return cast(value, acc, spec.dtype)

    if spec.layout == "NCHW":
        return planes(sums, target, "grad_input", total)
    pixels, channels = sums.shape
    vector = gcd(int(channels), 16 // ITEM_BYTES[acc])
    near = tirx.decl_buffer((vector,), sums.dtype, name="near_sums", scope="local", data_alignment=16)
    stored = tirx.decl_buffer((vector,), target.dtype, name="stored_sums", scope="local", data_alignment=16)

    def body(i: Expr, c: Expr) -> tirx.Stmt:
        here, whole = [i.astype("int64"), lanes_at(c * vector, vector)], [lanes_at(0, vector)]
        converted = [
            tirx.BufferStore(stored, total(tirx.BufferLoad(near, [e]), here[0], c * vector + e), [e])
            for e in range(vector)
        ]
        return sequence(
            [
                tirx.BufferStore(near, tirx.BufferLoad(sums, here), whole),
                *converted,
                tirx.BufferStore(target, tirx.BufferLoad(stored, whole), here),
            ]
        )

    def part(buffer: tirx.Buffer) -> Any:
        return lambda i, c: [region(buffer, i, (c * vector, vector))]

    axes = [("i", pixels.astype("int32")), ("c", int(channels) // vector)]
    return block_nest("grad_input", axes, part(sums), part(target), body, [near, stored])
