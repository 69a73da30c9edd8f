# SPDX-License-Identifier: Apache-2.0
"""The last stage of a product on a GPU, ``output``: bias, conversion and layout; what is padding is dropped.

And where sums are divided over blocks of threads, the kernel that adds their parts up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd
from typing import Any

from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.te.device_sampling import MOST_PIXELS
from tvmdcn.te.fragments import LANES, TILE, DeviceFunction, Fragments, thread_loop
from tvmdcn.te.nests import block_nest, region, sequence, serial
from tvmdcn.te.tiles import ITEM_BYTES, cast
from tvmdcn.te.transposition import Registers

__all__ = ["add_parts", "store_fragments", "store_numbers"]

Expr = Any

EXCHANGE = DeviceFunction(
    "tvmdcn_exchange",
    """\
__device__ __forceinline__ float tvmdcn_exchange(float value) { return __shfl_xor_sync(0xffffffffu, value, 1); }
""",
    "float32",
)
"""Gives a number to the other lane of a pair, and returns that lane's."""
_MOST_THREADS = 128


def store_numbers(
    result: tirx.Buffer,
    ordered: tuple[int, ...],
    bias: tirx.Buffer,
    out: tirx.Buffer,
    total: Expr,
    per_group: int,
    pixels: Expr | None,
) -> tirx.Stmt:
    """Return the stage ``output`` of a product without tensor cores, a number a block.

    `ordered` is the order of (group, pixel, output) in `result`; `pixels`: those of an image, where the output is one
    of planes.
    """
    groups, extent, width = (result.shape[ordered.index(i)] for i in range(3))
    registers = Registers("output", 3)

    def body(g: Expr, p: Expr, o: Expr) -> tirx.Stmt:
        channel = g * per_group + o
        value = tirx.BufferLoad(result, [(g, p, o)[i] for i in ordered]) + tirx.BufferLoad(bias, [channel])
        inside = p < total if int(width) == per_group else tirx.all(p < total, o < per_group)
        at = [p, channel] if pixels is None else [registers[i] for i in range(3)]
        store = tirx.IfThenElse(inside, tirx.BufferStore(out, cast(value, str(result.dtype), str(out.dtype)), at), None)
        return store if pixels is None else registers.before(_place(p, channel, pixels, registers), store)

    return block_nest(
        "output",
        [("g", groups), ("p", extent), ("o", width)],
        lambda g, p, o: [region(result, *((g, p, o)[i] for i in ordered)), region(bias, (0, bias.shape[0]))],
        lambda g, p, o: [region(out, *((0, extent) for extent in out.shape))],
        body,
        [] if pixels is None else registers.buffers,
    )


def store_fragments(
    sums: tirx.Buffer,
    bias: tirx.Buffer,
    out: tirx.Buffer,
    total: Expr,
    per_group: int,
    pixels: Expr | None,
) -> tirx.Stmt:
    """Return the stage ``output`` of a product on tensor cores: a tile of 16 x 16 a block, straight from registers.

    A lane holds two outputs of a pixel side by side, and four lanes eight. Of 4-byte numbers these are the 32 bytes
    that memory is written in; of 2-byte numbers, lanes first exchange half of what they hold, so that four lanes have
    16 outputs of a pixel (NHWC), or 16 lanes an output of 16 pixels (NCHW).
    """
    groups, rows, outputs, lanes, _ = sums.shape
    acc, dtype = str(sums.dtype), str(out.dtype)
    exchanged = ITEM_BYTES[dtype] == 2
    run = 4 if exchanged else 2
    vector = gcd(run, per_group) if pixels is None else 1
    values = tirx.decl_buffer((run,), acc, name="values", scope="local")
    got = tirx.decl_buffer((2,), acc, name="got", scope="local")
    registers = Registers("output", 3)

    def body(g: Expr, r: Expr, o: Expr, lane: Expr, _: Expr) -> tirx.Stmt:
        stmts: list[tirx.Stmt] = []
        held = [tirx.BufferLoad(sums, [g, r, o, lane, e]) for e in range(8)]
        runs = _exchanged(held, got, lane, pixels is not None) if exchanged else _own(held, lane)
        for before, row, column, numbers in runs:
            stmts += before
            stmts += [tirx.BufferStore(values, number, [i]) for i, number in enumerate(numbers)]
            p, first = r * TILE + row, o * TILE + column
            stores = []
            for begin in range(0, run, vector):
                inside = p < total
                if int(outputs) * TILE != per_group:
                    inside = tirx.all(inside, first + begin < per_group)
                e = tirx.Var("e", "int32")
                number = begin + (e if vector > 1 else 0)
                value = tirx.BufferLoad(values, [number]) + tirx.BufferLoad(bias, [g * per_group + first + number])
                at = [p, g * per_group + first + number]
                if pixels is not None:
                    at = [registers[0], registers[1] + number, registers[2]]
                store: tirx.Stmt = tirx.BufferStore(out, cast(value, acc, dtype), at)
                if vector > 1:
                    store = tirx.For(e, 0, vector, tirx.ForKind.VECTORIZED, store)
                stores.append(tirx.IfThenElse(inside, store, None))
            if pixels is not None:
                at_first = _place(p, g * per_group + first, pixels, registers)
                stores = [registers.before(at_first, sequence(stores))]
            stmts += stores
        return sequence(stmts)

    return block_nest(
        "output",
        [("g", groups), ("r", rows), ("o", outputs), ("lane", lanes), ("e", 1)],
        lambda g, r, o, lane, e: [region(sums, g, r, o, lane, (e * 8, 8)), region(bias, (0, bias.shape[0]))],
        lambda *_: [region(out, *((0, extent) for extent in out.shape))],
        body,
        [values, *([got] if exchanged else []), *([] if pixels is None else registers.buffers)],
    )


