# SPDX-License-Identifier: Apache-2.0
"""The stage of the gradients that walks over the corners of samples, and the one that puts its sums in their place.

Each corner of the image is read once, and does all it is needed for: it is multiplied with the column gradient for
offset and mask, becomes part of the sample for the weight, and gets its share of the column gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from tvm import te, tirx

from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.te.channel_blocks import ChannelBlocks
from tvmdcn.te.image_rows import somewhere
from tvmdcn.te.nests import TOKEN, block_nest, region, sequence, serial
from tvmdcn.te.sampling import derivatives, on_border
from tvmdcn.te.tiles import GRANULE, ITEM_BYTES, Tiles
from tvmdcn.te.vectors import broadcast, cast_vector, lanes_at, merge_lanes, strips, sum_lanes, vector_dtype

__all__ = ["part_buffers", "samples_stage", "store_places"]

Expr = Any

_CORNERS = ["".join(map(str, bits)) for bits in product((0, 1), repeat=2)]
_PARTS = ("mask_part", "place_0_part", "place_1_part")
_UNROLLED_TAPS = 9


def part_buffers(spec: DeformConv2dGradSpec, tiles: Tiles, blocks: ChannelBlocks) -> dict[str, tirx.Buffer]:
    """Return where each block of channels puts its sums for the gradients of mask and place: [N, block, tap, pixel]."""
    if not spec.grad_offset:
        return {}
    shape = (tiles.batch, blocks.count, spec.taps, tiles.pixels)
    names = _PARTS if spec.mask else _PARTS[1:]
    return {name: tirx.decl_buffer(shape, spec.accumulator_dtype, name=name) for name in names}


class _Samples:
    """The code for one unit and block of channels."""

    def __init__(
        self,
        spec: DeformConv2dGradSpec,
        tiles: Tiles,
        blocks: ChannelBlocks,
        buffers: Mapping[str, tirx.Buffer],
        parts: Mapping[str, tirx.Buffer],
    ) -> None:
        self.spec, self.tiles, self.blocks, self.buffers, self.parts = spec, tiles, blocks, buffers, parts
        self.acc, self.lanes = spec.accumulator_dtype, blocks.lanes
        self.border_inside = spec.grad_offset and spec.border == "torchvision"
        # Sums over channels of the four corners, side by side in a vector; what is left of a corner's lanes is added
        # up for several pixels at once.
        self.lanes_left = max(self.lanes // len(_CORNERS), 1)
        shape = (spec.taps, GRANULE, self.lanes_left * len(_CORNERS))
        self.scratch = tirx.decl_buffer(shape, self.acc, name="lane_sums")

    def body(self, c: Expr, t: Expr, u: Expr) -> tirx.Stmt:
        """Return the walk over the pixels, then the sums."""
        i, row, k_sums = (tirx.Var(name, "int32") for name in ("i", "row", "k_sums"))
        taps, width = self.spec.taps, self.spec.kernel_size[1]

        def unrolled(first: Expr, count: int) -> tirx.Stmt:
            return sequence([stmt for k in range(count) for stmt in self._pixel(c, t, u, first + k, i)])

        # Taps that are numbers save the registers that would point to their parts of the plan, of which a loop spills
        # twelve: the samples of r50_c3 take 1.66 ms instead of 1.84 (Zen 5, one thread, 2026-11-23).
        whole = taps <= _UNROLLED_TAPS
        pixel = unrolled(0, taps) if whole else serial(row, taps // width, unrolled(row * width, width))
        stages = [serial(i, GRANULE, pixel)]
        if self.spec.grad_offset:
            stages.append(serial(k_sums, taps, sequence(self._sums(c, t, u, k_sums))))
        return sequence(stages)

    def _pixel(self, c: Expr, t: Expr, u: Expr, k: Expr, i: Expr) -> list[tirx.Stmt]:
        spec, lanes, acc, buffers = self.spec, self.lanes, self.acc, self.buffers
        n, at = t // self.tiles.tiles, [c // self.blocks.of_offset_group, k, t, u, i]
        vector = vector_dtype(acc, lanes)
        code: list[tirx.Stmt] = []

        def bind(name: str, value: Expr, dtype: str) -> Expr:
            var = tirx.Var(name, dtype)
            code.append(tirx.Bind(var, value))
            return var

        first = bind("at", tirx.BufferLoad(buffers["index"], at).astype("int64"), "int64")
        steps = [self.tiles.frame.step(corner) * self.blocks.pitch for corner in product((0, 1), repeat=2)]
        index = [bind(f"at_{name}", first + step, "int64") for name, step in zip(_CORNERS, steps, strict=True)]
        share = []
        if spec.grad_input or spec.grad_weight:
            share = [
                broadcast(bind(f"share_{name}", tirx.BufferLoad(buffers[f"weight_{name}"], at), acc), lanes)
                for name in _CORNERS
            ]
        sums: list[Expr] = []
        once: list[tirx.Stmt] = []  # not for pixels that an earlier unit has done
        again: list[tirx.Stmt] = []
        for b in range(self.blocks.vectors):
            places = [[c, n, lanes_at(first + b * lanes, lanes)] for first in index]
            here = [c, t, u, k, i, b, lanes_at(0, lanes)]
            corners, gradient = [], None
            if spec.grad_input or spec.grad_offset:
                gradient = bind(f"gradient_{b}", tirx.BufferLoad(buffers["grad_columns"], here), vector)
            if spec.grad_offset or spec.grad_weight:
                corners = [
                    bind(f"corner_{name}_{b}", tirx.BufferLoad(buffers["image"], place), vector)
                    for name, place in zip(_CORNERS, places, strict=True)
                ]
            if spec.grad_offset:
                terms = [gradient * corner for corner in corners]
                terms = [old + term for old, term in zip(sums, terms, strict=True)] if sums else terms
                sums = [bind(f"sum_{name}_{b}", term, vector) for name, term in zip(_CORNERS, terms, strict=True)]
            if spec.grad_weight:
                sample = corners[0] * share[0]
                for corner, weight in zip(corners[1:], share[1:], strict=True):
                    sample = sample + corner * weight
                once.append(tirx.BufferStore(buffers["columns"], sample, here))
                again.append(tirx.BufferStore(buffers["columns"], broadcast(tirx.const(0.0, acc), lanes), here))
            if spec.grad_input:
                for place, weight in zip(places, share, strict=True):
                    old = tirx.BufferLoad(buffers["grad_image"], place)
                    once.append(tirx.BufferStore(buffers["grad_image"], old + weight * gradient, place))
        if sums:
            code += self._store_sums(sums, k, i)
        if once:
            fresh = i >= self.tiles.repeated(t, u)
            if self.border_inside:
                fractions = [tirx.BufferLoad(buffers[f"fraction_{axis}"], at) for axis in (0, 1)]
                fresh = tirx.all(fresh, tirx.Not(on_border(fractions, acc)))
            code.append(tirx.IfThenElse(fresh, sequence(once), sequence(again) if again else None))
        return code

    def _store_sums(self, sums: list[Expr], k: Expr, i: Expr) -> list[tirx.Stmt]:
        """Return the code that puts the corners' sums side by side, with as many lanes as fit."""
        if self.lanes >= len(_CORNERS):
            binds, together = merge_lanes(sums, self.acc, self.lanes, "corners")
            return [*binds, tirx.BufferStore(self.scratch, together, [k, i, lanes_at(0, self.lanes)])]
        stores = []
        for j, value in enumerate(sums):
            binds, single = sum_lanes(value, self.acc, self.lanes, f"corner_{j}")
            stores += [*binds, tirx.BufferStore(self.scratch, single, [k, i, j])]
        return stores

    def _sums(self, c: Expr, t: Expr, u: Expr, k: Expr) -> list[tirx.Stmt]:
        """Return the code that adds up the lanes, and makes derivatives of the sums; vectors along pixels."""
        buffers, acc = self.buffers, self.acc
        # Through memory: TVM would see a bounded region of the parts, and shift them by its (wrong) begin.
        row, column = (tirx.BufferLoad(buffers[f"pixel_{axis}"], [t, u, 0]) for axis in (0, 1))
        first_pixel = row * self.tiles.out_width + column
        code: list[tirx.Stmt] = []
        side, width = self.lanes_left, self.lanes_left * len(_CORNERS)
        for first in range(0, GRANULE, side):
            rows = [tirx.BufferLoad(self.scratch, [k, first + r, lanes_at(0, width)]) for r in range(side)]
            binds, together = merge_lanes(rows, acc, width, f"pixels_{first}", within=side)
            code += binds
            totals = [
                together if width == 1 else tirx.Shuffle([together], list(range(j * side, (j + 1) * side)))
                for j in range(len(_CORNERS))
            ]
            at = [c // self.blocks.of_offset_group, k, t, u, lanes_at(first, side)]
            fractions = [tirx.BufferLoad(buffers[f"fraction_{axis}"], at) for axis in (0, 1)]
            found = derivatives(fractions, totals, broadcast(tirx.const(1.0, acc), side))
            if self.border_inside:
                zero = broadcast(tirx.const(0.0, acc), side)
                found[0] = tirx.Select(on_border(fractions, acc, side), zero, found[0])
            place = [t // self.tiles.tiles, c, k, lanes_at(first_pixel + first, side)]
            for name, value in zip(_PARTS, found, strict=True):
                if name in self.parts:
                    code.append(tirx.BufferStore(self.parts[name], value, place))
        return code

    def reads(self, c: Expr, t: Expr, u: Expr) -> list[Any]:
        """Return the regions read."""
        spec, buffers = self.spec, self.buffers
        names = ["index"]
        if spec.grad_input or spec.grad_weight:
            names += [f"weight_{name}" for name in _CORNERS]
        if spec.grad_offset:
            names += ["fraction_0", "fraction_1"]
        group, taps = c // self.blocks.of_offset_group, (0, spec.taps)
        found = [region(buffers[name], group, taps, t, u, (0, GRANULE)) for name in names]
        if spec.grad_offset:
            found += [region(buffers[f"pixel_{axis}"], t, u, 0) for axis in (0, 1)]
        if spec.grad_input or spec.grad_offset:
            vectors = (0, self.blocks.vectors), (0, self.lanes)
            found.append(region(buffers["grad_columns"], c, t, u, taps, (0, GRANULE), *vectors))
        if spec.grad_offset or spec.grad_weight:
            found.append(somewhere(buffers["image"], c))
        return found

    def writes(self, c: Expr, t: Expr, u: Expr) -> list[Any]:
        """Return the regions written; of what is added to, or lies scattered, a token."""
        found = [region(part, *[TOKEN] * 4) for part in self.parts.values()]
        if self.spec.grad_input:
            found.append(somewhere(self.buffers["grad_image"], c))
        if self.spec.grad_weight:
            vectors = (0, self.blocks.vectors), (0, self.lanes)
            found.append(region(self.buffers["columns"], c, t, u, (0, self.spec.taps), (0, GRANULE), *vectors))
        return found


def samples_stage(
    spec: DeformConv2dGradSpec,
    tiles: Tiles,
    blocks: ChannelBlocks,
    buffers: Mapping[str, tirx.Buffer],
    parts: Mapping[str, tirx.Buffer],
) -> tirx.Stmt:
    """Return the stage ``samples``, one unit and block of channels at a time.

    All taps of a pixel come before the next pixel: their corners lie within a few pixels of each other, and of those of
    the next, so that most of them are in the first-level cache.

    Parameters
    ----------
    spec : DeformConv2dGradSpec
    tiles : Tiles
    blocks : ChannelBlocks
    buffers : mapping of str to Buffer
        The sampling plan, ``grad_columns``, ``image``, ``grad_image`` and ``columns``, as far as they are needed.
    parts : mapping of str to Buffer
        See `part_buffers`.
    """
    code = _Samples(spec, tiles, blocks, buffers, parts)
    extents = [("c", blocks.count), ("t", tiles.tasks), ("u", tiles.tile_units)]
    scratch = [code.scratch] if spec.grad_offset else []
    return block_nest("samples", extents, code.reads, code.writes, code.body, scratch)


def store_places(
    spec: DeformConv2dGradSpec,
    tiles: Tiles,
    blocks: ChannelBlocks,
    mask: tirx.Buffer | None,
    parts: Mapping[str, tirx.Buffer],
    lanes: int,
) -> tuple[dict[str, tirx.Buffer], tirx.Stmt]:
    """Return ``grad_offset`` and ``grad_mask``, and the stage that adds up for them what the blocks found."""
    acc, taps, count = spec.accumulator_dtype, spec.taps, blocks.of_offset_group
    results = {
        name: tirx.decl_buffer(
            tiles.plane(each * spec.offset_groups * taps, tiles.pixels),
            spec.dtype,
            name=name,
            data_alignment=ITEM_BYTES[spec.dtype],
        )
        for name, each in (("grad_offset", 2), ("grad_mask", 1))
        if name in spec.outputs
    }

    def first_pixel(q: Expr) -> Expr:
        return te.min(q * GRANULE, tiles.pixels - GRANULE)

    def pixels_of(buffer: tirx.Buffer, n: Expr, channels: Any, q: Expr) -> Any:
        return region(buffer, *tiles.index(n, channels, (first_pixel(q), GRANULE)))

    def body(n: Expr, q: Expr, o: Expr, k: Expr) -> tirx.Stmt:
        stores = []
        for name, part in parts.items():
            channel = (o * taps + k) * 2 + int(name[6]) if name != "mask_part" else o * taps + k
            target = results["grad_mask" if name == "mask_part" else "grad_offset"]
            for start, side in strips(GRANULE, lanes if tiles.nchw else 1):
                place = lanes_at(first_pixel(q) + start, side)
                value = tirx.BufferLoad(part, [n, o * count, k, place])
                for b in range(1, count):
                    value = value + tirx.BufferLoad(part, [n, o * count + b, k, place])
                if name != "mask_part" and mask is not None:
                    factor = tirx.BufferLoad(mask, tiles.index(n, o * taps + k, place))
                    value = value * cast_vector(factor, spec.dtype, acc, side)
                value = cast_vector(value, acc, spec.dtype, side)
                stores.append(tirx.BufferStore(target, value, tiles.index(n, channel, place)))
        return sequence(stores)

    def reads(n: Expr, q: Expr, o: Expr, k: Expr) -> list[Any]:
        found = [region(part, *[TOKEN] * 4) for part in parts.values()]
        return found if mask is None else [*found, pixels_of(mask, n, o * taps + k, q)]

    def writes(n: Expr, q: Expr, o: Expr, k: Expr) -> list[Any]:
        found = [pixels_of(results["grad_offset"], n, ((o * taps + k) * 2, 2), q)]
        return found + ([pixels_of(results["grad_mask"], n, o * taps + k, q)] if "grad_mask" in results else [])

    units = (tiles.pixels + GRANULE - 1) // GRANULE
    extents = [("n", tiles.batch), ("q", units), ("o", spec.offset_groups), ("k", taps)]
    return results, block_nest("grad_offset", extents, reads, writes, body)
