# SPDX-License-Identifier: Apache-2.0
"""ONNX models with ``DeformConv`` nodes: run with tvmdcn's kernels beside onnxruntime, and looked through for layers.

Export is torch's own: ``torch.onnx.export`` writes standard ``DeformConv`` nodes for tvmdcn's operators, see
:mod:`tvmdcn.torch.onnx_export`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tvmdcn.extras import require

if TYPE_CHECKING:
    from tvmdcn.onnx.layers import find_layers
    from tvmdcn.onnx.node import LayerNode
    from tvmdcn.onnx.openvino_frontend import openvino_extension
    from tvmdcn.onnx.session import InferenceSession
    from tvmdcn.onnx.values import ValueInfo

__all__ = ["InferenceSession", "LayerNode", "ValueInfo", "find_layers", "openvino_extension"]

_MODULES = {
    "InferenceSession": "session",
    "LayerNode": "node",
    "ValueInfo": "values",
    "find_layers": "layers",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name == "openvino_extension":  # which needs neither onnx nor onnxruntime
        from tvmdcn.onnx.openvino_frontend import openvino_extension

        return openvino_extension
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("onnx", f"tvmdcn.onnx.{name}")
    value = getattr(importlib.import_module(f"tvmdcn.onnx.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
