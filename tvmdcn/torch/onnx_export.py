# SPDX-License-Identifier: Apache-2.0
"""What ``torch.onnx.export`` makes of the operator: ONNX' ``DeformConv``, which other runtimes know.

Both exporters ask while they trace, so nothing has to be registered before. The one that follows ``torch.export``
is answered with ``torch.onnx.ops.symbolic``, which stands for the node in the graph: that computes zeros when it is
called, so that its option ``verify=True`` compares with zeros. The one of TorchScript (``dynamo=False``) finds the
function for the operator that is registered when it first traces one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tvmdcn.errors import SpecError
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.torch import fake

__all__ = ["exported", "exporting"]

OPSET = 19
"""The first version of ONNX' operators with ``DeformConv``."""
OPSET_OF_BFLOAT16 = 22
"""The first with bfloat16, and else the same."""


def exporting() -> bool:
    """Return whether this call is being traced for an export to ONNX. 1 us if ``torch.onnx`` is imported, else 0."""
    return "torch.onnx" in sys.modules and bool(torch.onnx.is_in_onnx_export())


def exported(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
) -> Tensor | None:
    """Return what stands for the layer in the exported graph; None if the call is to go on as always.

    Raises
    ------
    SpecError, SpecTypeError
        If the arguments do not fit one another; also if this torch cannot export them so.
    """
    if not torch._C._len_torch_dispatch_stack():  # tensors with memory: torch.export traces with others
        _register_for_torchscript()
        return None
    layer, shape = fake.check(input, offset, weight, bias, mask, (stride, padding, dilation))
    symbolic = getattr(getattr(torch.onnx, "ops", None), "symbolic", None)
    if symbolic is None:
        raise SpecError(
            f"torch {torch.__version__} cannot export tvmdcn's operators by torch.export, which takes torch 2.8. Use "
            "torch.onnx.export(..., dynamo=False)."
        )
    tensors = [input, weight, offset, bias, mask]
    while tensors[-1] is None:
        tensors.pop()
    found: Tensor = symbolic(
        "DeformConv",
        tensors,
        _attributes(layer),
        dtype=input.dtype,
        shape=shape,
        version=OPSET_OF_BFLOAT16 if input.dtype is torch.bfloat16 else OPSET,
    )
    return found


def _attributes(layer: DeformConv2dSpec) -> dict[str, Any]:
    return {
        "dilations": list(layer.dilation),
        "group": layer.groups,
        "kernel_shape": list(layer.kernel_size),
        "offset_group": layer.offset_groups,
        "pads": list(layer.padding),
        "strides": list(layer.stride),
    }


@functools.cache
def _register_for_torchscript() -> None:
    torch.onnx.register_custom_op_symbolic("tvmdcn::deform_conv2d", _torchscript_node, OPSET)


def _torchscript_node(
    g: Any,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    mask: Any,
    border: Any,
) -> Any:
    """Return the node for a call in a graph of TorchScript."""
    from torch.onnx import symbolic_helper

    named = {"input": input, "offset": offset, "weight": weight}
    sizes = {name: symbolic_helper._get_tensor_sizes(value) for name, value in named.items()}
    unknown = [
        f"the {what} of {name}"
        for name, what, axes in (
            ("input", "channels", (1,)),
            ("offset", "channels", (1,)),
            ("weight", "shape", range(4)),
        )
        if sizes[name] is None or any(sizes[name][axis] is None for axis in axes)
    ]
    if unknown:
        raise SpecError(
            f"{' and '.join(unknown)} must be known to export a deformable convolution: only the axes N, H and W may "
            "be in dynamic_axes."
        )
    geometry = {
        name: symbolic_helper._parse_arg(value, "is")
        for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))
    }
    kernel = sizes["weight"][2:]
    has_mask, has_bias = (not symbolic_helper._is_none(value) for value in (mask, bias))
    layer = DeformConv2dSpec(
        sizes["input"][1],
        sizes["weight"][0],
        kernel,
        groups=sizes["input"][1] // sizes["weight"][1],
        offset_groups=sizes["offset"][1] // (2 * kernel[0] * kernel[1]),
        mask=has_mask,
        **geometry,
    )
    tensors = [input, weight, offset]
    if has_bias or has_mask:
        tensors.append(bias)  # a value that is none where there is no bias, as ONNX has it
    if has_mask:
        tensors.append(mask)
    attributes = {f"{name}_i": value for name, value in _attributes(layer).items()}
    return g.op("DeformConv", *tensors, **attributes)
