# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from strategies import cases

from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.problems import TEST_PROBLEMS
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents, spec_from_json

LAYER = TEST_PROBLEMS["asymmetric"].spec
FLAGS = ("grad_input", "grad_offset", "grad_weight", "grad_bias")
ASKED = [dict(zip(FLAGS, bits, strict=True)) for bits in itertools.product((True, False), repeat=4) if any(bits)]


def grad(layer=LAYER, **flags):
    return DeformConv2dGradSpec.of(layer, **flags)


@pytest.mark.parametrize("border", ["torchvision", "mmcv"])
@pytest.mark.parametrize("flags", ASKED, ids=str)
def test_the_layer_comes_back(flags, border):
    spec = grad(**flags, border=border)
    assert type(spec.layer) is DeformConv2dSpec
    assert spec.layer == LAYER
    assert spec.border == border
    assert {name: getattr(spec, name) for name in FLAGS} == flags


def test_a_layer_is_not_its_gradients():
    assert grad() != LAYER
    assert len({grad(), LAYER, grad(border="mmcv"), grad(), DeformConv2dGradSpec.of(LAYER)}) == 3
    assert (LAYER.operator, grad().operator) == ("deform_conv2d", "deform_conv2d_grad")


@pytest.mark.parametrize(
    ("exception", "match", "fields"),
    [
        (SpecError, "no gradient is asked for: set one of grad_input, grad_offset", dict.fromkeys(FLAGS, False)),
        (SpecTypeError, "grad_weight must be True or False, got grad_weight=1", {"grad_weight": 1}),
        (SpecTypeError, "grad_offset must be True or False, got grad_offset=None", {"grad_offset": None}),
        (SpecError, "border must be one of torchvision, mmcv, got border='zeros'", {"border": "zeros"}),
        (SpecError, "border must be one of torchvision, mmcv, got border=None", {"border": None}),
    ],
)
def test_fields_are_checked(exception, match, fields):
    with pytest.raises(exception, match=match):
        grad(**fields)


def test_fields_of_the_layer_are_checked():
    with pytest.raises(SpecError, match="groups must divide in_channels"):
        DeformConv2dGradSpec(5, 4, groups=2)
    assert DeformConv2dGradSpec(4, 4, padding=1).padding == (1, 1, 1, 1)


def test_inputs_are_those_that_gradients_depend_on():
    # By hand, in the order input, offset, weight, bias asked for.
    expected = {
        (True, True, True, True): "grad_output input offset mask weight",
        (True, False, False, False): "grad_output offset mask weight",
        (False, True, False, False): "grad_output input offset mask weight",
        (False, False, True, False): "grad_output input offset mask",
        (False, False, False, True): "grad_output",
        (True, False, True, False): "grad_output input offset mask weight",
        (False, False, True, True): "grad_output input offset mask",
    }
    for asked, names in expected.items():
        flags = dict(zip(FLAGS, asked, strict=True))
        assert " ".join(grad(**flags).inputs) == names
        v1 = grad(dataclasses.replace(LAYER, mask=False), **flags)
        assert " ".join(v1.inputs) == names.replace(" mask", "")


def test_outputs_are_those_asked_for():
    assert grad().outputs == ("grad_input", "grad_offset", "grad_mask", "grad_weight", "grad_bias")
    v1 = dataclasses.replace(LAYER, mask=False)
    assert grad(v1).outputs == ("grad_input", "grad_offset", "grad_weight", "grad_bias")
    for flags in ASKED:
        wanted = [name for name in FLAGS if flags[name]]
        assert [name for name in grad(**flags).outputs if name != "grad_mask"] == wanted
        assert ("grad_mask" in grad(**flags).outputs) == flags["grad_offset"]
    assert LAYER.inputs == ("input", "offset", "mask", "weight", "bias")
    assert (v1.inputs, v1.outputs) == (("input", "offset", "weight", "bias"), ("output",))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_shapes_of_all_tensors(layout):
    spec, extents = grad(dataclasses.replace(LAYER, layout=layout)), Extents(7, 5, 4)
    shapes = {
        "input": (7, 6, 5, 4),
        "offset": (7, 36, 2, 3),
        "mask": (7, 18, 2, 3),
        "output": (7, 2, 2, 3),
        "weight": (2, 3, 3, 2),
        "bias": (2,),
    }
    for name, shape in shapes.items():
        if layout == "NHWC" and name not in ("weight", "bias"):
            shape = (shape[0], *shape[2:], shape[1])
        assert spec.shape_of(name, extents) == shape
        assert spec.shape_of(f"grad_{name}", extents) == shape


