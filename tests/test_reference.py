# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from onnx_oracle import onnx_cases, run_onnxruntime
from strategies import (
    FINITE_OFFSETS,
    IMAGES,
    NON_FINITE_IMAGES,
    NON_FINITE_OFFSETS,
    Case,
    base_positions,
    cases,
)

from tvmdcn.errors import SpecError
from tvmdcn.problems import PROBLEMS, REAL_LAYERS, TEST_PROBLEMS, Tensors, make_tensors, real_layer
from tvmdcn.reference import deform_conv2d_reference, reference
from tvmdcn.spec import DeformConv2dSpec, Extents

# Largest error relative to the largest output, by what the reference is compared with.
TOLERANCES = {
    # The shared outputs are rounded to float32, relative 6e-8.
    "real layer": 1e-6,
    # Written out in loops, in float64 as well: only the order of summation differs.
    "loops": 1e-13,
    # float32 products of up to 16 taps times 96 channels.
    "onnxruntime": 1e-5,
    # torch's convolution in float64.
    "convolution": 1e-13,
}


def assert_close(found, expected, tolerance, scale=None):
    """Compare with the largest finite output as scale; what is not finite must be equal."""
    assert found.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    if finite.any():
        scale = max(np.abs(expected[finite]).max(), 1e-30) if scale is None else scale
        assert np.abs(found - expected)[finite].max() <= tolerance * scale


def in_loops(spec: DeformConv2dSpec, tensors: Tensors) -> np.ndarray:
    """Return the output, NCHW, from the definition, one number after another."""
    x, offset, weight = (a.astype(np.float64) for a in (tensors.input, tensors.offset, tensors.weight))
    batch, channels, height, width = x.shape
    out_height, out_width = offset.shape[2:]
    kh, kw = spec.kernel_size
    offset_channels, in_group, out_group = (
        channels // spec.offset_groups,
        channels // spec.groups,
        spec.out_channels // spec.groups,
    )

    def pixel(n, c, row, column):
        return x[n, c, row, column] if 0 <= row < height and 0 <= column < width else 0.0

    def sample(n, c, row, column):
        if not (-1 < row < height and -1 < column < width):
            return 0.0
        top, left = int(np.floor(row)), int(np.floor(column))
        down, right = row - top, column - left
        return (
            (1 - down) * (1 - right) * pixel(n, c, top, left)
            + (1 - down) * right * pixel(n, c, top, left + 1)
            + down * (1 - right) * pixel(n, c, top + 1, left)
            + down * right * pixel(n, c, top + 1, left + 1)
        )

    output = np.zeros((batch, spec.out_channels, out_height, out_width))
    for n, co, oy, ox in np.ndindex(output.shape):
        total = 0.0 if tensors.bias is None else float(tensors.bias[co])
        for ci, i, j in np.ndindex(in_group, kh, kw):
            c = co // out_group * in_group + ci
            g, tap = c // offset_channels, i * kw + j
            dy = offset[n, g * 2 * kh * kw + 2 * tap, oy, ox]
            dx = offset[n, g * 2 * kh * kw + 2 * tap + 1, oy, ox]
            row = oy * spec.stride[0] - spec.padding[0] + i * spec.dilation[0] + dy
            column = ox * spec.stride[1] - spec.padding[1] + j * spec.dilation[1] + dx
            value = sample(n, c, row, column)
            if tensors.mask is not None:
                value *= float(tensors.mask[n, g * kh * kw + tap, oy, ox])
            total += weight[co, ci, i, j] * value
        output[n, co, oy, ox] = total
    return output


