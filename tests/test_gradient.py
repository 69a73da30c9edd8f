# SPDX-License-Identifier: Apache-2.0
"""Gradients as a function: which kernel a call finds, what it asks of it, and what it refuses.

With kernels written by hand.
"""

from __future__ import annotations

import itertools

import handmade
import numpy as np
import pytest
from bad_calls import BAD_CALLS, GOOD_CALL, numpy_tensor, tensor_arguments, torch_tensor
from call_counts import functions_entered
from handmade import EXTENTS, SPEC, torch_of, variant
from plain_torch import plain_gradients

import tvmdcn
from tvmdcn import deform_conv2d_backward, gradient
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.tensors import Gradients, Tensors, make_gradient_tensors

# Largest error of a gradient over its own largest value; storage dominates for the halves.
TOLERANCES = {"float64": 1e-13, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
NAMES = Gradients._fields


@pytest.fixture(autouse=True)
def builder(monkeypatch):
    handmade.install(monkeypatch)


def tensors_of(spec=SPEC, extents=EXTENTS, seed=0):
    return make_gradient_tensors(spec, extents, seed)


def backward(tensors, spec=SPEC, **options):
    geometry = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation}
    return deform_conv2d_backward(**tensors, **{**geometry, **options})


def assert_right(found, spec, tensors, *, border="torchvision", needs=(True,) * 5):
    """Compare with the reference in the spec's dtype, each gradient with its own largest value as scale."""
    expected = expected_gradients(DeformConv2dGradSpec.of(spec, border=border), tensors)
    for name, asked in zip(NAMES, needs, strict=True):
        value = getattr(found, name)
        if not asked or f"grad_{name}" not in expected:
            assert value is None, name
            continue
        wanted = expected[f"grad_{name}"]
        value = value.double().numpy() if hasattr(value, "double") else value.astype(np.float64)
        assert value.shape == wanted.shape, name
        worst = np.abs(value - wanted).max(initial=0)
        assert worst <= TOLERANCES[spec.dtype] * np.abs(wanted).max(initial=1e-30), (name, worst)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_numpy(dtype, mask):
    spec = variant(dtype=dtype, mask=mask)
    for extents in (EXTENTS, Extents(33, 5, 4), Extents(0, 5, 4)):
        tensors = tensors_of(spec, extents)
        found = backward(tensors, spec)
        assert type(found) is Gradients
        assert all(g.dtype == tensors["input"].dtype for g in found if g is not None)
        assert_right(found, spec, tensors)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_torch(dtype, channels_last):
    torch = pytest.importorskip("torch")
    spec = variant(dtype=dtype)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for extents in (EXTENTS, Extents(33, 5, 4)):
        tensors = tensors_of(spec, extents)
        given = {name: torch_of(array) for name, array in tensors.items()}
        # The input's memory format decides; the others may be in either.
        given["input"] = given["input"].contiguous(memory_format=memory_format)
        found = backward(given, spec)
        for name, value in found._asdict().items():
            assert value.dtype == given["input"].dtype
            expected_format = torch.contiguous_format if name in ("weight", "bias") else memory_format
            assert value.is_contiguous(memory_format=expected_format), name
        assert_right(found, spec, tensors)


@pytest.mark.parametrize("border", ["torchvision", "mmcv"])
def test_autograd_of_the_plain_formulation(border):
    """At 1e-5 in float32, and with samples on the border."""
    pytest.importorskip("torch")
    tensors = tensors_of()
    tensors["offset"][0] = 0
    found = backward({name: torch_of(array) for name, array in tensors.items()}, border=border)
    others = {name: array for name, array in tensors.items() if name != "grad_output"}
    expected = plain_gradients(SPEC, Tensors(**others, bias=None), tensors["grad_output"], border)
    for name, wanted in expected.items():
        assert np.abs(getattr(found, name).numpy() - wanted).max() <= 1e-5 * np.abs(wanted).max(), name


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=5)), ids=str)
def test_only_what_is_needed(needs, mask):
    spec = variant(mask=mask)
    tensors = tensors_of(spec)
    assert_right(backward(tensors, spec, needs=needs), spec, tensors, needs=needs)


