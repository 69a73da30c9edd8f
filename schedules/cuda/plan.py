# SPDX-License-Identifier: Apache-2.0
"""The sampling plan on NVIDIA GPUs: for a block of threads in shared memory, or for each thread in registers."""

from __future__ import annotations

from typing import Any

from tvmdcn.schedules.cuda.threads import BARRIER, Team
from tvmdcn.te.sampling import plan_blocks

__all__ = ["plan_of_block", "plan_of_threads"]

_PIXELS = ("pixel_1", "pixel_0", "pixel", "pixel_n")


def plan_of_block(sch: Any, at: Any, prefix: str = "", index: int = -1) -> Any:
    """Schedule the plan of all samples inside a loop: in shared memory, a sample a thread.

    `prefix`: of the stages' names. `index`: where in the loop, see ``Schedule.compute_at``. Returns its loop over
    samples, which is yet to be spread over threads.
    """
    plans = []
    for name in ("share", "place"):
        stage = sch.get_sblock(prefix + name)
        sch.set_scope(stage, 0, "shared.dyn")
        sch.compute_at(stage, at, index=index)
        *loops, corners = sch.get_loops(stage)[4:]
        plans.append(sch.fuse(*loops))
        sch.unroll(corners)
    merged = sch.merge(*reversed(plans))
    # In shared memory, where there is one sample a thread, the pixels' room would be given to the plan too early.
    for name in (*plan_blocks(2), *_PIXELS):
        stage = sch.get_sblock(prefix + name)
        sch.set_scope(stage, 0, "local")
        sch.compute_at(stage, merged)
    return merged


def plan_of_threads(sch: Any, team: Team, lane: Any, samples: list[Any]) -> None:
    """Schedule the plan of each sample where it is needed: places before the corners are read, shares after.

    `samples` are the loops of ``corner`` and ``columns`` inside which is all of a sample. Where the pixels lie is in
    shared memory.
    """
    block = sch.get_sblock
    for name, loop in zip(("place", "share"), samples, strict=True):
        stage = block(name)
        sch.set_scope(stage, 0, "local")
        sch.compute_at(stage, loop)
        sch.unroll(sch.get_loops(stage)[-1])
    for name in plan_blocks(2):
        if name.startswith(("index", "low", "high")):
            at = sch.get_loops(block("place"))[-2]
        elif name.startswith(("weight", "fraction")):
            at = sch.get_loops(block("share"))[-2]
        else:
            sch.compute_inline(block(name))
            continue
        sch.set_scope(block(name), 0, "local")
        sch.compute_at(block(name), at)
    # All are placed before any is spread over threads: of a guarded loop TVM takes the whole range for what is read.
    for name in _PIXELS:
        sch.set_scope(block(name), 0, "shared.dyn")
        sch.compute_at(block(name), lane)
    for name in _PIXELS:
        team.share(sch.get_loops(block(name))[4:])
        if name != "pixel_n":
            sch.annotate(block(name), BARRIER, "block")
