# SPDX-License-Identifier: Apache-2.0
"""What schedules for GPUs share: loops spread over a block's threads, barriers, and pipelines.

TVM's own barriers take any two accesses to shared memory for a conflict, two or more a step where a double-buffered
pipeline needs one, and they do not see what a device function reads. So a schedule marks where barriers belong, and
`finish` puts them there; `tvmdcn.builder.OwnBarriers` keeps TVM from adding its own. That none is missing is checked by
running the kernels in an emulator that finds races (tests/cuda_emulator).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.te import fragments
from tvmdcn.te.device_sampling import MOST_PIXELS

__all__ = ["BARRIER", "BOUND", "GRID", "LANES", "PIPELINE", "Team", "finish"]

LANES = 32
BARRIER = "tvmdcn.barrier"
"""Annotation of a loop or block: what must be waited for before it: "block" or "warp"."""
PIPELINE = "tvmdcn.pipeline"
"""Annotation of a loop: 1 if its stages run overlapped, 0 if one after the other."""
GRID = "tvmdcn.grid"
"""Annotation of a function's loop over tiles of pixels: how many pixels a tile has."""
BOUND = "tvmdcn.bound"
"""Annotation of a loop of free extent: a bound of it, which callers keep; see `finish`."""

# Stage and order of a step's statements in a pipeline. While the product of one step is made, the weight of the next is
# copied and its corners are on their way to registers.
_STAGES = {"weights": (0, 0), "corner": (0, 1), "product": (1, 2), "columns": (0, 3), "barrier": (0, 4)}
# The gradients of the columns copy both operands.
_STAGES |= {"near_rows": (0, 1)}
# The gradient of the weight plans its samples two steps ahead; only the first plan has a barrier of its own.
_STAGES |= {
    "weight_grad_rows": (1, 0),
    "weight_grad_corner": (1, 1),
    "weight_grad_product": (2, 2),
    "weight_grad_columns": (1, 3),
    "weight_grad_share": (0, 4),
    "first": (0, 5),
    "ahead": (1, 6),
}


@dataclass(frozen=True)
class Team:
    """The threads of a block, as warps of `LANES`.

    Parameters
    ----------
    sch : tvm.s_tir.Schedule
    warps : int
    """

    sch: Any
    warps: int

    @property
    def threads(self) -> int:
        """How many there are."""
        return self.warps * LANES

    def bind(self, loop: Any) -> Any:
        """Bind a loop of `threads` iterations, and return the inner one of the two it is split into."""
        warp, lane = self.sch.split(loop, [self.warps, LANES])
        self.sch.bind(warp, "threadIdx.y")
        self.sch.bind(lane, "threadIdx.x")
        return lane

    def share(self, loops: Sequence[Any]) -> Any:
        """Spread nested loops over all threads, the innermost first; what is left over is a loop of each thread.

        Returns the loop over lanes, inside which is all of an iteration.
        """
        fused = self.sch.fuse(*loops) if len(loops) > 1 else loops[0]
        rounds, mine = self.sch.split(fused, [None, self.threads])
        lane = self.bind(mine)
        self.sch.unroll(rounds)
        return lane


def _barrier(kind: str, copies: bool = False) -> tirx.Stmt:
    if copies:
        body = fragments.WAIT_COPIES()
    elif kind == "warp":
        body = fragments.SYNC_WARP()
    else:
        body = fragments.BARRIER()
    return SBlockRealize([], True, SBlock([], [], [], "barrier", body))


def _marks(stmt: Any) -> str | None:
    """Return the barrier asked for before a nest."""
    while isinstance(stmt, tirx.For):
        if BARRIER in stmt.annotations:
            return str(stmt.annotations[BARRIER])
        stmt = stmt.body
    if isinstance(stmt, SBlockRealize) and BARRIER in stmt.block.annotations:
        return str(stmt.block.annotations[BARRIER])
    return None


def _name(stmt: Any) -> str:
    """Return the name of the last block of a nest."""
    while not isinstance(stmt, SBlockRealize):
        stmt = stmt[len(stmt) - 1] if isinstance(stmt, tirx.SeqStmt) else stmt.body
    return str(stmt.block.name_hint).removesuffix("_update")


def _steps(loop: tirx.For) -> tirx.Stmt:
    """Return a loop over steps of the reduction with its barriers, and its order if it is a pipeline."""
    children = list(loop.body)
    annotations = {k: v for k, v in loop.annotations.items() if k not in (PIPELINE, BARRIER, BOUND)}
    if int(loop.annotations[PIPELINE]):
        names = [_name(child) for child in children]
        if "weight_grad_share" in names:
            first = tirx.IfThenElse(loop.loop_var == loop.min, fragments.BARRIER(), None)
            children.append(SBlockRealize([], True, SBlock([], [], [], "first", first)))
        wait = "ahead" if "weight_grad_product" in names else "barrier"
        children.append(SBlockRealize([], True, SBlock([], [], [], wait, fragments.WAIT_COPIES())))
        places = [_STAGES[_name(child)] for child in children]
        annotations["software_pipeline_stage"] = [stage - min(s for s, _ in places) for stage, _ in places]
        annotations["software_pipeline_order"] = [sorted(o for _, o in places).index(order) for _, order in places]
    else:
        children = [*children[:-1], _barrier("block", copies=True), children[-1], _barrier("block")]
    body = tirx.SeqStmt(children)
    return tirx.For(loop.loop_var, loop.min, _bounded(loop), loop.kind, body, None, annotations)


def _bounded(loop: tirx.For) -> Any:
    """Return a loop's extent, with its bound if it has one."""
    return tirx.min(loop.extent, int(loop.annotations[BOUND])) if BOUND in loop.annotations else loop.extent


def finish(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel with its barriers, pipelines, and a grid that ends with the last pixel.

    The schedule divides a padded number of pixels; blocks that would do nothing but padding are not launched.
    """
    total = next(param for param in func.params if param.name == "total")

    def visit(stmt: Any) -> Any:
        if isinstance(stmt, tirx.SeqStmt):
            parts: list[Any] = []
            for part in stmt:
                mark = _marks(part)
                if mark is not None:
                    parts.append(_barrier(mark))
                parts.append(visit(part))
            return tirx.SeqStmt(parts)
        if isinstance(stmt, tirx.For):
            if PIPELINE in stmt.annotations:
                return _steps(stmt)
            annotations = {k: v for k, v in stmt.annotations.items() if k not in (BARRIER, BOUND, GRID)}
            extent = _bounded(stmt)
            if GRID in stmt.annotations:
                pixels = int(stmt.annotations[GRID])
                # The bound, which callers keep, tells TVM that the number of a pixel is far from the end of integers.
                extent = tirx.min((total + pixels - 1) // pixels, MOST_PIXELS // pixels)
            return tirx.For(
                stmt.loop_var, stmt.min, extent, stmt.kind, visit(stmt.body), stmt.thread_binding, annotations
            )
        if isinstance(stmt, SBlockRealize):
            block = stmt.block
            kept = {k: v for k, v in block.annotations.items() if k != BARRIER}
            inner = SBlock(
                block.iter_vars,
                block.reads,
                block.writes,
                block.name_hint,
                visit(block.body),
                block.init,
                block.alloc_buffers,
                block.match_buffers,
                kept,
            )
            return SBlockRealize(stmt.iter_values, stmt.predicate, inner)
        return stmt

    return func.with_body(visit(func.body))
