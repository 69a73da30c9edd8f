# SPDX-License-Identifier: Apache-2.0
"""Torch tensors for torchvision's asymmetric test problem, as the tests of the torch operators call it.

Not imported where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from handmade import SPEC, torch_of, variant
from plain_torch import plain_deform_conv2d
from torch import Tensor

import tvmdcn
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tensors import make_tensors

GEOMETRY = {"stride": SPEC.stride, "padding": SPEC.padding[:2], "dilation": SPEC.dilation}
# In the order of the arguments of deform_conv2d, and of Gradients.
NAMES = ("input", "offset", "weight", "bias", "mask")


def layer_tensors(
    spec: DeformConv2dSpec = SPEC,
    extents: Extents = Extents(2, 5, 4),  # noqa: B008 - frozen
    seed: int = 0,
    requires_grad: Sequence[str] = (),
) -> list[Tensor]:
    """Return input, offset, weight, bias and mask; those of an NHWC layer in channels_last."""
    planar = DeformConv2dSpec.from_json({**spec.to_json(), "layout": "NCHW"})
    arrays = vars(make_tensors(planar, extents, seed))
    tensors = []
    for name in NAMES:
        if arrays[name] is None:
            continue
        tensor = torch_of(arrays[name])
        if spec.layout == "NHWC" and name in ("input", "offset", "mask"):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        tensors.append(tensor.requires_grad_(name in requires_grad))
    return tensors


def ours(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, **options: str
) -> Tensor:
    return tvmdcn.deform_conv2d(input, offset, weight, bias, mask=mask, **GEOMETRY, **options)


def dispatched(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, border: str = "torchvision"
) -> Tensor:
    """Call the operator itself."""
    result: Tensor = torch.ops.tvmdcn.deform_conv2d(input, offset, weight, bias, *GEOMETRY.values(), mask, border)
    return result


def plain(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, border: str = "torchvision"
) -> Tensor:
    """Compute the layer in torch's own differentiable operations."""
    spec = variant(mask=mask is not None)
    result: Tensor = plain_deform_conv2d(spec, input, offset, weight, mask, bias, border)
    return result


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error over the largest value."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