def test_needs_in_other_forms():
    tensors = tensors_of()
    for needs in ([True, False, True, False, True], (1, 0, 1, 0, 1), np.array([1, 0, 1, 0, 1], bool).tolist()):
        assert_right(backward(tensors, needs=needs), SPEC, tensors, needs=(True, False, True, False, True))


def test_padding_on_four_sides_and_numbers_for_pairs():
    spec = DeformConv2dSpec(4, 6, 3, 1, (1, 2, 0, 1), 1)
    tensors = tensors_of(spec, Extents(2, 6, 7))
    assert_right(backward(tensors, spec, stride=1, dilation=1), spec, tensors)
    spec = DeformConv2dSpec(4, 6, 3, 2, 1, 1)
    tensors = tensors_of(spec, Extents(2, 6, 7))
    expected = backward(tensors, spec)
    assert_right(expected, spec, tensors)
    for stride, padding in ((2, 1), ([2, 2], (1, 1)), ((2, 2), [1, 1, 1, 1])):
        for one, other in zip(backward(tensors, spec, stride=stride, padding=padding), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_strange_offsets_get_and_give_nothing(strange):
    tensors = tensors_of()
    tensors["offset"][1, 5] = strange
    found = backward(tensors)
    assert all(np.isfinite(value).all() for value in found)
    assert not found.offset[1, 4:6].any()
    assert not found.mask[1, 2].any()
    assert_right(found, SPEC, tensors)


# --- which kernel -------------------------------------------------------------------------------------------


@pytest.fixture
def builds(cache_dir, monkeypatch):
    """The specifications that are built."""
    found = []
    build = handmade.build
    monkeypatch.setattr(handmade, "build", lambda spec, *a, **k: found.append(spec) or build(spec, *a, **k))
    return found


def test_one_kernel_for_all_sizes(builds):
    for extents in (EXTENTS, Extents(1, 9, 8), Extents(0, 5, 4)):
        backward(tensors_of(extents=extents))
    assert builds == [DeformConv2dGradSpec.of(SPEC)]


def test_a_kernel_for_what_is_needed(builds):
    tensors = tensors_of()
    for needs in ((True, False, True, False, False), (True, 0, 1, False, False), [True, False, True, False, False]):
        backward(tensors, needs=needs)
    assert builds == [DeformConv2dGradSpec.of(SPEC, grad_offset=False, grad_bias=False)]
    # Offset and mask go together.
    for needs in ((False, True, False, False, False), (False, False, False, False, True)):
        backward(tensors, needs=needs)
    assert builds[1:] == [DeformConv2dGradSpec.of(SPEC, grad_input=False, grad_weight=False, grad_bias=False)]


def test_borders_share_a_kernel_where_the_offset_is_not_needed(builds):
    for border in ("torchvision", "mmcv"):
        backward(tensors_of(), needs=(True, False, True, True, False), border=border)
    assert len(builds) == 1
    for border in ("torchvision", "mmcv"):
        backward(tensors_of(), border=border)
    assert [spec.border for spec in builds[1:]] == ["torchvision", "mmcv"]


def test_nothing_needed_builds_nothing(builds):
    assert backward(tensors_of(), needs=(False,) * 5) == Gradients(None, None, None, None, None)
    v1 = variant(mask=False)
    assert backward(tensors_of(v1), v1, needs=(False,) * 4 + (True,)) == Gradients(None, None, None, None, None)
    assert builds == []


def test_channels_last_has_a_kernel_of_its_own(builds):
    torch = pytest.importorskip("torch")
    given = {name: torch_of(array) for name, array in tensors_of().items()}
    backward(given)
    backward({**given, "input": given["input"].contiguous(memory_format=torch.channels_last)})
    assert [spec.layout for spec in builds] == ["NCHW", "NHWC"]


def test_kernels_in_memory_are_bounded(monkeypatch):
    monkeypatch.setattr(gradient, "_MAX_KERNELS", 2)
    for channels in (2, 4, 6, 8):
        spec = DeformConv2dSpec(channels, 2, 1)
        tensors = tensors_of(spec, Extents(1, 4, 4))
        for _ in range(2):
            assert_right(backward(tensors, spec), spec, tensors)
        assert len(gradient._kernels) <= 2


# --- what is refused ----------------------------------------------------------------------------------------

GOOD_GRAD_OUTPUT = (2, 2, 2, 3)
APPLICABLE = [bad for bad in BAD_CALLS if bad.as_tensors and "bias" not in bad.name]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("bad", APPLICABLE, ids=lambda bad: bad.name)
def test_bad_calls_are_refused_as_by_the_forward(bad, kind, builds):
    pytest.importorskip("torch" if kind == "torch" else "ml_dtypes")
    make = torch_tensor if kind == "torch" else numpy_tensor
    arguments = tensor_arguments({**bad.arguments, "bias": None}, make)
    del arguments["bias"]
    match = bad.match.replace(".*Convert bias", "")
    with pytest.raises(bad.exception, match=match):
        deform_conv2d_backward(make(GOOD_GRAD_OUTPUT, "float32"), **arguments)
    assert builds == []


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("exception", "match", "shape", "dtype"),
    [
        (SpecError, r"grad_output must be of the output's shape \(2, 2, 2, 3\), got \(2, 2, 3, 2\)", (2, 2, 3, 2), ""),
        (SpecError, r"grad_output must be of the output's shape .*, got \(1, 2, 2, 3\)", (1, 2, 2, 3), ""),
        (SpecError, r"grad_output must have the 4 dimensions N, Cout, Ho, Wo, got 3", (2, 2, 3), ""),
        (SpecTypeError, r"grad_output must be a tensor.*NoneType", None, ""),
        (SpecTypeError, r"input is float32 and grad_output is float64", GOOD_GRAD_OUTPUT, "float64"),
    ],
)
def test_grad_output_is_checked(exception, match, shape, dtype, kind):
    if kind == "torch":
        pytest.importorskip("torch")
    make = torch_tensor if kind == "torch" else numpy_tensor
    arguments = tensor_arguments({**GOOD_CALL, "bias": None}, make)
    del arguments["bias"]
    wrong = None if shape is None else make(shape, dtype or "float32")
    for _ in range(2):
        with pytest.raises(exception, match=match):
            deform_conv2d_backward(wrong, **arguments)
        deform_conv2d_backward(make(GOOD_GRAD_OUTPUT, "float32"), **arguments)


