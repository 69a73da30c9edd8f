# SPDX-License-Identifier: Apache-2.0
"""The gradients of weight and bias on a GPU: sums over output pixels, see `deform_conv2d_grad`.

    parts[split, tap, output, channel] = sum over the split's pixels p of rows[p, output] * columns[tap, p, channel]
    grad_weight[output, channel, tap]  = sum over the splits of parts

with ``rows`` the output's gradient and ``columns`` the samples, which are made as they are needed and never stored.
Pixels are split over blocks of threads, and the parts added up in order: twice the same call gives twice the same bits.

Output channels are the rows of the product, input channels its columns. Both operands lie pixel by pixel in shared
memory, so that what is summed over is the slow axis of both: tensor cores read them by transposing ``ldmatrix``.

Stages, each name after `PREFIX`: the sampling plan, ``corner`` and ``column`` (`device_sampling`), ``operand``,
``columns``, ``rows``; on tensor cores ``left``, ``right``; ``product``, ``part``, ``total`` and ``store``. Those of the
bias: see `pixel_sums`. Their names are the contract with `schedules/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tvm import te, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.te.device_sampling import PIXELS, PixelAxes, Samples
from tvmdcn.te.fragments import COPY_16, LANES, TILE, TO_TF32, WORDS, DeviceFunction, Fragments, address_of
from tvmdcn.te.multiply import Operand, multiply_fragments, reduction
from tvmdcn.te.nests import TOKEN, block_name, block_nest, declare_reads, region, serial
from tvmdcn.te.pixel_sums import bias_stages, read_rows, sum_parts, where_met
from tvmdcn.te.products import padded, product_of
from tvmdcn.te.tiles import ITEM_BYTES, cast

if TYPE_CHECKING:
    from tvmdcn.te.implicit_gemm_grad import GradCall

__all__ = ["GRANULES", "PREFIX", "WeightGradients", "groups_fit"]

Expr = Any

PREFIX = "weight_grad_"
GRANULES = {"mma": TILE, "simt": 32, "gather": 1}
"""What channels of a group are padded to, by the kind of product: at least so many are a warp's multiply-adds."""
_WHOLE = ("e", 1)

_LDMATRIX_TRANS = DeviceFunction(
    "tvmdcn_ldmatrix_trans",
    """\
__device__ __forceinline__ void tvmdcn_ldmatrix_trans(unsigned* r, unsigned*, const void* row) {
  unsigned at = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
""",
)
"""As `fragments.LDMATRIX`, and each of the four matrices is transposed on its way."""


def groups_fit(spec: DeformConv2dGradSpec) -> bool:
    """Return whether tiles of channels can begin and end with offset groups; otherwise a tile plans all of them.

    Channels that fill up the last tile belong to no offset group.
    """
    in_group, size = spec.in_channels // spec.groups, spec.in_channels // spec.offset_groups
    tile = GRANULES[product_of(spec).kind]

    def divides(a: int, b: int) -> bool:
        return a % b == 0 or b % a == 0

    return spec.offset_groups == 1 or (in_group % tile == 0 and divides(tile, size) and divides(in_group, size))


