# SPDX-License-Identifier: Apache-2.0
"""Which layers a model in ONNX has, for Python and for the commands; nothing is built to find out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import click
import ml_dtypes
import numpy as np
import onnx
from click.testing import CliRunner
from onnx import helper
from onnx_models import CHANNELS, FIELD_WEIGHTS, branching, fields_of, image, layer, model_of, value, weights

import tvmdcn
from tvmdcn.cli import main
from tvmdcn.errors import MissingExtra, SpecError
from tvmdcn.onnx import find_layers
from tvmdcn.packs.command import _chosen
from tvmdcn.problems import parse_problem
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tuning.command import _selected

MODULATED = DeformConv2dSpec(CHANNELS, CHANNELS, padding=1)
PLAIN = DeformConv2dSpec(CHANNELS, CHANNELS, padding=1, mask=False)
SQUARE = (CHANNELS, CHANNELS, 3, 3)


def test_layers_are_found_once_each_and_nothing_is_built(cache_dir: Path) -> None:
    found = find_layers(branching(), [(1, 3, 10, 12)])
    extents = Extents(1, 10, 12)
    assert [(problem.spec, problem.extents) for problem in found] == [(MODULATED, extents), (PLAIN, extents)]
    assert found[0].source == "node first of graph of a test"
    for problem in found:
        again = parse_problem(problem.name)
        assert (again.spec, again.extents) == (problem.spec, problem.extents)
    assert not list(cache_dir.iterdir())


def test_sizes_that_only_a_run_shows() -> None:
    """Of what is resized by a number from the image, and of what a layer's own size decides."""
    nodes = [
        *fields_of(),
        layer(["x", "w", "offset"], "d", strides=[1, 1]),
        helper.make_node("Shape", ["d"], ["all"]),
        helper.make_node("Slice", ["all", "two", "four"], ["size"]),
        helper.make_node("Div", ["size", "two"], ["half"]),
        helper.make_node("Concat", ["nc", "half"], ["wanted"], axis=0),
        helper.make_node("Resize", ["d", "", "", "wanted"], ["small"]),
        *(
            helper.make_node(
                node.op_type,
                [{"x": "small", "raw_mask": "other_raw"}.get(name, name) for name in node.input],
                [{"offset": "o2", "raw_mask": "other_raw", "mask": "m2"}[node.output[0]]],
                pads=[1] * 4,
            )
            for node in fields_of()[:1]
        ),
        layer(["small", "w", "o2"], "y"),
    ]
    arrays = weights(w=SQUARE, **FIELD_WEIGHTS)
    arrays |= {"two": np.array([2]), "four": np.array([4]), "nc": np.array([1, CHANNELS])}
    model = model_of(nodes, [value("x")], [value("y", shape=[None] * 4)], arrays)
    found = find_layers(model, [(1, CHANNELS, 10, 13)])
    assert [problem.extents for problem in found] == [Extents(1, 10, 13), Extents(1, 5, 6)]


def test_inputs_may_be_given_or_be_fixed() -> None:
    model = branching()
    (first, _) = find_layers(model, {"image": image(1, 3, 5, 6)})
    assert first.extents == Extents(1, 5, 6)
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 3, 8, 9), strict=True):
        dim.dim_value = size
    (first, _) = find_layers(model)
    assert first.extents == Extents(1, 8, 9)


def test_bfloat16_and_integers_as_inputs() -> None:
    nodes = [helper.make_node("Gather", ["x", "which"], ["one"], axis=0), layer(["one", "w", "offset"], "y")]
    inputs = [value("x"), value("which", np.int64, (1,)), value("offset", shape=("k", 18, "h", "w"))]
    model = model_of(nodes, inputs, [value("y", shape=[None] * 4)], weights(w=SQUARE))
    (found,) = find_layers(model, [(5, CHANNELS, 6, 7), (1,), (1, 18, 6, 7)])
    assert (found.spec, found.extents) == (PLAIN, Extents(1, 6, 7))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (None, r"inputs vary in size: image \(n, 3, h, w\) tensor\(float\)\. Give a shape for each \(--input\)"),
        ([], r"--input must be given 1 times, not 0"),
        ([(1, 3, 8, 8)] * 2, r"--input must be given 1 times, not 2"),
        ([(1, 4, 8, 8)], r"input image of the shape \(1, 4, 8, 8\) does not fit the model's"),
        ([(1, 3, 8)], r"does not fit"),
        ([(2, 3, 8, 8)], r"does not run on inputs of the shapes image \(2, 3, 8, 8\)"),
    ],
)
def test_wrong_inputs_are_refused(shapes: object, message: str) -> None:
    model = branching()
    if shapes == [(2, 3, 8, 8)]:  # where a constant of the model's says otherwise
        model.graph.node[0].CopyFrom(helper.make_node("Reshape", ["image", "one"], ["x"]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, CHANNELS, 6, 8]), "one"))
    with pytest.raises(SpecError, match=message):
        find_layers(model, shapes)


