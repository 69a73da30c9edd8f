# SPDX-License-Identifier: Apache-2.0
"""Derivatives: which kernel is called for which, what is kept for it, and where there is no kernel.

Kernels compute the output and its first gradients. Second gradients and forward-mode derivatives are those of
:mod:`tvmdcn.torch.formula`: right, but slower, and with columns in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from tvmdcn.api import call_kernel
from tvmdcn.arrays import TorchArrays, arrays_of
from tvmdcn.gradient import deform_conv2d_backward
from tvmdcn.torch import fake, formula, onnx_export
from tvmdcn.validation import check_padding, check_pair

__all__ = ["backward", "call_recorded", "forward"]


def _requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _has_tangent(*tensors: Tensor | None) -> bool:
    """Return whether a forward-mode derivative is asked for."""
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _call_below(operator: Any, keyset: Any, *arguments: Any) -> Any:
    """Call what the dispatcher has below autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _call_inside(operator: Any, keyset: Any, *arguments: Any) -> Any:
    """Call what the dispatcher has below autograd, from a function that autograd records.

    Such a function runs without recording anything. Under nested transforms of ``torch.func`` what is below are
    the outer ones, which have derivatives of their own to record.
    """
    if not torch._C._are_functorch_transforms_active():
        return _call_below(operator, keyset, *arguments)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _call_below(operator, keyset, *arguments)


class _Recorded(_SingleLevelFunction):
    """A function that an Autograd kernel of the dispatcher applies.

    ``torch.func`` has then done its part: what it wraps are tensors like any other here. A plain ``Function`` does
    not know that, and would hand the call to ``torch.func`` again.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """Record a call."""
        if not torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        with enable_single_level_autograd_function():
            return super().apply(*arguments)

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[Any, ...]:
        # As of Function: what compiled autograd tells functions apart by.
        return (ctx._autograd_function_id,)


# --- the output, and its gradients --------------------------------------------------------------------------


def _keep(
    ctx: Any,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    border: str,
) -> None:
    """Keep the tensors that the gradients depend on, and of the others the shapes."""
    for_input, for_offset, for_weight, _, for_mask = ctx.needs_input_grad[:5]
    for_places = for_offset or for_mask
    columns = for_places or for_weight
    ctx.save_for_backward(
        input if columns else None,
        offset if columns or for_input else None,
        weight if for_places or for_input else None,
        mask if columns or for_input else None,
    )
    ctx.shapes = input.shape, offset.shape, weight.shape, None if mask is None else mask.shape
    ctx.layout = fake.layout_of(input)
    ctx.needs = ctx.needs_input_grad[:5]
    ctx.geometry = stride, padding, dilation
    ctx.border = border


def _complete(ctx: Any, grad_output: Tensor, kept: Sequence[Tensor | None]) -> list[Any]:
    """Return input, offset, weight and mask; for those not kept memory that is only there to have a shape."""
    return [
        fake.new_image(grad_output, shape, ctx.layout) if tensor is None and shape is not None else tensor
        for tensor, shape in zip(kept, ctx.shapes, strict=True)
    ]


def _call_backward(ctx: Any, grad_output: Tensor, kept: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of the five tensors, through the dispatcher."""
    found = torch.ops.tvmdcn.deform_conv2d_backward.default(
        grad_output, *_complete(ctx, grad_output, kept), *ctx.geometry, ctx.needs, ctx.border
    )
    return [gradient if needed else None for gradient, needed in zip(found, ctx.needs, strict=True)]


class _DispatchedLayer(_Recorded):
    """A call through the dispatcher, whose backward is one too."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        border: str,
        keyset: Any,
    ) -> Tensor:
        operator = torch.ops.tvmdcn.deform_conv2d.default
        output: Tensor = _call_inside(
            operator, keyset, input, offset, weight, bias, stride, padding, dilation, mask, border
        )
        _keep(ctx, input, offset, weight, mask, stride, padding, dilation, border)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (*_call_backward(ctx, grad_output, ctx.saved_tensors), None, None, None, None, None)


class _DirectLayer(torch.autograd.Function):
    """A call of plain tensors: 8 us more than without gradients, 7 us less than through the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        border: str,
    ) -> Tensor:
        output: Tensor = call_kernel(arrays_of(input), input, offset, weight, bias, stride, padding, dilation, mask)
        _keep(ctx, input, offset, weight, mask, stride, padding, dilation, border)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        arrays = arrays_of(grad_output)
        assert isinstance(arrays, TorchArrays)
        kept = ctx.saved_tensors  # once: a checkpoint computes them anew
        if not arrays.is_plain_call(grad_output, *kept) or arrays.needs_gradients(grad_output, *kept):
            gradients: Sequence[Tensor | None] = _call_backward(ctx, grad_output, kept)
        else:
            input, offset, weight, mask = _complete(ctx, grad_output, kept)
            gradients = deform_conv2d_backward(
                grad_output, input, offset, weight, mask, *ctx.geometry, needs=ctx.needs, border=ctx.border
            )
        return (*gradients, None, None, None, None)