class WeightGradients:
    """The stages of the gradients of weight and bias; a `implicit_gemm_grad.Part`.

    Parameters
    ----------
    call : GradCall

    Attributes
    ----------
    buffers : list of tirx.Buffer
        Intermediates of the stages written in TIR, once `stages` was called.
    """

    def __init__(self, call: GradCall) -> None:
        self.call, self.spec, self.acc = call, call.spec, call.acc
        self.product = product_of(call.spec)
        self.buffers: list[tirx.Buffer] = []
        self.in_group = self.spec.in_channels // self.spec.groups
        self.per_group = self.spec.out_channels // self.spec.groups
        whole = GRANULES[self.product.kind]
        self.depth, self.width = padded(self.in_group, whole), padded(self.per_group, whole)

    def tensors(self) -> list[te.Tensor]:
        """Return ``columns[group, tap, split, pixel, channel]``, if the weight's gradient is asked for."""
        if not self.spec.grad_weight:
            return []
        sizes, tensors = self.call.sizes, self.call.tensors
        pixels = sizes["tile_units"] * PIXELS
        axes = PixelAxes((sizes["splits"], pixels), lambda s, q: s * pixels + q)
        sampled = Samples(
            self.spec, sizes, axes, tensors["offset"], tensors.get("mask"), prefix=PREFIX, no_padding=True
        )
        column = sampled.samples(tensors["image"], self.depth)
        shape = (self.spec.groups, self.spec.taps, *axes.shape, self.depth)
        # Converted one by one: TVM has no vectors of eight floats for CUDA, and takes one that it has read from
        # registers for the next one there.
        operand = te.compute(shape, lambda *i: self._operand(column(*i)), name=PREFIX + "operand")
        return [te.compute(shape, lambda *i: operand(*i), name=PREFIX + "columns")]

    def _operand(self, value: Expr) -> Expr:
        if self.spec.tf32 and self.product.kind == "mma":
            return TO_TF32(value)
        return cast(value, self.acc, self.spec.dtype)

    def stages(self, staged: tirx.PrimFunc, buffers: Mapping[str, tirx.Buffer]) -> list[tirx.Stmt]:
        """Return the stages, in order; see `implicit_gemm_grad.Part`."""
        found = []
        if self.spec.grad_weight:
            found += self._weight_stages(staged, buffers)
        if self.spec.grad_bias:
            stages, intermediates = bias_stages(self.spec, buffers)
            found += stages
            self.buffers += intermediates
        return found

    def _buffer(self, name: str, shape: tuple[Expr, ...], dtype: str) -> tirx.Buffer:
        buffer = tirx.decl_buffer(shape, dtype, name=name, data_alignment=16)
        self.buffers.append(buffer)
        return buffer

    def _weight_stages(self, staged: tirx.PrimFunc, buffers: Mapping[str, tirx.Buffer]) -> list[tirx.Stmt]:
        spec, image, columns = self.spec, buffers["image"], buffers[PREFIX + "columns"]
        body = staged.body.block.body
        nests = [n for n in (body if isinstance(body, tirx.SeqStmt) else [body]) if block_name(n).startswith(PREFIX)]
        # One element for each image: see TOKEN.
        batch = buffers["offset"].shape[0].astype("int32")
        nests = [declare_reads(n, PREFIX + "corner", image, [(0, batch), TOKEN]) for n in nests]
        if not groups_fit(spec):
            nests = [_of_all_groups(n) for n in nests]
        splits, pixels = columns.shape[2:4]
        near = self._buffer(PREFIX + "near", (spec.groups, splits, pixels, self.width), spec.dtype)
        nests.append(self._rows(buffers, near))
        parts = buffers["weight_parts"]
        fragments = self.product.fragments
        if fragments is None:
            sums = self._buffer(PREFIX + "sums", (splits, spec.groups, spec.taps, self.width, self.depth), self.acc)
            nests += [self._multiply(near, columns, sums), self._part(sums, parts)]
        else:
            steps = buffers["tile_units"] * (PIXELS // fragments.depth)
            outputs, channels = self.width // TILE, self.depth // TILE

            def of_lanes(name: str, shape: tuple[Expr, ...], words: int, dtype: str) -> tirx.Buffer:
                return self._buffer(PREFIX + name, (splits, spec.groups, *shape, LANES, words), dtype)

            left = of_lanes("left", (steps, outputs), WORDS, "uint32")
            right = of_lanes("right", (spec.taps, steps, channels), WORDS, "uint32")
            sums = of_lanes("sums", (spec.taps, outputs, channels), 8, self.acc)
            nests += [
                _load_fragments(PREFIX + "left", near, left, fragments, lambda n, g, p, c: (g, n, p, c)),
                _load_fragments(PREFIX + "right", columns, right, fragments, lambda n, g, k, p, c: (g, k, n, p, c)),
                multiply_fragments(
                    Operand(left, ("n", "g", "s", "r")),
                    Operand(right, ("n", "g", "k", "s", "c")),
                    Operand(sums, ("n", "g", "k", "r", "c")),
                    ("s",),
                    fragments,
                    PREFIX + "product",
                ),
                self._part_of_fragments(sums, parts, fragments),
            ]
        total = self._buffer(PREFIX + "total", (spec.out_channels, self.in_group, spec.taps), self.acc)
        nests.append(
            sum_parts(
                PREFIX + "total",
                parts,
                total,
                splits,
                lambda o, c, k, n: (n.astype("int64"), k, o, c),
                where_met(parts),
            )
        )
        nests.append(self._store_weight(total, buffers["grad_weight"]))
        return nests

    def _rows(self, buffers: Mapping[str, tirx.Buffer], near: tirx.Buffer) -> tirx.Stmt:
        """Return the stage ``rows``: the output's gradient where it is multiplied; zeros where there is none.

        In vectors of 16 bytes that are copied and not waited for, where its rows are made of such.
        """
        spec, rows, total = self.spec, buffers["rows"], buffers["total"]
        groups, splits, pixels, width = near.shape
        reads = [read_rows(spec, buffers)]

        def place(g: Expr, n: Expr, q: Expr, o: Expr) -> tuple[list[Expr], Expr]:
            """Return the place in the output's gradient, one that there is, and whether it is the one asked for."""
            p = n * pixels + q
            # By the sign: from a comparison of pixels TVM would take a size of `near` that varies.
            there = tirx.bitwise_and(p - total, tirx.const(-(1 << 31), "int32")) != 0
            if int(width) != self.per_group:
                # As a product: from a condition on a channel TVM would take a size of `near` that varies.
                there = there.astype("int32") * (o < self.per_group).astype("int32") > 0
                o = te.min(o, self.per_group - 1)
            return [te.min(p, total - 1).astype("int64"), g * self.per_group + o], there

        axes = [("g", groups), ("n", splits), ("q", pixels)]
        vector = 16 // ITEM_BYTES[spec.dtype]
        if self.product.kind != "gather" and self.per_group % vector == 0:

            def copy(g: Expr, n: Expr, q: Expr, o: Expr) -> tirx.Stmt:
                at, there = place(g, n, q, o * vector)
                if int(width) != self.per_group:  # the last vector that there is
                    at[1] = g * self.per_group + te.min(o * vector, self.per_group - vector)
                copied = COPY_16(address_of(near, g, n, q, o * vector), address_of(rows, *at))
                zeros = tirx.Broadcast(tirx.const(0.0, spec.dtype), vector)
                return tirx.IfThenElse(
                    there, copied, tirx.BufferStore(near, zeros, [g, n, q, tirx.Ramp(o * vector, 1, vector)])
                )

            return block_nest(
                PREFIX + "rows",
                [*axes, ("o", int(width) // vector)],
                lambda *_: reads,
                lambda g, n, q, o: [region(near, g, n, q, (o * vector, vector))],
                copy,
            )

        def store(g: Expr, n: Expr, q: Expr, o: Expr) -> tirx.Stmt:
            at, there = place(g, n, q, o)
            value = tirx.if_then_else(there, tirx.BufferLoad(rows, at), tirx.const(0.0, spec.dtype))
            return tirx.BufferStore(near, value, [g, n, q, o])

        return block_nest(
            PREFIX + "rows", [*axes, ("o", width)], lambda *_: reads, lambda *at: [region(near, *at)], store
        )

    def _multiply(self, near: tirx.Buffer, columns: tirx.Buffer, sums: tirx.Buffer) -> tirx.Stmt:
        """Return the stage ``product`` without tensor cores."""
        dtype, acc = self.spec.dtype, self.acc

        def make(name: str, iters: list[Any], n: Expr, g: Expr, k: Expr, o: Expr, c: Expr, q: Expr) -> SBlock:
            at, of_rows, of_columns = [n, g, k, o, c], [g, n, q, o], [g, k, n, q, c]
            left, right = tirx.BufferLoad(near, of_rows), tirx.BufferLoad(columns, of_columns)
            value = tirx.BufferLoad(sums, at) + cast(left, dtype, acc) * cast(right, dtype, acc)
            reads = [region(sums, *at), region(near, *of_rows), region(columns, *of_columns)]
            init = tirx.BufferStore(sums, tirx.const(0.0, acc), at)
            return SBlock(iters, reads, [region(sums, *at)], name, tirx.BufferStore(sums, value, at), init)

        axes = [(label, extent, False) for label, extent in zip("ngkoc", sums.shape, strict=True)]
        return reduction(PREFIX + "product", [*axes, ("q", near.shape[2], True)], make)

    def _part(self, sums: tirx.Buffer, parts: tirx.Buffer) -> tirx.Stmt:
        """Return the stage ``part``: a split's sums to the device's memory."""

        def body(n: Expr, g: Expr, k: Expr, o: Expr, c: Expr) -> tirx.Stmt:
            at = [n.astype("int64"), k, g * self.per_group + o, c]
            return self._guarded(o, c, tirx.BufferStore(parts, tirx.BufferLoad(sums, [n, g, k, o, c]), at))

        return block_nest(
            PREFIX + "part",
            list(zip("ngkoc", sums.shape, strict=True)),
            lambda *at: [region(sums, *at)],
            lambda *_: [where_met(parts)],
            body,
        )

    def _guarded(self, o: Expr, c: Expr, store: tirx.Stmt) -> tirx.Stmt:
        """Return `store` for channels of a group that there are."""
        bounds = [(o, self.per_group, self.width), (c, self.in_group, self.depth)]
        inside = [value < bound for value, bound, extent in bounds if bound != extent]
        return tirx.IfThenElse(tirx.all(*inside), store, None) if inside else store

    def _part_of_fragments(self, sums: tirx.Buffer, parts: tirx.Buffer, fragments: Fragments) -> tirx.Stmt:
        """Return the stage ``part`` from the shares of lanes: four of them store 32 bytes side by side."""
        vector = 2 if self.in_group % 2 == 0 else 1
        *axes, lanes, _ = sums.shape

        def body(n: Expr, g: Expr, k: Expr, r: Expr, b: Expr, lane: Expr, _: Expr) -> tirx.Stmt:
            stores = []
            for e in range(0, 8, vector):
                row, column = fragments.result_element(lane, e)
                o, c = r * TILE + row, b * TILE + column
                at = [n.astype("int64"), k, g * self.per_group + o, c if vector == 1 else tirx.Ramp(c, 1, vector)]
                share = [n, g, k, r, b, lane, e if vector == 1 else tirx.Ramp(tirx.const(e, "int32"), 1, vector)]
                stores.append(self._guarded(o, c, tirx.BufferStore(parts, tirx.BufferLoad(sums, share), at)))
            return tirx.SeqStmt(stores)

        return block_nest(
            PREFIX + "part",
            [*zip("ngkrb", axes, strict=True), ("lane", lanes), _WHOLE],
            lambda *at: [region(sums, *at[:-1], (at[-1] * 8, 8))],
            lambda *_: [where_met(parts)],
            body,
        )

    def _store_weight(self, total: tirx.Buffer, grad_weight: tirx.Buffer) -> tirx.Stmt:
        """Return the stage ``store``: the gradient in its dtype and order."""

        def body(o: Expr, c: Expr, k: Expr) -> tirx.Stmt:
            value = cast(tirx.BufferLoad(total, [o, c, k]), self.acc, self.spec.dtype)
            return tirx.BufferStore(grad_weight, value, [o, c * self.spec.taps + k])

        return block_nest(
            PREFIX + "store",
            list(zip("ock", total.shape, strict=True)),
            lambda *at: [region(total, *at)],
            lambda o, c, k: [region(grad_weight, o, c * self.spec.taps + k)],
            body,
        )


def _of_all_groups(stmt: tirx.Stmt) -> tirx.Stmt:
    """Return a stage that says of the plan that it reads what is planned for all offset groups.

    What it reads, a tile that begins in the midst of one, TVM finds to be of varying size.
    """
    if isinstance(stmt, tirx.For):
        return serial(stmt.loop_var, stmt.extent, _of_all_groups(stmt.body))
    inner = stmt.block
    planned, reads = (PREFIX + "place", PREFIX + "share"), []
    for read in inner.reads:
        bounds = [(bound.min, bound.extent) for bound in read.region]
        if str(read.source.name) in planned:
            bounds[0] = (0, read.source.shape[0])
        reads.append(region(read.source, *bounds))
    block = SBlock(inner.iter_vars, reads, inner.writes, inner.name_hint, inner.body, inner.init, inner.alloc_buffers)
    return SBlockRealize(stmt.iter_values, stmt.predicate, block)


def _load_fragments(
    name: str, source: tirx.Buffer, target: tirx.Buffer, fragments: Fragments, place: Callable[..., tuple[Expr, ...]]
) -> tirx.Stmt:
    """Return the stage ``left`` or ``right``: a lane's share of 16 channels times `depth` pixels.

    `target` is ``[*leading, step, tile, lane, word]``, and ``place(*leading, pixel, channel)`` in `source`.
    """
    *leading, steps, tiles, lanes, words = target.shape
    depth, is_left = fragments.depth, name.endswith("left")

    def make(name: str, iters: list[Any], *at: Expr) -> SBlock:
        *lead, s, b, lane, e = at
        reads = [region(source, *place(*lead, (s * depth, depth), (b * TILE, TILE)))]
        writes = [region(target, *lead, s, b, lane, (e * words, words))]

        def element(pixel: Expr, channel: Expr) -> list[Expr]:
            return list(place(*lead, s * depth + pixel, b * TILE + channel))

        if fragments.packing == 2:
            # Four matrices of 8 x 8, whose rows are pixels. Of the left operand the second is of the next channels, of
            # the right one of the next pixels.
            row, second, third = lane % 8, lane // 8 % 2 * 8, lane // 16 * 8
            at_row = element(third + row, second) if is_left else element(second + row, third)
            ends = [address_of(target, *lead, s, b, lane, word) for word in (0, WORDS - 1)]
            return SBlock(iters, reads, writes, name, _LDMATRIX_TRANS(*ends, address_of(source, *at_row)))
        stores = []
        for word in range(WORDS):
            if is_left:
                pixel, channel = lane % 4 + 4 * (word // 2), lane // 4 + 8 * (word % 2)
            else:
                pixel, channel = fragments.right_element(lane, word, 0)
            value = tirx.BufferLoad(source, element(pixel, channel))
            # What was copied as it is has yet to be rounded.
            value = tirx.reinterpret("uint32", TO_TF32(value) if is_left else value)
            stores.append(tirx.BufferStore(target, value, [*lead, s, b, lane, word]))
        return SBlock(iters, reads, writes, name, tirx.SeqStmt(stores))

    axes = [*((f"l{i}", extent) for i, extent in enumerate(leading)), ("s", steps), ("b", tiles), ("lane", lanes)]
    return reduction(name, [(*axis, False) for axis in (*axes, _WHOLE)], make)
