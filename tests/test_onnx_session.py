# SPDX-License-Identifier: Apache-2.0
"""Models in ONNX: every number as onnxruntime's alone, however the graph is cut; refusals in words."""

from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime", "1.25")

import ml_dtypes
import onnx
import onnxruntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx_models import (
    CHANNELS,
    FIELD_WEIGHTS,
    TAPS,
    branching,
    fields_of,
    image,
    layer,
    model_of,
    oracle,
    value,
    weights,
)
from onnx_oracle import onnx_cases

import tvmdcn
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.kernel import Kernel
from tvmdcn.onnx import InferenceSession
from tvmdcn.onnx import values as onnx_values
from tvmdcn.reference import reference
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.tensors import Tensors

SQUARE = (CHANNELS, CHANNELS, 3, 3)
# Of sums of some dozens of products, relative to the largest value; both sides round.
TOLERANCES = {"float64": 1e-13, "float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}


def assert_same(found: Any, expected: Any, dtype: str = "float32") -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    assert np.abs(found - expected).max(initial=0) <= TOLERANCES[dtype] * max(1, np.abs(expected).max(initial=0))


def compare(model: Any, *feeds: dict[str, np.ndarray], dtype: str = "float32") -> InferenceSession:
    """Check a session of ours against onnxruntime's."""
    session = InferenceSession(model)
    for feed in feeds:
        for found, expected in zip(session.run(None, feed), oracle(model, feed), strict=True):
            assert_same(found, expected, dtype)
    return session


def one_layer(**attributes: Any) -> Any:
    """Return a model of one layer that is given everything but its weight."""
    inputs = [value("x"), value("offset", shape=("n", None, "p", "q"))]
    node = layer(["x", "w", "offset"], "y", "only", **attributes)
    return model_of([node], inputs, [value("y", shape=[None] * 4)], weights(w=SQUARE))


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [19, 22])
def test_node_tests_of_onnx(opset: int) -> None:
    """All tensors are inputs there: the weight is packed at each call."""
    _, cases = onnx_cases()
    assert len(cases) >= 4
    for name, node, inputs, expected in cases:
        given = dict(zip(filter(None, node.input), inputs, strict=True))
        values = [value(key, array.dtype, array.shape) for key, array in given.items()]
        model = model_of([node], values, [value(node.output[0], expected.dtype, expected.shape)], {}, opset)
        (found,) = InferenceSession(model).run(None, given)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("opset", [19, 22])
def test_sizes_vary_and_values_are_shared(opset: int) -> None:
    session = compare(branching(opset), *({"image": image(n, 3, h, w)} for n, h, w in ((1, 6, 7), (1, 11, 5))))
    assert [node.name for node in session.layers] == ["first", "second", "third"]
    assert [entry.name for entry in session.get_inputs()] == ["image"]
    assert [(entry.name, entry.type, entry.shape) for entry in session.get_outputs()] == [
        ("y", "tensor(float)", ("n", CHANNELS, "h", "w")),
        ("peak", "tensor(float)", ()),
        ("d3", "tensor(float)", ("n", CHANNELS, "h", "w")),
    ]


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_dtypes(dtype: str) -> None:
    """Of single layers, as onnxruntime has no convolutions in all of them."""
    inputs = [value("x", dtype), value("offset", dtype, ("n", 18, "h", "w")), value("mask", dtype, ("n", 9, "h", "w"))]
    nodes = [layer(["x", "w", "offset", "b", "mask"], "d"), helper.make_node("Neg", ["d"], ["y"])]
    model = model_of(nodes, inputs, [value("y", dtype)], weights(2, dtype, w=SQUARE, b=(CHANNELS,)), 22)
    shapes = {"x": (2, CHANNELS, 7, 9), "offset": (2, 18, 7, 9), "mask": (2, 9, 7, 9)}
    compare(model, {name: image(*shape, dtype=dtype) for name, shape in shapes.items()}, dtype=dtype)


