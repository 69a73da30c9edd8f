# SPDX-License-Identifier: Apache-2.0
"""Stages written as TIR: loops around one block whose inside the schedule leaves alone.

For what TE cannot say, or says badly: transpositions in registers, and stages with several results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Range, TensorRegion, load_json, save_json
from tvm.s_tir.stmt import SBlock, SBlockRealize

__all__ = [
    "TOKEN",
    "block_name",
    "block_nest",
    "declare_reads",
    "prefetch",
    "region",
    "sequence",
    "serial",
    "whole_function",
    "with_alignment",
]

Expr = Any

TOKEN = (0, 1)
"""Region in which the image's stage and its reader are said to meet.

The schedule proves that a stage writes what the next reads; of a gather from an image of free size it cannot, and need
not: ``channels_last`` stays a stage of its own before the tiles. So both sides declare one element, which keeps their
order.
"""


def block_nest(
    name: str,
    extents: Sequence[tuple[str, Expr]],
    reads: Callable[..., list[TensorRegion]],
    writes: Callable[..., list[TensorRegion]],
    body: Callable[..., tirx.Stmt],
    scratch: Sequence[tirx.Buffer] = (),
    parallel: bool = False,
) -> tirx.Stmt:
    """Return loops over `extents` around one data-parallel block whose `body` is opaque to the schedule.

    `scratch` are the buffers of one execution of the body. `parallel`: the outermost loop is (for functions that no
    schedule will touch).
    """
    loops = [tirx.Var(label, "int32") for label, _ in extents]
    axes = [
        tirx.IterVar(Range(0, extent), tirx.Var("v_" + label, "int32"), tirx.IterVar.DataPar)
        for label, extent in extents
    ]
    at = [axis.var for axis in axes]
    nest: tirx.Stmt = SBlockRealize(
        loops, True, SBlock(axes, reads(*at), writes(*at), name, body(*at), None, list(scratch))
    )
    for depth, (loop, (_, extent)) in reversed(list(enumerate(zip(loops, extents, strict=True)))):
        kind = tirx.ForKind.PARALLEL if parallel and depth == 0 else tirx.ForKind.SERIAL
        nest = tirx.For(loop, 0, extent, kind, nest)
    return nest


def serial(var: tirx.Var, extent: Expr, body: tirx.Stmt) -> tirx.Stmt:
    """Return a plain loop from 0."""
    return tirx.For(var, 0, extent, tirx.ForKind.SERIAL, body)


def sequence(stmts: Sequence[tirx.Stmt]) -> tirx.Stmt:
    """Return statements one after the other; TVM refuses a sequence of one."""
    return tirx.SeqStmt(list(stmts)) if len(stmts) > 1 else stmts[0]


def prefetch(buffer: tirx.Buffer, index: Sequence[Expr]) -> tirx.Stmt:
    """Return a hint to the processor: the cache line of an element will be read soon."""
    address = tirx.address_of(tirx.BufferLoad(buffer, list(index)))
    # Behind the address: to read, into the first-level cache, data.
    kind = [tirx.const(value, "int32") for value in (0, 3, 1)]
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *kind))


def region(buffer: tirx.Buffer, *bounds: Expr | tuple[Expr, Expr]) -> TensorRegion:
    """Return a region; a bound is an index, or a pair (begin, extent)."""
    return tirx.BufferRegion(
        buffer, [Range.from_min_extent(*b) if isinstance(b, tuple) else Range.from_min_extent(b, 1) for b in bounds]
    )


def declare_reads(stmt: tirx.Stmt, block: str, source: tirx.Buffer, bounds: Sequence[tuple[Expr, Expr]]) -> tirx.Stmt:
    """Return `stmt` with the region that `block` reads from `source` replaced.

    `bounds` is (begin, extent) for each axis of `source`. See `TOKEN` for why a gather does not describe itself.
    """
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([declare_reads(s, block, source, bounds) for s in stmt])
    if isinstance(stmt, tirx.For):
        body = declare_reads(stmt.body, block, source, bounds)
        return tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body)
    inner = stmt.block
    if inner.name_hint != block:
        return stmt
    reads = [r for r in inner.reads if not r.source.same_as(source)] + [region(source, *bounds)]
    declared = SBlock(inner.iter_vars, reads, inner.writes, block, inner.body, inner.init, inner.alloc_buffers)
    return SBlockRealize(stmt.iter_values, stmt.predicate, declared)


def block_name(stmt: tirx.Stmt) -> str:
    """Return the name of the block in a nest of loops."""
    while isinstance(stmt, tirx.For):
        stmt = stmt.body
    return str(stmt.block.name_hint)


def whole_function(params: Sequence[tirx.Buffer], stage: tirx.Stmt) -> tirx.PrimFunc:
    """Return a function of one stage."""
    body = SBlockRealize([], True, SBlock([], [], [], "root", stage))
    return tirx.PrimFunc(list(params), body).with_attr("tirx.noalias", True)


def with_alignment(func: tirx.PrimFunc, alignments: Mapping[str, int]) -> tirx.PrimFunc:
    """Return `func` with another alignment, in bytes, promised for the data of its buffer parameters.

    TE promises 64 for all, and the code generator then emits aligned loads that fault on a NumPy array.
    """
    graph = json.loads(save_json(func))
    nodes = graph["nodes"]
    for index in nodes[nodes[graph["root_index"]]["data"]["params"]]["data"]:
        param = nodes[index]["data"]
        name, kind = nodes[param["name"]]["data"], nodes[param["ty"]]
        if kind["type"] == "tirx.BufferType" and name in alignments:
            kind["data"]["data_alignment"] = alignments[name]
    return load_json(json.dumps(graph))
