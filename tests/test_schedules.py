# SPDX-License-Identifier: Apache-2.0
"""The design space for CPUs: its schedules give the reference's numbers, and the machine code they should.

Everything that only needs a compiler runs for processors that this machine is not.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
from compiled import Job, build_and_compare, runnable_targets
from machine_code import JUMP, STACK, STORE, assembly, blocks_of, loops_of, matches, scheduled

from tvmdcn.errors import BuildError
from tvmdcn.problems import PROBLEMS
from tvmdcn.space import TILE_UNITS, VARIANT, Decisions, space_of
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import TargetInfo, resolve_target

# Largest error over the largest value: sums of up to 513 products; for the halves the output's rounding.
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


SPACE = "deform_conv2d", "llvm"


def variants(spec: DeformConv2dSpec, target: TargetInfo) -> list[str]:
    return space_of(*SPACE).variants(spec, target)


# --- numbers -----------------------------------------------------------------------------------------------


def jobs() -> dict[str, Job]:
    """Return each kind in every variant in float32 and NCHW, and in some other combinations in turn."""
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
        for _ in range(2):
            # With 23 combinations (three widths), 7 brings them all up, each time in other company.
            dtype, layout, target = others[turn * 7 % len(others)]
            changed = dataclasses.replace(spec, dtype=dtype, layout=layout)
            names = variants(changed, target)
            add(kind, changed, target, names[turn % len(names)])
            turn += 1
    return found


# Decisions that are nobody's default: kind, how the variant begins, values.
DECIDED = {
    "wide_register_tile": ("four_blocks", "full-4", {"register_pixels": 3, "unroll": 4, "tile_units": 48}),
    "narrow_register_tile": ("plain", "full-2", {"register_pixels": 1, "unroll": 8, "tile_units": 1}),
    "small_chunks": ("plain", "split-2", {"taps": 3, "channels": 8, "register_pixels": 8, "unroll": 8}),
    "one_chunk": ("pointwise", "split-3", {"taps": 1, "channels": 20, "unroll": 5, "tile_units": 3}),
    "chunks_of_runs": ("offset_groups", "split-2", {"taps": 9, "channels": 2, "register_pixels": 6}),
    "prime_chunks": ("uneven_offset_groups", "split-2", {"taps": 3, "channels": 19, "unroll": 1}),
    "groups": ("groups", "full-1", {"register_pixels": 24, "unroll": 8, "tile_units": 2}),
    "registers_of_depthwise": ("depthwise", "depthwise", {"register_blocks": 1, "tile_units": 3}),
}


def decided() -> dict[str, Job]:
    """Return the decisions above, each in the last variant of that name."""
    found = {}
    for name, (kind, begin, values) in DECIDED.items():
        variant = next(v for v in reversed(variants(KINDS[kind], HOST)) if v.startswith(begin))
        found[name] = Job(KINDS[kind], HOST, Decisions(variant, values))
    return found


JOBS = jobs() | decided()


@pytest.fixture(scope="session")
def outcomes(request, compilers, session_cache_dir):
    """What comes of the jobs of the tests that were selected, all begun at once."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    names = dict.fromkeys(call.params["job"] for call in calls if call is not None and "job" in call.params)
    return {name: compilers.submit(build_and_compare, JOBS[name], session_cache_dir) for name in names}


@pytest.mark.parametrize("job", JOBS)
def test_numbers(outcomes, job):
    errors = outcomes[job].result().errors
    assert max(errors) <= TOLERANCES[JOBS[job].spec.dtype]


@pytest.mark.parametrize("job", DECIDED)
def test_decisions_are_followed(outcomes, job):
    wanted, made = JOBS[job].schedule, outcomes[job].result().schedule["decisions"]
    assert made["variant"] == wanted.variant
    assert made["values"].items() >= wanted.values.items()


@pytest.mark.parametrize("variant", ["full-2-tap", "split-9-tap", "unknown"])
def test_impossible_decisions_give_way_to_the_default(variant):
    known = variant if variant in variants(KINDS["plain"], HOST) else variants(KINDS["plain"], HOST)[0]
    values = {"register_pixels": 99, "unroll": 7, "taps": 2, "channels": 5, "tile_units": 5, "unknown": 3}
    default = scheduled(KINDS["plain"], HOST, Decisions(known, {}))[1]
    made = scheduled(KINDS["plain"], HOST, Decisions(variant, values))[1]
    # 5 units are possible, but not one of the candidates: the nearest is taken.
    assert made == Decisions(known, {**default.values, "tile_units": 4})


def test_every_combination_comes_up():
    seen = {(job.target.vector_bits, job.spec.dtype, job.spec.layout) for job in JOBS.values()}
    assert len(seen) == len(TARGETS) * len(TOLERANCES) * 2