def test_flops_and_bytes():
    extents = Extents(2, 5, 4)
    forward = LAYER.flops(extents)
    asked = {
        flags: grad(**dict(zip(FLAGS, flags, strict=True)))
        for flags in itertools.product((True, False), repeat=4)
        if any(flags)
    }
    for (of_input, of_offset, of_weight, _), spec in asked.items():
        assert spec.flops(extents) == forward * ((of_input or of_offset) + of_weight)
    image, field, mask, output, weight = 2 * 6 * 5 * 4, 2 * 36 * 6, 2 * 18 * 6, 2 * 2 * 6, 36
    assert grad().bytes_moved(extents) == 4 * (output + 2 * (image + field + mask + weight) + 2)
    bias_only = grad(grad_input=False, grad_offset=False, grad_weight=False)
    assert bias_only.bytes_moved(extents) == 4 * (output + 2)


def test_slugs_tell_specs_apart():
    assert grad().slug == LAYER.slug + "_giowb"
    assert grad(grad_input=False, border="mmcv").slug == LAYER.slug + "_gowb.mmcv"
    assert grad(deterministic=True).slug == LAYER.slug + "_giowb.det"
    options = [(border, fixed) for border in ("torchvision", "mmcv") for fixed in (False, True)]
    specs = [grad(**flags, border=border, deterministic=fixed) for flags in ASKED for border, fixed in options]
    assert len({spec.slug for spec in specs} | {LAYER.slug}) == len(specs) + 1
    assert all(re.fullmatch(r"[a-z0-9._-]+", spec.slug) for spec in specs)


@given(case=cases(dtypes=("float16", "bfloat16", "float32", "float64"), layouts=("NCHW", "NHWC")))
def test_specs_survive_json(case):
    some = grad(case.spec, grad_offset=False, border="mmcv")
    for spec in (case.spec, grad(case.spec), some, dataclasses.replace(some, deterministic=True)):
        data = json.loads(json.dumps(spec.to_json()))
        assert spec_from_json(data) == spec
        assert type(spec_from_json(data)) is type(spec)
        assert type(spec).from_json(data) == spec


@pytest.mark.parametrize(
    ("exception", "match", "data"),
    [
        (SpecError, "operator must be one of deform_conv2d, deform_conv2d_grad, got 'conv2d'", {"operator": "conv2d"}),
        (SpecError, "missing .*operator.*; unknown a", {"a": 1}),
        (SpecError, "missing .*operator", {}),
        (SpecTypeError, "must be an object, got list", []),
        (SpecTypeError, "must be an object, got NoneType", None),
        (SpecError, "operator must be 'deform_conv2d', got 3", {**LAYER.to_json(), "operator": 3}),
        (SpecError, "missing border, grad_bias", {**LAYER.to_json(), "operator": "deform_conv2d_grad"}),
        (SpecError, "unknown border, grad_bias", {**grad().to_json(), "operator": "deform_conv2d"}),
        (SpecTypeError, "grad_bias must be True or False", {**grad().to_json(), "grad_bias": 1}),
        (SpecError, "border must be one of", {**grad().to_json(), "border": ["mmcv"]}),
        (SpecTypeError, "deterministic must be True or False", {**grad().to_json(), "deterministic": 1}),
        (SpecError, "deterministic must be left out in JSON", {**grad().to_json(), "deterministic": False}),
    ],
)
def test_json_is_read_strictly(exception, match, data):
    with pytest.raises(exception, match=match):
        spec_from_json(data)


def test_json_of_before_there_was_determinism():
    assert "deterministic" not in grad().to_json()
    assert grad(deterministic=True).to_json() == {**grad().to_json(), "deterministic": True}
    assert grad(deterministic=True).layer == LAYER


def test_one_operators_json_is_not_the_others():
    with pytest.raises(SpecError, match="unknown border"):
        DeformConv2dSpec.from_json(grad().to_json())
    with pytest.raises(SpecError, match="missing border"):
        DeformConv2dGradSpec.from_json(LAYER.to_json())


def test_imports_neither_torch_nor_tvm():
    code = (
        "import sys, tvmdcn; tvmdcn.Gradients, tvmdcn.DeformConv2dGradSpec, tvmdcn.GradKernel, tvmdcn.load,"
        "tvmdcn.deform_conv2d_backward;"
        "print(sorted({'torch', 'tvm', 'tvm_ffi', 'platformdirs', 'ml_dtypes'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
