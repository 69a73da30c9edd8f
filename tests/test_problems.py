# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.problems import (
    OPERATORS,
    PROBLEMS,
    REAL_LAYERS,
    TEST_PROBLEMS,
    load_problem_file,
    make_tensors,
    numpy_dtype,
    of_operators,
    parse_problem,
    real_layer,
)
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents

# (N, Cin, H, W, Cout), stride, groups, offset groups, mask: what figures are published for.
NAMED = {
    "r50_c3": ((1, 128, 64, 64, 128), 1, 1, 1, True),
    "r50_c4": ((1, 256, 32, 32, 256), 1, 1, 1, True),
    "r50_c5": ((1, 512, 16, 16, 512), 1, 1, 1, True),
    "r50_c4_det": ((1, 256, 50, 84, 256), 1, 1, 1, True),
    "r50_c3_s2": ((1, 128, 64, 64, 128), 2, 1, 1, True),
    "yolact_p3": ((1, 128, 69, 69, 128), 1, 1, 1, True),
    "edvr_align": ((1, 64, 128, 128, 64), 1, 1, 8, True),
    "basicvsr_align": ((1, 128, 64, 64, 64), 1, 1, 16, True),
    "rpn_dcnv1": ((1, 256, 64, 64, 256), 1, 1, 1, False),
    "grouped32": ((1, 256, 32, 32, 256), 1, 32, 1, True),
    "batch8_c5": ((8, 512, 16, 16, 512), 1, 1, 1, True),
    "deft": ((1, 64, 64, 64, 64), 1, 1, 1, True),
    "yolact_c3": ((1, 128, 138, 138, 128), 2, 1, 1, True),
    "yolact_c4": ((1, 256, 35, 35, 256), 1, 1, 1, True),
    "yolact_c5": ((1, 512, 18, 18, 512), 1, 1, 1, True),
    "aliked_b3c1": ((1, 32, 60, 80, 64), 1, 1, 1, False),
    "aliked_b3c2": ((1, 64, 60, 80, 64), 1, 1, 1, False),
    "aliked_b4c1": ((1, 64, 15, 20, 128), 1, 1, 1, False),
    "aliked_b4c2": ((1, 128, 15, 20, 128), 1, 1, 1, False),
}


def test_named_problems_are_the_published_ones():
    found = {}
    for name, problem in PROBLEMS.items():
        spec, extents = problem.spec, problem.extents
        assert problem.name == name
        assert problem.source
        assert (spec.kernel_size, spec.padding, spec.dilation) == ((3, 3), (1, 1, 1, 1), (1, 1))
        assert (spec.dtype, spec.layout) == ("float32", "NCHW")
        assert spec.stride[0] == spec.stride[1]
        sizes = (extents.batch, spec.in_channels, extents.height, extents.width, spec.out_channels)
        found[name] = (sizes, spec.stride[0], spec.groups, spec.offset_groups, spec.mask)
    assert list(found.items()) == list(NAMED.items())


def test_the_asymmetric_problem_is_torchvisions():
    problem = TEST_PROBLEMS["asymmetric"]
    assert problem.extents == Extents(33, 5, 4)
    assert problem.spec == DeformConv2dSpec(6, 2, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3)


def test_test_problems_cover_what_they_should():
    specs = [problem.spec for problem in TEST_PROBLEMS.values()]
    assert {spec.dtype for spec in specs} == {"float16", "bfloat16", "float32", "float64"}
    assert {spec.layout for spec in specs} == {"NCHW", "NHWC"}
    assert {0, 1, 33} <= {problem.extents.batch for problem in TEST_PROBLEMS.values()}
    assert any(spec.groups == spec.in_channels > 1 for spec in specs)
    assert any(spec.padding[:2] != spec.padding[2:] for spec in specs)
    assert not set(PROBLEMS) & set(TEST_PROBLEMS)


@pytest.mark.parametrize("name", TEST_PROBLEMS)
def test_tensors_have_the_shapes_and_the_dtype(name):
    spec, extents = TEST_PROBLEMS[name].spec, TEST_PROBLEMS[name].extents
    if spec.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    tensors = make_tensors(spec, extents)
    expected = {
        "input": spec.input_shape(extents),
        "offset": spec.offset_shape(extents),
        "weight": spec.weight_shape,
        "mask": spec.mask_shape(extents) if spec.mask else None,
        "bias": (spec.out_channels,),
    }
    for argument, shape in expected.items():
        array = getattr(tensors, argument)
        if shape is None:
            assert array is None
            continue
        assert array.shape == shape
        assert array.dtype == numpy_dtype(spec.dtype)
        assert array.flags.c_contiguous
        assert np.isfinite(array.astype(np.float64)).all()


