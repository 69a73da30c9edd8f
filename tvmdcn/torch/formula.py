# SPDX-License-Identifier: Apache-2.0
"""The layer and its gradients in torch's own operations, for derivatives that no kernel computes.

Everything is differentiable, again and again, in reverse and in forward mode, and under ``torch.func``. It costs
what the kernels avoid: the samples of all taps and channels are in memory, four times over for the corners.

With ``G`` the gradient of the output, ``s`` the samples, ``m`` the mask and ``g = w^T G``::

    dw = G (s m)^T,   dm = sum_c g s,   doffset = sum_c g m ds/dplace,   dx = scatter(g m, corners)

(Dai et al. 2017, Zhu et al. 2019.) The border is that of :data:`tvmdcn.spec.BORDERS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvmdcn.spec import DeformConv2dSpec

__all__ = ["gradients", "output"]


@dataclass
class _Corner:
    """One of the four pixels around samples ``[N, og, K, P]``.

    Attributes
    ----------
    index : pixel number, 0 where there is none
    there : whether there is one
    weight : share of the sample
    slopes : derivatives of the share by row and column
    """

    index: Tensor
    there: Tensor
    weight: Tensor
    slopes: tuple[Tensor, Tensor]


def _corners(layer: DeformConv2dSpec, input: Tensor, offset: Tensor, border: str) -> list[_Corner]:
    sizes, out_sizes = input.shape[2:], offset.shape[2:]
    moved = offset.reshape(offset.shape[0], layer.offset_groups, *layer.kernel_size, 2, *out_sizes)
    places, used = [], None
    for axis, (size, out_size) in enumerate(zip(sizes, out_sizes, strict=True)):
        options = {"dtype": offset.dtype, "device": offset.device}
        taps = torch.arange(layer.kernel_size[axis], **options) * layer.dilation[axis]
        pixels = torch.arange(out_size, **options) * layer.stride[axis] - layer.padding[axis]
        base = taps[:, None, None, None] + pixels[:, None] if axis == 0 else taps[:, None, None] + pixels
        place = (base + moved[:, :, :, :, axis]).flatten(4).flatten(2, 3)
        places.append(place)
        # At exactly -1 the share of the only corner inside is 0, and its slope is not. False for NaN.
        inside = (place > -1 if border == "mmcv" else place >= -1) & (place < size)
        used = inside if used is None else used & inside
    assert used is not None
    rows, columns = (torch.where(used, place, 0) for place in places)
    top, left = rows.detach().floor(), columns.detach().floor()
    corners = []
    for down in (0, 1):
        for right in (0, 1):
            row, column = top + down, left + right
            there = used & (row >= 0) & (row < sizes[0]) & (column >= 0) & (column < sizes[1])
            vertical = rows - top if down else top + 1 - rows
            horizontal = columns - left if right else left + 1 - columns
            corners.append(
                _Corner(
                    torch.where(there, row * sizes[1] + column, 0).long(),
                    there,
                    vertical * horizontal,
                    (horizontal if down else -horizontal, vertical if right else -vertical),
                )
            )
    return corners


def _read(layer: DeformConv2dSpec, image: Tensor, corner: _Corner) -> Tensor:
    """Return the corner's pixels, ``[N, og, Cin / og, K, P]``, 0 where there is none."""
    channels = layer.in_channels // layer.offset_groups
    grouped = image.reshape(image.shape[0], layer.offset_groups, channels, image.shape[2] * image.shape[3])
    index = corner.index[:, :, None].expand(-1, -1, channels, -1, -1)
    pixels = grouped.gather(3, index.flatten(3)).reshape(index.shape)
    return torch.where(corner.there[:, :, None], pixels, 0)


def _accumulated(layer: DeformConv2dSpec, *tensors: Tensor) -> list[Tensor]:
    """Return tensors in the dtype of places and sums."""
    return [tensor.to(getattr(torch, layer.accumulator_dtype)) for tensor in tensors]