# --- what a schedule looks like -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_structure(kind):
    from tvm.tirx import ForKind

    spec = KINDS[kind]
    sch, made = scheduled(spec, HOST)
    blocks = blocks_of(sch.mod[SPACE[0]])
    first = blocks["pixel_0"][0].block.annotations
    assert first[VARIANT] == made.variant
    assert first[TILE_UNITS] == made.values["tile_units"]
    for name, (realize, loops) in blocks.items():
        # All but the image's stage is computed in one parallel loop over tiles.
        kinds = [loop.kind for loop in loops]
        assert kinds.count(ForKind.PARALLEL) == 1, name
        assert kinds[0] == ForKind.PARALLEL, name
        assert (loops[0].same_as(blocks["output"][1][0])) == (name != "channels_last"), name
        # Everything has the tile's constant extents, but for channels that are no multiple of a vector.
        lanes = HOST.vector_bits // 32
        per_offset_group = spec.in_channels // spec.offset_groups
        if name != "columns" or per_offset_group < lanes or per_offset_group % lanes == 0:
            assert str(realize.predicate) in ("True", "T.bool(True)"), name
        if name not in ("channels_last", "output", "pixel_0", "pixel_1"):
            assert kinds[-1] == ForKind.VECTORIZED, name
    product = next(name for name in ("product_rf_update", "product_update") if name in blocks)
    innermost = blocks[product][1][::-1]
    assert {loop.kind for loop in innermost[1:3]} <= {ForKind.UNROLLED, ForKind.SERIAL}


def test_spaces_are_found_by_name():
    assert space_of(*SPACE).operator == SPACE[0]
    with pytest.raises(BuildError, match="no design space for deform_conv2d on targets of kind 'tpu'"):
        space_of(SPACE[0], "tpu")


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"variant": 1, "values": {}},
        {"variant": "a", "values": {"b": 1.0}},
        {"variant": "a", "values": []},
    ],
)
def test_other_things_are_no_decisions(data):
    with pytest.raises(BuildError, match="not decisions as"):
        Decisions.from_json(data)


def test_decisions_survive_json():
    decisions = Decisions("full-2-tap", {"unroll": 2})
    assert Decisions.from_json(decisions.to_json()) == decisions


# --- machine code -------------------------------------------------------------------------------------------


# What keeps two FMA units busy has little else in its loop: no predicate, and no register spilled.
PRODUCT_LOOPS = {
    # problem, processor: multiply-adds on which registers, at least how many, and as which part of the loop
    ("r50_c3", "znver5"): (r"vfmadd\w+ps .*%zmm", 24, 0.55),
    ("r50_c4", "znver5"): (r"vfmadd\w+ps .*%zmm", 24, 0.55),
    ("r50_c4", "cascadelake"): (r"vfmadd\w+ps .*%zmm", 24, 0.55),
    ("r50_c4", "x86-64-v3"): (r"vfmadd\w+ps .*%ymm", 12, 0.5),
    ("r50_c4", "llvm-aarch64"): (r"fmla v\d+\.4s", 24, 0.5),
    ("edvr_align", "znver5"): (r"vfmadd\w+ps .*%zmm", 24, 0.55),
    ("grouped32", "znver5"): (r"vfmadd\w+ps .*%ymm", 12, 0.5),
}


@pytest.mark.parametrize(("problem", "processor"), PRODUCT_LOOPS)
def test_product_loop(problem, processor):
    pattern, count, share = PRODUCT_LOOPS[problem, processor]
    loops = loops_of(assembly(PROBLEMS[problem].spec, resolve_target(processor)))
    # Sampling multiplies as well, and stores what it sampled; the product keeps its sums in registers.
    products = [
        loop
        for loop in loops
        if matches(pattern, loop) >= count
        and matches(JUMP, loop) == 1
        and not any(matches(STORE, [line]) and not matches(STACK, [line]) for line in loop)
    ]
    assert products
    for loop in products:
        assert matches(STACK, loop) == 0
        assert matches(pattern, loop) / len(loop) >= share


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [("float64", r"fmla\s+v\d+\.2d"), ("float16", r"fcvtl\s+v\d+\.4s"), ("bfloat16", r"shll?\s+v\d+\.4s")],
)
@pytest.mark.parametrize("kind", ["uneven_offset_groups", "depthwise"])
def test_neon(kind, dtype, pattern):
    spec = dataclasses.replace(KINDS[kind], dtype=dtype, layout="NHWC")
    code = assembly(spec, resolve_target("llvm-aarch64"))
    assert re.search(pattern, code.expandtabs(1))
    assert re.search(r"fmla\s+v\d+\.[24][sd]", code.expandtabs(1))