@pytest.mark.parametrize("needs", [(True,), (), (True,) * 6, None, True, "12345x"], ids=str)
def test_needs_are_checked(needs):
    with pytest.raises(SpecError, match=r"needs must hold 5 values \(input, offset, weight, bias, mask\), got"):
        backward(tensors_of(), needs=needs)


@pytest.mark.parametrize("border", ["zeros", None, ["mmcv"], ""], ids=str)
def test_border_is_checked(border, builds):
    for needs in ((True,) * 5, (True, False, True, True, False)):
        with pytest.raises(SpecError, match="border must be one of torchvision, mmcv, got"):
            backward(tensors_of(), border=border, needs=needs)
    assert builds == []


@pytest.mark.parametrize("name", ["grad_output", "input", "offset", "weight", "mask"])
def test_second_derivatives_are_refused_before_a_build(name, builds):
    torch = pytest.importorskip("torch")
    given = {key: torch_of(array) for key, array in tensors_of().items()}
    given[name].requires_grad_()
    with pytest.raises(SpecTypeError, match=r"requires gradients, .*no derivatives.*torch.no_grad\(\)"):
        backward(given)
    assert builds == []
    with torch.no_grad():
        assert not any(value.requires_grad for value in backward(given))


def test_kinds_that_are_none():
    tensors = tensors_of()
    with pytest.raises(SpecTypeError, match=r"input must be a tensor, .* got \[\] of type list"):
        backward({**tensors, "input": []})


# --- what a call costs besides the kernel -------------------------------------------------------------------


def test_a_call_that_was_made_before_does_little():
    """About 40 functions for five tensors in and five out; `tvmdcn benchmark --overhead` says how long they take."""
    pytest.importorskip("torch")
    spec = DeformConv2dSpec(1, 1, 1)
    tensors = {name: torch_of(array) for name, array in tensors_of(spec, Extents(1, 3, 3)).items()}
    arguments = [tensors[name] for name in ("grad_output", "input", "offset", "weight", "mask")]
    assert len(functions_entered(lambda: deform_conv2d_backward(*arguments))) <= 50


def test_public_names():
    assert tvmdcn.deform_conv2d_backward is gradient.deform_conv2d_backward
    assert tvmdcn.Gradients is Gradients
    assert NAMES == ("input", "offset", "weight", "bias", "mask")
