# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from plain_torch import plain_deform_conv2d, plain_gradients
from strategies import FINITE_OFFSETS, NON_FINITE_OFFSETS, cases

from tvmdcn.errors import SpecError
from tvmdcn.problems import TEST_PROBLEMS, make_tensors
from tvmdcn.reference import deform_conv2d_reference, reference
from tvmdcn.reference_grad import deform_conv2d_grad_reference, reference_grad
from tvmdcn.spec import DeformConv2dGradSpec, Extents
from tvmdcn.tensors import Gradients, Tensors

# Largest error relative to the largest value of the same gradient, by what the reference is compared with.
TOLERANCES = {
    # torch's autograd through gathers and a product, in float64: only the order of summation differs.
    "autograd": 1e-12,
    # Central differences with a step of 1e-6 of an output that is linear, or bilinear, in what is moved.
    "differences": 1e-7,
    # The same sums in blocks of another size.
    "blocks": 1e-14,
}


def made(problem, seed=0):
    """Return tensors and a gradient of the output for them."""
    tensors = make_tensors(problem.spec, problem.extents, seed=seed)
    shape = problem.spec.output_shape(problem.extents)
    return tensors, np.random.default_rng(seed + 99).standard_normal(shape)


def gradients(spec, tensors, grad_output, border="torchvision", coordinate_dtype="float64"):
    return deform_conv2d_grad_reference(
        grad_output,
        tensors.input,
        tensors.offset,
        tensors.weight,
        tensors.mask,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.layout,
        coordinate_dtype,
        border,
    )


def assert_all_close(found, expected, tolerance):
    """Compare each gradient with its own largest value as scale."""
    assert {name for name, value in found._asdict().items() if value is not None} == set(expected)
    for name, wanted in expected.items():
        value = getattr(found, name)
        assert value.shape == wanted.shape, name
        assert value.dtype == np.float64, name
        error = np.abs(value - wanted).max(initial=0)
        assert error <= tolerance * max(np.abs(wanted).max(initial=0), 1e-30), (name, error)


# --- against others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("border", ["torchvision", "mmcv"])
@pytest.mark.parametrize("name", [name for name, p in TEST_PROBLEMS.items() if p.spec.dtype != "bfloat16"])
def test_autograd_agrees_on_every_problem(name, border):
    pytest.importorskip("torch")
    problem = TEST_PROBLEMS[name]
    tensors, grad_output = made(problem)
    found = gradients(problem.spec, tensors, grad_output, border)
    assert_all_close(found, plain_gradients(problem.spec, tensors, grad_output, border), TOLERANCES["autograd"])


@settings(max_examples=150)
@given(case=cases(offsets=(*FINITE_OFFSETS, *NON_FINITE_OFFSETS), layouts=("NCHW", "NHWC"), max_channels=3))
def test_autograd_agrees(case):
    pytest.importorskip("torch")
    rng = np.random.default_rng(case.seed)
    grad_output = rng.standard_normal(case.spec.output_shape(case.extents))
    for border in ("torchvision", "mmcv"):
        found = gradients(case.spec, case.tensors, grad_output, border)
        expected = plain_gradients(case.spec, case.tensors, grad_output, border)
        assert_all_close(found, expected, TOLERANCES["autograd"])


def test_the_plain_formulation_is_the_layer():
    torch = pytest.importorskip("torch")
    for name in ("asymmetric", "straddling", "uneven_padding", "asymmetric_v1"):
        spec, tensors = TEST_PROBLEMS[name].spec, made(TEST_PROBLEMS[name])[0]
        given = {
            k: None if v is None else torch.from_numpy(np.asarray(v, np.float64)) for k, v in vars(tensors).items()
        }
        found = plain_deform_conv2d(spec, **given).numpy()
        np.testing.assert_allclose(found, reference(spec, tensors, "float64"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["asymmetric_single", "asymmetric_nhwc", "uneven_padding", "straddling", "depthwise"])
def test_finite_differences(name):
    problem = TEST_PROBLEMS[name]
    spec, step, rng = problem.spec, 1e-6, np.random.default_rng(5)
    tensors, grad_output = made(problem)
    tensors = Tensors(**{k: None if v is None else v.astype(np.float64) for k, v in vars(tensors).items()})
    # A kink of the interpolation is at every integer: none may lie within a step.
    tensors.offset[...] = np.floor(tensors.offset) + rng.uniform(0.01, 0.99, tensors.offset.shape)
    found = gradients(spec, tensors, grad_output)

    def loss(**changed):
        return float((reference(spec, dataclasses.replace(tensors, **changed), "float64") * grad_output).sum())

    for field, value in vars(tensors).items():
        if value is None:
            continue
        gradient = getattr(found, field)
        scale = np.abs(gradient).max()
        # Some single entries, and a direction through all of them.
        directions = [rng.standard_normal(value.shape)]
        for _ in range(12):
            one = np.zeros(value.shape)
            one.flat[rng.integers(value.size)] = 1
            directions.append(one)
        for direction in directions:
            near = direction * (1e-3 if direction is directions[0] and field == "offset" else 1)
            slope = (loss(**{field: value + step * near}) - loss(**{field: value - step * near})) / (2 * step)
            reach = np.sqrt((near**2).sum())
            assert abs(slope - (gradient * near).sum()) <= TOLERANCES["differences"] * scale * reach, field


# --- the border rule ----------------------------------------------------------------------------------------

IMAGE = np.array([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0], [17.0, 19.0, 23.0]])