def test_bfloat16_which_onnxruntime_has_no_layer_for() -> None:
    """And for which NumPy has no name: values come and go as bits."""
    half = onnx.TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["bx"], to=half),
        helper.make_node("Cast", ["offset"], ["bo"], to=half),
        layer(["bx", "w", "bo", "b"], "d"),
        helper.make_node("Cast", ["d"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    arrays = weights(3, ml_dtypes.bfloat16, w=SQUARE, b=(CHANNELS,))
    inputs = [value("x"), value("offset", shape=("n", 2 * TAPS, "h", "w"))]
    session = InferenceSession(model_of(nodes, inputs, ["y", value("d", ml_dtypes.bfloat16)], arrays, 22))
    x, offset = image(), image(2, 2 * TAPS, 7, 9)
    found, low = session.run(None, {"x": x, "offset": offset})
    rounded = [array.astype(ml_dtypes.bfloat16) for array in (x, offset)]
    spec = DeformConv2dSpec(CHANNELS, CHANNELS, padding=1, mask=False, dtype="bfloat16")
    expected = reference(spec, Tensors(rounded[0], rounded[1], arrays["w"], None, arrays["b"]))
    assert low.dtype == ml_dtypes.bfloat16
    assert_same(found, expected.astype(np.float32), "bfloat16")
    np.testing.assert_array_equal(low.astype(np.float32), found)


def test_every_attribute() -> None:
    """Nothing symmetric in it: as the test problem of torchvision, with ONNX' asymmetric padding."""
    rng = np.random.default_rng(5)
    arrays = {"w": rng.standard_normal((2, 3, 3, 2)).astype(np.float32), "b": np.float32([1, -2])}
    geometry = {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [2, 1], "kernel_shape": [3, 2]}
    node = layer(["x", "w", "offset", "b", "mask"], "y", group=2, offset_group=3, **geometry)
    inputs = [value("x", shape=("n", 6, "h", "w")), value("offset", shape=("n", 36, "p", "q"))]
    inputs.append(value("mask", shape=("n", 18, "p", "q")))
    model = model_of([node], inputs, [value("y", shape=[None] * 4)], arrays)
    feeds = []
    for n, h, w in ((2, 5, 4), (1, 8, 3)):
        size = ((h + 3 - 5) // 2 + 1, w + 1 - 1)
        shapes = {"x": (n, 6, h, w), "offset": (n, 36, *size), "mask": (n, 18, *size)}
        feeds.append({name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    compare(model, *feeds)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Any], list[str]]:
    """Draw nodes over tensors of one shape, each taking any that were made before, and outputs among all."""
    names, nodes = ["x"], []
    for index in range(draw(st.integers(1, 12))):
        name = f"v{index}"
        one, two = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        kind = draw(st.sampled_from(("layer", "modulated", "bent", "Add", "Tanh", "Shape", "Random")))
        if kind == "layer":
            nodes.append(layer([one, draw(st.sampled_from(("w1", "w2"))), "offset"], name, name))
        elif kind == "modulated":
            nodes.append(layer([one, "w1", "offset", "b1", "mask"], name, name))
        elif kind == "bent":  # places and modulation that come from another layer's output, perhaps
            made = [
                helper.make_node("Conv", [two, "w_offset", "b_offset"], [f"o{index}"], pads=[1] * 4),
                helper.make_node("Conv", [two, "w_mask"], [f"m{index}"], pads=[1] * 4),
            ]
            nodes += [*made, layer([one, "w2", f"o{index}", "", f"m{index}"], name, name)]
        elif kind == "Shape":  # a size and a constant, over cuts
            nodes.append(helper.make_node("Shape", [one], [f"s{index}"]))
            nodes.append(helper.make_node("Reshape", [two, f"s{index}"], [name]))
        elif kind == "Random":  # must not be taken for a constant, nor be drawn twice
            nodes.append(helper.make_node("RandomNormalLike", [one], [f"r{index}"]))
            nodes.append(helper.make_node("Sub", [f"r{index}", f"r{index}"], [f"z{index}"]))
            nodes.append(helper.make_node("Add", [f"z{index}", two], [name]))
        else:
            nodes.append(helper.make_node(kind, [one, two] if kind == "Add" else [one], [name]))
        names.append(name)
    count = draw(st.integers(1, 3))
    outputs = draw(st.lists(st.sampled_from(names[1:]), min_size=1, max_size=count, unique=True))
    return nodes, outputs


@settings(max_examples=150, database=None, suppress_health_check=list(HealthCheck))
@given(drawn=graphs())
def test_any_graph(drawn: tuple[list[Any], list[str]]) -> None:
    nodes, outputs = drawn
    arrays = weights(9, w1=SQUARE, w2=SQUARE, b1=(CHANNELS,), **FIELD_WEIGHTS)
    arrays = {name: 0.3 * array for name, array in arrays.items()}
    used = {name for node in nodes for name in node.input}
    fields = fields_of() if used & {"offset", "mask"} else []
    model = model_of([*fields, *nodes], [value("x")], outputs, arrays)
    compare(model, {"x": image()}, {"x": image(1, CHANNELS, 5, 6)})


# --- graphs -------------------------------------------------------------------------------------------------


def test_weight_is_packed_once_and_kept_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    pack = Kernel.pack
    monkeypatch.setattr(Kernel, "pack", lambda self, weight: packed.append(1) or pack(self, weight))
    session = InferenceSession(branching())
    assert len(packed) == 3
    for _ in range(2):
        session.run(None, {"image": image(1, 3, 6, 7)})
    assert len(packed) == 3


def test_weight_that_is_an_input_may_change_its_shape() -> None:
    inputs = [value("x"), value("w", shape=("o", CHANNELS, "kh", "kw"))]
    inputs.append(value("offset", shape=("n", None, "p", "q")))
    model = model_of([layer(["x", "w", "offset"], "y")], inputs, [value("y", shape=[None] * 4)], {})
    small = {"x": image(), "w": image(2, CHANNELS, 1, 1), "offset": image(2, 2, 9, 11)}
    compare(model, {"x": image(), "w": image(*SQUARE), "offset": image(2, 18, 7, 9)}, small)


def test_initializer_that_is_an_input_is_its_default() -> None:
    inputs = [value("x"), value("offset", shape=("n", 18, "h", "w")), value("w", shape=SQUARE)]
    arrays = weights(w=SQUARE)
    model = model_of([layer(["x", "w", "offset"], "y")], inputs, ["y"], arrays)
    given = {"x": image(), "offset": image(2, 18, 7, 9)}
    session = compare(model, given, {**given, "w": image(*SQUARE, seed=8)})
    assert [entry.name for entry in session.get_inputs()] == ["x", "offset"]


def test_only_what_is_asked_for_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = branching()
    session, feed = InferenceSession(model), {"image": image(1, 3, 6, 7)}
    ran = []
    call = Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda self, *args: ran.append(1) or call(self, *args))
    for names, layers in ((["peak"], 1), (["d3", "peak"], 2), (["y"], 3), ([], 3)):
        ran.clear()
        for found, expected in zip(session.run(names, feed), oracle(model, feed, names or None), strict=True):
            assert_same(found, expected)
        assert len(ran) == layers


def test_outputs_that_are_no_results() -> None:
    """An input, an initializer, and a constant expression."""
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.arange(3.0))),
        helper.make_node("Neg", ["c"], ["minus"]),
        layer(["x", "w", "offset"], "y"),
        helper.make_node("Identity", ["x"], ["same"]),
    ]
    inputs = [value("x"), value("offset", shape=("n", 18, "h", "w"))]
    outputs = ["y", value("minus", np.float64, (3,)), value("w", shape=SQUARE), "same"]
    model = model_of(nodes, inputs, outputs, weights(w=SQUARE))
    compare(model, {"x": image(), "offset": image(2, 18, 7, 9)})