# --- against others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL_LAYERS)
def test_real_layers(name, real_layers_folder):
    tensors, expected = real_layer(name, real_layers_folder)
    found = reference(PROBLEMS[name].spec, tensors, "float64")
    assert found.dtype == np.float64
    assert_close(found, expected, TOLERANCES["real layer"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities times 0, in the loops
@settings(max_examples=200)
@given(case=cases(offsets=(*FINITE_OFFSETS, *NON_FINITE_OFFSETS), images=(*IMAGES, *NON_FINITE_IMAGES), max_channels=2))
def test_definition_in_loops(case):
    found = reference(case.spec, case.tensors, "float64")
    # Sums through infinities may give NaN or infinity in one order and the other alike: compared as such.
    assert_close(found, in_loops(case.spec, case.tensors), TOLERANCES["loops"])


def test_definition_in_loops_on_the_asymmetric_problem():
    problem = TEST_PROBLEMS["asymmetric"]
    tensors = make_tensors(problem.spec, problem.extents)
    found = reference(problem.spec, tensors, "float64")
    assert_close(found, in_loops(problem.spec, tensors), TOLERANCES["loops"])


def test_onnx_node_tests():
    onnx, collected = onnx_cases()
    assert sorted(name for name, *_ in collected) == [
        "test_basic_deform_conv_with_padding",
        "test_basic_deform_conv_without_padding",
        "test_deform_conv_with_mask_bias",
        "test_deform_conv_with_multiple_offset_groups",
    ]
    for _, node, inputs, expected in collected:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        x, weight, offset, bias, mask = [*inputs, None, None][:5]
        found = deform_conv2d_reference(
            x,
            offset,
            weight,
            bias,
            attributes.get("strides", 1),
            attributes.get("pads", 0),
            attributes.get("dilations", 1),
            mask,
        )
        assert_close(found, expected.astype(np.float64), 1e-6)


# onnxruntime documents nothing for NaN offsets; ours are tested below.
@settings(max_examples=500)
@given(case=cases(offsets=(*FINITE_OFFSETS, "infinite"), min_batch=1))
def test_onnxruntime_agrees(case):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    # As a float32 sum's error is relative to what is summed, and a sum may cancel: the scale is of its terms.
    scale = np.abs(case.tensors.input).max() * np.abs(case.tensors.weight).max() + 1
    found = run_onnxruntime(case).astype(np.float64)
    assert_close(found, reference(case.spec, case.tensors), TOLERANCES["onnxruntime"], scale)


@pytest.mark.parametrize("name", [name for name, p in TEST_PROBLEMS.items() if p.spec.layout == "NCHW"])
def test_zero_offsets_are_a_convolution(name):
    torch = pytest.importorskip("torch")
    problem = TEST_PROBLEMS[name]
    spec = dataclasses.replace(problem.spec, dtype="float64", mask=False)
    tensors = make_tensors(spec, problem.extents)
    tensors.offset[...] = 0
    top, left, bottom, right = spec.padding
    padded = torch.nn.functional.pad(torch.from_numpy(tensors.input), (left, right, top, bottom))
    expected = torch.nn.functional.conv2d(
        padded,
        torch.from_numpy(tensors.weight),
        torch.from_numpy(tensors.bias),
        spec.stride,
        0,
        spec.dilation,
        spec.groups,
    )
    if problem.extents.batch == 0:
        assert reference(spec, tensors).shape == tuple(expected.shape)
        return
    assert_close(reference(spec, tensors), expected.numpy(), TOLERANCES["convolution"])


# --- the border rule ----------------------------------------------------------------------------------------


def sample_ones(rows, columns, height=3, width=4, fill=1.0):
    """Return the samples of an image of `fill` at places, by a 1x1 kernel with an offset to each."""
    rows, columns = np.broadcast_arrays(np.asarray(rows, np.float64), np.asarray(columns, np.float64))
    image = np.full((rows.size, 1, height, width), fill)
    offset = np.zeros((rows.size, 2, height, width))
    offset[:, 0, 0, 0], offset[:, 1, 0, 0] = rows, columns
    return deform_conv2d_reference(image, offset, np.ones((1, 1, 1, 1)))[:, 0, 0, 0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (-1.0, 0.0),
        (np.nextafter(-1, 0), 2.0**-53),
        (-0.75, 0.25),
        (-0.5, 0.5),
        (0.0, 1.0),
        (0.3, 1.0),
        (2.0, 1.0),
        (2.25, 0.75),
        (np.nextafter(3, 0), 2.0**-51),
        (3.0, 0.0),
        (3.5, 0.0),
        (-1.5, 0.0),
    ],
)
def test_border_of_an_image_of_ones(row, expected):
    # 3 rows; the same along the columns, of which there are 3 as well
    assert sample_ones(row, 1.0)[0] == pytest.approx(expected, rel=1e-9, abs=0)
    assert sample_ones(1.0, row, height=4, width=3)[0] == pytest.approx(expected, rel=1e-9, abs=0)


def test_corner_of_an_image():
    assert sample_ones(-0.5, -0.5)[0] == 0.25
    assert sample_ones(2.5, 3.75)[0] == 0.125


STRANGE = (np.nan, np.inf, -np.inf, 1e30, -1e30, 1e300, -1e300, 2.0**31, 2.0**63, -(2.0**63))


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("coordinate_dtype", ["float32", "float64"])
def test_strange_offsets_sample_zero(strange, coordinate_dtype):
    image, weight = np.ones((1, 1, 4, 4)), np.ones((1, 1, 1, 1))
    for axis in (0, 1):
        offset = np.zeros((1, 2, 4, 4))
        offset[0, axis, 1, 2] = strange
        expected = np.ones((1, 1, 4, 4))
        expected[0, 0, 1, 2] = 0
        for mask in (None, np.ones((1, 1, 4, 4))):
            found = deform_conv2d_reference(image, offset, weight, mask=mask, coordinate_dtype=coordinate_dtype)
            np.testing.assert_array_equal(found, expected)


def test_infinite_pixels_outside_do_not_count_and_inside_do():
    image = np.zeros((1, 1, 2, 2))
    image[0, 0, 0, 0] = np.inf
    weight = np.ones((1, 1, 1, 1))

    def sample(row, column):
        offset = np.zeros((1, 2, 2, 2))
        offset[0, :, 0, 0] = row, column
        return deform_conv2d_reference(image, offset, weight)[0, 0, 0, 0]

    assert sample(-0.5, 0.0) == np.inf
    # The row above the image would be row 0 if clamped: its corners weigh 0 and are worth 0.
    assert sample(-1.0, 0.0) == 0
    assert sample(2.0, 0.0) == 0
    assert sample(np.nan, 0.0) == 0
    assert sample(1.5, 0.5) == 0
    assert sample(0.0, 0.5) == np.inf
    assert sample(1.0, 0.0) == 0
    # A corner inside is multiplied even where it weighs 0, as torchvision does: 0 * inf.
    image[0, 0] = [[0.0, 0.0], [0.0, np.inf]]
    assert np.isnan(sample(0.0, 0.0))
    assert np.isnan(sample(0.0, 0.5))
    assert sample(0.5, 0.5) == np.inf


@given(case=cases(offsets=NON_FINITE_OFFSETS))
def test_not_finite_offsets_never_spread(case):
    tensors = case.tensors
    found = reference(case.spec, tensors)
    assert np.isfinite(found).all()
    # The same as moving each of those samples far away.
    moved = dataclasses.replace(tensors, offset=np.where(np.isfinite(tensors.offset), tensors.offset, np.float32(1e6)))
    np.testing.assert_array_equal(found, reference(case.spec, moved))


def test_mask_multiplies_the_sample():
    image, weight = np.full((1, 1, 2, 2), 3.0), np.ones((1, 1, 1, 1))
    offset = np.zeros((1, 2, 2, 2))
    mask = np.array([0.0, 0.5, 2.0, np.nan]).reshape(1, 1, 2, 2)
    found = deform_conv2d_reference(image, offset, weight, mask=mask)
    np.testing.assert_array_equal(found.ravel(), [0.0, 1.5, 6.0, np.nan])


# --- layouts, dtypes, arguments -----------------------------------------------------------------------------


@given(case=cases())
def test_layouts_agree(case):
    spec, tensors = case.spec, case.tensors

    def last(array):
        return None if array is None else np.ascontiguousarray(np.moveaxis(array, 1, -1))

    channels_last = Tensors(last(tensors.input), last(tensors.offset), tensors.weight, last(tensors.mask), tensors.bias)
    found = reference(dataclasses.replace(spec, layout="NHWC"), channels_last)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(np.moveaxis(found, -1, 1), reference(spec, tensors))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_tensors_are_taken_exactly(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    problem = TEST_PROBLEMS[dtype]
    tensors = make_tensors(problem.spec, problem.extents)
    widened = Tensors(*(array.astype(np.float64) for array in vars(tensors).values()))
    np.testing.assert_array_equal(reference(problem.spec, tensors), reference(problem.spec, widened, "float32"))


def test_coordinates_are_rounded_to_float32_on_request():
    image = np.zeros((1, 1, 1, 1000))
    image[..., 900] = 1
    offset = np.zeros((1, 2, 1, 1000))
    # 899 + 0.99999 has no room for five decimals in float32: its spacing there is 2**-14.
    offset[0, 1, 0, 899] = 0.99999
    weight = np.ones((1, 1, 1, 1))
    exact, rounded = (
        deform_conv2d_reference(image, offset, weight, coordinate_dtype=dtype)[0, 0, 0, 899]
        for dtype in ("float64", "float32")
    )
    assert exact == pytest.approx(0.99999, rel=1e-9)
    assert rounded == float(np.float32(899) + np.float32(0.99999)) - 899 == 1.0
    spec = DeformConv2dSpec(1, 1, 1, mask=False)
    tensors = Tensors(image, offset, weight, None, None)
    assert reference(spec, tensors)[0, 0, 0, 899] == rounded
    assert reference(dataclasses.replace(spec, dtype="float64"), tensors)[0, 0, 0, 899] == exact


def test_coordinate_dtype_is_checked():
    tensors = make_tensors(TEST_PROBLEMS["pixel"].spec, TEST_PROBLEMS["pixel"].extents)
    with pytest.raises(SpecError, match="coordinate_dtype must be float32 or float64, got 'float16'"):
        reference(TEST_PROBLEMS["pixel"].spec, tensors, "float16")


def test_shapes_are_checked():
    with pytest.raises(SpecError, match="offset must be of the output's size"):
        deform_conv2d_reference(np.ones((1, 1, 4, 4)), np.ones((1, 2, 3, 4)), np.ones((1, 1, 1, 1)))


def test_inputs_stay_as_they_are_and_views_are_taken():
    problem = TEST_PROBLEMS["grouped"]
    tensors = make_tensors(problem.spec, problem.extents)
    expected = reference(problem.spec, tensors)
    copies = {name: array.copy() for name, array in vars(tensors).items()}
    wide = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in vars(tensors).items()}
    for array in vars(tensors).values():
        array.flags.writeable = False
    np.testing.assert_array_equal(reference(problem.spec, Tensors(**wide)), expected)
    for name, array in vars(tensors).items():
        np.testing.assert_array_equal(array, copies[name])


def test_blocks_of_pixels_do_not_show(monkeypatch):
    problem = TEST_PROBLEMS["straddling"]
    tensors = make_tensors(problem.spec, problem.extents)
    expected = reference(problem.spec, tensors)
    monkeypatch.setattr("tvmdcn.reference._BLOCK_ELEMENTS", 7 * problem.spec.in_channels)
    assert_close(reference(problem.spec, tensors), expected, 1e-15)


# --- the strategies themselves ------------------------------------------------------------------------------


def test_border_offsets_hit_the_borders():
    spec, extents = DeformConv2dSpec(4, 4, (3, 2), (2, 1), (1, 0, 2, 3), offset_groups=2), Extents(2, 9, 8)
    for layout in ("NCHW", "NHWC"):
        case = Case(dataclasses.replace(spec, layout=layout), extents, "border", "ones", True, 0)
        offset = case.tensors.offset
        assert offset.shape == case.spec.offset_shape(extents)
        offset = np.moveaxis(offset, -1, 1) if layout == "NHWC" else offset
        base = base_positions(spec, extents)
        places = offset.reshape(2, *base.shape) + base
        for axis, size in enumerate((9, 8)):
            found = set(np.unique(places[:, :, :, axis]))
            assert {-1.0, 0.0, size - 1.0, float(size)} <= found
            assert min(place for place in found if place > -1) < -0.99
            assert max(place for place in found if place < size) > size - 0.01