def test_tensors_follow_the_seed_and_the_spread_asked_for():
    spec, extents = PROBLEMS["deft"].spec, PROBLEMS["deft"].extents
    first, again, other = (make_tensors(spec, extents, seed=seed) for seed in (0, 0, 1))
    for name in ("input", "offset", "weight", "mask", "bias"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    near = make_tensors(spec, extents, offset_scale=3.0, far=0.0)
    assert near.offset.std() == pytest.approx(3.0, rel=0.02)
    assert np.abs(near.offset).max() < 20
    # far ones have a spread of 200 pixels; of those, half and more are beyond 100
    assert 0.01 < (np.abs(first.offset) > 100).mean() < 0.02
    assert first.mask.min() > 0
    assert first.mask.max() < 1
    assert first.weight.std() == pytest.approx((64 * 9) ** -0.5, rel=0.05)


def test_float64_tensors_use_the_whole_precision():
    spec, extents = TEST_PROBLEMS["float64"].spec, TEST_PROBLEMS["float64"].extents
    offset = make_tensors(spec, extents).offset
    assert (offset != offset.astype(np.float32)).any()


def test_bfloat16_without_ml_dtypes_is_refused_in_our_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(SpecError, match="bfloat16 exists in NumPy only with the package ml_dtypes"):
        numpy_dtype("bfloat16")


@pytest.mark.parametrize("name", REAL_LAYERS)
def test_real_layers_have_the_shapes_of_their_problems(name, real_layers_folder):
    tensors, output = real_layer(name, real_layers_folder)
    problem = PROBLEMS[name]
    assert tensors.input.shape == problem.spec.input_shape(problem.extents)
    assert output.shape == problem.spec.output_shape(problem.extents)
    assert tensors.mask is None
    assert tensors.bias is None


def test_real_layer_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(SpecError, match="'nothing' is no real layer; there are aliked_b3c1"):
        real_layer("nothing", tmp_path)
    with pytest.raises(FileNotFoundError):
        real_layer("aliked_b3c1", tmp_path)
    wrong = np.zeros((1, 2, 3, 4), np.float32)
    np.savez(
        tmp_path / "aliked_n16_tum_block3_conv1.npz",
        input=wrong,
        offset=wrong,
        weight=wrong,
        output_float64_rounded=wrong,
    )
    with pytest.raises(SpecError, match=r"have shapes \(\(1, 2, 3, 4\).* expected \(\(1, 32, 60, 80\)"):
        real_layer("aliked_b3c1", tmp_path)


# --- problems as text ---------------------------------------------------------------------------------------


def test_parse_names():
    assert parse_problem(" r50_c4 ") is PROBLEMS["r50_c4"]
    assert parse_problem("asymmetric") is TEST_PROBLEMS["asymmetric"]


@pytest.mark.parametrize(
    ("text", "spec", "extents"),
    [
        ("1,256,32,32,256", PROBLEMS["r50_c4"].spec, (1, 32, 32)),
        ("1,64,128,128,64,og=8", PROBLEMS["edvr_align"].spec, (1, 128, 128)),
        ("1, 256, 64, 64, 256, mask=0", PROBLEMS["rpn_dcnv1"].spec, (1, 64, 64)),
        ("33,6,5,4,2,k=3x2,s=2x1,p=1x0,d=2x1,g=2,og=3", TEST_PROBLEMS["asymmetric"].spec, (33, 5, 4)),
        ("2,8,7,9,12,p=1x2x0x1,s=1x2", TEST_PROBLEMS["uneven_padding"].spec, (2, 7, 9)),
        ("1,4,9,9,4,k=5", DeformConv2dSpec(4, 4, 5, padding=2), (1, 9, 9)),
        ("1,4,9,9,4,k=3x1,d=2", DeformConv2dSpec(4, 4, (3, 1), padding=(2, 0), dilation=2), (1, 9, 9)),
        (
            "0,4,9,8,6,dtype=float16,layout=NHWC,mask=1",
            DeformConv2dSpec(4, 6, padding=1, dtype="float16", layout="NHWC"),
            (0, 9, 8),
        ),
    ],
)
def test_parse_descriptions(text, spec, extents):
    problem = parse_problem(text)
    assert problem.spec == spec
    assert problem.extents == Extents(*extents)
    assert problem.name == text.strip()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("r50_c9", "neither a name nor of the form .*Names: r50_c3, r50_c4"),
        ("", "neither a name"),
        ("1,2,3,4", "neither a name"),
        ("1,2,3,4,5,6", "neither a name"),
        ("1,2,3,4,x", "neither a name"),
        ("1,2,3,-4,5", "neither a name"),
        ("1,2,3,p=1,4,5", "neither a name"),
        ("1,2,9,9,2,q=1", "q in problem .* is not one of k, s, p"),
        ("1,2,9,9,2,p=1,p=2", "p in problem .* is given twice"),
        ("1,2,9,9,2,p=-1", "p in problem .* must look like"),
        ("1,2,9,9,2,p=1x1x1", "p in problem .* must look like"),
        ("1,2,9,9,2,k=3x3x3", "k in problem .* must look like"),
        ("1,2,9,9,2,g=1x1", "g in problem .* must look like"),
        ("1,2,9,9,2,s=", "s in problem .* must look like"),
        ("1,2,9,9,2,mask=yes", "mask in problem .* must be 0 or 1"),
        ("1,2,9,9,2,s=0", "stride must be at least 1"),
        ("1,2,9,9,2,k=0", "kernel_size must be at least 1"),
        ("1,2,9,9,2,g=3", "groups must divide in_channels"),
        ("1,2,1,1,2,p=0", "kernel is larger than the padded input"),
        ("1,2,9,9,2,dtype=int8", "dtype int8 .* is not supported"),
        ("1,2,9,9,2,layout=nchw", "layout must be one of NCHW, NHWC"),
    ],
)
def test_parse_refuses(text, match):
    with pytest.raises((SpecError, SpecTypeError), match=match):
        parse_problem(text)


