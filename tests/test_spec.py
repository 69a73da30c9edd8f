# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from bad_calls import (
    BAD_CALLS,
    GOOD_CALL,
    TENSORS,
    numpy_tensor,
    shape_arguments,
    tensor_arguments,
    torch_tensor,
)
from hypothesis import given
from strategies import cases

from tvmdcn.errors import SpecError, SpecTypeError, TvmdcnError
from tvmdcn.problems import PROBLEMS, TEST_PROBLEMS
from tvmdcn.spec import DeformConv2dSpec, Extents

ASYMMETRIC = TEST_PROBLEMS["asymmetric"].spec


def from_shapes(**changes):
    return DeformConv2dSpec.from_shapes(**shape_arguments({**GOOD_CALL, **changes}))


# --- bad calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda bad: bad.name)
def test_bad_calls_are_refused(bad):
    with pytest.raises(bad.exception, match=bad.match) as caught:
        DeformConv2dSpec.from_shapes(**shape_arguments(bad.arguments))
    assert type(caught.value) is bad.exception
    assert isinstance(caught.value, TvmdcnError)
    assert len(str(caught.value)) < 500


def test_bad_calls_are_many_and_differ():
    names = [bad.name for bad in BAD_CALLS]
    assert len(names) >= 30
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("make", [numpy_tensor, torch_tensor])
def test_bad_calls_exist_as_tensors(make):
    if make is torch_tensor:
        pytest.importorskip("torch")
    else:
        pytest.importorskip("ml_dtypes")
    for bad in BAD_CALLS:
        if not bad.as_tensors:
            continue
        arguments = tensor_arguments(bad.arguments, make)
        for name in TENSORS:
            if isinstance(bad.arguments[name], tuple):
                assert tuple(arguments[name].shape) == bad.arguments[name]
                dtype = str(arguments[name].dtype).removeprefix("torch.")
                assert dtype == bad.arguments["dtypes"].get(name, "float32")


def test_errors_are_also_the_built_in_ones():
    assert issubclass(SpecError, ValueError)
    assert issubclass(SpecTypeError, TypeError)


# --- good calls ---------------------------------------------------------------------------------------------


def test_the_good_call_is_good():
    assert from_shapes() == (ASYMMETRIC, Extents(2, 5, 4))


@pytest.mark.parametrize("problem", [*PROBLEMS.values(), *TEST_PROBLEMS.values()], ids=lambda p: p.name)
def test_shapes_lead_back_to_the_spec(problem):
    spec, extents = problem.spec, problem.extents
    nchw = dataclasses.replace(spec, layout="NCHW")
    found = DeformConv2dSpec.from_shapes(
        nchw.input_shape(extents),
        nchw.offset_shape(extents),
        nchw.weight_shape,
        nchw.mask_shape(extents) if spec.mask else None,
        (spec.out_channels,),
        spec.stride,
        spec.padding,
        spec.dilation,
        dtype=spec.dtype,
        layout=spec.layout,
    )
    assert found == (spec, extents)


@given(case=cases(dtypes=("float16", "bfloat16", "float32", "float64"), layouts=("NCHW", "NHWC")))
def test_any_spec_survives_json_and_has_a_slug(case):
    spec = case.spec
    assert DeformConv2dSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert re.fullmatch(r"[a-z0-9._-]+", spec.slug)


def test_optional_tensors():
    spec, _ = from_shapes(mask=None, bias=None)
    assert spec == dataclasses.replace(ASYMMETRIC, mask=False)


@pytest.mark.parametrize("number", [np.int64(2), np.int32(2)])
def test_integers_of_numpy_become_plain(number):
    spec, _ = from_shapes(stride=(number, 1), input=(2, np.int64(6), 5, 4))
    assert spec == ASYMMETRIC
    assert all(type(value) is int for value in (*spec.stride, spec.in_channels))
    assert DeformConv2dSpec(number, 4, number, number, number, number).stride == (2, 2)


@pytest.mark.parametrize("dtype", [np.float16, np.dtype("float16"), "float16"])
def test_dtypes_in_every_spelling(dtype):
    assert DeformConv2dSpec(4, 4, dtype=dtype).dtype == "float16"


def test_dtypes_of_torch():
    torch = pytest.importorskip("torch")
    assert DeformConv2dSpec(4, 4, dtype=torch.bfloat16).dtype == "bfloat16"
    spec, _ = from_shapes(dtypes=dict.fromkeys(TENSORS, torch.float64))
    assert spec.dtype == "float64"


def test_shapes_of_torch():
    torch = pytest.importorskip("torch")
    spec, _ = from_shapes(input=torch.Size((2, 6, 5, 4)), stride=torch.Size((2, 1)))
    assert spec == ASYMMETRIC


