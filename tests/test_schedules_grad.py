# SPDX-License-Identifier: Apache-2.0
"""The gradients' design space for CPUs: its schedules give the reference's numbers, and the machine code they should.

Everything that only needs a compiler runs for processors that this machine is not.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from compiled import build_and_compare_gradients, gradients_of, runnable_targets
from machine_code import JUMP, STACK, STORE, assembly, loops_of, matches

import tvmdcn
from tvmdcn.problems import PROBLEMS
from tvmdcn.space import TILE_UNITS, UNIT_BYTES, VARIANT, Decisions, space_of
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec
from tvmdcn.target import TargetInfo, resolve_target

# Largest error of a gradient over its own largest value: sums of up to 1400 products; for the halves the rounding of
# what is stored.
TOLERANCES = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
FLAGS = ("grad_input", "grad_offset", "grad_weight", "grad_bias")
SUBSETS = [flags for flags in itertools.product((True, False), repeat=4) if any(flags)]
BORDERS = ("torchvision", "mmcv")


def layer(in_channels: int, out_channels: int, **fields) -> DeformConv2dSpec:
    return DeformConv2dSpec(in_channels, out_channels, **{"padding": 1, **fields})


# What a schedule has to tell apart. Stride, padding and dilation vary along the way.
KINDS = {
    "plain": layer(32, 32),
    # two blocks of two vectors, in vectors of 16
    "blocks": layer(64, 24, stride=(1, 2)),
    # channels that are no multiple of a vector; prime, so that they are one block, of three vectors and of four
    "three_vectors": layer(37, 13, kernel_size=(3, 2), padding=(1, 0), dilation=(2, 1)),
    "four_vectors": layer(61, 10, kernel_size=(1, 3), padding=(0, 1)),
    "image": layer(3, 16, kernel_size=5, stride=(2, 1), dilation=(1, 2), padding=(2, 4, 3, 1)),
    "one_output": layer(16, 1, stride=2, padding=(2, 1, 0, 3)),
    "pointwise": layer(20, 33, kernel_size=1, padding=0),
    "v1": layer(17, 32, mask=False),
    "offset_groups": layer(32, 32, offset_groups=8),
    # 19 channels in an offset group: more than a vector, and not a multiple
    "uneven_offset_groups": layer(57, 16, offset_groups=3, kernel_size=2),
    "groups": layer(32, 48, groups=4),
    # offset groups of 4 channels in groups of 6
    "crossing_groups": layer(12, 18, groups=2, offset_groups=3),
    "two_per_channel": layer(8, 16, groups=8),
    "depthwise": layer(40, 40, groups=40, mask=False, kernel_size=(5, 3), padding=(2, 1)),
    "depthwise_offset_groups": layer(24, 24, groups=24, offset_groups=3),
}
TARGETS = runnable_targets()
HOST = next(iter(TARGETS.values()))
SPACE = "deform_conv2d_grad", "llvm"


def gradients(spec: DeformConv2dSpec, turn: int = 0, asked: tuple[bool, ...] = SUBSETS[0]) -> DeformConv2dGradSpec:
    """Return a layer's gradients; one border, or the other, in turn."""
    return DeformConv2dGradSpec.of(spec, **dict(zip(FLAGS, asked, strict=True)), border=BORDERS[turn % 2])


def variants(spec: DeformConv2dGradSpec, target: TargetInfo) -> list[str]:
    return space_of(*SPACE).variants(spec, target)


# --- numbers ------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """A kernel to build."""

    spec: DeformConv2dGradSpec
    target: TargetInfo
    decisions: Decisions


def wanted() -> dict[str, Wanted]:
    """Return each kind in two variants in float32 and NCHW, and in some other combinations in turn."""
    found = {}

    def add(kind: str, spec: DeformConv2dGradSpec, target: TargetInfo, number: int) -> None:
        names = variants(spec, target)
        variant = names[number % len(names)]
        asked = spec.slug.rpartition("_")[2]
        name = f"{kind}-{variant}-{target.vector_bits}-{spec.dtype}-{spec.layout}-{asked}"
        found[name] = Wanted(spec, target, Decisions(variant, {}))

    # There are six variants for each number of vectors, so 0, 7, 14, ... meet all of them and all numbers.
    for turn, (kind, spec) in enumerate(KINDS.items()):
        add(kind, gradients(spec, turn), HOST, 7 * turn)
        if spec.groups == 1 and spec.mask:
            add(kind, gradients(spec, turn + 1), HOST, 7 * turn + 2)
    others = [
        (dtype, layout, target)
        for dtype in TOLERANCES
        for layout in ("NCHW", "NHWC")
        for target in TARGETS.values()
        if (dtype, layout, target) != ("float32", "NCHW", HOST)
    ]
    # With 23 combinations (three widths), 7 brings them all up, each time in other company; all 15 subsets too.
    kinds = list(KINDS.items())
    for turn in range(len(others)):
        dtype, layout, target = others[turn * 7 % len(others)]
        kind, spec = kinds[turn * 4 % len(kinds)]
        changed = dataclasses.replace(spec, dtype=dtype, layout=layout)
        add(kind, gradients(changed, turn, SUBSETS[turn % len(SUBSETS)]), target, 5 * turn)
    return found


