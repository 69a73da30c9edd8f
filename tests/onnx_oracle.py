# SPDX-License-Identifier: Apache-2.0
"""ONNX's own node tests of DeformConv, and onnxruntime as a live oracle for any case."""

from __future__ import annotations

import numpy as np
import pytest
from strategies import Case


def onnx_cases():
    """Return the onnx package, and (name, node, inputs, output) of each of its node tests of DeformConv."""
    onnx = pytest.importorskip("onnx")
    from onnx.backend.test.case.node import deformconv

    collected = []

    def collect(node, inputs, outputs, name, **_):
        collected.append((name, node, inputs, outputs[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deformconv, "expect", collect)
        for export in vars(deformconv.DeformConv).values():
            if isinstance(export, staticmethod):
                export.__func__()
    return onnx, collected


def run_onnxruntime(case: Case) -> np.ndarray:
    """Return onnxruntime's output for a case."""
    import onnx
    import onnxruntime

    spec, tensors = case.spec, case.tensors
    arrays = {"X": tensors.input, "W": tensors.weight, "offset": tensors.offset}
    arrays |= {"B": tensors.bias} if tensors.bias is not None else {}
    arrays |= {"mask": tensors.mask} if tensors.mask is not None else {}
    node = onnx.helper.make_node(
        "DeformConv",
        [name if name in arrays else "" for name in ("X", "W", "offset", "B", "mask")],
        ["Y"],
        kernel_shape=spec.kernel_size,
        strides=spec.stride,
        pads=spec.padding,
        dilations=spec.dilation,
        group=spec.groups,
        offset_group=spec.offset_groups,
    )
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "deform_conv",
        [onnx.helper.make_tensor_value_info(name, kind, a.shape) for name, a in arrays.items()],
        [onnx.helper.make_tensor_value_info("Y", kind, spec.output_shape(case.extents))],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, arrays)[0]
