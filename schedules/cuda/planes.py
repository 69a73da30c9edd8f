# SPDX-License-Identifier: Apache-2.0
"""Corners read straight from planes: NCHW without a channels-last copy of the input before.

What is read is another argument, and no move of a schedule changes that; `from_planes` does. Threads side by side then
read one channel of neighbouring pixels, and each load is a number. The copy costs a kernel, and memory written and read
once; this costs loads, eight times as many of 2-byte numbers. So it may win where the layer is small.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.space import PLANES
from tvmdcn.te.nests import region
from tvmdcn.te.transposition import Registers

__all__ = ["from_planes"]


def from_planes(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel, if it is marked, that reads ``x[n, channel, pixel]`` and has no argument ``image``."""
    root = func.body.block
    nests = list(root.body) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    params = {param.name: param for param in func.params}
    if not any(_is_marked(nest) for nest in nests):
        return func
    corners = _Corners(params["x"], params["image"])
    # The first nest makes the copy.
    kept = [corners(nest) for nest in nests[1:]]
    body = kept[0] if len(kept) == 1 else tirx.SeqStmt(kept)
    block = SBlock([], [], [], "root", body, None, root.alloc_buffers, [], root.annotations)
    order = [param for param in func.params if not param.same_as(params["image"])]
    return tirx.PrimFunc(order, SBlockRealize([], True, block), attrs=func.attrs)


def _is_marked(stmt: Any) -> bool:
    if isinstance(stmt, tirx.SeqStmt):
        return any(_is_marked(inner) for inner in stmt)
    if isinstance(stmt, tirx.For):
        return _is_marked(stmt.body)
    return isinstance(stmt, SBlockRealize) and PLANES in stmt.block.annotations


class _Corners:
    """A nest whose ``corner`` reads from planes."""

    def __init__(self, x: tirx.Buffer, image: tirx.Buffer) -> None:
        self._x, self._image = x, image

    def __call__(self, stmt: Any) -> Any:
        if isinstance(stmt, tirx.SeqStmt):
            return tirx.SeqStmt([self(inner) for inner in stmt])
        if isinstance(stmt, tirx.For):
            return tirx.For(
                stmt.loop_var, stmt.min, stmt.extent, stmt.kind, self(stmt.body), stmt.thread_binding, stmt.annotations
            )
        if isinstance(stmt, SBlockRealize) and stmt.block.name_hint == "corner":
            return SBlockRealize(stmt.iter_values, stmt.predicate, self._corner(stmt.block))
        return stmt

    def _corner(self, block: SBlock) -> SBlock:
        store = block.body
        there, load, zero = store.value.args
        place, channel = load.indices[0].value, load.indices[1]
        size = self._x.shape[2].astype("int32")
        registers = Registers("corner", 3)
        image, first, pixel = (registers[i] for i in range(3))
        value = tirx.if_then_else(there, tirx.BufferLoad(self._x, [image, first, pixel]), zero)
        reads = [r for r in block.reads if not r.source.same_as(self._image)]
        return SBlock(
            block.iter_vars,
            [*reads, region(self._x, *((0, extent) for extent in self._x.shape))],
            block.writes,
            block.name_hint,
            registers.before(
                [place // size, channel, place - image * size], tirx.BufferStore(store.buffer, value, store.indices)
            ),
            None,
            registers.buffers,
            [],
            block.annotations,
        )
