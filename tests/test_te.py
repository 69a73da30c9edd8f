# SPDX-License-Identifier: Apache-2.0
"""The algorithm before any schedule: the blocks that schedules rely on, and its numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from compiled import Job, build_and_compare, build_and_compare_gradients, runnable_targets
from strategies import sampled_from_axis

from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents

# Largest error over the largest value, of sums of up to 100 products; for the halves the output's rounding.
TOLERANCES = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}

PLAN = [
    *("position_0", "position_1", "fraction_0", "fraction_1", "index"),
    *(f"weight_{corner}" for corner in ("00", "01", "10", "11")),
]
# Without a frame of zeros around the image, each corner has an index of its own.
PLAIN_PLAN = [
    *(name for name in PLAN if name != "index"),
    *("low_0", "high_0", "low_1", "high_1", "index_00", "index_01", "index_10", "index_11"),
]
ASYMMETRIC = DeformConv2dSpec(6, 2, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3)


def changed(spec: DeformConv2dSpec = ASYMMETRIC, **fields) -> DeformConv2dSpec:
    return DeformConv2dSpec.from_json({**spec.to_json(), **fields})


# --- structure ----------------------------------------------------------------------------------------------


def function_of(spec: DeformConv2dSpec, lanes: int = 4):
    from tvmdcn.te import operator_of

    return operator_of(spec).kernel(spec, lanes)


def names_of_blocks(stmt) -> list[str]:
    if hasattr(stmt, "seq"):
        return [name for inner in stmt for name in names_of_blocks(inner)]
    if hasattr(stmt, "loop_var"):
        return names_of_blocks(stmt.body)
    return [stmt.block.name_hint]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_blocks_are_the_contract(layout, mask):
    from tvmdcn.te.sampling import plan_blocks

    names = names_of_blocks(function_of(changed(layout=layout, mask=mask)).body.block.body)
    first = ["channels_last"] if layout == "NCHW" else []
    assert names[: len(first)] == first
    assert names[-3:] == ["columns", "product", "output"]
    framed = layout == "NCHW"
    plan = PLAN if framed else PLAIN_PLAN
    assert sorted(names) == sorted([*first, "pixel_0", "pixel_1", *plan, "columns", "product", "output"])
    # Consumers before producers: the order in which a schedule can place them.
    placed = plan_blocks(2, framed=framed)
    assert sorted(placed) == sorted(plan)
    order = {name: index for index, name in enumerate(names)}
    sides = ("fraction",) if framed else ("low", "fraction")
    assert all(order[f"position_{a}"] < order[f"{side}_{a}"] for a in (0, 1) for side in sides)
    indices = 1 if framed else 4
    assert [name.split("_")[0] for name in placed[: indices + 4]] == ["index"] * indices + ["weight"] * 4
    assert placed[-2:] == ["position_0", "position_1"]


def test_depthwise_has_the_same_blocks():
    names = names_of_blocks(function_of(DeformConv2dSpec(8, 8, groups=8)).body.block.body)
    assert names[-3:] == ["columns", "product", "output"]


@pytest.mark.parametrize(("dtype", "item"), [("float16", 2), ("bfloat16", 2), ("float32", 4), ("float64", 8)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_parameters_are_the_contract(layout, dtype, item):
    spec = changed(layout=layout, dtype=dtype)
    parameters = list(function_of(spec).params)
    tensors = [p for p in parameters if hasattr(p, "data_alignment")]
    assert [p.name for p in parameters] == [
        *("x", "offset", "mask", "weight", "bias", "out"),
        *("height", "width", "out_width", "tasks", "tiles", "tile_units"),
    ]
    accumulators = {"weight", "bias"}
    for p in tensors:
        assert p.dtype == (spec.accumulator_dtype if p.name in accumulators else dtype), p.name
        # A caller's tensors begin at any item; TVM's own promise would be 64 bytes, and a fault without it.
        promised = {"weight": 64, "bias": max(item, 4)}.get(p.name, item)
        assert p.data_alignment == promised, p.name
    constants = {p.name: [int(s) for s in p.shape if str(s).isdigit()] for p in tensors}
    channels = {"offset": [36], "mask": [18], "weight": [2, 1, 6, 3, 4], "bias": [2], "out": [2]}
    assert constants == {"x": [6] if layout == "NCHW" else [], **channels}


def test_mask_and_image_are_left_out_of_the_parameters():
    assert [p.name for p in function_of(changed(mask=False)).params][:4] == ["x", "offset", "weight", "bias"]


@pytest.mark.parametrize(
    ("spec", "vector", "lanes", "shape"),
    [
        (DeformConv2dSpec(32, 64), 16, 16, (1, 4, 9, 32, 16)),
        (DeformConv2dSpec(32, 18), 16, 16, (1, 2, 9, 32, 16)),
        (DeformConv2dSpec(32, 5), 16, 8, (1, 1, 9, 32, 8)),
        (DeformConv2dSpec(32, 1, 1), 16, 1, (1, 1, 1, 32, 1)),
        (DeformConv2dSpec(12, 18, groups=2, offset_groups=3), 8, 8, (2, 2, 9, 6, 8)),
        (DeformConv2dSpec(8, 16, groups=8), 8, 2, (8, 1, 9, 1, 2)),
        (DeformConv2dSpec(24, 24, groups=24), 16, 8, (1, 3, 9, 1, 8)),
        (DeformConv2dSpec(24, 24, groups=24, offset_groups=6), 16, 4, (1, 6, 9, 1, 4)),
        (DeformConv2dSpec(21, 21, (5, 3), groups=21, offset_groups=3), 16, 1, (1, 21, 15, 1, 1)),
    ],
)
def test_packed_shape(spec, vector, lanes, shape):
    from tvmdcn.te.deform_conv2d import lanes_for, packed_shape

    assert lanes_for(spec, vector) == lanes
    assert packed_shape(spec, lanes) == shape


@pytest.mark.parametrize("count", range(1, 25))
@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
def test_strips_of_pixels_cover_a_unit(count, lanes):
    from tvmdcn.te.vectors import strips as split

    strips = split(count, lanes)
    assert [p for first, size in strips for p in range(first, first + size)] == list(range(count))
    assert all(size <= lanes and size & (size - 1) == 0 for _, size in strips)


# --- structure of gradients ---------------------------------------------------------------------------------

FLAGS = ("grad_input", "grad_offset", "grad_weight", "grad_bias")


def gradients(spec: DeformConv2dSpec = ASYMMETRIC, **fields) -> DeformConv2dGradSpec:
    return DeformConv2dGradSpec.of(spec, **fields)


@pytest.mark.parametrize("asked", [a for a in itertools.product((True, False), repeat=4) if any(a)], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_blocks_of_gradients_are_the_contract(layout, asked):
    spec = gradients(changed(layout=layout), **dict(zip(FLAGS, asked, strict=True)))
    names = names_of_blocks(function_of(spec).body.block.body)
    image, offset, weight, bias = asked
    sampled = image or offset or weight
    plan = [name for name in PLAN if sampled and (image or weight or not name.startswith("weight"))]
    last = ["image_frame", "image_rows"] if sampled else []
    last += ["grad_columns"] if image or offset else []
    last += ["samples"] if sampled else []
    last += ["weight_part", "weight_sum"] if weight else []
    last += [f"grad_{name}" for name, needed in (("weight", weight), ("input", image), ("offset", offset)) if needed]
    last += (["bias_part", "bias_sum", "grad_bias"] if layout == "NCHW" else ["bias_part", "grad_bias"]) if bias else []
    first = ["pixel_0", "pixel_1", *plan, "grad_tile"] if sampled else []
    assert names[len(names) - len(last) :] == last
    assert sorted(names) == sorted([*first, *last])


@pytest.mark.parametrize(("dtype", "item"), [("float16", 2), ("bfloat16", 2), ("float32", 4), ("float64", 8)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_parameters_of_gradients_are_the_contract(layout, dtype, item):
    channels = {"input": [6], "offset": [36], "mask": [18], "bias": [2]}
    constant_extents = channels | {f"grad_{name}": extents for name, extents in channels.items()}
    constant_extents |= {"grad_output": [2], "weight": [6, 6, 1, 1, 4], "grad_weight": [2, 18]}
    for flags in ({}, {"grad_weight": False, "grad_bias": False}, {"grad_input": False, "grad_offset": False}):
        spec = gradients(changed(layout=layout, dtype=dtype), **flags)
        parameters = list(function_of(spec).params)
        scalars = ["height", "width", "out_width", "tasks", "tiles", "tile_units"]
        assert [p.name for p in parameters] == [*spec.inputs, *spec.outputs, *scalars]
        for p in parameters[: len(spec.inputs + spec.outputs)]:
            # The packed weight is the runtime's own, all else a caller's.
            assert p.dtype == (spec.accumulator_dtype if p.name == "weight" else dtype), p.name
            assert p.data_alignment == (64 if p.name == "weight" else item), p.name
            constants = [int(extent) for extent in p.shape if str(extent).isdigit()]
            assert constants == constant_extents[p.name], p.name


BLOCK_LAYERS = (
    ASYMMETRIC,
    DeformConv2dSpec(3, 4),
    DeformConv2dSpec(37, 8),
    DeformConv2dSpec(61, 2),
    DeformConv2dSpec(67, 3),
    DeformConv2dSpec(256, 64),
    DeformConv2dSpec(240, 12, groups=3, offset_groups=5),
    DeformConv2dSpec(24, 48, groups=2, offset_groups=8),
    DeformConv2dSpec(57, 6, offset_groups=3),
    DeformConv2dSpec(8, 16, groups=8),
    DeformConv2dSpec(64, 32, groups=8, offset_groups=2),
    DeformConv2dSpec(128, 128, groups=4),
    DeformConv2dSpec(48, 24, groups=4),
    DeformConv2dSpec(40, 40, groups=40),
    DeformConv2dSpec(42, 42, groups=42, offset_groups=6),
    DeformConv2dSpec(6, 48, groups=3),
    DeformConv2dSpec(40, 20, groups=5),
)


@pytest.mark.parametrize("vector_lanes", [2, 4, 8, 16])
@pytest.mark.parametrize("spec", BLOCK_LAYERS, ids=lambda spec: spec.slug)
def test_blocks_of_channels(spec, vector_lanes):
    """A block is in one offset group, in one group or of several, and has few lanes that are padding."""
    from tvmdcn.te.channel_blocks import ChannelBlocks, lanes_for

    lanes = lanes_for(spec, vector_lanes)
    assert lanes <= vector_lanes
    blocks = ChannelBlocks(spec, lanes)
    assert blocks.count * blocks.width == spec.in_channels
    assert blocks.pitch == blocks.vectors * lanes >= blocks.width > blocks.pitch - lanes
    assert blocks.width <= 4 * lanes
    depthwise = spec.groups == spec.in_channels == spec.out_channels
    in_group, out_group = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    in_offset_group = spec.in_channels // spec.offset_groups
    for channel in range(spec.in_channels):
        block, inside = divmod(channel, blocks.width)
        vector, lane = divmod(inside, lanes)
        assert channel // in_offset_group == block // blocks.of_offset_group
        outputs = [blocks.out_channel(block, vector, lane, o) for o in range(blocks.outputs)]
        group = channel // in_group
        assert [int(o) for o in outputs] == list(range(group * out_group, (group + 1) * out_group))
        assert depthwise or blocks.group(block, inside) == (group, channel % in_group)
    # What fills up the last vector is computed like the rest, and must not be made of what lies beyond.
    for block, lane in itertools.product(range(blocks.count), range(blocks.pitch)):
        assert 0 <= int(blocks.out_channel(block, *divmod(lane, lanes), blocks.outputs - 1)) < spec.out_channels


@pytest.mark.parametrize(
    ("channels", "cores", "l2_bytes", "vectors"),
    [
        ((128, 128), 2, 1 << 20, 4),
        ((128, 128), 4, 1 << 20, 2),  # two blocks would leave two cores idle
        ((128, 128), 6, 1 << 20, 2),  # eight blocks would take as long as four
        ((128, 128), 8, 1 << 20, 1),
        ((256, 256), 64, 1 << 20, 1),
        ((96, 96), 2, 1 << 20, 3),  # two blocks are done sooner than three
        ((128, 128), 0, 1 << 20, 2),  # a pack's processors: how many cores they have is not known
        ((128, 128), 2, 1 << 18, 2),  # 288 KiB of weights
        ((64, 64), 1, 1 << 20, 2),  # a block alone
        ((512, 512), 2, 1 << 20, 2),
        ((512, 512), 2, 1 << 21, 4),
        ((48, 128), 1, 1 << 20, 1),  # 16 and 48 are what divides it into whole vectors and leaves more than one block
    ],
)
def test_blocks_are_as_wide_as_there_are_enough_of(channels, cores, l2_bytes, vectors):
    from tvmdcn.target import resolve_target
    from tvmdcn.te.channel_blocks import ChannelBlocks, form

    target = dataclasses.replace(resolve_target("llvm-znver5"), cores=cores, l2_bytes=l2_bytes)
    spec = DeformConv2dGradSpec.of(DeformConv2dSpec(*channels, padding=1))
    assert ChannelBlocks(spec, *form(spec, target)).vectors == vectors


# --- numbers of the parts -----------------------------------------------------------------------------------


def compile_functions(functions: dict):
    import tvm

    from tvmdcn.target import detect_target

    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    return tvm.compile(tvm.IRModule(named), target=detect_target().to_tvm())


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return memory that begins as TVM promises its code that all does."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.full(size + 64, 0xFF, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size].view(dtype).reshape(shape)


def sample(image: np.ndarray, place: tuple[float, ...]) -> float:
    """Return one sample by rule A, for any number of axes."""
    if not all(-1 < p < size for p, size in zip(place, image.shape, strict=True)):
        return 0.0
    total = 0.0
    for bits in itertools.product((0, 1), repeat=image.ndim):
        at = tuple(math.floor(p) + bit for p, bit in zip(place, bits, strict=True))
        share = math.prod(abs(1 - bit - (p - math.floor(p))) for p, bit in zip(place, bits, strict=True))
        if all(0 <= i < size for i, size in zip(at, image.shape, strict=True)):
            total += share * float(image[at])
    return total


def test_sampling_in_one_two_and_three_dimensions():
    """The plan is written for any number of axes, of which deform_conv2d uses two."""
    from tvm import te

    from tvmdcn.te.nests import with_alignment
    from tvmdcn.te.sampling import Frame, interpolate, sampling_plan

    shapes, count = ((7,), (4, 6), (3, 5, 4)), 600

    def sampler(extents: tuple[int, ...], framed: bool):
        places = [te.placeholder((1, 1, count), "float32", name=f"place_{a}") for a in range(len(extents))]
        size = Frame(extents).pixels if framed else math.prod(extents)
        image = te.placeholder((size,), "float32", name="image")
        plan = sampling_plan((1, 1, count), lambda a, *i: places[a](*i), extents, 1, "float32", framed=framed)
        read = image.__getitem__
        result = te.compute((count,), lambda i: interpolate(plan, (0, 0, i), read), name="result")
        tensors = [*places, image, result]
        return with_alignment(te.create_prim_func(tensors), {t.op.name: 4 for t in tensors})

    functions = {f"s{len(shape)}_{framed}": sampler(shape, framed) for shape in shapes for framed in (True, False)}
    compiled = compile_functions(functions)
    rng = np.random.default_rng(0)
    strange = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31)], np.float32)
    for shape in shapes:
        places = []
        for size in shape:
            some = [sampled_from_axis(size), rng.uniform(-2, size + 1, 25), strange]
            places.append(rng.choice(np.concatenate(some).astype(np.float32), (1, 1, count)))
        pixels = rng.standard_normal(shape).astype(np.float32)
        expected = [sample(pixels, place) for place in zip(*(p.ravel().tolist() for p in places), strict=True)]
        frame = Frame(shape)
        within = np.zeros(frame.pixels, np.float32)
        steps = (np.arange(size) * stride for size, stride in zip(shape, frame.strides, strict=True))
        within[frame.first + sum(np.ix_(*steps))] = pixels
        for framed, flat in ((True, within), (False, pixels.ravel())):
            # What lies before and behind is never read, whatever it may be worth.
            memory = np.full(flat.size + 32, np.nan, np.float32)
            memory[16:-16] = flat
            found = np.empty(count, np.float32)
            compiled[f"s{len(shape)}_{framed}"](*places, memory[16:-16], found)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_transposition_in_registers():
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock, SBlockRealize

    from tvmdcn.te.vectors import lanes_at, transpose_into

    def transposer(size: int, dtype: str):
        source = tirx.decl_buffer((size, size), dtype, name="source")
        target = tirx.decl_buffer((size, size), dtype, name="target")
        rows = [tirx.BufferLoad(source, [i, lanes_at(0, size)]) for i in range(size)]
        body = transpose_into(rows, dtype, lambda j, v: tirx.BufferStore(target, v, [j, lanes_at(0, size)]))
        block = SBlock([], [], [], "root", tirx.SeqStmt(body) if len(body) > 1 else body[0])
        return tirx.PrimFunc([source, target], SBlockRealize([], True, block))

    cases = [(size, dtype) for size in (1, 2, 4, 8, 16) for dtype in ("float32", "float64", "uint16")]
    compiled = compile_functions({f"t{size}_{dtype}": transposer(size, dtype) for size, dtype in cases})
    for size, dtype in cases:
        source, target = aligned((size, size), dtype), aligned((size, size), dtype)
        source[...] = np.arange(size * size).reshape(size, size)
        compiled[f"t{size}_{dtype}"](source, target)
        np.testing.assert_array_equal(target, source.T)


def test_lanes_are_merged_and_added_up():
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock, SBlockRealize

    from tvmdcn.te.vectors import lanes_at, merge_lanes, sum_lanes

    def adder(rows: int, lanes: int, within: int | None, dtype: str):
        source = tirx.decl_buffer((rows, lanes), dtype, name="source")
        target = tirx.decl_buffer((lanes,), dtype, name="target")
        total = tirx.decl_buffer((rows,), dtype, name="total")
        loads = [tirx.BufferLoad(source, [row, lanes_at(0, lanes)]) for row in range(rows)]
        body, merged = merge_lanes(loads, dtype, lanes, "m", within)
        body.append(tirx.BufferStore(target, merged, [lanes_at(0, lanes)]))
        for row, load in enumerate(loads):
            binds, value = sum_lanes(load, dtype, lanes, f"s{row}")
            body += [*binds, tirx.BufferStore(total, value, [row])]
        block = SBlock([], [], [], "root", tirx.SeqStmt(body))
        return tirx.PrimFunc([source, target, total], SBlockRealize([], True, block))

    cases = [(1, 1, None), (1, 4, None), (2, 2, None), (4, 4, None), (4, 8, None), (4, 16, None), (8, 8, None)]
    # Four corners side by side, as the gradients have them.
    cases += [(1, 4, 1), (2, 8, 2), (4, 16, 4), (2, 16, 8)]
    cases = [(*case, dtype) for case in cases for dtype in ("float32", "float64")]
    compiled = compile_functions({f"a{i}": adder(*case) for i, case in enumerate(cases)})
    rng = np.random.default_rng(0)
    for i, (rows, lanes, within, dtype) in enumerate(cases):
        source, target, total = (aligned(shape, dtype) for shape in ((rows, lanes), (lanes,), (rows,)))
        # Whole numbers: sums are exact in whatever order.
        source[...] = rng.integers(-1000, 1000, source.shape)
        compiled[f"a{i}"](source, target, total)
        np.testing.assert_array_equal(total, source.sum(1))
        within = lanes if within is None else within
        groups = source.reshape(rows, lanes // within, within).sum(2).T
        np.testing.assert_array_equal(target.reshape(lanes // within, rows, within // rows).sum(2), groups)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_derivatives_are_those_of_the_interpolation(ndim):
    """It is linear along each axis, so that a difference of any length is its derivative."""
    from tvmdcn.te.sampling import derivatives

    rng = np.random.default_rng(ndim)
    corners = list(itertools.product((0, 1), repeat=ndim))
    fractions, sums = rng.random((ndim, 50)), rng.standard_normal((len(corners), 50))

    def interpolated(at: np.ndarray) -> np.ndarray:
        shares = [math.prod(f if bit else 1 - f for bit, f in zip(bits, at, strict=True)) for bits in corners]
        return (np.array(shares) * sums).sum(0)

    modulation, *places = derivatives(list(fractions), list(sums), 1.0)
    np.testing.assert_allclose(modulation, interpolated(fractions), rtol=0, atol=1e-14)
    assert len(places) == ndim
    for axis, found in enumerate(places):
        ends = np.stack([fractions, fractions])
        ends[0, axis], ends[1, axis] = 0, 1
        np.testing.assert_allclose(found, interpolated(ends[1]) - interpolated(ends[0]), rtol=0, atol=1e-14)


# Blocks, channels of a block, elements between its pixels, and lanes of a vector.
BLOCKED = [(2, 16, 16, 16), (3, 5, 8, 8), (2, 3, 4, 4), (1, 37, 48, 16), (1, 61, 64, 16), (4, 1, 1, 1), (2, 19, 32, 16)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocked_images(dtype):
    """From planes and from pixels to blocks of channels and back, for images smaller and larger than a vector."""
    from tvm import tirx

    from tvmdcn.te.layout import Blocked, copy_strip, places_of, to_channels_last, to_planes, zero_frame
    from tvmdcn.te.nests import block_nest, sequence, whole_function
    from tvmdcn.te.sampling import Frame

    acc = "float32"

    def functions(index: int, blocks: int, width: int, pitch: int, lanes: int) -> dict:
        found = {}
        for name in ("from_planes", "to_planes", "from_pixels", "to_pixels"):
            n, size, height, columns = (tirx.Var(label, "int32") for label in ("n", "size", "height", "columns"))
            form = Blocked(blocks, width, pitch, size, Frame((height, columns)), lanes)
            planes = name.endswith("planes")
            shape = (n, blocks * width, size) if planes else (n, size, blocks * width)
            x = tirx.decl_buffer(shape, dtype, name="x")
            image = tirx.decl_buffer((n, form.extent), acc, name="image")
            places = places_of(form)

            def body(i, strip, name=name, x=x, image=image, form=form, places=places):
                if name == "to_planes":
                    return to_planes(image, x, form, places, i, strip, [i])
                copy = copy_strip(x, image, form, i, strip, [i], 0, into=name == "from_pixels")
                zeros = [zero_frame(form, image, [i], acc)] if name == "from_pixels" else []
                return sequence([*zeros, copy])

            stage = (
                to_channels_last(x, image, form)
                if name == "from_planes"
                else block_nest("copy", [("n", n), ("p", form.strips)], lambda *_: [], lambda *_: [], body, [places])
            )
            found[f"{name}_{index}"] = whole_function([x, image, height, columns], stage)
        return found

    compiled = compile_functions({k: f for i, case in enumerate(BLOCKED) for k, f in functions(i, *case).items()})
    rng = np.random.default_rng(0)
    shapes = ((1, 1), (1, 5), (7, 1), (2, 8), (3, 11), (5, 14), (2, 35), (1, 70), (70, 1))
    for (index, (blocks, width, pitch, _)), (height, columns) in itertools.product(enumerate(BLOCKED), shapes):
        size, frame = height * columns, Frame((height, columns))
        channels, image_shape = blocks * width, (2, blocks * frame.pixels * pitch)
        planes = aligned((2, channels, size), dtype)
        planes[...] = rng.standard_normal(planes.shape)
        pixels = aligned((2, size, channels), dtype)
        pixels[...] = planes.swapaxes(1, 2)
        expected = np.zeros((2, blocks, frame.pixels, pitch), acc)
        places = frame.first + np.add.outer(np.arange(height) * (columns + 1), np.arange(columns)).ravel()
        expected[:, :, places, :width] = planes.reshape(2, blocks, width, size).swapaxes(2, 3)
        for name, x in (("planes", planes), ("pixels", pixels)):
            image, back = aligned(image_shape, acc), aligned(x.shape, dtype)
            compiled[f"from_{name}_{index}"](x, image, height, columns)
            np.testing.assert_array_equal(image.reshape(expected.shape), expected)
            compiled[f"to_{name}_{index}"](back, image, height, columns)
            np.testing.assert_array_equal(back, x)


def test_packed_weights():
    from tvmdcn.te import operator_of

    specs = [
        (ASYMMETRIC, 4),
        (DeformConv2dSpec(5, 18, (2, 3)), 8),
        (DeformConv2dSpec(8, 24, 1, groups=4, dtype="float64"), 4),
        (DeformConv2dSpec(12, 12, groups=12, dtype="float16"), 4),
        (DeformConv2dSpec(6, 20, groups=2), 8),
    ]
    functions = {f"p{index}": operator_of(s).pack(s, lanes) for index, (s, lanes) in enumerate(specs)}
    compiled = compile_functions(functions)
    rng = np.random.default_rng(0)
    for index, (spec, lanes) in enumerate(specs):
        weight = rng.standard_normal(spec.weight_shape).astype(spec.dtype)
        shape = operator_of(spec).packed_shape(spec, lanes)
        packed = aligned(shape, spec.accumulator_dtype)
        compiled[f"p{index}"](weight.reshape(spec.out_channels, -1), packed)
        depthwise = spec.groups == spec.in_channels == spec.out_channels
        groups = 1 if depthwise else spec.groups
        outputs = spec.out_channels // groups
        expected = np.zeros((groups, shape[1] * lanes, *weight.shape[1:2], spec.taps), spec.accumulator_dtype)
        expected[:, :outputs] = weight.reshape(groups, outputs, -1, spec.taps)
        expected = expected.reshape(groups, shape[1], lanes, -1, spec.taps).transpose(0, 1, 4, 3, 2)
        np.testing.assert_array_equal(packed, expected)


def test_packed_weights_of_gradients():
    from tvmdcn.te import operator_of

    layers = [
        (DeformConv2dSpec(64, 12), 8),
        (DeformConv2dSpec(64, 12, (5, 4), groups=2, offset_groups=4, dtype="float16"), 8),
        (DeformConv2dSpec(6, 2, (3, 2), groups=2, offset_groups=3, dtype="float64"), 4),
        (DeformConv2dSpec(13, 5, 1), 8),
        (DeformConv2dSpec(12, 12, groups=12), 4),
    ]
    specs = [(DeformConv2dGradSpec.of(layer), lanes) for layer, lanes in layers]
    compiled = compile_functions({f"p{i}": operator_of(s).pack(s, lanes) for i, (s, lanes) in enumerate(specs)})
    rng = np.random.default_rng(0)
    for index, (spec, lanes) in enumerate(specs):
        weight = rng.standard_normal(spec.weight_shape).astype(spec.dtype)
        blocks, taps, vectors, outputs, _ = shape = operator_of(spec).packed_shape(spec, lanes)
        packed = aligned(shape, spec.accumulator_dtype)
        compiled[f"p{index}"](weight.reshape(spec.out_channels, -1), packed)
        width = spec.in_channels // blocks
        expected = np.zeros((blocks, taps, vectors * lanes, outputs), spec.accumulator_dtype)
        filters = weight.reshape(spec.out_channels, -1, taps)
        for channel in range(spec.in_channels):
            group, inside = divmod(channel, spec.in_channels // spec.groups)
            per_group = spec.out_channels // spec.groups
            rows = filters[group * per_group : (group + 1) * per_group, inside]
            expected[channel // width, :, channel % width] = rows.T
        expected = expected.reshape(blocks, taps, vectors, lanes, outputs).swapaxes(3, 4)
        np.testing.assert_array_equal(packed, expected)


# --- numbers of the whole, naively scheduled ----------------------------------------------------------------

HOST = next(iter(runnable_targets().values()))
NAIVE = {
    "asymmetric": ASYMMETRIC,
    "asymmetric_nhwc": changed(layout="NHWC"),
    "asymmetric_v1": changed(mask=False, dtype="float64"),
    "dense": DeformConv2dSpec(5, 18, 3, 1, 1, dtype="float16"),
    "dense_nhwc": DeformConv2dSpec(5, 18, 3, 1, (1, 2, 0, 1), dtype="float16", layout="NHWC"),
    "bfloat16": DeformConv2dSpec(8, 8, (1, 5), (1, 2), (0, 2), offset_groups=4, dtype="bfloat16"),
    "depthwise": DeformConv2dSpec(10, 10, 3, 1, 1, groups=10, offset_groups=2),
    "pointwise_nhwc": DeformConv2dSpec(7, 1, 1, dtype="float64", layout="NHWC"),
}


@pytest.fixture(scope="module")
def naive_outcomes(compilers, session_cache_dir):
    jobs = {name: Job(spec, HOST, "naive", (Extents(2, 7, 11), Extents(1, 5, 4))) for name, spec in NAIVE.items()}
    return {name: compilers.submit(build_and_compare, job, session_cache_dir) for name, job in jobs.items()}


@pytest.mark.parametrize("name", NAIVE)
def test_naive_numbers(naive_outcomes, name):
    assert max(naive_outcomes[name].result().errors) <= TOLERANCES[NAIVE[name].dtype]


NAIVE_GRADIENTS = {
    "asymmetric": gradients(changed(layout="NHWC"), border="mmcv"),
    "uneven": gradients(DeformConv2dSpec(19, 5, (1, 3), 1, (0, 1), dtype="float16")),
}


@pytest.fixture(scope="module")
def naive_gradients(compilers, session_cache_dir):
    return {
        name: compilers.submit(build_and_compare_gradients, spec, HOST, "naive", session_cache_dir)
        for name, spec in NAIVE_GRADIENTS.items()
    }


@pytest.mark.parametrize("name", NAIVE_GRADIENTS)
def test_naive_numbers_of_gradients(naive_gradients, name):
    outcome = naive_gradients[name].result()
    assert max(outcome.errors.values()) <= TOLERANCES[NAIVE_GRADIENTS[name].dtype]
    assert outcome.unsteady == set()
