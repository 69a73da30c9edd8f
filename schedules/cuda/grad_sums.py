# SPDX-License-Identifier: Apache-2.0
"""Sums over output pixels on NVIDIA GPUs: the parts of the weight's gradient added up, and the gradient of the bias."""

from __future__ import annotations

from typing import Any

from tvmdcn.schedules.cuda.threads import BARRIER, BOUND, LANES, Team
from tvmdcn.te.device_sampling import MOST_PIXELS
from tvmdcn.te.pixel_sums import BIAS_LANES, BIAS_PREFIX
from tvmdcn.te.weight_gradients import PREFIX

__all__ = ["add_parts", "sum_bias"]


def add_parts(sch: Any) -> None:
    """Schedule the sum over splits: read along channels, stored in the order of the weight."""
    total, store = (sch.get_sblock(PREFIX + name) for name in ("total", "store"))
    o, c, k = sch.get_loops(store)
    team = Team(sch, min(int(sch.get(k).extent), 16))  # a tap a warp
    blocks_o, o = sch.split(o, [None, max(1, LANES // int(sch.get(c).extent))])
    blocks_c, c = sch.split(c, [None, min(LANES, int(sch.get(c).extent))])
    sch.reorder(blocks_o, blocks_c, o, c, k)
    tile = sch.fuse(blocks_o, blocks_c)
    sch.bind(tile, "blockIdx.x")
    sch.set_scope(total, 0, "shared.dyn")
    sch.compute_at(total, tile, preserve_unit_loops=True)
    team.share([o, c, k])
    sch.annotate(store, BARRIER, "block")
    o, c, k, part = sch.get_loops(total)[1:]
    sch.reorder(k, o, c, part)
    team.share([k, o, c])


def sum_bias(sch: Any) -> None:
    """Schedule the bias: a block of threads does 32 output channels of a split."""
    lanes, part, total, store = (sch.get_sblock(BIAS_PREFIX + name) for name in ("lanes", "part", "total", "store"))
    team = Team(sch, BIAS_LANES)
    n, o, _ = sch.get_loops(part)
    blocks, o = sch.split(o, [None, LANES])
    tile = sch.fuse(n, blocks)
    sch.bind(tile, "blockIdx.x")
    sch.set_scope(lanes, 0, "shared.dyn")
    sch.compute_at(lanes, tile)
    team.share([o])
    lane, o, q = sch.get_loops(lanes)[1:]
    sch.annotate(q, BOUND, MOST_PIXELS // BIAS_LANES)
    team.share([lane, o])
    sch.annotate(part, BARRIER, "block")
    blocks, o = sch.split(sch.get_loops(store)[0], [None, LANES])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(o, "threadIdx.x")
    sch.set_scope(total, 0, "local")
    sch.compute_at(total, o)
