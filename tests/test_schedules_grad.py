# SPDX-License-Identifier: Apache-2.0
"""The gradients' design space for CPUs: its schedules give the reference's numbers, and the machine code they should.

Everything that only needs a compiler runs for processors that this machine is not.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from compiled import build_and_compare_gradients, build_only, error_of, gradients_of, run, runnable_targets
from machine_code import JUMP, STACK, STORE, assembly, blocks_of, loops_of, matches, scheduled

import tvmdcn
from tvmdcn.problems import PROBLEMS, real_layer
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.space import TILE_UNITS, UNIT_BYTES, VARIANT, Decisions, space_of
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo, resolve_target
from tvmdcn.te.channel_blocks import ChannelBlocks, form
from tvmdcn.te.sampling import plan_blocks
from tvmdcn.te.tiles import GRANULE
from tvmdcn.tensors import make_gradient_tensors
from tvmdcn.tuning.words import describe_decisions

# Largest error of a gradient over its own largest value: sums of up to 1400 products; for the halves the rounding of
# what is stored.
TOLERANCES = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3, "real layer": 1e-5}
DTYPES = ("float64", "float32", "float16", "bfloat16")
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
    # several groups in a vector; several vectors of a group in a block; groups no vector is a multiple of
    "groups": layer(32, 48, groups=4),
    "groups_of_vectors": layer(128, 24, groups=4, offset_groups=2),
    "uneven_groups": layer(24, 8, groups=2),
    # whole groups, and yet no whole vectors
    "groups_of_part_of_a_vector": layer(12, 24, groups=3),
    "groups_of_three_vectors": layer(40, 20, groups=5, kernel_size=2),
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

    for turn, (kind, spec) in enumerate(KINDS.items()):
        add(kind, gradients(spec, turn), HOST, turn)
        if spec.groups == 1 and spec.mask:
            add(kind, gradients(spec, turn + 1), HOST, turn + 4)
    others = [
        (dtype, layout, target)
        for dtype in DTYPES
        for layout in ("NCHW", "NHWC")
        for target in TARGETS.values()
        if (dtype, layout, target) != ("float32", "NCHW", HOST)
    ]
    # A step that has no factor in common with the number of combinations brings them all up, each in other company.
    step = next(n for n in (7, 5, 1) if math.gcd(n, len(others)) == 1)
    kinds = list(KINDS.items())
    for turn in range(max(len(others), len(SUBSETS))):
        dtype, layout, target = others[turn * step % len(others)]
        kind, spec = kinds[turn * 4 % len(kinds)]
        changed = dataclasses.replace(spec, dtype=dtype, layout=layout)
        add(kind, gradients(changed, turn, SUBSETS[turn % len(SUBSETS)]), target, 5 * turn)
    return found


# Decisions that are nobody's default: kind, variant, values.
DECIDED = {
    "small_registers": (
        "blocks",
        "own-1",
        {"register_pixels": 1, "unroll": 8, "weight_vectors": 1, "register_outputs": 1, "tile_units": 1},
    ),
    "large_registers": (
        "blocks",
        "stored-2",
        {"register_pixels": 4, "unroll": 4, "weight_vectors": 2, "register_outputs": 6, "unroll_pixels": 2},
    ),
    "all_pixels": (
        "plain",
        "shared-1",
        {"register_pixels": 24 if HOST.vector_registers > 24 else 8, "unroll_pixels": 4, "tile_units": 48},
    ),
    "three_vectors": (
        "three_vectors",
        "shared-3",
        {"register_pixels": 4, "weight_vectors": 3, "register_outputs": 1, "unroll_pixels": 3, "tile_units": 3},
    ),
}
# Blocks of three vectors need wide ones: shorter ones come in other blocks.
DECIDED = {name: d for name, d in DECIDED.items() if d[1] in variants(gradients(KINDS[d[0]]), HOST)}


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
def test_nothing_changes_a_bit(gradient_outcomes, gradient_job):
    """On 1, 2, 3 and 4 threads, with several tiles in several images, in repeated calls, and wherever tensors lie."""
    assert gradient_outcomes[gradient_job].result().unsteady == set()


@pytest.mark.parametrize("gradient_job", JOBS)
def test_nothing_is_written_beside_the_gradients(gradient_outcomes, gradient_job):
    assert gradient_outcomes[gradient_job].result().overrun == set()


# Besides the images above: none, one output pixel, 23, 24, 25, 48, 49 (around one and two units), many images.
SIZES = (
    *(Extents(0, 9, 9), Extents(1, 1, 1), Extents(3, 1, 9), Extents(1, 1, 23), Extents(2, 4, 6), Extents(1, 5, 5)),
    *(Extents(1, 6, 8), Extents(2, 7, 7), Extents(33, 5, 4), Extents(1, 100, 1), Extents(1, 1, 99), Extents(2, 37, 41)),
)
SIZED = {layout: gradients(layer(24, 20, layout=layout)) for layout in ("NCHW", "NHWC")}


@pytest.fixture(scope="module")
def sized_builds(compilers, session_cache_dir):
    return {layout: compilers.submit(build_only, spec, "tuned", session_cache_dir) for layout, spec in SIZED.items()}


@pytest.mark.parametrize("layout", SIZED)
def test_one_kernel_for_all_sizes(sized_builds, layout):
    sized_builds[layout].result()
    spec = SIZED[layout]
    kernel = tvmdcn.load(spec)
    for seed, extents in enumerate(SIZES):
        arguments = make_gradient_tensors(spec, extents, seed)
        found = gradients_of(kernel, arguments)
        for name, expected in expected_gradients(spec, arguments).items():
            assert error_of(found[name], expected) <= TOLERANCES[spec.dtype], (name, extents)


@pytest.mark.parametrize("gradient_job", DECIDED)
def test_decisions_are_followed(gradient_outcomes, gradient_job):
    decisions, made = JOBS[gradient_job].decisions, gradient_outcomes[gradient_job].result().schedule["decisions"]
    assert made["variant"] == decisions.variant
    assert made["values"].items() >= decisions.values.items()


def test_everything_comes_up():
    """The table above is a choice; should it change, it must not lose a value."""
    jobs = list(JOBS.values())
    combinations = {(job.target.vector_bits, job.spec.dtype, job.spec.layout) for job in jobs}
    assert len(combinations) == len(TARGETS) * len(DTYPES) * 2
    assert {tuple(getattr(job.spec, name) for name in FLAGS) for job in jobs} == set(SUBSETS)
    assert {(job.spec.border, job.spec.layout) for job in jobs} == set(itertools.product(BORDERS, ("NCHW", "NHWC")))
    plain = [job for job in jobs if (job.spec.dtype, job.spec.layout) == ("float32", "NCHW") and job.target is HOST]
    parts = [job.decisions.variant.split("-") for job in plain]
    assert {order for order, _ in parts} == {"stored", "own", "shared"}
    if HOST.vector_bits == 512:
        assert {count for _, count in parts} == {"1", "2", "3", "4"}


REAL = ("aliked_b3c1", "aliked_b4c1")


@pytest.fixture(scope="module")
def real_builds(real_layers_folder, compilers, session_cache_dir):
    specs = [PROBLEMS[name].spec for name in REAL]
    specs += [DeformConv2dGradSpec.of(spec) for spec in specs]
    return {spec: compilers.submit(build_only, spec, "tuned", session_cache_dir) for spec in specs}


@pytest.mark.parametrize("name", REAL)
def test_real_layers_forward_and_backward(real_builds, real_layers_folder, name):
    tensors, output = real_layer(name, real_layers_folder)
    spec = PROBLEMS[name].spec
    backward = DeformConv2dGradSpec.of(spec)
    for needed in (spec, backward):
        real_builds[needed].result()
    assert error_of(run(tvmdcn.load(spec), tensors), output) <= TOLERANCES["real layer"]
    arguments = {name: array for name, array in vars(tensors).items() if array is not None}
    arguments["grad_output"] = np.random.default_rng(0).standard_normal(output.shape, dtype=np.float32)
    found = gradients_of(tvmdcn.load(backward), arguments)
    for name, expected in expected_gradients(backward, arguments).items():
        assert error_of(found[name], expected) <= TOLERANCES["real layer"], name


def test_impossible_decisions_give_way_to_the_default():
    spec = gradients(KINDS["plain"])
    values = {"register_pixels": 99, "unroll": 7, "weight_vectors": 5, "register_outputs": 7, "unknown": 3}
    default = scheduled(spec, HOST)[1]
    assert (
        scheduled(spec, HOST, Decisions("unknown", {**values, "tile_units": default.values["tile_units"]}))[1]
        == default
    )


# --- what a schedule looks like -----------------------------------------------------------------------------

# Stages whose inside the schedule leaves alone, or that are too little to matter.
OPAQUE = {"image_frame", "image_rows", "samples", "grad_offset", "grad_weight", "grad_input"}
SCALAR = {"pixel_0", "pixel_1", "bias_sum", "grad_bias"}
# Stages of whole images, before and behind the tiles.
WHOLE = {"image_frame", "grad_offset", "grad_weight", "grad_input", "bias_sum", "grad_bias"}
WHOLE |= {"bias_part_init", "bias_part_update"}


def structures() -> list[tuple[str, int]]:
    """Return kinds and numbers of variants: the default of each, and all of two."""
    chosen = [(kind, 0) for kind in KINDS]
    for kind in ("blocks", "uneven_offset_groups"):
        chosen += [(kind, number) for number in range(1, len(variants(gradients(KINDS[kind]), HOST)))]
    return chosen


@pytest.mark.parametrize(("kind", "number"), structures())
def test_structure(kind, number):
    from tvm.tirx import ForKind

    spec = gradients(KINDS[kind])
    variant = variants(spec, HOST)[number]
    sch, made = scheduled(spec, HOST, Decisions(variant, {}))
    order = variant.split("-")[0]
    blocks = blocks_of(sch.mod[SPACE[0]])
    noted = blocks["samples"][0].block.annotations
    assert (noted[VARIANT], noted[TILE_UNITS]) == (variant, made.values["tile_units"])
    assert noted[UNIT_BYTES] > 0
    plan = {name for name in blocks if name in plan_blocks(2, framed=True) or name in ("pixel_0", "pixel_1")}
    tiles = {name for name in blocks if name not in WHOLE}
    if order == "stored":
        tiles -= {*plan, "grad_tile"}
    task = blocks["samples"][1][order != "shared"].loop_var
    for name, (realize, loops) in blocks.items():
        kinds = [loop.kind for loop in loops]
        # Everything has a constant extent inside a tile, also where channels are no multiple of a vector.
        assert str(realize.predicate) in ("True", "T.bool(True)"), name
        # Blocks of channels are parallel, outside of all or inside of a tile; so is the walk over whole images.
        at = [depth for depth, kind in enumerate(kinds) if kind == ForKind.PARALLEL]
        if name == "grad_bias" or (order == "shared" and name in ("pixel_0", "pixel_1")):
            assert at == [], name
        elif order == "shared" and name in tiles:
            assert len(at) == 1, name
        else:
            assert at == [0], name
        assert any(loop.loop_var.same_as(task) for loop in loops) == (name in tiles), name
        if name not in OPAQUE | SCALAR:
            assert kinds[-1] == ForKind.VECTORIZED, name
            assert int(loops[-1].extent) <= HOST.vector_bits // 32, name
            assert kinds.count(ForKind.VECTORIZED) == 1, name
    if "grad_columns_update" in blocks:
        for name in ("grad_columns_update", "weight_part_update"):
            assert {loop.kind for loop in blocks[name][1][-4:-1]} == {ForKind.UNROLLED}, name


@pytest.mark.parametrize("asked", SUBSETS[:2] + SUBSETS[-1:])
def test_every_decision_has_words(asked):
    spec = gradients(KINDS["blocks"], 0, asked)
    for number, variant in enumerate(variants(spec, HOST)[:3]):
        made = scheduled(spec, HOST, Decisions(variant, {}))[1]
        _, *words = describe_decisions(made, GRANULE).split("; ")
        assert len(words) == 1 + (variant != "bias") + len(made.values), number
        assert not any(name in word for word in words for name in made.values if "_" in name)


@pytest.mark.parametrize("asked", SUBSETS, ids=lambda asked: "".join("iowb"[i] for i in range(4) if asked[i]))
def test_only_what_is_asked_for_is_computed(asked):
    spec = gradients(KINDS["blocks"], 0, asked)
    blocks = set(blocks_of(scheduled(spec, HOST)[0].mod[SPACE[0]]))
    input, offset, weight, bias = asked
    needed = {
        "image_frame": input or offset or weight,
        "image_rows": input or offset or weight,
        "samples": input or offset or weight,
        "index": input or offset or weight,
        "weight_00": input or weight,
        "grad_columns_update": input or offset,
        "grad_input": input,
        "grad_offset": offset,
        "weight_part_update": weight,
        "weight_sum": weight,
        "grad_weight": weight,
        "bias_part_update": bias,
    }
    assert {name for name in needed if name in blocks} == {name for name, present in needed.items() if present}


# --- memory -------------------------------------------------------------------------------------------------


def allocated(spec: DeformConv2dGradSpec, variant: str, scale: int) -> dict[str, int]:
    """Return the elements of each intermediate of a call, for so many times 50 tiles of an image of 9600 pixels."""
    import tvm
    from tvm import s_tir, tirx

    function = scheduled(spec, HOST, Decisions(variant, {}))[0].mod[SPACE[0]]
    sizes = {"batch": 1, "size": 9600 * scale, "pixels": 9600 * scale, "height": 96, "width": 100 * scale}
    sizes |= {"out_width": 100 * scale, "tile_units": 8, "tiles": 50 * scale, "tasks": 50 * scale}
    known = {}
    for param in function.params:
        known[param] = sizes.get(param.name)
        if hasattr(param, "shape"):
            shape = [sizes[extent.name] if hasattr(extent, "name") else int(extent) for extent in param.shape]
            alignment = param.data_alignment
            known[param] = tirx.decl_buffer(shape, param.dtype, param.name, data_alignment=alignment)
    # What the compiler does up to where it knows how much of each intermediate is alive at once.
    names = ("CanonicalizeLoop", "LowerCrossThreadReduction", "LowerInitBlock", "PlanAndUpdateBufferAllocationLocation")
    names += ("ConvertBlocksToOpaque", "CompactBufferAllocation")
    passes = tvm.transform.Sequential([getattr(s_tir.transform, name)() for name in names])
    found: dict[str, int] = {}

    def visit(stmt: Any) -> None:
        for inner in stmt if hasattr(stmt, "seq") else ():
            visit(inner)
        if hasattr(stmt, "block"):
            found.update({b.name: math.prod(map(int, b.shape)) for b in stmt.block.alloc_buffers})
            visit(stmt.block.body)
        for name in ("body", "then_case", "else_case"):
            if getattr(stmt, name, None) is not None:
                visit(getattr(stmt, name))

    visit(passes(tvm.IRModule({"main": function.specialize(known)}))["main"].body)
    return found


@pytest.mark.parametrize("kind", ["blocks", "offset_groups", "crossing_groups", "depthwise"])
@pytest.mark.parametrize("number", range(3))
def test_columns_are_never_stored_whole(kind, number):
    spec = gradients(KINDS[kind])
    blocks = ChannelBlocks(spec, *form(spec, HOST))
    variant = variants(spec, HOST)[number]
    once, twice = (allocated(spec, variant, scale) for scale in (1, 2))
    assert once.keys() == twice.keys()
    # Of columns and their gradients there is one tile of one block of channels.
    for name in ("columns", "grad_columns"):
        assert once[name] == twice[name] <= 8 * GRANULE * spec.taps * blocks.pitch, name
    # What grows with the image has channels, or taps, or taps and blocks of channels: never taps and channels.
    most = dict.fromkeys(("image", "grad_image"), blocks.count * blocks.pitch) | {"grad_tile": spec.out_channels}
    most |= dict.fromkeys([*plan_blocks(2, framed=True), "pixel_0", "pixel_1"], spec.taps * spec.offset_groups)
    most |= dict.fromkeys(("mask_part", "place_0_part", "place_1_part"), spec.taps * blocks.count)
    for name in once:
        # An image has two rows more, for its frame.
        pixels = 9600 + (2 * 100 if name in ("image", "grad_image") else 0)
        assert twice[name] - once[name] <= pixels * most.get(name, 0), name


# --- machine code -------------------------------------------------------------------------------------------

# What keeps two FMA units busy has little else in its loop: no predicate, and no register spilled.
PRODUCT_LOOPS = {
    # processor: multiply-adds on which registers, at least how many for the column gradients and for the weight's part,
    # as which part of the loop; arithmetic that is no vector's
    "znver5": (r"vfmadd\w+ps .*%zmm", 24, 32, 0.55, r"v(f?n?m(ul|add|sub)\w*|add|sub)s[sd] "),
    "cascadelake": (r"vfmadd\w+ps .*%zmm", 24, 16, 0.55, r"v(f?n?m(ul|add|sub)\w*|add|sub)s[sd] "),
    "x86-64-v3": (r"vfmadd\w+ps .*%ymm", 12, 16, 0.5, r"v(f?n?m(ul|add|sub)\w*|add|sub)s[sd] "),
    "llvm-aarch64": (r"fmla v\d+\.4s", 24, 16, 0.5, r"f(n?mul|n?madd|n?msub|add|sub) s\d"),
}


@pytest.fixture(scope="module")
def codes(request, compilers):
    """The machine code of the gradients of r50_c3 for the processors of the tests that were selected."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    names = {call.params["processor"] for call in calls if call and "processor" in call.params} & PRODUCT_LOOPS.keys()
    spec = DeformConv2dGradSpec.of(PROBLEMS["r50_c3"].spec)
    return {name: compilers.submit(assembly, spec, resolve_target(name)) for name in names}


