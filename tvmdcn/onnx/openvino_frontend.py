# SPDX-License-Identifier: Apache-2.0
"""``DeformConv`` for OpenVINO, which computes such layers, but does not read ONNX' node for them."""

from __future__ import annotations

from typing import Any

from tvmdcn.extras import require

__all__ = ["openvino_extension"]


def openvino_extension() -> Any:
    """Return what lets OpenVINO read models with ``DeformConv``, as its own operator: ``core.add_extension(...)``.

    The version of OpenVINO here, 2026.4, has the operator, with ONNX' border rule and with asymmetric padding, and no
    rule in its reader of ONNX that leads to it. (tvmdcn takes no part in computing such a model.)

    Raises
    ------
    MissingExtra
        If openvino is not installed.
    """
    require("bench", "tvmdcn.onnx.openvino_extension")
    from openvino.frontend.onnx import ConversionExtension

    return ConversionExtension("DeformConv", _convert)


def _convert(node: Any) -> list[Any]:
    from openvino import opset8

    def attribute(name: str, default: list[int]) -> list[int]:
        return list(map(int, node.get_attribute(name, default)))

    inputs = [node.get_input(index) for index in range(node.get_input_size())]
    # A tensor that is left out before one that is not stands there as a node of its own kind.
    inputs = [None if each.get_node().get_type_name() == "NullNode" else each for each in inputs]
    data, weight, offset, bias, mask = [*inputs, None, None][:5]
    pads = attribute("pads", [0, 0, 0, 0])
    output = opset8.deformable_convolution(
        data,
        offset,
        weight,
        attribute("strides", [1, 1]),
        pads[:2],
        pads[2:],
        attribute("dilations", [1, 1]),
        mask=mask,
        auto_pad="EXPLICIT",
        group=int(node.get_attribute("group", 1)),
        deformable_group=int(node.get_attribute("offset_group", 1)),
        bilinear_interpolation_pad=True,
    )
    if bias is not None:
        output = opset8.add(output, opset8.reshape(bias, [1, -1, 1, 1], special_zero=False))
    return [output.output(0)]