def test_sequence_crosses_a_cut() -> None:
    nodes = [
        *fields_of(),
        helper.make_node("SequenceConstruct", ["x", "offset"], ["both"]),
        layer(["x", "w", "offset"], "d"),
        helper.make_node("SequenceInsert", ["both", "d"], ["three"]),
        helper.make_node("ConcatFromSequence", ["three"], ["y"], axis=1),
    ]
    arrays = weights(w=SQUARE, **FIELD_WEIGHTS)
    compare(model_of(nodes, [value("x")], [value("y", shape=[None] * 4)], arrays), {"x": image()})


def branch(name: str, nodes: list[Any]) -> Any:
    return helper.make_graph(nodes, name, [], [value(f"{name}_out")])


def test_subgraph_sees_values_from_both_sides_of_a_cut() -> None:
    then = branch("then", [helper.make_node("Add", ["d", "x"], ["then_out"])])
    other = branch("other", [helper.make_node("Mul", ["d", "r"], ["other_out"])])
    nodes = [
        *fields_of(),
        helper.make_node("Relu", ["x"], ["r"]),
        layer(["x", "w", "offset"], "d"),
        helper.make_node("ReduceMax", ["d"], ["peak"], keepdims=0),
        helper.make_node("Greater", ["peak", "limit"], ["high"]),
        helper.make_node("If", ["high"], ["y"], then_branch=then, else_branch=other),
    ]
    for limit in (-1e9, 1e9):
        arrays = weights(w=SQUARE, **FIELD_WEIGHTS) | {"limit": np.float32(limit)}
        compare(model_of(nodes, [value("x")], ["y"], arrays), {"x": image()})