@pytest.mark.parametrize(
    ("padding", "expected"),
    [(2, (2, 2, 2, 2)), ((1, 2), (1, 2, 1, 2)), ([1, 2, 3, 4], (1, 2, 3, 4)), ((0, 0), (0, 0, 0, 0))],
)
def test_padding_is_top_left_bottom_right(padding, expected):
    assert DeformConv2dSpec(4, 4, padding=padding).padding == expected


def test_batch_may_be_empty():
    _, extents = from_shapes(input=(0, 6, 5, 4), offset=(0, 36, 2, 3), mask=(0, 18, 2, 3))
    assert extents == Extents(0, 5, 4)


def test_largest_tensor_that_can_be_indexed():
    width = 2**30 - 1
    spec, extents = DeformConv2dSpec.from_shapes((1, 1, 1, width), (1, 2, 1, width), (1, 1, 1, 1), dtype="float32")
    assert spec.output_size(1, extents.width) == (1, width)


# --- the class ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exception", "match", "fields"),
    [
        (SpecError, "in_channels must be at least 1, got in_channels=0", {"in_channels": 0}),
        (SpecError, "out_channels must be at least 1", {"out_channels": -4}),
        (SpecTypeError, r"in_channels must be made of ints, got 4\.0 of type float", {"in_channels": 4.0}),
        (SpecTypeError, "groups must be made of ints, got True of type bool", {"groups": True}),
        (SpecError, "groups must divide in_channels, got groups=3 and in_channels=4", {"groups": 3}),
        (SpecError, "groups must divide out_channels, got groups=4", {"groups": 4}),
        (SpecError, "offset_groups must divide in_channels", {"offset_groups": 3}),
        (SpecError, r"kernel_size must be at least 1, got kernel_size=\(3, 0\)", {"kernel_size": (3, 0)}),
        (SpecTypeError, "mask must be True or False, got mask=1", {"mask": 1}),
        (SpecTypeError, "dtype int64 of input is not supported: use one of float16", {"dtype": np.int64}),
        (SpecTypeError, "dtype float of input is not supported", {"dtype": float}),
        (SpecError, "layout must be one of NCHW, NHWC, got layout='nchw'", {"layout": "nchw"}),
        (SpecError, "layout must be one of NCHW, NHWC, got layout=None", {"layout": None}),
        (SpecError, r"weight has .* elements", {"kernel_size": 2**15}),
    ],
)
def test_fields_are_checked(exception, match, fields):
    with pytest.raises(exception, match=match):
        DeformConv2dSpec(**{"in_channels": 4, "out_channels": 6, **fields})


@pytest.mark.parametrize(
    ("exception", "match", "sizes"),
    [
        (SpecError, "batch must be at least 0", (-1, 5, 4)),
        (SpecError, "height must be at least 1", (1, 0, 4)),
        (SpecError, "width must be at most 2147483647", (1, 5, 2**31)),
        (SpecTypeError, "width must be made of ints", (1, 5, "4")),
    ],
)
def test_extents_are_checked(exception, match, sizes):
    with pytest.raises(exception, match=match):
        Extents(*sizes)