def at(row, column, border="torchvision", image=IMAGE, grad=1.0, mask=None):
    """Return the gradients of one sample of an image, by a 1x1 kernel of weight 4; all other samples are far away."""
    offset = np.full((1, 2, 3, 3), 100.0)
    offset[0, :, 0, 0] = row, column
    grad_output = np.full((1, 1, 3, 3), grad)
    weight = np.full((1, 1, 1, 1), 4.0)
    mask = None if mask is None else np.full((1, 1, 3, 3), mask)
    return deform_conv2d_grad_reference(grad_output, image[None, None], offset, weight, mask, border=border)


def slopes(row, column, border="torchvision", **changes):
    found = at(row, column, border, **changes).offset
    assert not found.reshape(2, -1)[:, 1:].any()
    return tuple(found[0, :, 0, 0] / 4)


@pytest.mark.parametrize(
    ("place", "torchvision", "mmcv"),
    [
        # inside, and on a pixel: the corners are floor and floor + 1
        ((0.5, 0.25), (0.75 * 5 + 0.25 * 8, 0.5 * 1 + 0.5 * 4), None),
        ((1.0, 1.0), (8.0, 2.0), None),
        # the last row and column: the next ones are worth 0
        ((2.0, 1.0), (-19.0, 4.0), None),
        ((2.5, 1.0), (-19.0, 0.5 * 4), None),
        ((1.0, 2.0), (10.0, -13.0), None),
        # before the first row: the row above is worth 0
        ((-0.5, 1.0), (3.0, 0.5 * 2), None),
        # exactly on -1: one-sided, or 0
        ((-1.0, 1.0), (3.0, 0.0), (0.0, 0.0)),
        ((-1.0, 0.5), (2.5, 0.0), (0.0, 0.0)),
        ((1.0, -1.0), (0.0, 7.0), (0.0, 0.0)),
        ((-1.0, -1.0), (0.0, 0.0), (0.0, 0.0)),
        ((-1.0, -0.25), (0.75 * 2, 0.0), (0.0, 0.0)),
        # beyond: nothing
        ((np.nextafter(-1, -2), 1.0), (0.0, 0.0), None),
        ((-1.0, -1.5), (0.0, 0.0), None),
        ((3.0, 1.0), (0.0, 0.0), None),
        ((1.0, 3.0), (0.0, 0.0), None),
        ((-1.0, 3.0), (0.0, 0.0), None),
        ((-1.0, 2.0), (5.0, 0.0), (0.0, 0.0)),
    ],
)
def test_offset_gradient_at_the_border(place, torchvision, mmcv):
    assert slopes(*place) == pytest.approx(torchvision, rel=1e-12)
    assert slopes(*place, border="mmcv") == pytest.approx(torchvision if mmcv is None else mmcv, rel=1e-12)


def test_input_and_weight_get_what_the_sample_is_made_of():
    found = at(0.5, 0.25, grad=3.0, mask=0.5)
    shares = np.zeros((3, 3))
    shares[:2, :2] = np.outer([0.5, 0.5], [0.75, 0.25])
    sample = (shares * IMAGE).sum()
    np.testing.assert_allclose(found.input[0, 0], 3 * 4 * 0.5 * shares)
    assert found.weight.item() == pytest.approx(3 * 0.5 * sample)
    assert found.mask[0, 0, 0, 0] == pytest.approx(3 * 4 * sample)
    assert not found.mask.ravel()[1:].any()
    assert found.bias.tolist() == [27.0]


@pytest.mark.parametrize("border", ["torchvision", "mmcv"])
def test_a_sample_on_minus_one_gives_to_no_one_but_the_offset(border):
    found = at(-1.0, 1.0, border, mask=0.5)
    for name in ("input", "weight", "mask"):
        assert not getattr(found, name).any(), name