def test_functions_of_the_model_are_inlined() -> None:
    imports = [helper.make_opsetid("", 19)]
    body = [layer(["a", "b", "c"], "d"), helper.make_node("Relu", ["d"], ["e"])]
    function = helper.make_function("own", "Block", ["a", "b", "c"], ["e"], body, imports)
    nodes = [*fields_of(), *(helper.make_node("Block", [a, "w", "offset"], [b], domain="own") for a, b in ("xy", "yz"))]
    options = {"functions": [function], "imports": [helper.make_opsetid("own", 1)]}
    model = model_of(nodes, [value("x")], ["z"], weights(w=SQUARE, **FIELD_WEIGHTS), **options)
    assert len(compare(model, {"x": image()}).layers) == 2
    assert model.functions  # the argument is as it was


def test_model_without_layers_is_left_to_onnxruntime(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], [value("x")], ["y"], {})
    with caplog.at_level(logging.WARNING, "tvmdcn"):
        assert not compare(model, {"x": image()}).layers
    assert "no DeformConv node" in caplog.text


def test_what_is_random_is_drawn_at_each_run() -> None:
    """A weight without inputs is no constant if it is drawn."""
    nodes = [helper.make_node("RandomNormal", [], ["w"], shape=SQUARE), layer(["x", "w", "offset"], "y")]
    inputs = [value("x"), value("offset", shape=("n", 18, "h", "w"))]
    session = InferenceSession(model_of(nodes, inputs, ["y", value("w", shape=SQUARE)], {}))
    feed = {"x": image(), "offset": image(2, 18, 7, 9)}
    (one, w), (other, another) = session.run(None, feed), session.run(None, feed)
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(w - another).max() > 1e-3
    spec = DeformConv2dSpec(CHANNELS, CHANNELS, padding=1, mask=False)
    assert_same(one, reference(spec, Tensors(feed["x"], feed["offset"], w, None, None)).astype(np.float32))


