# SPDX-License-Identifier: Apache-2.0
"""What rows are about, in words: for the terminal's table and for reports."""

from __future__ import annotations

from collections.abc import Sequence

from tvmdcn.bench.measurement import DIRECTIONS, Measurement
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents

__all__ = ["describe_layer", "describe_measure"]

_OF_KERNEL = {"overhead_numpy": "NumPy", "overhead_torch": "torch"}
# What is called, forward and backward.
_CALLED = {
    "overhead_function": ("tvmdcn.deform_conv2d", "tvmdcn.deform_conv2d_backward"),
    "overhead_operator": ("torch.ops.tvmdcn.deform_conv2d", "torch.ops.tvmdcn.deform_conv2d_backward"),
    "overhead_module": ("tvmdcn.DeformConv2d", "tvmdcn.DeformConv2d"),
    "overhead_autograd": ("tvmdcn.deform_conv2d, recorded by autograd", "torch.autograd.grad of tvmdcn.deform_conv2d"),
}


def describe_measure(row: Measurement) -> str:
    """Return what a row measured, in words."""
    if row.measure == "first_result":
        return "import to first result"
    if row.measure in _OF_KERNEL:
        kernel = "the kernel" if row.direction == "forward" else "the gradients' kernel"
        return f"call overhead, {kernel}, {_OF_KERNEL[row.measure]}"
    if row.role != "ours":
        what = "recorded by autograd" if row.direction == "forward" else "torch.autograd.grad of it"
        return f"call overhead, a function that computes nothing, {what}"
    if row.measure in _CALLED:
        return f"call overhead, {_CALLED[row.measure][DIRECTIONS.index(row.direction)]}"
    return f"call, {row.direction}"


def describe_layer(spec: DeformConv2dSpec, extents: Extents) -> str:
    """Return a layer in a few characters: sizes, kernel, and whatever is not usual."""
    kernel = "\u00d7".join(map(str, spec.kernel_size))
    image = f"{extents.batch}\u00d7{spec.in_channels}\u00d7{extents.height}\u00d7{extents.width}"
    text = f"{image} \u2192 {spec.out_channels}, {kernel}"
    if spec.stride != (1, 1):
        text += f", stride {_short(spec.stride)}"
    same = tuple(d * (k - 1) // 2 for k, d in zip(spec.kernel_size, spec.dilation, strict=True))
    if spec.padding != same * 2:
        text += f", padding {_short(spec.padding)}"
    if spec.dilation != (1, 1):
        text += f", dilation {_short(spec.dilation)}"
    if spec.groups > 1:
        text += f", {spec.groups} groups"
    if spec.offset_groups > 1:
        text += f", {spec.offset_groups} offset groups"
    if not spec.mask:
        text += ", no mask"
    if spec.dtype != "float32":
        text += f", {spec.dtype}"
    if spec.layout != "NCHW":
        text += f", {spec.layout}"
    if isinstance(spec, DeformConv2dGradSpec):
        if spec.outputs != DeformConv2dGradSpec.of(spec.layer).outputs:
            text += f", {', '.join(spec.outputs)} only"
        if spec.border != "torchvision":
            text += f", border as {spec.border}"
    return text


def _short(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "\u00d7".join(map(str, values))