STRANGE = (np.nan, np.inf, -np.inf, 1e30, -1e30, 1e300, -1e300, 2.0**31, 2.0**63, -(2.0**63))


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("coordinate_dtype", ["float32", "float64"])
@pytest.mark.parametrize("border", ["torchvision", "mmcv"])
def test_strange_offsets_get_and_give_nothing(strange, coordinate_dtype, border):
    problem = TEST_PROBLEMS["straddling"]
    tensors, grad_output = made(problem)
    tensors.offset = tensors.offset.astype(np.float64)
    plain = gradients(problem.spec, tensors, grad_output, border, coordinate_dtype)
    for axis in (0, 1):
        moved = tensors.offset.copy()
        moved[0, axis, 1, 2] = strange  # of the first offset group's first tap
        found = gradients(
            problem.spec, dataclasses.replace(tensors, offset=moved), grad_output, border, coordinate_dtype
        )
        assert all(np.isfinite(gradient).all() for gradient in found)
        assert not found.offset[0, :2, 1, 2].any()
        assert found.mask[0, 0, 1, 2] == 0
        # No other sample's gradient changes; those of the input and the weight lose this sample's part.
        for name in ("offset", "mask"):
            changed = np.argwhere(getattr(found, name) != getattr(plain, name))
            assert {tuple(place) for place in changed} <= {(0, 0, 1, 2), (0, 1, 1, 2)}, name
        away = dataclasses.replace(tensors, offset=np.where(np.isfinite(moved), moved, 1e6).clip(-1e6, 1e6))
        for mine, others in zip(
            found, gradients(problem.spec, away, grad_output, border, coordinate_dtype), strict=True
        ):
            np.testing.assert_array_equal(mine, others)


def test_infinite_pixels_that_are_not_sampled_do_not_count():
    image = IMAGE.copy()
    image[0, 0] = np.inf
    for place in ((np.nan, 0.0), (3.0, 0.0), (-2.0, 0.0), (1.5, 1.5), (np.inf, -np.inf)):
        assert all(np.isfinite(gradient).all() for gradient in at(*place, image=image, mask=1.0)[:-1])
    # Weight and mask of a sample that is 0 because of its place, though its slope is not.
    found = at(-1.0, 0.5, image=image, mask=1.0)
    assert found.offset[0, 0, 0, 0] == np.inf
    assert not found.weight.any()
    assert not found.mask.any()


# --- layouts, dtypes, arguments -----------------------------------------------------------------------------


def test_batch_zero():
    problem = TEST_PROBLEMS["asymmetric_empty"]
    tensors, grad_output = made(problem)
    found = gradients(problem.spec, tensors, grad_output)
    assert [array.shape for array in found] == [
        *(tensors.input.shape, tensors.offset.shape, tensors.weight.shape, tensors.bias.shape, tensors.mask.shape)
    ]
    assert not found.weight.any()
    assert not found.bias.any()


@given(case=cases(max_channels=2))
def test_layouts_agree(case):
    spec, tensors = case.spec, case.tensors
    grad_output = np.random.default_rng(1).standard_normal(spec.output_shape(case.extents))

    def last(array):
        return None if array is None else np.ascontiguousarray(np.moveaxis(array, 1, -1))

    channels_last = Tensors(last(tensors.input), last(tensors.offset), tensors.weight, last(tensors.mask), tensors.bias)
    found = gradients(dataclasses.replace(spec, layout="NHWC"), channels_last, last(grad_output))
    expected = gradients(spec, tensors, grad_output)
    for name in Gradients._fields:
        mine, other = getattr(found, name), getattr(expected, name)
        if mine is not None:
            assert mine.flags.c_contiguous
            np.testing.assert_array_equal(mine, last(other) if name in ("input", "offset", "mask") else other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_tensors_are_taken_exactly(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    problem = TEST_PROBLEMS[dtype]
    tensors, grad_output = made(problem)
    grad_output = grad_output.astype(tensors.input.dtype)
    widened = Tensors(*(array.astype(np.float64) for array in vars(tensors).values()))
    spec = DeformConv2dGradSpec.of(problem.spec)
    found = reference_grad(spec, tensors, grad_output)
    for mine, other in zip(found, reference_grad(spec, widened, grad_output.astype(np.float64)), strict=True):
        assert mine.dtype == np.float64
        np.testing.assert_array_equal(mine, other)


def test_coordinates_are_rounded_to_float32_on_request():
    image = np.arange(1000.0)[None, None, None]
    image[..., 900] = 5000
    offset = np.zeros((1, 2, 1, 1000))
    offset[0, 1, 0, 899] = 0.99999  # rounded, the place is 900, whose slope is that to its right
    one, grad_output = np.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1000))
    exact, rounded = (
        deform_conv2d_grad_reference(grad_output, image, offset, one, coordinate_dtype=dtype).offset[0, 1, 0, 899]
        for dtype in ("float64", "float32")
    )
    assert exact == 5000 - 899
    assert rounded == 901 - 5000