def test_large_parts_go_through_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_values, "_MOST_BYTES", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    compare(branching(), {"image": image(1, 3, 6, 7)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("external", [False, True])
def test_model_in_files(tmp_path: Path, external: bool) -> None:
    model, feed = branching(), {"image": image(1, 3, 6, 7)}
    path = tmp_path / "model.onnx"
    expected = oracle(model, feed)
    onnx.save_model(model, path, save_as_external_data=external, location="weights", size_threshold=0)
    for found, wanted in zip(InferenceSession(str(path)).run(None, feed), expected, strict=True):
        assert_same(found, wanted)
    if external:
        (tmp_path / "weights").unlink()
        with pytest.raises(SpecError, match="weights"):
            InferenceSession(path)
    else:
        assert len(InferenceSession(path.read_bytes()).layers) == 3


def test_results_outlive_the_session() -> None:
    model, feed = branching(), {"image": image(1, 3, 6, 7)}
    session = InferenceSession(model)
    found = session.run(None, feed)
    copies = [np.array(array) for array in found]
    session.run(None, {"image": image(1, 3, 6, 7, seed=5)})
    del session
    gc.collect()
    for array, copy in zip(found, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_many_threads() -> None:
    model = branching()
    session = InferenceSession(model)
    feeds = [{"image": image(1, 3, 6 + seed, 7, seed=seed)} for seed in range(4)]
    expected = [oracle(model, feed) for feed in feeds]
    failures = []

    def work(at: int) -> None:
        try:
            for _ in range(10):
                for found, wanted in zip(session.run(None, feeds[at]), expected[at], strict=True):
                    assert_same(found, wanted)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index % 4,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_options_reach_every_part() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model, feed = branching(), {"image": image(1, 3, 6, 7)}
    session = InferenceSession(model, options, ["CPUExecutionProvider"])
    for found, wanted in zip(session.run(None, feed, onnxruntime.RunOptions()), oracle(model, feed), strict=True):
        assert_same(found, wanted)
    options.optimized_model_filepath = "optimized.onnx"
    with pytest.raises(SpecError, match=r"optimized_model_filepath is set, and every part"):
        InferenceSession(model, options)


def test_values_of_onnxruntime_are_taken() -> None:
    feed = {"image": image(1, 3, 6, 7)}
    session = InferenceSession(branching())
    (found,) = session.run(["y"], {"image": onnxruntime.OrtValue.ortvalue_from_numpy(feed["image"])})
    np.testing.assert_array_equal(found, session.run(["y"], feed)[0])


def test_empty_batch() -> None:
    session = InferenceSession(one_layer())
    (found,) = session.run(None, {"x": image(0, CHANNELS, 7, 9), "offset": image(0, 18, 7, 9)})
    assert found.shape == (0, CHANNELS, 7, 9)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["If", "Loop"])
def test_layer_in_a_subgraph_is_refused(kind: str) -> None:
    inner = [layer(["x", "w", "offset"], "then_out", "inside")]
    arrays = weights(w=SQUARE, **FIELD_WEIGHTS) | {"yes": np.array(True), "times": np.array(2)}
    if kind == "If":
        other = branch("other", [helper.make_node("Identity", ["x"], ["other_out"])])
        node = helper.make_node("If", ["yes"], ["y"], "choice", then_branch=branch("then", inner), else_branch=other)
    else:
        inputs = [value("i", np.int64, ()), value("go", bool, ()), value("x")]
        inner.append(helper.make_node("Identity", ["go"], ["going"]))
        body = helper.make_graph(inner, "body", inputs, [value("going", bool, ()), value("then_out")])
        node = helper.make_node("Loop", ["times", "yes", "x"], ["y"], "choice", body=body)
    model = model_of([*fields_of(), node], [value("x")], ["y"], arrays)
    with pytest.raises(
        SpecError, match=rf"'inside' is in a subgraph of node 'choice' \({kind}\).*run it in onnxruntime"
    ):
        InferenceSession(model)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"strides": [0, 1]}, r"DeformConv node 'only': stride must be at least 1"),
        ({"pads": [-1, 0, 0, 0]}, r"'only': padding must be at least 0"),
        ({"pads": [1] * 6}, r"'only': pads must be 4 integers, got \[1, 1, 1, 1, 1, 1\]"),
        ({"strides": [1]}, r"'only': strides must be 2 integers"),
        ({"kernel_shape": [3, 2]}, r"'only': kernel_shape is \(3, 2\), the weight's shape \(4, 4, 3, 3\)"),
        ({"group": 3}, r"'only': groups must divide out_channels"),
        ({"auto_pad": "SAME_UPPER"}, r"'only' is no DeformConv of ONNX.*auto_pad"),
    ],
    ids=str,
)
def test_bad_attribute_is_refused(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        InferenceSession(one_layer(**attributes))


def test_bad_calls_are_refused() -> None:
    session = InferenceSession(one_layer())
    x, offset = image(), image(2, 18, 7, 9)
    cases = [
        ({"x": x}, None, SpecError, "missing: offset"),
        ({"x": x, "offset": offset, "z": x}, None, SpecError, "given but unknown: z"),
        ({"x": x, "offset": offset}, ["z"], SpecError, "outputs are y; asked for z"),
        ({"x": x[:, :3], "offset": offset}, None, SpecError, r"DeformConv node 'only': input has 3 channels"),
        ({"x": x, "offset": offset[:, :, 1:]}, None, SpecError, "'only': offset must be of the output's size"),
        ({"x": x.astype(np.float64), "offset": offset}, None, SpecTypeError, "'only': all tensors must have one dtype"),
        ({"x": x.tolist(), "offset": offset}, None, SpecTypeError, "'only': input must be a tensor"),
        ({"x": x, "offset": np.tile(offset, (1, 2, 1, 1))}, None, SpecError, "'only'.*offset_groups 2, not 1"),
    ]
    for feeds, names, kind, message in cases:
        with pytest.raises(kind, match=message):
            session.run(names, feeds)
    assert session.run(None, {"x": x, "offset": offset})[0].shape == (2, CHANNELS, 7, 9)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no protobuf, but long enough")
    nodes = [helper.make_node("Relu", ["later"], ["y"]), helper.make_node("Relu", ["x"], ["later"])]
    unsorted = model_of(nodes, [value("x")], ["y"], {})
    missing = model_of(nodes[1:], [value("x")], ["y"], {})
    for model, kind, message in (
        (broken, SpecError, "cannot be read"),
        (b"", SpecError, "no model of ONNX"),
        (tmp_path / "absent.onnx", SpecError, "absent"),
        (3, SpecTypeError, "must be a path, bytes or an onnx.ModelProto, got 3"),
        (unsorted, SpecError, r"needs 'later', which is no input"),
        (missing, SpecError, r"output 'y' is made by no node"),
    ):
        with pytest.raises(kind, match=message):
            InferenceSession(model)


def test_package_is_found_by_its_name() -> None:
    assert tvmdcn.onnx.InferenceSession is InferenceSession
    assert "onnx" not in tvmdcn.__all__  # `from tvmdcn import *` must not hide the package onnx
