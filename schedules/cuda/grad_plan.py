# SPDX-License-Identifier: Apache-2.0
"""The sampling plan of the gradient of the weight, on NVIDIA GPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

from tvmdcn.te.sampling import plan_blocks
from tvmdcn.te.weight_gradients import PREFIX

__all__ = ["plan_samples", "stage_of"]


def stage_of(sch: Any, name: str) -> Any:
    """Return a stage of the gradient of the weight."""
    return sch.get_sblock(PREFIX + name)


def plan_samples(sch: Any, at: Any) -> Any:
    """Schedule the sampling plan inside a loop: in shared memory, a sample a thread. Returns its loop over samples."""
    block = partial(stage_of, sch)

    sch.compute_inline(block("image_first"))
    plans = []
    for name in ("share", "place"):
        stage = block(name)
        sch.set_scope(stage, 0, "shared.dyn")
        sch.compute_at(stage, at, index=-2)  # side by side, before all that is there
        *loops, corners = sch.get_loops(stage)[4:]
        plans.append(sch.fuse(*loops))
        sch.unroll(corners)
    merged = sch.merge(*reversed(plans))
    for name in (*plan_blocks(2), "pixel_1", "pixel_0", "pixel", "pixel_n"):
        sch.set_scope(block(name), 0, "local")
        sch.compute_at(block(name), merged)
    return merged
