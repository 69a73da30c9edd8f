# SPDX-License-Identifier: Apache-2.0
"""Sums over output pixels on a GPU whose parts are added up in order; the gradient of the bias, which is nothing else.

Stages of the bias, each name after `BIAS_PREFIX`: ``lanes`` (what a thread sums up of a split's pixels), ``part``,
``total`` and ``store``. Their names are the contract with `schedules/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm import te, tirx
from tvm.s_tir.stmt import SBlock

from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.te.device_sampling import PIXELS
from tvmdcn.te.multiply import reduction
from tvmdcn.te.nests import TOKEN, block_nest, region
from tvmdcn.te.tiles import cast

__all__ = ["BIAS_LANES", "BIAS_PREFIX", "bias_stages", "read_rows", "sum_parts", "where_met"]

Expr = Any

BIAS_PREFIX = "bias_grad_"
BIAS_LANES = 32
"""Threads side by side on an output channel's pixels; divides `PIXELS`."""


def read_rows(spec: DeformConv2dGradSpec, buffers: Mapping[str, tirx.Buffer]) -> Any:
    """Return the region of the output's gradient, channels-last, that a stage is said to read; see `TOKEN`."""
    batch = buffers["grad_output"].shape[0].astype("int32") if spec.layout == "NCHW" else 1
    return region(buffers["rows"], (0, batch), TOKEN)


def where_met(parts: tirx.Buffer) -> Any:
    """Return the region in which the stages that write and read `parts` are said to meet; see `TOKEN`."""
    return region(parts, *[TOKEN] * len(parts.shape))


def sum_parts(
    name: str,
    parts: tirx.Buffer,
    total: tirx.Buffer,
    count: Expr,
    place: Callable[..., tuple[Expr, ...]],
    reads: Any = None,
) -> tirx.Stmt:
    """Return a stage that adds up parts in order.

    Parameters
    ----------
    name : str
    parts, total : tirx.Buffer
    count : expression
        How many parts an element of `total` has.
    place : callable
        ``place(*element, number)`` is where one lies.
    reads : TensorRegion, optional
        What the stage is said to read; what it does read by default.
    """

    def make(name: str, iters: list[Any], *at: Expr) -> SBlock:
        element, source = list(at[:-1]), list(place(*at))
        value = tirx.BufferLoad(total, element) + tirx.BufferLoad(parts, source)
        sources = [region(total, *element), region(parts, *source) if reads is None else reads]
        init = tirx.BufferStore(total, tirx.const(0.0, total.dtype), element)
        store = tirx.BufferStore(total, value, element)
        return SBlock(iters, sources, [region(total, *element)], name, store, init)

    axes = [(f"i{axis}", extent, False) for axis, extent in enumerate(total.shape)]
    return reduction(name, [*axes, ("part", count, True)], make)


def bias_stages(
    spec: DeformConv2dGradSpec, buffers: Mapping[str, tirx.Buffer]
) -> tuple[list[tirx.Stmt], list[tirx.Buffer]]:
    """Return the stages of the gradient of the bias, and their intermediates; see `implicit_gemm_grad.Part`."""
    acc, rows, count, units = spec.accumulator_dtype, buffers["rows"], buffers["total"], buffers["tile_units"]
    parts, grad_bias = buffers["bias_parts"], buffers["grad_bias"]
    splits, outputs = parts.shape
    lanes = tirx.decl_buffer((splits, BIAS_LANES, outputs), acc, name=BIAS_PREFIX + "lanes")
    total = tirx.decl_buffer((outputs,), acc, name=BIAS_PREFIX + "total")

    def of_lane(name: str, iters: list[Any], n: Expr, lane: Expr, o: Expr, q: Expr) -> SBlock:
        p, at = n * (units * PIXELS) + q * BIAS_LANES + lane, [n, lane, o]
        value = cast(tirx.BufferLoad(rows, [te.min(p, count - 1).astype("int64"), o]), spec.dtype, acc)
        value = tirx.if_then_else(p < count, value, tirx.const(0.0, acc))
        store = tirx.BufferStore(lanes, tirx.BufferLoad(lanes, at) + value, at)
        init = tirx.BufferStore(lanes, tirx.const(0.0, acc), at)
        return SBlock(iters, [region(lanes, *at), read_rows(spec, buffers)], [region(lanes, *at)], name, store, init)

    axes = [("n", splits, False), ("lane", BIAS_LANES, False), ("o", outputs, False)]
    stages = [
        reduction(BIAS_PREFIX + "lanes", [*axes, ("q", units * (PIXELS // BIAS_LANES), True)], of_lane),
        sum_parts(BIAS_PREFIX + "part", lanes, parts, BIAS_LANES, lambda n, o, lane: (n, lane, o)),
        sum_parts(BIAS_PREFIX + "total", parts, total, splits, lambda o, n: (n, o)),
        block_nest(
            BIAS_PREFIX + "store",
            [("o", outputs)],
            lambda o: [region(total, o)],
            lambda o: [region(grad_bias, o)],
            lambda o: tirx.BufferStore(grad_bias, cast(tirx.BufferLoad(total, [o]), acc, spec.dtype), [o]),
        ),
    ]
    return stages, [lanes, total]