_Run = tuple[list[tirx.Stmt], Expr, Expr, list[Expr]]
"""Statements before, row and first column of 16 x 16, and results side by side from there on."""


def _own(held: list[Expr], lane: Expr) -> Iterator[_Run]:
    """Yield a lane's results as it has them."""
    for e in range(0, 8, 2):
        yield [], *Fragments.result_element(lane, e), held[e : e + 2]


def _exchanged(held: list[Expr], got: tirx.Buffer, lane: Expr, planes: bool) -> Iterator[_Run]:
    """Yield a lane's results after pairs of lanes have exchanged: by rows, or for `planes` by columns."""
    odd = lane % 2
    for half in (0, 1):
        # Of two pairs the even lane keeps the first and the odd lane the second, which is 8 columns or rows on.
        first, second = (4 * half, 4 * half + 2) if planes else (2 * half, 2 * half + 4)
        before = []
        for i in (0, 1):
            given = tirx.Select(odd == 1, held[first + i], held[second + i])
            before.append(tirx.BufferStore(got, EXCHANGE(given), [i]))
        other = [tirx.BufferLoad(got, [i]) for i in (0, 1)]
        numbers = [tirx.Select(odd == 1, other[i], held[first + i]) for i in (0, 1)]
        numbers += [tirx.Select(odd == 1, held[second + i], other[i]) for i in (0, 1)]
        row, column = Fragments.result_element(lane - odd, first)
        yield (before, row + 8 * odd, column, numbers) if planes else (before, row, column + 8 * odd, numbers)


def _place(p: Expr, channel: Expr, pixels: Expr, registers: Registers) -> list[Expr]:
    """Return image, channel, and number of a pixel in its image, the first of which is in `registers` by then."""
    return [p // pixels.astype("int32"), channel, p - registers[0] * pixels.astype("int32")]


def add_parts(parts: tirx.Buffer, bias: tirx.Buffer, out: tirx.Buffer, total: Expr) -> tirx.Stmt:
    """Return a kernel, with its threads, that adds up ``parts[split, *shape of out]`` in order, and the bias.

    `total`: output pixels of all images.
    """
    acc, channels = str(parts.dtype), int(out.shape[1])
    planes = len(out.shape) == 3
    vector = 1 if planes else gcd(16 // ITEM_BYTES[acc], channels)
    sums = tirx.decl_buffer((vector,), acc, name="sums", scope="local")
    registers = Registers("added", 3)
    thread = tirx.Var("thread", "int32")

    def added(at: list[Expr], channel: Expr, inside: Expr) -> tirx.Stmt:
        """Return the sum from an index on, whose last but for planes is the channel."""

        def vectors(store: Callable[[Expr, list[Expr]], tirx.Stmt]) -> tirx.Stmt:
            if vector == 1:
                return store(0, at)
            e = tirx.Var("e", "int32")
            return tirx.For(e, 0, vector, tirx.ForKind.VECTORIZED, store(e, [*at[:-1], at[-1] + e]))

        stmts = []
        for split in range(int(parts.shape[0])):

            def add(e: Expr, index: list[Expr], split: int = split) -> tirx.Stmt:
                part = tirx.BufferLoad(parts, [split, *index])
                return tirx.BufferStore(sums, tirx.BufferLoad(sums, [e]) + part if split else part, [e])

            stmts.append(vectors(add))

        def store(e: Expr, index: list[Expr]) -> tirx.Stmt:
            value = tirx.BufferLoad(sums, [e]) + tirx.BufferLoad(bias, [channel + e])
            return tirx.BufferStore(out, cast(value, acc, str(out.dtype)), index)

        return tirx.IfThenElse(inside, tirx.SeqStmt([*stmts, vectors(store)]), None)

    if planes:
        batch, pixels = (extent.astype("int32") for extent in (out.shape[0], out.shape[2]))
        threads = _MOST_THREADS
        n, o, block = (tirx.Var(name, "int32") for name in ("n", "o", "block"))
        pixel = block * threads + thread
        at = [registers[i] for i in range(3)]
        body = registers.before([n, o, pixel], added(at, o, pixel < pixels))
        nest = thread_loop(thread, threads, "threadIdx.x", body)
        nest = thread_loop(block, (pixels + threads - 1) // threads, "blockIdx.x", nest)
        nest = thread_loop(n, batch, "blockIdx.z", thread_loop(o, channels, "blockIdx.y", nest))
    else:
        threads = min(_MOST_THREADS, -(-channels // vector // LANES) * LANES)
        p, several = tirx.Var("p", "int32"), tirx.Var("several", "int32")
        o = (several * threads + thread) * vector
        body = serial(several, -(-channels // vector // threads), added([p, o], o, o < channels))
        nest = thread_loop(
            p, tirx.min(total, MOST_PIXELS), "blockIdx.x", thread_loop(thread, threads, "threadIdx.x", body)
        )
    scratch = [sums, *(registers.buffers if planes else [])]
    return SBlockRealize([], True, SBlock([], [], [], "added", nest, None, scratch))