def test_only_what_is_asked_for_is_given():
    problem = TEST_PROBLEMS["asymmetric_single"]
    tensors, grad_output = made(problem)
    everything = reference_grad(DeformConv2dGradSpec.of(problem.spec), tensors, grad_output)
    assert all(gradient is not None for gradient in everything)
    spec = DeformConv2dGradSpec.of(problem.spec, grad_input=False, grad_bias=False)
    found = reference_grad(spec, tensors, grad_output)
    assert found.input is None
    assert found.bias is None
    for name in ("offset", "mask", "weight"):
        np.testing.assert_array_equal(getattr(found, name), getattr(everything, name))
    assert reference_grad(DeformConv2dGradSpec.of(problem.spec, grad_offset=False), tensors, grad_output).mask is None
    v1 = TEST_PROBLEMS["asymmetric_v1"]
    tensors, grad_output = made(v1)
    assert reference_grad(DeformConv2dGradSpec.of(v1.spec), tensors, grad_output).mask is None


def test_blocks_of_pixels_do_not_show(monkeypatch):
    problem = TEST_PROBLEMS["straddling"]
    tensors, grad_output = made(problem)
    expected = gradients(problem.spec, tensors, grad_output)._asdict()
    monkeypatch.setattr("tvmdcn.reference_grad._BLOCK_ELEMENTS", 7 * problem.spec.in_channels)
    assert_all_close(gradients(problem.spec, tensors, grad_output), expected, TOLERANCES["blocks"])


def test_inputs_stay_as_they_are_and_views_are_taken():
    problem = TEST_PROBLEMS["grouped"]
    tensors, grad_output = made(problem)
    expected = gradients(problem.spec, tensors, grad_output)
    given = {**vars(tensors), "grad_output": grad_output}
    copies = {name: array.copy() for name, array in given.items()}
    wide = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in given.items()}
    for array in given.values():
        array.flags.writeable = False
    views = wide.pop("grad_output")
    for mine, other in zip(gradients(problem.spec, Tensors(**wide), views), expected, strict=True):
        np.testing.assert_array_equal(mine, other)
    for name, array in given.items():
        np.testing.assert_array_equal(array, copies[name])


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("coordinate_dtype must be float32 or float64, got 'float16'", {"coordinate_dtype": "float16"}),
        ("border must be one of torchvision, mmcv, got 'zero'", {"border": "zero"}),
        (r"grad_output must be of the output's shape \(1, 2, 4, 4\), got \(1, 3, 4, 4\)", {"grad": (1, 3, 4, 4)}),
        (r"grad_output must have the 4 dimensions N, Cout, Ho, Wo, got 3", {"grad": (2, 4, 4)}),
        (r"offset must be of the output's size", {"offset": (1, 2, 3, 4)}),
    ],
)
def test_arguments_are_checked(match, changes):
    shapes = {"grad": (1, 2, 4, 4), "offset": (1, 2, 4, 4), **changes}
    arrays = np.ones(shapes.pop("grad")), np.ones((1, 1, 4, 4)), np.ones(shapes.pop("offset")), np.ones((2, 1, 1, 1))
    with pytest.raises(SpecError, match=match):
        deform_conv2d_grad_reference(*arrays, **shapes)


def test_gradient_of_a_plain_convolution():
    torch = pytest.importorskip("torch")
    problem = TEST_PROBLEMS["uneven_padding"]
    spec, extents = problem.spec, Extents(2, 7, 9)
    tensors, grad_output = made(problem)
    tensors = Tensors(**{k: v.astype(np.float64) for k, v in vars(tensors).items()})
    tensors.offset[...], tensors.mask[...] = 0, 1
    top, left, bottom, right = spec.padding
    x, w, b = (torch.tensor(a, requires_grad=True) for a in (tensors.input, tensors.weight, tensors.bias))
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    torch.nn.functional.conv2d(padded, w, b, spec.stride, 0, spec.dilation, spec.groups).backward(
        torch.tensor(grad_output)
    )
    found = gradients(spec, tensors, grad_output)
    assert found.input.shape == spec.input_shape(extents)
    for mine, leaf in ((found.input, x), (found.weight, w), (found.bias, b)):
        np.testing.assert_allclose(mine, leaf.grad.numpy(), rtol=0, atol=1e-12)
    output = deform_conv2d_reference(
        tensors.input, tensors.offset, tensors.weight, None, spec.stride, spec.padding, spec.dilation, tensors.mask
    )
    # The mask's gradient, times the mask of ones, adds up to the output times its gradient.
    assert found.mask.sum() == pytest.approx((output * grad_output).sum(), rel=1e-10)
