# SPDX-License-Identifier: Apache-2.0
"""The layer written out in differentiable torch operations, whose autograd gradients are compared with."""

from __future__ import annotations

from typing import Any

from tvmdcn.spec import DeformConv2dSpec


def plain_deform_conv2d(
    spec: DeformConv2dSpec, input: Any, offset: Any, weight: Any, mask: Any, bias: Any, border: str = "torchvision"
) -> Any:
    """Return the output, NCHW, of torch tensors that are NCHW, in their dtype.

    Four gathers and a product; the weights of the corners are differentiable in the place, the corners' numbers
    are not. With border "mmcv" a sample at exactly -1 is constant.
    """
    import torch

    batch, channels, height, width = input.shape
    out_height, out_width = offset.shape[2:]
    (kh, kw), pixels = spec.kernel_size, out_height * out_width
    moved = offset.reshape(batch, spec.offset_groups, kh, kw, 2, out_height, out_width)
    places = []
    for axis, out_size in enumerate((out_height, out_width)):
        tap = torch.arange(spec.kernel_size[axis], dtype=input.dtype) * spec.dilation[axis]
        pixel = torch.arange(out_size, dtype=input.dtype) * spec.stride[axis] - spec.padding[axis]
        base = tap[:, None, None, None] + pixel[:, None] if axis == 0 else tap[:, None, None] + pixel
        places.append((base + moved[:, :, :, :, axis]).reshape(batch, spec.offset_groups, kh * kw, pixels))
    sizes = (height, width)
    used = torch.ones_like(places[0], dtype=torch.bool)
    for place, size in zip(places, sizes, strict=True):
        used &= (place >= -1 if border == "torchvision" else place > -1) & (place < size)
    rows, columns = (torch.where(used, place, torch.zeros_like(place)) for place in places)
    top, left = rows.detach().floor(), columns.detach().floor()
    image = torch.cat([input.reshape(batch, channels, height * width), input.new_zeros(batch, channels, 1)], dim=2)
    per_group = channels // spec.offset_groups
    image = image.reshape(batch, spec.offset_groups, per_group, 1, height * width + 1).expand(-1, -1, -1, kh * kw, -1)
    sampled = 0
    for down in (0, 1):
        for right in (0, 1):
            row, column = top + down, left + right
            there = used & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(there, row * width + column, height * width).long()
            share = (rows - top if down else 1 - rows + top) * (columns - left if right else 1 - columns + left)
            share = torch.where(used, share, torch.zeros_like(share))
            corner = image.gather(4, index[:, :, None].expand(-1, -1, per_group, -1, -1))
            sampled = sampled + corner * share[:, :, None]
    if mask is not None:
        sampled = sampled * mask.reshape(batch, spec.offset_groups, 1, kh * kw, pixels)
    columns = sampled.reshape(batch, spec.groups, channels // spec.groups * kh * kw, pixels)
    taps = weight.reshape(spec.groups, -1, columns.shape[2])
    output = torch.einsum("goc,ngcp->ngop", taps, columns).reshape(batch, spec.out_channels, out_height, out_width)
    return output if bias is None else output + bias[:, None, None]


def plain_gradients(
    spec: DeformConv2dSpec, tensors: Any, grad_output: Any, border: str = "torchvision"
) -> dict[str, Any]:
    """Return the gradients by autograd in float64, as NumPy arrays in the order of the layout."""
    import numpy as np
    import torch

    def planar(array: Any) -> Any:
        array = np.asarray(array, np.float64)
        return np.moveaxis(array, -1, 1) if spec.layout == "NHWC" else array

    given = {
        name: planar(array) if name in ("input", "offset", "mask") else np.asarray(array, np.float64)
        for name, array in vars(tensors).items()
        if array is not None
    }
    given.setdefault("bias", np.zeros(spec.out_channels))
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in given.items()}
    output = plain_deform_conv2d(spec, **{"mask": None, **leaves}, border=border)
    output.backward(torch.tensor(planar(grad_output)))
    found = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    return {
        name: np.moveaxis(array, 1, -1) if spec.layout == "NHWC" and array.ndim == 4 and name != "weight" else array
        for name, array in found.items()
    }
