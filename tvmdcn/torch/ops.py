# SPDX-License-Identifier: Apache-2.0
"""The operators as torch's dispatcher knows them: schemas, kernels, fake kernels, autocast.

``torch.library.Library`` and not ``torch.library.custom_op``, as autograd and autocast have kernels of their own
here. A call costs 9 us more than a direct one of the kernel, 16 us if it is recorded (Zen 5, torch 2.13, 2026-11).
The kernels are registered for all backends: they choose by the tensors' device, and refuse others in our words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tvmdcn.api import call_kernel, check_border
from tvmdcn.arrays import arrays_of
from tvmdcn.gradient import deform_conv2d_backward
from tvmdcn.torch import autograd, batching, fake, onnx_export
from tvmdcn.torch.fake import arrays
from tvmdcn.validation import check_padding, check_pair

__all__ = ["call_operator"]

_GEOMETRY = "int[2] stride=1, int[4] padding=0, int[2] dilation=1"
_SCHEMAS = {
    "deform_conv2d": (
        f"(Tensor input, Tensor offset, Tensor weight, Tensor? bias=None, {_GEOMETRY}, Tensor? mask=None, "
        "str border='torchvision') -> Tensor"
    ),
    # In the order of tvmdcn.tensors.Gradients; what `needs` does not ask for is empty, of shape (0,).
    "deform_conv2d_backward": (
        f"(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, Tensor? mask=None, {_GEOMETRY}, "
        "bool[5] needs=[True, True, True, True, True], str border='torchvision') "
        "-> (Tensor input, Tensor offset, Tensor weight, Tensor bias, Tensor mask)"
    ),
}
# The memory of the result follows the input's: inductor must not choose another.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)

library = torch.library.Library("tvmdcn", "DEF")
for _name, _schema in _SCHEMAS.items():
    library.define(_name + _schema, tags=_TAGS)
_operator = torch.ops.tvmdcn.deform_conv2d.default


def call_operator(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    mask: Any,
    border: str,
) -> Any:
    """Call :func:`tvmdcn.deform_conv2d` through the dispatcher.

    Raises
    ------
    SpecError, SpecTypeError
        Also for what the dispatcher would refuse in words of its own.
    """
    for name, array in (("offset", offset), ("weight", weight)):
        arrays.check_kind(name, array)
    for name, array in (("mask", mask), ("bias", bias)):
        if array is not None:
            arrays.check_kind(name, array)
    stride, padding = check_pair("stride", stride, 1), check_padding(padding)
    dilation = check_pair("dilation", dilation, 1)
    if not torch.compiler.is_dynamo_compiling() and torch.is_inference_mode_enabled() and onnx_export.exporting():
        # Autograd's kernel, which would do so, is not called in inference mode.
        node = onnx_export.exported(input, offset, weight, bias, stride, padding, dilation, mask)
        if node is not None:
            return node
    return _operator(input, offset, weight, bias, stride, padding, dilation, mask, border)


def _as_written(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> fake.Geometry:
    """Return ints where the dispatcher has made lists of them: messages show what the caller wrote."""
    written = [
        values[0] if len(values) == axes and all(value == values[0] for value in values) else tuple(values)
        for values, axes in ((stride, 2), (padding, 4), (dilation, 2))
    ]
    return written[0], written[1], written[2]


# --- kernels ------------------------------------------------------------------------------------------------


def _forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    mask: Tensor | None = None,
    border: str = "torchvision",
) -> Tensor:
    check_border(border)
    arrays.check_kind("input", input)  # the dispatcher lets None through
    geometry = _as_written(stride, padding, dilation)
    result: Tensor = call_kernel(arrays_of(input), input, offset, weight, bias, *geometry, mask)
    return result


def _forward_fake(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    mask: Tensor | None = None,
    border: str = "torchvision",
) -> Tensor:
    check_border(border)
    geometry = _as_written(stride, padding, dilation)
    return fake.empty_output(input, offset, weight, bias, mask, geometry)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    needs: Sequence[bool] = (True, True, True, True, True),
    border: str = "torchvision",
) -> tuple[Tensor, ...]:
    geometry = _as_written(stride, padding, dilation)
    found = deform_conv2d_backward(grad_output, input, offset, weight, mask, *geometry, needs=needs, border=border)
    return tuple(input.new_empty(0) if gradient is None else gradient for gradient in found)


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    needs: Sequence[bool] = (True, True, True, True, True),
    border: str = "torchvision",
) -> tuple[Tensor, ...]:
    check_border(border)
    geometry = _as_written(stride, padding, dilation)
    return fake.empty_gradients(grad_output, input, offset, weight, mask, geometry, needs)


# --- autocast -----------------------------------------------------------------------------------------------


def _autocast(device: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    """Return the kernel that brings all tensors to the dtype that autocast chose for a device.

    Low precision is what autocast is for: places and sums are float32 inside the kernel all the same. float64
    stays, as for torch's own convolutions.
    """
    below = torch._C.DispatchKeySet(key)

    def kernel(
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0, 0, 0),
        dilation: Sequence[int] = (1, 1),
        mask: Tensor | None = None,
        border: str = "torchvision",
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.device.type != device or not tensor.is_floating_point():
                return tensor
            return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)

        tensors = [cast(tensor) for tensor in (input, offset, weight, bias, mask)]
        with torch._C._ExcludeDispatchKeyGuard(below):
            result: Tensor = _operator(*tensors[:4], stride, padding, dilation, tensors[4], border)
        return result

    return kernel


for _name, _kernel, _fake_kernel, _autograd_kernel, _vmap in (
    ("deform_conv2d", _forward, _forward_fake, autograd.forward, batching.forward),
    ("deform_conv2d_backward", _backward, _backward_fake, autograd.backward, batching.backward),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tvmdcn::{_name}", _fake_kernel, lib=library)
    library.impl(_name, _autograd_kernel, "Autograd", with_keyset=True)
    if hasattr(torch.library, "register_vmap"):  # since torch 2.5; 2.4 maps by a loop of its own
        torch.library.register_vmap(f"tvmdcn::{_name}", _vmap, lib=library)
for _device, _key in (("cpu", torch._C.DispatchKey.AutocastCPU), ("cuda", torch._C.DispatchKey.AutocastCUDA)):
    library.impl("deform_conv2d", _autocast(_device, _key), f"Autocast{_device.upper()}")
