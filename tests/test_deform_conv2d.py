# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels, called as users call them: sizes, borders, strange values, memory, threads.

What surrounds a kernel is tested with handmade ones in test_kernel.py and test_api.py, random layers in
test_fuzz.py.
"""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import Future

import numpy as np
import pytest
from compiled import build_only, error_of, run
from handmade import misaligned, strided, torch_of, variant
from onnx_oracle import onnx_cases
from strategies import NON_FINITE_OFFSETS, Case

import tvmdcn
from tvmdcn.errors import SpecError
from tvmdcn.kernel import Kernel
from tvmdcn.problems import PROBLEMS, REAL_LAYERS, Tensors, make_tensors, real_layer
from tvmdcn.reference import reference
from tvmdcn.spec import DeformConv2dSpec, Extents

# Largest error over the largest value: sums of up to 300 products; for the halves the output's rounding.
TOLERANCES = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3, "real layer": 1e-5}
DTYPES = ("float32", "float64", "float16", "bfloat16")
LAYOUTS = ("NCHW", "NHWC")

PLAIN = DeformConv2dSpec(32, 40, padding=1)
# Columns of more than half a cache of 1 MiB: sampled and multiplied in chunks.
WIDE = DeformConv2dSpec(160, 64, padding=1, mask=False)
OFFSET_GROUPS = DeformConv2dSpec(16, 24, padding=1, offset_groups=4, mask=False)
DEPTHWISE = DeformConv2dSpec(24, 24, (3, 5), (2, 1), (1, 2), groups=24, offset_groups=3)
# One tap, one channel: the output is the sample.
POINT = DeformConv2dSpec(1, 1, 1, mask=False)

# So few outputs that a very large image can be tried.
LONG_STRIDE = DeformConv2dSpec(1, 1, 1, (1, 4099), 0, mask=False)


def in_layout(spec: DeformConv2dSpec, layout: str) -> DeformConv2dSpec:
    return dataclasses.replace(spec, layout=layout)


def onnx_specs() -> list[tuple[DeformConv2dSpec, list, np.ndarray]]:
    """Return the layer, the inputs X, W, offset, B, mask and the output of ONNX's node tests."""
    onnx, collected = onnx_cases()
    found = []
    for _, node, inputs, expected in collected:
        given = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        x, weight, offset, bias, mask = arrays = [*inputs, None, None][:5]
        spec, _ = DeformConv2dSpec.from_shapes(
            x.shape,
            offset.shape,
            weight.shape,
            None if mask is None else mask.shape,
            None if bias is None else bias.shape,
            given.get("strides", 1),
            given.get("pads", 0),
            given.get("dilations", 1),
            dtype="float32",
        )
        found.append((spec, arrays, expected))
    return found


SPECS = (
    *(in_layout(spec, layout) for spec in (PLAIN, POINT) for layout in LAYOUTS),
    *(variant(dtype=dtype, layout=layout) for dtype in DTYPES for layout in LAYOUTS),
    *(WIDE, OFFSET_GROUPS, DEPTHWISE, LONG_STRIDE),
)


@pytest.fixture(scope="module")
def builds(compilers, session_cache_dir) -> dict[DeformConv2dSpec, Future]:
    """All kernels of this module, being built."""
    specs = [*SPECS, *(PROBLEMS[name].spec for name in REAL_LAYERS)]
    return {spec: compilers.submit(build_only, spec, "tuned", session_cache_dir) for spec in specs}


@pytest.fixture
def kernel_of(builds):
    """Load the kernel of a layer, which was built beside others if it is one of this module's."""

    def load(spec: DeformConv2dSpec, threads: int | None = None) -> Kernel:
        if spec in builds:
            builds[spec].result()
        return tvmdcn.load(spec, threads=threads)

    return load


def check(kernel: Kernel, tensors: Tensors) -> None:
    expected = reference(kernel.spec, tensors)
    assert error_of(run(kernel, tensors), expected) <= TOLERANCES[kernel.spec.dtype]


# --- sizes --------------------------------------------------------------------------------------------------

SIZES = (
    *(Extents(0, 9, 9), Extents(1, 1, 1), Extents(3, 1, 1), Extents(1, 1, 9), Extents(2, 9, 1)),
    # 23, 24, 25, 48 and 49 pixels: around one and two units
    *(Extents(1, 1, 23), Extents(2, 4, 6), Extents(1, 5, 5), Extents(1, 6, 8), Extents(2, 7, 7)),
    *(Extents(33, 5, 4), Extents(33, 3, 9), Extents(1, 100, 1), Extents(1, 1, 100), Extents(2, 37, 41)),
)


