# SPDX-License-Identifier: Apache-2.0
"""Programs whose stages can be switched off at run time, to measure what each stage costs.

A stage that is left out of a program takes more with it than itself: the compiler deletes what nobody reads any more,
and a stage without its inputs reads places that nobody computed. So nothing is left out here. Each stage stands behind
a switch that the compiled code reads from memory, at an index that changes with the loop around it: the compiler knows
neither the switches nor that they are all alike, must keep every stage, and can assume nothing of their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from tvmdcn.errors import BuildError
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec
from tvmdcn.te.sampling import plan_blocks

__all__ = ["SLOTS", "STAGES", "SwitchedProgram", "switched_program"]

SLOTS = 64
"""Entries per stage in the table of switches, all alike; a loop's number, modulo this, says which one is read."""

_PLAN = ("pixel_0", "pixel_1", *plan_blocks(2, framed=True), *plan_blocks(2))

# The blocks of each stage, which are named in `te/`. A schedule that divides a block adds to its name.
STAGES: Mapping[str, Mapping[str, Sequence[str]]] = {
    DeformConv2dSpec.operator: {
        "layout": ("channels_last",),
        "plan": _PLAN,
        "sampling": ("columns",),
        "product": ("product",),
        "epilogue": ("output",),
    },
    DeformConv2dGradSpec.operator: {
        "plan": _PLAN,
        "layout": ("grad_tile", "image_frame", "image_rows", "grad_input"),
        "column gradients": ("grad_columns",),
        "samples": ("samples",),
        "weight's product": ("weight_part", "weight_sum"),
        "epilogue": ("grad_offset", "grad_weight", "bias_part", "bias_sum", "grad_bias"),
    },
}
"""The stages of each operator in the order in which they run, and their blocks."""


@dataclass(frozen=True)
class SwitchedProgram:
    """A scheduled function with a switch for each stage.

    Parameters
    ----------
    function : tirx.PrimFunc
        The scheduled function with one more argument, the last: the switches, float32 [stages, SLOTS]. A stage runs
        where its entries are positive.
    stages : tuple of str
        The stages that the schedule has, in the order of the rows of the switches.
    needs : mapping of str to frozenset of str
        The stages without which a stage must not run, because it reads places in memory that they computed.
    """

    function: Any
    stages: tuple[str, ...]
    needs: Mapping[str, frozenset[str]]

    def orders(self) -> tuple[list[str], list[str]]:
        """Return two orders in which stages can be switched on: as they run, and as much the other way as is safe."""
        backwards: list[str] = []

        def add(stage: str) -> None:
            for other in self.stages:
                if other in self.needs[stage] and other not in backwards:
                    add(other)
            if stage not in backwards:
                backwards.append(stage)

        for stage in reversed(self.stages):
            add(stage)
        return list(self.stages), backwards


def switched_program(function: Any, operator: str) -> SwitchedProgram:
    """Put every stage of a scheduled function behind a switch.

    Parameters
    ----------
    function : tirx.PrimFunc
        As a schedule leaves it, with its blocks.
    operator : str

    Raises
    ------
    BuildError
        If nothing is known of the operator's stages, or a block belongs to none of them.
    """
    if operator not in STAGES:
        raise BuildError(f"the stages of {operator} are not known: add its blocks to tvmdcn.bench.switches.STAGES.")
    blocks = _blocks(function.body.block.body)
    stage_of = {block.name_hint: _stage(block.name_hint, operator) for block in blocks}
    stages = tuple(stage for stage in STAGES[operator] if stage in stage_of.values())
    table = tirx.decl_buffer((len(stages), SLOTS), "float32", name="stage_switches")
    root = function.body.block
    body = _Guards(table, stages, stage_of).visit(root.body, None)
    block = SBlock(root.iter_vars, root.reads, root.writes, root.name_hint, body, root.init, root.alloc_buffers)
    switched = tirx.PrimFunc([*function.params, table], SBlockRealize([], True, block), attrs=function.attrs)
    return SwitchedProgram(switched, stages, _needs(blocks, stages, stage_of))


def _stage(block: str, operator: str) -> str:
    """Return the stage of a block, by the longest of the names that its name begins with."""
    found = [
        (len(name), stage)
        for stage, names in STAGES[operator].items()
        for name in names
        if block == name or block.startswith(name + "_")
    ]
    if not found:
        raise BuildError(f"block {block} belongs to no stage of {operator}: add it to tvmdcn.bench.switches.STAGES.")
    return max(found)[1]


def _blocks(stmt: Any) -> list[Any]:
    """Return the blocks of a scheduled program; they hold no other blocks."""
    if isinstance(stmt, tirx.SeqStmt):
        return [block for inner in stmt for block in _blocks(inner)]
    if isinstance(stmt, tirx.For):
        return _blocks(stmt.body)
    if isinstance(stmt, SBlockRealize):
        return [stmt.block]
    raise BuildError(f"a schedule has a {type(stmt).__name__} around its blocks, which no switch can be put round.")


def _needs(blocks: Sequence[Any], stages: Sequence[str], stage_of: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Return which stages compute the integers that a stage reads: they are places in memory."""
    makers = {
        region.source.name: stage_of[block.name_hint]
        for block in blocks
        for region in block.writes
        if str(region.source.dtype).startswith("int")
    }
    needs: dict[str, set[str]] = {stage: set() for stage in stages}
    for block in blocks:
        stage = stage_of[block.name_hint]
        needs[stage] |= {makers[r.source.name] for r in block.reads if r.source.name in makers} - {stage}
    return {stage: frozenset(others) for stage, others in needs.items()}


class _Guards:
    """Puts the largest parts of a program that belong to one stage behind its switch."""

    def __init__(self, table: Any, stages: Sequence[str], stage_of: Mapping[str, str]) -> None:
        self._table, self._stages, self._stage_of = table, stages, stage_of

    def _only_stage(self, stmt: Any) -> str | None:
        """Return the stage that all of a statement belongs to; None if there are several."""
        found = {self._stage_of[block.name_hint] for block in _blocks(stmt)}
        return found.pop() if len(found) == 1 else None

    def _guard(self, stmts: Sequence[Any], stage: str, loop: Any) -> Any:
        slot = tirx.const(0, "int32") if loop is None else tirx.floormod(loop, SLOTS)
        switch = tirx.BufferLoad(self._table, [self._stages.index(stage), slot])
        body = tirx.SeqStmt(list(stmts)) if len(stmts) > 1 else stmts[0]
        return tirx.IfThenElse(switch > tirx.const(0.0, "float32"), body, None)

    def visit(self, stmt: Any, loop: Any) -> Any:
        """Return a statement with its stages behind switches; `loop` is the number of the loop around it."""
        stage = self._only_stage(stmt)
        if stage is not None:
            return self._guard([stmt], stage, loop)
        if isinstance(stmt, tirx.For):
            body = self.visit(stmt.body, stmt.loop_var)
            return tirx.For(
                stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding, stmt.annotations
            )
        result: list[Any] = []
        together: list[Any] = []  # neighbours of one stage share a switch
        before: str | None = None
        for inner in stmt:
            stage = self._only_stage(inner)
            if together and stage != before:
                result.append(self._guard(together, str(before), loop))
                together = []
            if stage is None:
                result.append(self.visit(inner, loop))
            else:
                together.append(inner)
            before = stage
        if together:
            result.append(self._guard(together, str(before), loop))
        return tirx.SeqStmt(result) if len(result) > 1 else result[0]