def is_store(line: str) -> bool:
    return bool(matches(STORE, [line])) and not matches(STACK, [line])


@pytest.mark.parametrize("processor", PRODUCT_LOOPS)
def test_product_loops(codes, processor):
    pattern, columns, weight, share, _ = PRODUCT_LOOPS[processor]
    made = scheduled(DeformConv2dGradSpec.of(PROBLEMS["r50_c3"].spec), resolve_target(processor))[1]
    tile = made.values["register_pixels"] * int(made.variant.split("-")[1])
    weight_tile = made.values["register_outputs"] * made.values["weight_vectors"]
    # Samples multiply as well, and are stored; the products keep their sums in registers.
    loops = [
        loop
        for loop in loops_of(codes[processor].result())
        if matches(JUMP, loop) == 1 and matches(pattern, loop) >= 12 and not any(map(is_store, loop))
    ]
    counts = [matches(pattern, loop) for loop in loops]
    assert any(count % tile == 0 and count >= columns for count in counts), counts
    assert any(count % weight_tile == 0 and count >= weight for count in counts), counts
    for loop, count in zip(loops, counts, strict=True):
        assert matches(STACK, loop) == 0
        assert count / len(loop) >= share


@pytest.mark.parametrize("processor", PRODUCT_LOOPS)
def test_sample_loop_is_vectorized(codes, processor):
    """All taps and vectors of channels: the sums of four corners, a sample, and what is added to four corners."""
    pattern, *_, scalar = PRODUCT_LOOPS[processor]
    spec = DeformConv2dGradSpec.of(PROBLEMS["r50_c3"].spec)
    vectors = spec.taps * ChannelBlocks(spec, *form(spec, resolve_target(processor))).vectors
    multiply = pattern.replace(r"vfmadd\w+ps", r"v(fmadd\w+|mul)ps").replace("fmla", "fm(la|ul)")
    loops = [
        loop
        for loop in loops_of(codes[processor].result())
        if sum(map(is_store, loop)) >= 4 * vectors and matches(multiply, loop) == 12 * vectors
        if matches(JUMP, loop) <= 4 * spec.taps
    ]
    assert loops
    for loop in loops:
        assert matches(scalar, loop) == 0