@pytest.mark.parametrize("spec", [PLAIN, in_layout(PLAIN, "NHWC"), OFFSET_GROUPS, DEPTHWISE], ids=lambda s: s.slug)
def test_one_kernel_for_all_sizes(kernel_of, spec):
    kernel = kernel_of(spec)
    for seed, extents in enumerate(SIZES):
        tensors = make_tensors(spec, extents, seed)
        assert run(kernel, tensors).shape == spec.output_shape(extents)
        check(kernel, tensors)


@pytest.mark.parametrize("batch", [0, 1, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchvisions_asymmetric_problem(kernel_of, dtype, layout, batch):
    spec = variant(dtype=dtype, layout=layout)
    kernel = kernel_of(spec)
    for size in ((5, 4), (3, 2), (21, 30)):
        tensors = make_tensors(spec, Extents(batch, *size), seed=batch)
        check(kernel, tensors)
        tensors.bias = None
        check(kernel, tensors)


def test_rows_longer_than_float32_counts(kernel_of):
    """Coordinates beyond 2**24 are rounded in float32, and must still not lead out of the image."""
    width = (1 << 24) + 4099
    spec = LONG_STRIDE
    extents = Extents(1, 1, width)
    image = (np.arange(width, dtype=np.uint32) * 2654435761 >> 8).astype(np.float32).reshape(1, 1, 1, width)
    offset = np.random.default_rng(0).normal(0, 3, spec.offset_shape(extents)).astype(np.float32)
    tensors = Tensors(image, offset, np.ones((1, 1, 1, 1), np.float32), None, None)
    check(kernel_of(spec), tensors)


def test_indices_beyond_32_bits_are_refused(kernel_of):
    height, width = 1 << 15, (1 << 15) + 4
    image = np.broadcast_to(np.float32(0), (1, 1, height, width))
    offset = np.broadcast_to(np.float32(0), LONG_STRIDE.offset_shape(Extents(1, height, width)))
    with pytest.raises(SpecError, match="indices beyond 32 bits for a batch of 1 images of 32768 x 32772"):
        kernel_of(LONG_STRIDE)(image, offset, np.ones((1, 1, 1, 1), np.float32))
    naive = tvmdcn.load(POINT, schedule="naive")
    batch = (1 << 31) // 24
    image, offset = (np.broadcast_to(np.float32(0), (batch, c, 1, 1)) for c in (1, 2))
    with pytest.raises(SpecError, match=rf"for a batch of {batch} images of 1 x 1\. Split"):
        naive(image, offset, np.ones((1, 1, 1, 1), np.float32))


# --- borders and strange values -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_border_of_an_image_of_ones(kernel_of, layout):
    kernel = kernel_of(in_layout(POINT, layout))
    height, width, tiny = 6, 5, np.float32(2**-20)
    values = {
        **{-2.0: 0, -1.0: 0, -1 + tiny: tiny, -0.75: 0.25, -0.5: 0.5, -tiny: 1 - tiny, 0.0: 1, 0.3: 1},
        **{height - 1.0: 1, height - 0.75: 0.75, height - 0.5: 0.5, float(height): 0, height + 1.0: 0},
    }
    offset = np.zeros((len(values), 2, height, width), np.float32)
    offset[:, 0, 0, 2] = list(values)
    image = np.ones((len(values), 1, height, width), np.float32)
    if layout == "NHWC":
        image, offset = image.transpose(0, 2, 3, 1), offset.transpose(0, 2, 3, 1)
    found = kernel(image, offset, np.ones((1, 1, 1, 1), np.float32)).reshape(-1, height, width)
    np.testing.assert_array_equal(found[:, 0, 2], np.array(list(values.values()), np.float32))
    found[:, 0, 2] = 1
    assert (found == 1).all()


@pytest.mark.parametrize("offsets", ["border", "half", "integer", "zero", "far", "huge", *NON_FINITE_OFFSETS])
@pytest.mark.parametrize("image", ["normal", "ones", "infinite"])
@pytest.mark.parametrize("spec", [PLAIN, in_layout(PLAIN, "NHWC"), DEPTHWISE], ids=lambda s: s.slug)
def test_places(kernel_of, spec, image, offsets):
    case = Case(spec, Extents(2, 7, 9), offsets, image, True, 5)
    check(kernel_of(spec), case.tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strange_places_and_pixels_in_every_dtype(kernel_of, dtype, layout):
    spec = variant(dtype=dtype, layout=layout)
    for offsets in ("border", "huge", "nan"):
        check(kernel_of(spec), Case(spec, Extents(3, 11, 12), offsets, "infinite", True, 7).tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_in_its_cell(kernel_of, layout, value):
    """A sample outside is worth 0 whatever lies at the border, where the reads that it does not need go."""
    spec = in_layout(POINT, layout)
    image = np.zeros((1, 6, 7, 1), np.float32)
    image[0, [0, 0, -1, -1], [0, -1, 0, -1]] = value
    rows, columns = np.meshgrid(np.linspace(-3, 8, 6), np.linspace(-3, 9, 7), indexing="ij")
    grid = np.stack(np.meshgrid(np.arange(6), np.arange(7), indexing="ij"), -1)
    offset = (np.stack([rows, columns], -1) - grid)[None].astype(np.float32)
    if layout == "NCHW":
        image, offset = (np.ascontiguousarray(a.transpose(0, 3, 1, 2)) for a in (image, offset))
    check(kernel_of(spec), Tensors(image, offset, np.ones((1, 1, 1, 1), np.float32), None, None))
    outside = np.full_like(offset, 100)
    found = kernel_of(spec)(image, outside, np.ones((1, 1, 1, 1), np.float32))
    np.testing.assert_array_equal(found, np.zeros_like(found))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**63])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strange_offsets_in_a_large_image_sample_zero(kernel_of, layout, strange, axis):
    spec, extents = in_layout(PLAIN, layout), Extents(1, 90, 130)
    tensors = make_tensors(spec, extents, far=0)
    pairs = tensors.offset.reshape(1, 9, 2, -1) if layout == "NCHW" else tensors.offset.reshape(1, -1, 9, 2)
    chosen = (slice(None), slice(None), axis) if layout == "NCHW" else (..., axis)
    pairs[chosen] = strange
    found = run(kernel_of(spec), tensors)
    bias = tensors.bias if layout == "NHWC" else tensors.bias[:, None, None]
    np.testing.assert_array_equal(found, np.broadcast_to(bias, found.shape))


def test_nan_mask_and_weight_spread_as_in_arithmetic(kernel_of):
    tensors = make_tensors(PLAIN, Extents(1, 6, 7), far=0)
    tensors.mask[0, 4, 2, 3] = np.nan
    tensors.weight[7, 3, 1, 1] = np.inf
    check(kernel_of(PLAIN), tensors)
    assert np.isnan(run(kernel_of(PLAIN), tensors)[0, :, 2, 3]).all()


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_is_taken_and_given(builds, dtype, monkeypatch):
    torch = pytest.importorskip("torch")
    nhwc = variant(dtype=dtype, layout="NHWC")
    builds[nhwc].result()
    tensors = make_tensors(nhwc, Extents(2, 15, 14))
    given = {name: torch_of(array) for name, array in vars(tensors).items()}
    for name in ("input", "offset", "mask"):
        given[name] = given[name].permute(0, 3, 1, 2)
        assert given[name].is_contiguous(memory_format=torch.channels_last)
    geometry = {name: getattr(nhwc, name) for name in ("stride", "padding", "dilation")}
    expected = reference(nhwc, tensors).transpose(0, 3, 1, 2)
    found = tvmdcn.deform_conv2d(**given, **geometry)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error_of(found.double().numpy(), expected) <= TOLERANCES[dtype]
    # Offset and mask come from plain convolutions, which may answer in either memory format.
    given |= {name: given[name].contiguous() for name in ("offset", "mask")}
    assert torch.equal(tvmdcn.deform_conv2d(**given, **geometry), found)
    given["input"] = given["input"].contiguous()
    planar = tvmdcn.deform_conv2d(**given, **geometry)
    assert planar.is_contiguous()
    assert error_of(planar.double().numpy(), expected) <= TOLERANCES[dtype]


def reversed_view(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array[::-1])[::-1]


def fortran(array: np.ndarray) -> np.ndarray:
    return np.asfortranarray(array)


def shifted(array: np.ndarray) -> np.ndarray:
    """Return a copy that begins one item after the start of a buffer."""
    buffer = np.empty(array.size + 1, array.dtype)
    buffer[1:] = array.ravel()
    return buffer[1:].reshape(array.shape)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask", "bias"])
@pytest.mark.parametrize("memory", [strided, reversed_view, fortran, shifted, misaligned])
@pytest.mark.parametrize("spec", [PLAIN, in_layout(PLAIN, "NHWC")], ids=lambda s: s.layout)
def test_any_memory_gives_the_same(kernel_of, spec, memory, name):
    tensors = make_tensors(spec, Extents(2, 8, 9))
    kernel = kernel_of(spec)
    expected = run(kernel, tensors)
    odd = dataclasses.replace(tensors, **{name: memory(getattr(tensors, name))})
    np.testing.assert_array_equal(run(kernel, odd), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_may_begin_at_any_item(kernel_of, layout, dtype):
    spec = variant(dtype=dtype, layout=layout)
    kernel, extents = kernel_of(spec), Extents(2, 21, 15)
    tensors = make_tensors(spec, extents)
    expected = run(kernel, tensors)
    for start in (1, 3, 5, 16):
        moved = {}
        for name, array in vars(tensors).items():
            buffer = np.empty(array.size + start, array.dtype)
            buffer[start:] = array.ravel()
            moved[name] = buffer[start:].reshape(array.shape)
        out = np.empty(expected.size + start, expected.dtype)[start:].reshape(expected.shape)
        np.testing.assert_array_equal(run(kernel, Tensors(**moved), out=out), expected)


def test_nothing_is_written_beside_the_output(kernel_of):
    for spec in (PLAIN, in_layout(PLAIN, "NHWC"), OFFSET_GROUPS, DEPTHWISE):
        for size in ((3, 4), (5, 6), (7, 7), (13, 11)):
            extents = Extents(2, *size)
            tensors = make_tensors(spec, extents)
            shape = spec.output_shape(extents)
            count = int(np.prod(shape))
            buffer = np.full(count + 128, 7, np.float32)
            copies = {name: None if a is None else a.copy() for name, a in vars(tensors).items()}
            run(kernel_of(spec), tensors, out=buffer[64:-64].reshape(shape))
            assert (buffer[:64] == 7).all()
            assert (buffer[-64:] == 7).all()
            for name, array in vars(tensors).items():
                np.testing.assert_array_equal(array, copies[name])


# --- against others -----------------------------------------------------------------------------------------


def test_onnx_node_tests(compilers, session_cache_dir):
    cases = onnx_specs()
    assert len(cases) == 4
    for future in [compilers.submit(build_only, spec, "tuned", session_cache_dir) for spec, *_ in cases]:
        future.result()
    for spec, (x, weight, offset, bias, mask), expected in cases:
        found = tvmdcn.deform_conv2d(x, offset, weight, bias, spec.stride, spec.padding, spec.dilation, mask)
        assert error_of(found, expected) <= TOLERANCES["float32"]


@pytest.mark.parametrize("name", REAL_LAYERS)
def test_real_layers(kernel_of, real_layers_folder, name):
    tensors, expected = real_layer(name, real_layers_folder)
    found = run(kernel_of(PROBLEMS[name].spec), tensors)
    assert error_of(found, expected) <= TOLERANCES["real layer"]


@pytest.mark.parametrize("spec", [PLAIN, WIDE, DEPTHWISE], ids=lambda s: s.slug)
def test_zero_offsets_are_a_convolution(kernel_of, spec):
    torch = pytest.importorskip("torch")
    tensors = make_tensors(spec, Extents(2, 17, 19))
    tensors.offset[...] = 0
    tensors.mask = None if tensors.mask is None else np.ones_like(tensors.mask)
    x, weight, bias = (torch.from_numpy(a).double() for a in (tensors.input, tensors.weight, tensors.bias))
    expected = torch.nn.functional.conv2d(x, weight, bias, spec.stride, spec.padding[:2], spec.dilation, spec.groups)
    assert error_of(run(kernel_of(spec), tensors), expected.numpy()) <= TOLERANCES["float32"]


@pytest.mark.parametrize("schedule", ["default", "naive"])
def test_schedules_by_name(schedule):
    kernel = tvmdcn.load(POINT, schedule=schedule)
    assert kernel.artifact.schedule["source"] == schedule
    check(kernel, make_tensors(POINT, Extents(2, 9, 7)))


# --- threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", [PLAIN, in_layout(PLAIN, "NHWC"), WIDE, OFFSET_GROUPS, DEPTHWISE], ids=lambda s: s.slug
)
def test_threads_do_not_change_a_bit(kernel_of, spec):
    """The last units overlap, and are computed twice, by different threads: both must write the same bits."""
    kernels = [kernel_of(spec, threads=count) for count in (1, 2, 3)]
    for seed, extents in enumerate((Extents(1, 13, 9), Extents(3, 20, 21), Extents(1, 64, 40), Extents(1, 3, 3))):
        tensors = make_tensors(spec, extents, seed)
        expected = run(kernels[0], tensors)
        for kernel in kernels:
            for _ in range(3):
                np.testing.assert_array_equal(run(kernel, tensors), expected)


def test_several_python_threads_in_one_kernel(kernel_of):
    kernel = kernel_of(PLAIN, threads=2)
    sizes = [Extents(1 + i % 2, 5 + 7 * i, 30 - 3 * i) for i in range(4)]
    work = [(tensors, run(kernel, tensors)) for tensors in (make_tensors(PLAIN, e) for e in sizes)]
    failures: list[str] = []
    begin = threading.Barrier(4)

    def call(first: int) -> None:
        begin.wait()
        for index in range(30):
            tensors, expected = work[(first + index) % len(work)]
            if not np.array_equal(run(kernel, tensors), expected):
                failures.append(f"thread {first}, call {index}")

    threads = [threading.Thread(target=call, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
