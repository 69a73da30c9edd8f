# SPDX-License-Identifier: Apache-2.0
"""``torch.vmap``: the mapped axis becomes part of the batch; where weights are mapped, calls follow one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["backward", "forward"]


def _fold(tensor: Any, axis: int | None, size: int) -> Any:
    """Return (N, ...) mapped along `axis`, or not mapped, as (size * N, ...)."""
    if tensor is None:
        return None
    mapped = tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return mapped.flatten(0, 1)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    """Return (size * N, ...) as (size, N, ...)."""
    return tensor.unflatten(0, (size, tensor.shape[0] // size))


def _one(tensor: Any, axis: int | None, index: int) -> Any:
    return tensor if axis is None else tensor.select(axis, index)


def forward(
    info: Any,
    in_dims: Sequence[int | None],
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    mask: Tensor | None = None,
    border: str = "torchvision",
) -> tuple[Tensor, int]:
    """Map ``tvmdcn::deform_conv2d``."""
    operator, size = torch.ops.tvmdcn.deform_conv2d.default, info.batch_size
    axes = (*in_dims, *[None] * 9)
    tensors, dims = (input, offset, weight, bias, mask), (*axes[:4], axes[7])
    geometry = stride, padding, dilation
    if dims[2] is None and dims[3] is None:
        image, field, modulation = (_fold(tensors[index], dims[index], size) for index in (0, 1, 4))
        return _unfold(operator(image, field, weight, bias, *geometry, modulation, border), size), 0
    outputs = []
    for index in range(size):
        *others, modulation = map(_one, tensors, dims, [index] * len(dims))
        outputs.append(operator(*others, *geometry, modulation, border))
    return torch.stack(outputs), 0


def backward(
    info: Any,
    in_dims: Sequence[int | None],
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
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Map ``tvmdcn::deform_conv2d_backward``."""
    operator, size = torch.ops.tvmdcn.deform_conv2d_backward.default, info.batch_size
    dims = (*in_dims, None, None)[:5]
    tensors = grad_output, input, offset, weight, mask
    geometry = stride, padding, dilation
    if dims[3] is None and not (needs[2] or needs[3]):
        folded = [_fold(tensors[index], dims[index], size) for index in (0, 1, 2)]
        found = operator(*folded, weight, _fold(mask, dims[4], size), *geometry, needs, border)
        mapped = [
            _unfold(gradient, size) if needed else gradient for gradient, needed in zip(found, needs, strict=True)
        ]
    else:
        # The gradients of weights are sums over images: those of each element are wanted apart.
        mapped = []
        single = [
            operator(*(map(_one, tensors, dims, [index] * len(dims))), *geometry, needs, border)
            for index in range(size)
        ]
        for gradients, needed in zip(zip(*single, strict=True), needs, strict=True):
            mapped.append(torch.stack(gradients) if needed else gradients[0])
    return tuple(mapped), tuple(0 if needed else None for needed in needs)