def _columns(layer: DeformConv2dSpec, samples: Tensor, strength: Tensor | None) -> Tensor:
    """Return ``[N, groups, Cin / groups, K, P]`` of samples ``[N, og, Cin / og, K, P]``."""
    modulated = samples if strength is None else samples * strength
    return modulated.reshape(samples.shape[0], layer.groups, layer.in_channels // layer.groups, *samples.shape[3:])


def _strength(layer: DeformConv2dSpec, mask: Tensor | None) -> Tensor | None:
    """Return the mask as ``[N, og, 1, K, P]``, in the dtype of sums."""
    if mask is None:
        return None
    (mask,) = _accumulated(layer, mask)
    return mask.reshape(mask.shape[0], layer.offset_groups, 1, layer.taps, mask.shape[2] * mask.shape[3])


def _samples(layer: DeformConv2dSpec, input: Tensor, corners: Sequence[_Corner]) -> Tensor:
    """Return the samples, ``[N, og, Cin / og, K, P]``."""
    return torch.stack([_read(layer, input, corner) * corner.weight[:, :, None] for corner in corners]).sum(0)


def output(
    layer: DeformConv2dSpec,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    border: str,
) -> Tensor:
    """Return the layer's output, of arguments that are known to be right."""
    dtype, size = input.dtype, offset.shape[2:]
    input, offset, weight = _accumulated(layer, input, offset, weight)
    samples = _samples(layer, input, _corners(layer, input, offset, border))
    columns = _columns(layer, samples, _strength(layer, mask))
    taps = weight.reshape(layer.groups, layer.out_channels // layer.groups, *columns.shape[2:4])
    result = torch.einsum("gock,ngckp->ngop", taps, columns).reshape(columns.shape[0], layer.out_channels, *size)
    if bias is not None:
        result = result + _accumulated(layer, bias)[0][:, None, None]
    return result.to(dtype)


def gradients(
    layer: DeformConv2dSpec, tensors: Sequence[Any], needs: Sequence[bool], border: str
) -> list[Tensor | None]:
    """Return the gradients of input, offset, weight, bias and mask; None for those not needed.

    `tensors` are the output's gradient, input, offset, weight and mask or None; known to be right.
    """
    grad_output, input, offset, weight, mask = tensors
    dtype, shapes = input.dtype, (input.shape, offset.shape, weight.shape, None, None if mask is None else mask.shape)
    grad_output, input, offset, weight = _accumulated(layer, grad_output, input, offset, weight)
    batch, pixels = input.shape[0], offset.shape[2] * offset.shape[3]
    channels, outputs = layer.in_channels // layer.offset_groups, layer.out_channels // layer.groups
    outer = grad_output.reshape(batch, layer.groups, outputs, pixels)
    strength = _strength(layer, mask)
    corners = _corners(layer, input, offset, border)
    taps = weight.reshape(layer.groups, outputs, layer.in_channels // layer.groups, layer.taps)
    back = torch.einsum("gock,ngop->ngckp", taps, outer)
    back = back.reshape(batch, layer.offset_groups, channels, layer.taps, pixels)
    modulated = back if strength is None else back * strength
    found: list[Tensor | None] = [None] * 5
    if needs[0]:
        total = input.new_zeros(batch, layer.offset_groups, channels, input.shape[2] * input.shape[3])
        for corner in corners:
            share = torch.where(corner.there, corner.weight, 0)[:, :, None] * modulated
            index = corner.index[:, :, None].expand(-1, -1, channels, -1, -1)
            total = total.scatter_add(3, index.flatten(3), share.flatten(3))
        found[0] = total
    if needs[1]:
        along = [(modulated * _read(layer, input, corner)).sum(2) for corner in corners]
        slopes = [
            torch.stack([each * corner.slopes[axis] for each, corner in zip(along, corners, strict=True)]).sum(0)
            for axis in (0, 1)
        ]
        found[1] = torch.stack(slopes, 3)
    samples = _samples(layer, input, corners)
    if needs[2]:
        found[2] = torch.einsum("ngop,ngckp->gock", outer, _columns(layer, samples, strength))
    if needs[3]:
        found[3] = outer.sum((0, 3)).flatten()
    if needs[4] and mask is not None:
        found[4] = (back * samples).sum(2)
    return [
        None if gradient is None else (gradient if shape is None else gradient.reshape(shape)).to(dtype)
        for gradient, shape in zip(found, shapes, strict=True)
    ]
