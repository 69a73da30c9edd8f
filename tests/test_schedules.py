# SPDX-License-Identifier: Apache-2.0
"""The design space for CPUs: each of its schedules gives the reference's numbers, and the machine code it should.

Everything that only needs a compiler runs for processors that this machine is not.
"""

from __future__ import annotations

import dataclasses

import pytest
from compiled import Job, build_and_compare, runnable_targets

from tvmdcn.space import Decisions, space_of
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import TargetInfo

# Largest error over the largest value. float32: sums of up to 513 products; the halves: rounding of the output.
TOLERANCES = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


def layer(in_channels: int, out_channels: int, **fields) -> DeformConv2dSpec:
    return DeformConv2dSpec(in_channels, out_channels, **{"padding": 1, **fields})


# What a schedule has to tell apart. Stride, padding and dilation vary along the way.
KINDS = {
    "plain": layer(32, 32),
    "four_blocks": layer(20, 64, stride=(1, 2)),
    "three_blocks": layer(16, 48, kernel_size=(3, 2), padding=(1, 0), dilation=(2, 1)),
    "one_output": layer(33, 1),
    "five_outputs": layer(16, 5, padding=(2, 1, 0, 1)),
    "eighteen_outputs": layer(24, 18, stride=(2, 1)),
    "twenty_seven_outputs": layer(18, 27),
    "image": layer(3, 16, kernel_size=5, padding=2),
    "pointwise": layer(20, 33, kernel_size=1, padding=0),
    "v1": layer(17, 32, mask=False),
    "offset_groups": layer(32, 32, offset_groups=8),
    # 19 channels in an offset group: more than a vector, and not a multiple
    "uneven_offset_groups": layer(57, 32, offset_groups=3),
    "groups": layer(32, 48, groups=4),
    # offset groups of 4 channels in groups of 6
    "crossing_groups": layer(12, 18, groups=2, offset_groups=3),
    "two_per_channel": layer(8, 16, groups=8),
    "depthwise": layer(40, 40, groups=40, mask=False),
    "depthwise_offset_groups": layer(24, 24, groups=24, offset_groups=3),
}
TARGETS = runnable_targets()
HOST = next(iter(TARGETS.values()))


def variants(spec: DeformConv2dSpec, target: TargetInfo) -> list[str]:
    return space_of(spec.operator, target.kind).variants(spec, target)


def jobs() -> dict[str, Job]:
    """Return every variant of every kind in float32 and NCHW, and of each kind some other combinations in turn."""
    found = {}

    def add(kind: str, spec: DeformConv2dSpec, target: TargetInfo, variant: str) -> None:
        name = f"{kind}-{variant}-{target.vector_bits}-{spec.dtype}-{spec.layout}"
        found[name] = Job(spec, target, Decisions(variant, {}))

    others = [
        (dtype, layout, target)
        for dtype in TOLERANCES
        for layout in ("NCHW", "NHWC")
        for target in TARGETS.values()
        if (dtype, layout, target) != ("float32", "NCHW", HOST)
    ]
    turn = 0
    for kind, spec in KINDS.items():
        for variant in variants(spec, HOST):
            add(kind, spec, HOST, variant)
        for _ in range(4):
            # 7 is prime to the number of combinations, so that all come up, and not in the same company.
            dtype, layout, target = others[turn * 7 % len(others)]
            changed = dataclasses.replace(spec, dtype=dtype, layout=layout)
            names = variants(changed, target)
            add(kind, changed, target, names[turn % len(names)])
            turn += 1
    return found


JOBS = jobs()