# Decisions that are nobody's default: kind, variant, values.
DECIDED = {
    "small_registers": (
        "blocks",
        "own-1-unit",
        {"register_pixels": 1, "unroll": 8, "weight_vectors": 1, "register_outputs": 1, "tile_units": 1},
    ),
    "large_registers": (
        "blocks",
        "stored-2-tap",
        {"register_pixels": 8, "unroll": 4, "weight_vectors": 2, "register_outputs": 12, "unroll_pixels": 2},
    ),
    "all_pixels": ("plain", "shared-1-tap", {"register_pixels": 24, "unroll_pixels": 4, "tile_units": 48}),
    "three_vectors": (
        "three_vectors",
        "shared-3-unit",
        {"register_pixels": 4, "weight_vectors": 3, "register_outputs": 1, "unroll_pixels": 3, "tile_units": 3},
    ),
}


def decided() -> dict[str, Wanted]:
    return {
        name: Wanted(gradients(KINDS[kind]), HOST, Decisions(variant, values))
        for name, (kind, variant, values) in DECIDED.items()
    }


JOBS = wanted() | decided()


@pytest.fixture(scope="session")
def gradient_outcomes(request, compilers, session_cache_dir):
    """What comes of the jobs of the tests that were selected, all begun at once."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    names = dict.fromkeys(call.params["gradient_job"] for call in calls if call and "gradient_job" in call.params)
    return {name: compilers.submit(build_and_compare_gradients, *JOBS[name], session_cache_dir) for name in names}


@pytest.mark.parametrize("gradient_job", JOBS)
def test_numbers(gradient_outcomes, gradient_job):
    outcome = gradient_outcomes[gradient_job].result()
    spec = JOBS[gradient_job].spec
    assert tuple(outcome.errors) == spec.outputs
    assert max(outcome.errors.values()) <= TOLERANCES[spec.dtype], outcome.errors


@pytest.mark.parametrize("gradient_job", JOBS)
def test_threads_do_not_change_a_bit(gradient_outcomes, gradient_job):
    """On 1, 2, 3 and 4 threads, with several tiles in each of several images, and in repeated calls."""
    assert gradient_outcomes[gradient_job].result().unsteady == set()


@pytest.mark.parametrize("gradient_job", DECIDED)
def test_decisions_are_followed(gradient_outcomes, gradient_job):
    decisions, made = JOBS[gradient_job].decisions, gradient_outcomes[gradient_job].result().schedule["decisions"]
    assert made["variant"] == decisions.variant
    assert made["values"].items() >= decisions.values.items()


def test_everything_comes_up():
    """The table above is a choice; should it change, it must not lose a value."""
    jobs = list(JOBS.values())
    combinations = {(job.target.vector_bits, job.spec.dtype, job.spec.layout) for job in jobs}
    assert len(combinations) == len(TARGETS) * len(TOLERANCES) * 2
    assert {tuple(getattr(job.spec, name) for name in FLAGS) for job in jobs} == set(SUBSETS)
    assert {(job.spec.border, job.spec.layout) for job in jobs} == set(itertools.product(BORDERS, ("NCHW", "NHWC")))
    plain = [job for job in jobs if (job.spec.dtype, job.spec.layout) == ("float32", "NCHW") and job.target is HOST]
    parts = [tuple(job.decisions.variant.split("-")) for job in plain]
    assert {(order, place) for order, _, place in parts} == set(
        itertools.product(("stored", "own", "shared"), ("tap", "unit"))
    )
    if HOST.vector_bits == 512:
        assert {count for _, count, _ in parts} == {"1", "2", "3", "4"}