def test_specs_are_frozen_and_hashable():
    spec = DeformConv2dSpec(4, 4, padding=[1, 1])
    assert {spec: 1}[DeformConv2dSpec(4, 4, padding=1)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.stride = (2, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_accumulator(dtype):
    expected = "float64" if dtype == "float64" else "float32"
    assert DeformConv2dSpec(4, 4, dtype=dtype).accumulator_dtype == expected


def test_output_size():
    assert ASYMMETRIC.output_size(5, 4) == (2, 3)
    assert DeformConv2dSpec(1, 1, padding=1, stride=2).output_size(138, 7) == (69, 4)
    assert DeformConv2dSpec(1, 1, padding=(0, 0, 1, 2)).output_size(2, 1) == (1, 1)
    with pytest.raises(SpecError, match=r"along the width it spans 2 .* padded input 1"):
        ASYMMETRIC.output_size(5, 1)


def test_output_size_is_that_of_a_convolution():
    torch = pytest.importorskip("torch")
    for problem in TEST_PROBLEMS.values():
        spec, extents = problem.spec, problem.extents
        top, left, bottom, right = spec.padding
        image = torch.empty(1, 1, extents.height + top + bottom, extents.width + left + right, device="meta")
        weight = torch.empty(1, 1, *spec.kernel_size, device="meta")
        output = torch.nn.functional.conv2d(image, weight, None, spec.stride, 0, spec.dilation)
        assert spec.output_size(extents.height, extents.width) == tuple(output.shape[2:])


def test_shapes_of_both_layouts():
    extents = Extents(2, 5, 4)
    nhwc = dataclasses.replace(ASYMMETRIC, layout="NHWC")
    assert ASYMMETRIC.input_shape(extents) == (2, 6, 5, 4)
    assert ASYMMETRIC.offset_shape(extents) == (2, 36, 2, 3)
    assert ASYMMETRIC.mask_shape(extents) == (2, 18, 2, 3)
    assert ASYMMETRIC.output_shape(extents) == (2, 2, 2, 3)
    assert ASYMMETRIC.weight_shape == nhwc.weight_shape == (2, 3, 3, 2)
    assert nhwc.input_shape(extents) == (2, 5, 4, 6)
    assert nhwc.offset_shape(extents) == (2, 2, 3, 36)
    assert nhwc.mask_shape(extents) == (2, 2, 3, 18)
    assert nhwc.output_shape(extents) == (2, 2, 3, 2)


def test_flops_and_bytes():
    extents = Extents(2, 5, 4)
    # 2 images of 2 x 3 pixels, 2 outputs, 3 channels of 6 taps each
    assert ASYMMETRIC.flops(extents) == 2 * 2 * 2 * 3 * 2 * 3 * 6
    elements = 2 * 6 * 5 * 4 + 2 * (36 + 18 + 2) * 2 * 3 + 2 * 3 * 3 * 2 + 2
    assert ASYMMETRIC.bytes_moved(extents) == 4 * elements
    assert dataclasses.replace(ASYMMETRIC, dtype="bfloat16").bytes_moved(extents) == 2 * elements
    assert PROBLEMS["r50_c4"].spec.flops(PROBLEMS["r50_c4"].extents) == 2 * 1024 * 256 * 256 * 9


def test_slugs_tell_specs_apart():
    assert ASYMMETRIC.slug == "c6x2_k3x2_s2x1_p1.0.1.0_d2x1_g2_og3_m_f32_nchw"
    base = DeformConv2dSpec(12, 12)
    changed = [
        dataclasses.replace(base, **{name: value})
        for name, value in {
            "in_channels": 24,
            "out_channels": 24,
            "kernel_size": (3, 1),
            "stride": (1, 2),
            "padding": (0, 0, 0, 1),
            "dilation": (1, 2),
            "groups": 2,
            "offset_groups": 2,
            "mask": False,
            "dtype": "float16",
            "layout": "NHWC",
            "tf32": True,
        }.items()
    ]
    assert len({spec.slug for spec in (base, *changed)}) == len(dataclasses.fields(base)) + 1


@pytest.mark.parametrize(
    ("exception", "match", "change"),
    [
        (SpecError, "missing stride; unknown none", lambda data: data.pop("stride")),
        (SpecError, "missing none; unknown bias", lambda data: data.update(bias=True)),
        (SpecError, "operator must be 'deform_conv2d', got 'conv2d'", lambda d: d.update(operator="conv2d")),
        (SpecError, r"padding must be written as \[0, 0, 0, 0\]", lambda data: data.update(padding=0)),
        (SpecTypeError, "mask must be True or False", lambda data: data.update(mask=1)),
        (SpecTypeError, "groups must be made of ints", lambda data: data.update(groups="1")),
        (SpecError, "stride must be at least 1", lambda data: data.update(stride=[0, 1])),
        (SpecError, "tf32 must be left out in JSON where it is False", lambda data: data.update(tf32=False)),
        (SpecTypeError, "tf32 must be True or False", lambda data: data.update(tf32=1)),
    ],
)
def test_json_is_read_strictly(exception, match, change):
    data = DeformConv2dSpec(4, 4).to_json()
    change(data)
    with pytest.raises(exception, match=match):
        DeformConv2dSpec.from_json(data)


def test_json_of_before_there_was_tf32():
    spec = DeformConv2dSpec(4, 4)
    assert "tf32" not in spec.to_json()
    rounded = dataclasses.replace(spec, tf32=True)
    assert rounded.to_json()["tf32"] is True
    assert DeformConv2dSpec.from_json(rounded.to_json()) == rounded


def test_json_must_be_an_object():
    with pytest.raises(SpecTypeError, match="must be an object, got list"):
        DeformConv2dSpec.from_json([])


def test_imports_neither_torch_nor_tvm():
    code = (
        "import sys, tvmdcn.spec, tvmdcn.problems, tvmdcn.reference, tvmdcn.env;"
        "print(sorted({'torch', 'tvm', 'tvm_ffi', 'platformdirs', 'ml_dtypes'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
