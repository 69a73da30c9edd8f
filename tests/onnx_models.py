# SPDX-License-Identifier: Apache-2.0
"""Small ONNX models with ``DeformConv`` nodes, and onnxruntime's answers for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

CHANNELS = 4
TAPS = 9


def value(name: str, dtype: Any = np.float32, shape: Sequence[Any] | None = ("n", CHANNELS, "h", "w")) -> Any:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def model_of(
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    initializers: Mapping[str, np.ndarray],
    opset: int = 19,
    **fields: Any,
) -> Any:
    """Return a model; outputs are values or names."""
    graph = helper.make_graph(
        nodes,
        "graph of a test",
        inputs,
        [value(output) if isinstance(output, str) else output for output in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    imports = [helper.make_opsetid("", opset), *fields.pop("imports", ())]
    return helper.make_model(graph, opset_imports=imports, ir_version=fields.pop("ir_version", 10), **fields)


def weights(seed: int = 0, dtype: Any = np.float32, **shapes: Sequence[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (0.4 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def image(*shape: int, seed: int = 1, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape or (2, CHANNELS, 7, 9)).astype(dtype)


def fields_of(name: str = "x") -> list[Any]:
    """Return nodes that make an offset and a mask, `offset` and `mask`, from a tensor of CHANNELS channels."""
    return [
        helper.make_node("Conv", [name, "w_offset", "b_offset"], ["offset"], pads=[1] * 4),
        helper.make_node("Conv", [name, "w_mask"], ["raw_mask"], pads=[1] * 4),
        helper.make_node("Sigmoid", ["raw_mask"], ["mask"]),
    ]


FIELD_WEIGHTS = {
    "w_offset": (2 * TAPS, CHANNELS, 3, 3),
    "b_offset": (2 * TAPS,),
    "w_mask": (TAPS, CHANNELS, 3, 3),
}


def layer(inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> Any:
    """Return a ``DeformConv`` node."""
    return helper.make_node("DeformConv", inputs, [output], name=name, **{"pads": [1] * 4, **attributes})


def branching(opset: int = 19, dtype: Any = np.float32) -> Any:
    """Return a model whose layers follow one another, stand side by side, and have several consumers each.

    A weight is used twice, another is a constant expression; a layer's result is an output, too.
    """
    nodes = [
        helper.make_node("Conv", ["image", "w_stem"], ["x"], pads=[1] * 4),
        *fields_of(),
        helper.make_node("Transpose", ["w_turned"], ["w2"], perm=[1, 0, 2, 3]),
        layer(["x", "w1", "offset", "b1", "mask"], "d1", "first"),
        helper.make_node("Relu", ["d1"], ["r1"]),
        layer(["r1", "w1", "offset", "", "mask"], "d2", "second"),
        layer(["d1", "w2", "offset"], "d3", "third"),
        helper.make_node("Add", ["d2", "d3"], ["s"]),
        helper.make_node("Shape", ["image"], ["size"]),
        helper.make_node("Slice", ["size", "two", "four"], ["hw"]),
        helper.make_node("Concat", ["nc", "hw"], ["wanted"], axis=0),
        helper.make_node("Expand", ["s", "wanted"], ["e"]),
        helper.make_node("Add", ["e", "r1"], ["y"]),
        helper.make_node("ReduceMax", ["d1"], ["peak"], keepdims=0),
    ]
    arrays = weights(
        0,
        dtype,
        w_stem=(CHANNELS, 3, 3, 3),
        w1=(CHANNELS, CHANNELS, 3, 3),
        b1=(CHANNELS,),
        w_turned=(CHANNELS, CHANNELS, 3, 3),
        **FIELD_WEIGHTS,
    )
    arrays |= {"two": np.array([2]), "four": np.array([4]), "nc": np.array([1, CHANNELS])}
    inputs = [value("image", dtype, ("n", 3, "h", "w"))]
    outputs = [value("y", dtype), value("peak", dtype, ()), value("d3", dtype)]
    return model_of(nodes, inputs, outputs, arrays, opset)


def oracle(model: Any, feeds: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> list[Any]:
    """Return what onnxruntime makes of all of a model."""
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(names, feeds)
