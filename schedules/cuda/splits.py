# SPDX-License-Identifier: Apache-2.0
"""Sums that are divided over blocks of threads, for layers with few pixels: each adds up some steps of the reduction.

A schedule splits the loop over steps and marks its outer part. No move of a schedule can bind that to blocks, because
it carries a sum; `divided` does: each block then writes what it has to memory of the caller's, ``parts``, and a second
kernel adds the parts up, always in the same order.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Range
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.space import SPLITS
from tvmdcn.te.epilogue import add_parts
from tvmdcn.te.fragments import thread_loop
from tvmdcn.te.nests import region
from tvmdcn.te.sampling import plan_blocks

__all__ = ["TAP_STEPS", "divided"]

TAP_STEPS = "tvmdcn.tap_steps"
"""Annotation of the loop over parts, where the plan is made before the steps: how many steps a tap has."""


def divided(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel with its parts of sums, if it has any, spread over blocks.

    The result has one more argument, before ``out``: ``parts[splits, *shape of out]``, in the accumulator's dtype.
    """
    root = func.body.block
    nests = list(root.body) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    loops = [_find(nest) for nest in nests]
    if not any(loops):
        return func
    params = {param.name: param for param in func.params}
    out, bias = params["out"], params["bias"]
    splits = next(int(loop.extent) for loop in loops if loop is not None)
    parts = tirx.decl_buffer((splits, *out.shape), bias.dtype, name="parts", data_alignment=16)
    nests = [
        nest if loop is None else thread_loop(loop.loop_var, splits, "blockIdx.z", _Nest(loop, parts, out)(nest))
        for nest, loop in zip(nests, loops, strict=True)
    ]
    nests.append(add_parts(parts, bias, out, params["total"]))
    body = SBlock([], [], [], "root", tirx.SeqStmt(nests), None, root.alloc_buffers, [], root.annotations)
    at = list(func.params).index(out)
    order = [*func.params[:at], parts, *func.params[at:]]
    return tirx.PrimFunc(order, SBlockRealize([], True, body), attrs=func.attrs)


def _find(stmt: Any) -> Any:
    """Return the loop over parts."""
    if isinstance(stmt, tirx.For):
        return stmt if SPLITS in stmt.annotations else _find(stmt.body)
    if isinstance(stmt, tirx.SeqStmt):
        return next(filter(None, map(_find, stmt)), None)
    return None


def _within(stmt: SBlockRealize) -> SBlockRealize:
    """Return a block whose sums are said to end within it: else TVM puts them where all blocks of threads see them."""
    block = stmt.block
    axes = [tirx.IterVar(axis.dom, axis.var, tirx.IterVar.DataPar) for axis in block.iter_vars]
    inner = SBlock(
        axes,
        block.reads,
        block.writes,
        block.name_hint,
        block.body,
        None,
        block.alloc_buffers,
        block.match_buffers,
        block.annotations,
    )
    return SBlockRealize(stmt.iter_values, stmt.predicate, inner)


class _Nest:
    """The same nest, for one part, without the loop over parts."""

    def __init__(self, loop: tirx.For, parts: tirx.Buffer, out: tirx.Buffer) -> None:
        self._loop, self._parts, self._out = loop, parts, out

    def __call__(self, stmt: Any) -> Any:
        if isinstance(stmt, tirx.SeqStmt):
            return tirx.SeqStmt([self(inner) for inner in stmt])
        if isinstance(stmt, tirx.For):
            if stmt.loop_var.same_as(self._loop.loop_var):
                return self(stmt.body)
            return tirx.For(
                stmt.loop_var, stmt.min, stmt.extent, stmt.kind, self(stmt.body), stmt.thread_binding, stmt.annotations
            )
        if isinstance(stmt, SBlockRealize):
            if stmt.block.name_hint == "output":
                return self._output(stmt)
            if TAP_STEPS in self._loop.annotations and stmt.block.name_hint in ("place", "share", *plan_blocks(2)):
                return self._planned(stmt)
            return _within(stmt)
        return stmt

    def _planned(self, stmt: SBlockRealize) -> SBlockRealize:
        """Return a block of the plan, for the taps of this part only."""
        per_tap, part, splits = int(self._loop.annotations[TAP_STEPS]), self._loop.loop_var, int(self._loop.extent)
        steps = self._loop.body.extent
        assert int(steps) * splits % per_tap == 0
        tap = stmt.iter_values[1]
        # A tap's steps are [tap * per_tap, (tap + 1) * per_tap), a part's [part * steps, (part + 1) * steps).
        here = tirx.all(tap * per_tap < (part + 1) * steps, part * steps < (tap + 1) * per_tap)
        return SBlockRealize(stmt.iter_values, tirx.all(stmt.predicate, here), stmt.block)

    def _output(self, stmt: SBlockRealize) -> SBlockRealize:
        """Return the last stage, with sums as they are, without the bias, stored to the parts."""
        block = stmt.block
        part = tirx.Var("v_part", "int32")
        axes = [*block.iter_vars, tirx.IterVar(Range(0, self._loop.extent), part, tirx.IterVar.DataPar)]
        inner = SBlock(
            axes,
            [r for r in block.reads if r.source.name != "bias"],
            [region(self._parts, *((0, extent) for extent in self._parts.shape))],
            block.name_hint,
            self._stored(block.body, part),
            None,
            block.alloc_buffers,
            [],
            block.annotations,
        )
        return SBlockRealize([*stmt.iter_values, self._loop.loop_var], stmt.predicate, inner)

    def _stored(self, stmt: Any, part: tirx.Var) -> Any:
        if isinstance(stmt, tirx.SeqStmt):
            return tirx.SeqStmt([self._stored(inner, part) for inner in stmt])
        if isinstance(stmt, tirx.For):
            body = self._stored(stmt.body, part)
            return tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, None, stmt.annotations)
        if isinstance(stmt, tirx.IfThenElse):
            return tirx.IfThenElse(stmt.condition, self._stored(stmt.then_case, part), None)
        if isinstance(stmt, tirx.BufferStore) and stmt.buffer.same_as(self._out):
            value = stmt.value.value if isinstance(stmt.value, tirx.Cast) else stmt.value
            assert isinstance(value, tirx.Add)  # of a sum and the bias
            return tirx.BufferStore(self._parts, value.a, [part, *stmt.indices])
        return stmt