def test_problem_files(tmp_path):
    items = ["r50_c4", {"name": "mine", "problem": "1,8,9,9,8"}]
    as_list, as_object = tmp_path / "list.json", tmp_path / "object.json"
    as_list.write_text(json.dumps(items))
    as_object.write_text(json.dumps({"problems": items}))
    for path in (as_list, as_object):
        first, second = load_problem_file(path)
        assert (first.name, first.spec) == ("r50_c4", PROBLEMS["r50_c4"].spec)
        assert (second.name, second.spec.in_channels) == ("mine", 8)
        assert second.source == f"{path.name}, item 1"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
def test_problem_files_in_toml(tmp_path):
    path = tmp_path / "layers.toml"
    path.write_text('problems = ["r50_c4", {name = "mine", problem = "1,8,9,9,8"}]\n')
    assert [problem.name for problem in load_problem_file(str(path))] == ["r50_c4", "mine"]
    path.write_text("problems = [\n")
    with pytest.raises(SpecError, match=r"layers\.toml is not valid toml"):
        load_problem_file(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not valid json"),
        ("[]", "must hold a list of problems, not empty"),
        ("3", "must hold a list of problems"),
        ('{"layers": ["r50_c4"]}', "must hold a list of problems"),
        ("[3]", "item 0: expected a text"),
        ('["r50_c4", {"name": "x"}]', "item 1: expected a text"),
        ('[{"problem": "r50_c4", "extra": "x"}]', "item 0: expected a text"),
        ('[{"problem": 3}]', "item 0: expected a text"),
        ('["no_such"]', "neither a name"),
    ],
)
def test_problem_files_refused(tmp_path, text, match):
    path = tmp_path / "layers.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=match):
        load_problem_file(path)


def test_texts_in_messages_are_cut():
    with pytest.raises(SpecError) as caught:
        parse_problem("x" * 10_000)
    assert len(re.sub(r"\s", "", str(caught.value))) < 1000


def test_every_layer_has_gradients():
    for problem in (*PROBLEMS.values(), *TEST_PROBLEMS.values()):
        backward = problem.backward
        assert backward.name == f"{problem.name} backward"
        assert backward.spec == DeformConv2dGradSpec.of(problem.spec)
        assert backward.extents == problem.extents
        assert backward.forward == problem == problem.forward


def test_problems_of_operators():
    row, pixel = TEST_PROBLEMS["row"], TEST_PROBLEMS["pixel"]
    assert of_operators([row, pixel], "deform_conv2d") == [row, pixel]
    assert of_operators([row, pixel], "deform_conv2d_grad") == [row.backward, pixel.backward]
    assert of_operators([row, pixel], "all") == [row, row.backward, pixel, pixel.backward]
    assert (row.spec.operator, row.backward.spec.operator, "all") == OPERATORS
