# SPDX-License-Identifier: Apache-2.0
"""What a schedule looks like: its loops in TIR, and those of the machine code."""

from __future__ import annotations

import re
from typing import Any

from tvmdcn.space import Decisions, space_of
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import TargetInfo

JUMP = r"j|b\.|cb|tb|b "
STACK = r".*(%rsp|\[(sp|x29))"
STORE = r"v?mov[au]p[sd] %.*\(|v?mov[dq\w]+ %[xyz]mm.*\(|st[rpu]+ [qvd]"


def scheduled(spec: DeformConv2dSpec, target: TargetInfo, decisions: Decisions | None = None) -> tuple[Any, Decisions]:
    """Return a TVM schedule, and what was decided."""
    from tvmdcn.builder import new_schedule

    sch = new_schedule(spec, target)
    return sch, space_of(spec.operator, target.kind).schedule(sch, spec, target, decisions)


def blocks_of(function: Any) -> dict[str, tuple[Any, list[Any]]]:
    """Return each block's realization and the loops around it, by name, in the order of the text."""
    found = {}

    def visit(stmt: Any, loops: list[Any]) -> None:
        if hasattr(stmt, "seq"):
            for inner in stmt:
                visit(inner, loops)
        elif hasattr(stmt, "loop_var"):
            visit(stmt.body, [*loops, stmt])
        elif hasattr(stmt, "block"):
            found[stmt.block.name_hint] = stmt, loops
            visit(stmt.block.body, loops)

    visit(function.body, [])
    del found["root"]
    return found


def assembly(spec: DeformConv2dSpec, target: TargetInfo) -> str:
    """Return the machine code of a layer's default schedule."""
    from tvmdcn.builder import compile_schedule

    return compile_schedule(spec, target, scheduled(spec, target)[0].mod).mod.inspect_source("s")


def loops_of(code: str) -> list[list[str]]:
    """Return the instructions of each loop, from the target of a jump backwards to the jump."""
    lines = [re.split(r"\s*(?:#|//)", line)[0].strip() for line in code.splitlines()]
    labels = {line[:-1]: index for index, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for index, line in enumerate(lines):
        words = line.split()
        if len(words) > 1 and words[0][0] in "jbct" and labels.get(words[-1], index) < index:
            body = lines[labels[words[-1]] : index + 1]
            loops.append([text for text in body if text and not text.endswith(":") and text[0] != "."])
    return loops


def matches(pattern: str, lines: list[str]) -> int:
    """Return how many instructions begin with a pattern."""
    return sum(re.match(pattern, line.expandtabs(1)) is not None for line in lines)