def call_recorded(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    mask: Tensor | None,
    border: str,
) -> Tensor:
    """Call :func:`tvmdcn.deform_conv2d` so that autograd records it; for plain tensors."""
    if type(stride) is not int:
        stride = check_pair("stride", stride, 1)
    if type(padding) is not int:
        padding = check_padding(padding)
    if type(dilation) is not int:
        dilation = check_pair("dilation", dilation, 1)
    output: Tensor = _DirectLayer.apply(input, offset, weight, bias, mask, stride, padding, dilation, border)
    return output


def forward(
    keyset: Any,
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
    """Autograd's kernel of ``tvmdcn::deform_conv2d``."""
    if onnx_export.exporting():
        node = onnx_export.exported(input, offset, weight, bias, stride, padding, dilation, mask)
        if node is not None:
            return node
    if _has_tangent(input, offset, weight, bias, mask):
        layer, _ = fake.check(input, offset, weight, bias, mask, (stride, padding, dilation))
        last = fake.layout_of(input) == "NHWC"
        output = formula.output(layer, input, offset, weight, bias, mask, border)
        return output.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if _requires_grad(input, offset, weight, bias, mask):
        return _DispatchedLayer.apply(input, offset, weight, bias, mask, stride, padding, dilation, border, keyset)
    operator = torch.ops.tvmdcn.deform_conv2d.default
    output = _call_below(operator, keyset, input, offset, weight, bias, stride, padding, dilation, mask, border)
    return output


# --- the gradients, and theirs ------------------------------------------------------------------------------


class _Gradients(_Recorded):
    """The gradients, differentiable; they are computed by the kernel, their derivatives by the formula."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, needs: Sequence[bool], border: str, geometry: Any, *tensors: Any) -> Any:
        operator = torch.ops.tvmdcn.deform_conv2d_backward.default
        found = _call_inside(operator, keyset, *tensors, *geometry, needs, border)
        ctx.save_for_backward(*tensors)
        ctx.arguments = needs, border, geometry
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        needs, border, geometry = ctx.arguments
        _, input, offset, weight, mask = tensors
        layer, _ = fake.check(input, offset, weight, None, mask, geometry)
        # Of the gradients, those that something depends on; of the tensors, those that are asked for.
        wanted = [needed and given is not None for needed, given in zip(needs, outer, strict=True)]
        asked = [index for index, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        if not any(wanted):
            return (None,) * len(ctx.needs_input_grad)

        def gradients(*varied: Tensor) -> tuple[Tensor, ...]:
            arguments = list(tensors)
            for index, tensor in zip(asked, varied, strict=True):
                arguments[index] = tensor
            found = formula.gradients(layer, arguments, wanted, border)
            return tuple(gradient for gradient in found if gradient is not None)

        _, pull_back = torch.func.vjp(gradients, *(tensors[index] for index in asked))
        found = pull_back(tuple(given for given, used in zip(outer, wanted, strict=True) if used))
        result: list[Tensor | None] = [None] * len(tensors)
        for index, gradient in zip(asked, found, strict=True):
            result[index] = gradient
        return (None, None, None, None, *result)


def backward(
    keyset: Any,
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
    """Autograd's kernel of ``tvmdcn::deform_conv2d_backward``."""
    tensors = grad_output, input, offset, weight, mask
    geometry = stride, padding, dilation
    if _has_tangent(*tensors):
        layer, _ = fake.check(input, offset, weight, None, mask, geometry)
        found = formula.gradients(layer, tensors, needs, border)
        return tuple(input.new_empty(0) if gradient is None else gradient for gradient in found)
    if _requires_grad(*tensors):
        differentiable: tuple[Tensor, ...] = _Gradients.apply(keyset, needs, border, geometry, *tensors)
        return differentiable
    operator = torch.ops.tvmdcn.deform_conv2d_backward.default
    plain: tuple[Tensor, ...] = _call_below(operator, keyset, *tensors, *geometry, needs, border)
    return plain