def test_model_without_layers_is_refused() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], [value("x")], ["y"], {})
    with pytest.raises(SpecError, match="the model has no DeformConv node"):
        find_layers(model, [(1, CHANNELS, 5, 5)])


def test_attributes_that_do_not_fit_the_tensors_are_refused() -> None:
    node = layer(["x", "w", "offset"], "y", "only", offset_group=2)
    inputs = [value("x"), value("offset", shape=("n", None, "p", "q"))]
    model = model_of([node], inputs, [value("y", shape=[None] * 4)], weights(w=SQUARE))
    with pytest.raises(SpecError, match=r"node 'only': its tensors are of 1 groups and 1 offset groups.* say 1 and 2"):
        find_layers(model, [(1, CHANNELS, 5, 5), (1, 18, 5, 5)])


@pytest.mark.parametrize("choose", [_selected, _chosen], ids=["tune", "pack"])
def test_commands_take_a_model_in_a_file(choose: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save_model(branching(), path)
    found = choose((), (), str(path), ("1x3x10x12",))
    assert [problem.spec for problem in found] == [MODULATED, PLAIN]
    assert [problem.count for problem in found] == [2, 1]
    with pytest.raises(SpecError, match="vary in size"):
        choose((), (), str(path), ())
    with pytest.raises(SpecError, match="absent"):
        choose((), (), str(tmp_path / "absent.onnx"), ())
    with pytest.raises(click.UsageError, match="--model needs --input"):
        choose((), (), "models:make", ())


def test_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvmdcn import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "onnxruntime" else object())
    monkeypatch.delitem(vars(tvmdcn.onnx), "InferenceSession", raising=False)
    message = r"tvmdcn\.onnx\.InferenceSession needs onnxruntime, not installed here: pip install 'tvmdcn\[onnx\]'"
    with pytest.raises(MissingExtra, match=message):
        _ = tvmdcn.onnx.InferenceSession
    with pytest.raises(AttributeError, match="no attribute 'Session'"):
        _ = tvmdcn.onnx.Session


# --- the command --------------------------------------------------------------------------------------------


def call(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, ["onnx", *map(str, arguments)], prog_name="tvmdcn")
    assert isinstance(result.exception, SystemExit | None), result.exc_info
    return result.output


def test_command_compares_with_onnxruntime_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save_model(branching(), path)
    lines = call(path, "--input", "1x3x10x12", "--repeat", "1", "--threads", "1").splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["1,4,10,12,4", "1,4,10,12,4,mask=0"]
    assert lines[0].endswith("(node first of graph of a test)")
    found = [re.fullmatch(r"(\w+): largest difference (\S+), of values up to (\S+)", line) for line in lines[2:5]]
    assert [match[1] for match in found] == ["y", "peak", "d3"]
    assert all(float(match[2]) <= 1e-5 * float(match[3]) for match in found)
    assert [line.rpartition(": ")[0] for line in lines[5:]] == ["with tvmdcn", "onnxruntime alone"]


def test_command_says_what_onnxruntime_cannot_run(tmp_path: Path) -> None:
    half = onnx.TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["bx"], to=half),
        helper.make_node("Cast", ["offset"], ["bo"], to=half),
        layer(["bx", "w", "bo"], "d"),
        helper.make_node("Cast", ["d"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    inputs = [value("x"), value("offset", shape=("n", 18, "h", "w"))]
    path = tmp_path / "model.onnx"
    onnx.save_model(model_of(nodes, inputs, ["y"], weights(0, ml_dtypes.bfloat16, w=SQUARE), 22), path)
    lines = call(path, "--input", "1x4x6x7", "--input", "1x18x6x7", "--repeat", "1").splitlines()
    assert re.match(r"onnxruntime \S+ alone cannot run it: .*DeformConv", lines[1])
    assert [line.rpartition(": ")[0] for line in lines[2:]] == ["with tvmdcn"]


def test_command_refuses_in_words(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save_model(branching(), path)
    assert "Give a shape for each (--input)" in call(path)
    assert "does not fit the model's" in call(path, "--input", "1x4x10x12")
    path.write_bytes(b"no protobuf, but long enough")
    assert "cannot be read" in call(path)
