# SPDX-License-Identifier: Apache-2.0
"""The gradients of input, offset and mask on a GPU: the columns' gradients, and what is done with them at once.

    column_grads[tap, pixel, channel] = sum over output channels of rows[pixel, output] * weight[output, channel, tap]

A block of threads makes these for a tile of pixels, some taps and the channels of one offset group, one tile of
channels after the other, and brings each to shared memory. Warps then walk over the corners of the samples, threads
side by side along channels: they add to the input's gradient in the device's memory, and sum up the products with the
image at the corners. Those sums belong to one block of threads, so the gradients of offset and mask do not depend on
any order.

Stages, in order, those that are needed: ``grad_zero``, the sampling (`device_sampling.Samples`, without samples of
the image), ``fraction``, ``near_rows``, ``weights``, ``left`` and ``product`` (of which a thread that gathers needs
only the last), ``column_grads``, ``scatter``, ``corner_sums``, ``grad_offset``, ``grad_input``. Their names are the
contract with `schedules/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd
from typing import TYPE_CHECKING, Any

from tvm import te, tirx
from tvm.s_tir.stmt import SBlock

from tvmdcn.te.device_sampling import PIXELS, PixelAxes, Samples
from tvmdcn.te.fixed_point import bound_stages
from tvmdcn.te.fragments import COPY_16, LANES, SEEN, TILE, WORDS, address_of, sum_corners, sum_lanes
from tvmdcn.te.multiply import Operand, copy_weight, load_left, multiply_fragments, reduction, spread
from tvmdcn.te.nests import TOKEN, block_name, block_nest, region, sequence
from tvmdcn.te.products import column_units, product_of
from tvmdcn.te.sampling import derivatives, on_border
from tvmdcn.te.scattering import finish_image, scatter, zero_image
from tvmdcn.te.tiles import ITEM_BYTES, cast
from tvmdcn.te.transposition import Registers
from tvmdcn.te.vectors import broadcast, lanes_at

if TYPE_CHECKING:
    from tvmdcn.spec import DeformConv2dGradSpec
    from tvmdcn.te.implicit_gemm_grad import GradCall

__all__ = ["ColumnGradients", "beside", "vector_of"]

Expr = Any

_SIDE_CHANNELS = 64
"""The most channels of a pixel that threads side by side read at once."""


def vector_of(spec: DeformConv2dGradSpec) -> int:
    """Return how many channels of the image a thread reads at once."""
    return gcd(column_units(spec).channels, 16 // ITEM_BYTES[spec.dtype])


def beside(spec: DeformConv2dGradSpec) -> int:
    """Return how many threads side by side read the channels of a corner: a power of two."""
    vector = vector_of(spec)
    return gcd(column_units(spec).width // vector, min(_SIDE_CHANNELS // vector, LANES))


class ColumnGradients:
    """A part of the gradients, see `implicit_gemm_grad.Part`.

    Parameters
    ----------
    call : GradCall
    """

    def __init__(self, call: GradCall) -> None:
        self.spec, self.acc, self.nchw = call.spec, call.acc, call.nchw
        self.units, self.product = column_units(call.spec), product_of(call.spec)
        self.buffers: list[tirx.Buffer] = []
        self.border_inside = call.spec.grad_offset and call.spec.border == "torchvision"
        offset, mask = call.tensors["offset"], call.tensors.get("mask")
        axes = PixelAxes((call.sizes["tiles"] * PIXELS,), lambda p: p)
        self.samples = Samples(
            call.spec, call.sizes, axes, offset, mask, border_inside=self.border_inside, no_padding=True
        )

    def tensors(self) -> list[te.Tensor]:
        """Return the sampling plan, as far as it is needed."""
        found = [self.samples.place]
        if self.spec.grad_input:
            found.append(self.samples.share)
        if self.spec.grad_offset:
            low, high = self.samples.plan.fractions
            shape = (*self.samples.place.shape[:-1], 2)
            found.append(
                te.compute(shape, lambda *i: tirx.Select(i[-1] == 0, low(*i[:-1]), high(*i[:-1])), name="fraction")
            )
        return found

    def stages(self, staged: tirx.PrimFunc, buffers: Mapping[str, tirx.Buffer]) -> list[tirx.Stmt]:
        """Return the stages."""
        body = staged.body.block.body
        nests = list(body) if isinstance(body, tirx.SeqStmt) else [body]
        plan = [nest for nest in nests if not block_name(nest).startswith(("weight_grad_", "bias_grad_"))]
        at = dict(buffers)
        taps, extent = self.spec.taps, at["tiles"] * PIXELS
        at["column_grads"] = self._declare("column_grads", (self.units.count, taps, extent, self.units.width), self.acc)
        found = [*plan, *{"mma": self._fragments, "simt": self._adds, "gather": self._gathers}[self.product.kind](at)]
        if self.spec.grad_input:
            image = at["grad_image"] if "grad_image" in at else at["grad_input"]
            found.insert(0, zero_image(image))
            if self.spec.deterministic:
                found[1:1] = [zero_image(at["fixed"], "fixed_zero"), *bound_stages(self.spec, at)]
            found.append(scatter(self.spec, at, image, self.border_inside))
        if self.spec.grad_offset:
            at["corner_sums"] = self._declare("corner_sums", (self.spec.offset_groups, taps, extent, 4), self.acc)
            found += [self._corner_sums(at), self._grad_offset(at)]
        if self.spec.grad_input and "grad_image" in at:
            found.append(finish_image(self.spec, at))
        return found

    def _declare(self, name: str, shape: tuple[Expr, ...], dtype: str) -> tirx.Buffer:
        buffer = tirx.decl_buffer(shape, dtype, name=name, data_alignment=16)
        self.buffers.append(buffer)
        return buffer

    @staticmethod
    def _anywhere(at: Mapping[str, tirx.Buffer], buffer: tirx.Buffer) -> Any:
        """Return the region of a channels-last copy that its readers name: one element for each image, see TOKEN."""
        return region(buffer, (0, at["offset"].shape[0].astype("int32")), TOKEN)

    # --- the product -----------------------------------------------------------------------------------------

    def _operands(self, at: dict[str, tirx.Buffer]) -> list[tirx.Stmt]:
        """Return the stages that bring both operands to shared memory."""
        extent, weight = at["column_grads"].shape[2], at["weight"]
        at["near_rows"] = self._declare("near_rows", (self.units.count, extent, self.units.depth), self.spec.dtype)
        at["weights"] = self._declare("weights", tuple(weight.shape), str(weight.dtype))
        return [self._near_rows(at), copy_weight(weight, at["weights"])]

    def _near_rows(self, at: Mapping[str, tirx.Buffer]) -> tirx.Stmt:
        """Return the stage ``near_rows``; rows of the padding repeat the last."""
        rows, near, total = at["rows"], at["near_rows"], at["total"]
        per_group, dtype = self.spec.out_channels // self.spec.groups, self.spec.dtype
        vector = copied_at_once(self.spec)

        def body(u: Expr, p: Expr, v: Expr) -> tirx.Stmt:
            row, first = te.min(p, total - 1).astype("int64"), u // self.units.of_group * per_group
            if vector > 1:
                return COPY_16(address_of(near, u, p, v * vector), address_of(rows, row, first + v * vector))
            value = tirx.BufferLoad(rows, [row, first + v])
            if per_group != self.units.depth:
                value = tirx.if_then_else(v < per_group, value, tirx.const(0.0, dtype))
            return tirx.BufferStore(near, value, [u, p, v])

        return block_nest(
            "near_rows",
            [("u", self.units.count), ("p", near.shape[1]), ("v", self.units.depth // vector)],
            lambda *_: [self._anywhere(at, rows)],
            lambda u, p, v: [region(near, u, p, (v * vector, vector))],
            body,
        )

    def _fragments(self, at: dict[str, tirx.Buffer]) -> list[tirx.Stmt]:
        """Return the product on tensor cores."""
        fragments, units, taps = self.product.fragments, self.units, self.spec.taps
        assert fragments is not None
        tiles = at["tiles"] * (PIXELS // TILE)
        found = self._operands(at)
        shape = (units.count, tiles, units.depth // fragments.depth, LANES, WORDS)
        left = self._declare("left", shape, "uint32")
        sums = self._declare("sums", (units.count, taps, tiles, units.width // TILE, LANES, 8), self.acc)
        return [
            *found,
            load_left(at["near_rows"], left, fragments, copied=True),
            multiply_fragments(
                Operand(left, ("u", "r", "s")),
                Operand(at["weights"], ("u", "k", "s", "c")),
                Operand(sums, ("u", "k", "r", "c")),
                ("s",),
                fragments,
                copied=Operand(at["near_rows"], ("u", "r", "s")),
            ),
            spread(sums, at["column_grads"], fragments, "column_grads"),
        ]

    def _adds(self, at: dict[str, tirx.Buffer]) -> list[tirx.Stmt]:
        """Return the product by multiply-adds of operands in shared memory."""
        found, vector = self._operands(at), int(at["weight"].shape[-1])
        near, weights = at["near_rows"], at["weights"]

        def factors(u: Expr, k: Expr, p: Expr, c: Expr, o: Expr) -> list[tuple[tirx.Buffer, list[Expr]]]:
            return [(near, [u, p, o]), (weights, [u, k, o, c // vector, c % vector])]

        return [*found, *self._plain(at, factors)]

    def _gathers(self, at: dict[str, tirx.Buffer]) -> list[tirx.Stmt]:
        """Return the product of a thread by itself."""
        spec, rows, weight, total = self.spec, at["rows"], at["weight"], at["total"]
        in_group, per_group = spec.in_channels // spec.groups, spec.out_channels // spec.groups

        def factors(u: Expr, k: Expr, p: Expr, c: Expr, o: Expr) -> list[tuple[tirx.Buffer, list[Expr]]]:
            channel, row = u * self.units.channels + c, te.min(p, total - 1).astype("int64")
            return [(rows, [row, channel // in_group * per_group + o]), (weight, [k, o, channel])]

        return self._plain(at, factors)

    def _plain(
        self,
        at: dict[str, tirx.Buffer],
        factors: Callable[..., list[tuple[tirx.Buffer, list[Expr]]]],
    ) -> list[tirx.Stmt]:
        """Return ``product``, sums of products of two factors, and the stage that copies them."""
        result, dtype = at["column_grads"], self.spec.dtype
        shape = tuple(result.shape)
        sums = self._declare("sums", shape, self.acc)

        def make(name: str, iters: list[Any], u: Expr, k: Expr, p: Expr, c: Expr, o: Expr) -> SBlock:
            here, ((left, of_left), (right, of_right)) = [u, k, p, c], factors(u, k, p, c, o)
            term = cast(tirx.BufferLoad(left, of_left), dtype, self.acc) * tirx.BufferLoad(right, of_right)
            body = tirx.BufferStore(sums, tirx.BufferLoad(sums, here) + term, here)
            init = tirx.BufferStore(sums, tirx.const(0.0, self.acc), here)
            of_rows = self._anywhere(at, left) if left.name == "rows" else region(left, *of_left)
            reads = [region(sums, *here), of_rows, region(right, *of_right)]
            return SBlock(iters, reads, [region(sums, *here)], name, body, init)

        axes = list(zip("ukpc", shape, strict=True))
        depth = self.units.depth
        return [
            reduction("product", [*((*axis, False) for axis in axes), ("o", depth, True)], make),
            block_nest(
                "column_grads",
                axes,
                lambda *i: [region(sums, *i)],
                lambda *i: [region(result, *i)],
                lambda *i: tirx.BufferStore(result, tirx.BufferLoad(sums, list(i)), list(i)),
            ),
        ]

    # --- offset and mask -------------------------------------------------------------------------------------

    def _corner_sums(self, at: Mapping[str, tirx.Buffer]) -> tirx.Stmt:
        """Return the stage ``corner_sums``: column gradients times the image at the corners, summed over channels.

        Each execution is a thread's; `beside` of them add up what they found.
        """
        spec, acc, units = self.spec, self.acc, self.units
        image, grads, place, sums = (at[name] for name in ("image", "column_grads", "place", "corner_sums"))
        vector, together = vector_of(spec), beside(spec)
        most = min(vector, 16 // ITEM_BYTES[acc])  # elements of a load from shared memory
        corner = tirx.decl_buffer((4 * vector,), spec.dtype, name="corner", scope="local", data_alignment=16)
        near = tirx.decl_buffer((vector,), acc, name="near_grads", scope="local", data_alignment=16)
        parts = tirx.decl_buffer((4,), acc, name="corner_parts", scope="local")
        near_place = tirx.decl_buffer((4,), "int32", name="near_places", scope="local")
        # Four lanes or more share out the corners.
        apart, add_up = together >= 4, sum_corners(acc) if together >= 4 else sum_lanes(acc)

        def body(u: Expr, k: Expr, p: Expr, v: Expr, lane: Expr) -> tirx.Stmt:
            o, c = u // units.of_offset_group, (v * together + lane) * vector
            places = [tirx.BufferLoad(near_place, [q]) for q in range(4)]
            there = [
                found >= 0 if units.channels == units.width else tirx.all(found >= 0, c < units.channels)
                for found in places
            ]
            whole = lanes_at(0, 4)
            code = [tirx.BufferStore(near_place, tirx.BufferLoad(place, [o, k, p, whole]), [whole])]
            for q in range(4):
                target = [lanes_at(q * vector, vector)]
                value = tirx.BufferLoad(image, [places[q].astype("int64"), lanes_at(u * units.channels + c, vector)])
                zero = broadcast(tirx.const(0.0, spec.dtype), vector)
                load, missing = tirx.BufferStore(corner, value, target), tirx.BufferStore(corner, zero, target)
                code.append(tirx.IfThenElse(there[q], load, missing))
            for first in range(0, vector, most):
                value = tirx.BufferLoad(grads, [u, k, p, lanes_at(c + first, most)])
                code.append(tirx.BufferStore(near, value, [lanes_at(first, most)]))
            for q in range(4):
                terms = [
                    tirx.BufferLoad(near, [e]) * cast(tirx.BufferLoad(corner, [q * vector + e]), spec.dtype, acc)
                    for e in range(vector)
                ]
                total = terms[0]
                for term in terms[1:]:
                    total = total + term
                # A corner outside adds nothing, whatever the output's gradient is.
                code.append(tirx.BufferStore(parts, tirx.Select(there[q], total, tirx.const(0.0, acc)), [q]))
            found = [tirx.BufferLoad(parts, [q]) for q in range(4)]
            first = tirx.all(u % units.of_offset_group == 0, v == 0)

            def keep(q: Expr, value: Expr) -> tirx.Stmt:
                old = tirx.if_then_else(first, tirx.const(0.0, acc), tirx.BufferLoad(sums, [o, k, p, q]))
                return tirx.BufferStore(sums, old + value, [o, k, p, q])

            if apart:
                code.append(tirx.BufferStore(parts, add_up(*found, lane, together), [0]))
                code.append(tirx.IfThenElse(lane < 4, keep(lane, found[0]), None))
            else:
                if together > 1:
                    code += [tirx.BufferStore(parts, add_up(found[q], together), [q]) for q in range(4)]
                kept = sequence([keep(q, found[q]) for q in range(4)])
                code.append(tirx.IfThenElse(lane == 0, kept, None) if together > 1 else kept)
            # Or TVM might put the sums where other threads still read.
            code += [SEEN(tirx.BufferLoad(place, [o, k, p, 0])), SEEN(tirx.BufferLoad(grads, [u, k, p, c]))]
            return sequence(code)

        def reads(u: Expr, k: Expr, p: Expr, v: Expr, lane: Expr) -> list[Any]:
            size = together * vector
            return [
                region(grads, u, k, p, (v * size, size)),
                region(place, u // units.of_offset_group, k, p, (0, 4)),
                self._anywhere(at, image),
            ]

        return block_nest(
            "corner_sums",
            [
                ("u", units.count),
                ("k", spec.taps),
                ("p", grads.shape[2]),
                ("v", units.width // (together * vector)),
                ("lane", together),
            ],
            reads,
            lambda u, k, p, *_: [region(sums, u // units.of_offset_group, k, p, (0, 4))],
            body,
            [corner, near, parts, near_place],
        )

    def _grad_offset(self, at: Mapping[str, tirx.Buffer]) -> tirx.Stmt:
        """Return the stage ``grad_offset``: from the corners' sums to the gradients of offset and mask."""
        spec, acc, taps = self.spec, self.acc, self.spec.taps
        sums, fraction, registers = at["corner_sums"], at["fraction"], Registers("grad_offset", 2)
        mask, grad_offset = at.get("mask"), at["grad_offset"]
        grad_mask = at["grad_mask"] if "grad_mask" in spec.outputs else None
        pixels = grad_offset.shape[2 if self.nchw else 1].astype("int32")

        def body(o: Expr, k: Expr, p: Expr) -> tirx.Stmt:
            code: list[tirx.Stmt] = []

            def bind(name: str, value: Expr, dtype: str) -> Expr:
                var = tirx.Var(name, dtype)
                code.append(tirx.Bind(var, value))
                return var

            def index(channel: Expr) -> list[Expr]:
                return [n, channel, q] if self.nchw else [n, q, channel]

            n, q = registers[0], registers[1]
            fractions = [bind(f"fraction_{a}_here", tirx.BufferLoad(fraction, [o, k, p, a]), acc) for a in (0, 1)]
            of_corners = [bind(f"sum_{c}", tirx.BufferLoad(sums, [o, k, p, c]), acc) for c in range(4)]
            found = derivatives(fractions, of_corners, tirx.const(1.0, acc))
            if self.border_inside:
                found[0] = tirx.Select(on_border(fractions, acc), tirx.const(0.0, acc), found[0])
            if grad_mask is not None:
                code.append(tirx.BufferStore(grad_mask, cast(found[0], acc, spec.dtype), index(o * taps + k)))
            if mask is not None:
                factor = bind("factor", cast(tirx.BufferLoad(mask, index(o * taps + k)), spec.dtype, acc), acc)
                found = [value * factor for value in found]
            for axis in (0, 1):
                value = cast(found[1 + axis], acc, spec.dtype)
                code.append(tirx.BufferStore(grad_offset, value, index((o * taps + k) * 2 + axis)))
            values = [p // pixels, p - n * pixels]
            return tirx.IfThenElse(p < at["total"], registers.before(values, sequence(code)), None)

        def reads(o: Expr, k: Expr, p: Expr) -> list[Any]:
            found = [region(sums, o, k, p, (0, 4)), region(fraction, o, k, p, (0, 2))]
            return found if mask is None else [*found, region(mask, *((0, extent) for extent in mask.shape))]

        results = [grad_offset] if grad_mask is None else [grad_offset, grad_mask]
        return block_nest(
            "grad_offset",
            [("o", spec.offset_groups), ("k", taps), ("p", sums.shape[2])],
            reads,
            lambda *_: [region(result, *((0, extent) for extent in result.shape)) for result in results],
            body,
            registers.buffers,
        )


def copied_at_once(spec: DeformConv2dGradSpec) -> int:
    """Return how many elements of the output's gradient one asynchronous copy moves; 1 where none is possible."""
    per_group, vector = spec.out_channels // spec.groups, 16 // ITEM_BYTES[spec.dtype]
    return vector if per_group == column_units(spec).depth and per_group % vector == 0 else 1
