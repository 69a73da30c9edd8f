# SPDX-License-Identifier: Apache-2.0
"""From the shapes of a call's tensors to a specification: what a layer's tensors must agree on.

:meth:`tvmdcn.spec.DeformConv2dSpec.from_shapes` is the public name of :func:`derive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvmdcn.errors import SpecError
from tvmdcn.validation import check_dtype, check_int, check_layout, check_shape

if TYPE_CHECKING:
    from tvmdcn.spec import DeformConv2dSpec

INPUT_AXES = ("N", "Cin", "H", "W")
WEIGHT_AXES = ("Cout", "Cin/groups", "kh", "kw")
OFFSET_AXES = ("N", "offset_groups*2*kh*kw", "Ho", "Wo")
MASK_AXES = ("N", "offset_groups*kh*kw", "Ho", "Wo")
OUTPUT_AXES = ("N", "Cout", "Ho", "Wo")


@dataclass(frozen=True)
class Extents:
    """The sizes that a kernel leaves free: batch (may be 0), input height and input width.

    Raises
    ------
    SpecError, SpecTypeError
        If a size is negative, an image is empty, or a size is not an integer.
    """

    batch: int
    height: int
    width: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name, minimum in (("batch", 0), ("height", 1), ("width", 1)):
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum))


def derive(
    spec_type: type[DeformConv2dSpec],
    input: Sequence[int],
    offset: Sequence[int],
    weight: Sequence[int],
    mask: Sequence[int] | None,
    bias: Sequence[int] | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    dtype: Any,
    layout: str,
) -> tuple[DeformConv2dSpec, Extents]:
    """Return the specification and the extents; the arguments and errors are `from_shapes`'s."""
    dtype, layout = check_dtype(dtype), check_layout(layout)
    batch, in_channels, height, width = check_shape("input", input, INPUT_AXES)
    out_channels, group_channels, *kernel = check_shape("weight", weight, WEIGHT_AXES)
    offset = check_shape("offset", offset, OFFSET_AXES)
    groups = _groups(in_channels, out_channels, group_channels, tuple(input), tuple(weight))
    taps = kernel[0] * kernel[1]
    offset_groups = _offset_groups(offset, kernel, in_channels)
    spec = spec_type(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=(kernel[0], kernel[1]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        mask=mask is not None,
        dtype=dtype,
        layout=layout,
    )
    size = spec.output_size(height, width)
    derivation = (
        f"Ho, Wo = {size[0]}, {size[1]} follow from input {height}, {width}, kernel {spec.kernel_size}, "
        f"stride {spec.stride}, padding {spec.padding} (top, left, bottom, right), dilation {spec.dilation}."
    )
    _check_batch_and_size("offset", offset, batch, size, derivation)
    if mask is not None:
        mask = check_shape("mask", mask, MASK_AXES)
        _check_batch_and_size("mask", mask, batch, size, derivation)
        if mask[1] != offset_groups * taps:
            raise SpecError(
                f"mask must have offset_groups * kh * kw = {offset_groups * taps} channels for the "
                f"offset_groups={offset_groups} that offset has, got {mask[1]} (shape {mask})."
            )
    if bias is not None:
        (bias_size,) = check_shape("bias", bias, ("Cout",))
        if bias_size != out_channels:
            raise SpecError(f"bias must have one value per output channel, {out_channels}, got {bias_size}.")
    check_shape("output", (batch, out_channels, *size), OUTPUT_AXES)
    return spec, Extents(batch, height, width)


def _groups(
    in_channels: int,
    out_channels: int,
    group_channels: int,
    input: tuple[int, ...],
    weight: tuple[int, ...],
) -> int:
    """Return the number of groups that the weight's second size makes."""
    if in_channels % group_channels:
        raise SpecError(
            f"input has {in_channels} channels, not a multiple of the {group_channels} that weight takes per "
            f"group: input {input} is read as N, Cin, H, W and weight {weight} as Cout, Cin/groups, kh, kw. "
            f"Make Cin a multiple of {group_channels}."
        )
    groups = in_channels // group_channels
    if out_channels % groups:
        raise SpecError(
            f"weight has {out_channels} output channels, not a multiple of groups={groups}, which follows "
            f"from Cin {in_channels} / weight.shape[1] {group_channels}. Check the weight's shape {weight}."
        )
    return groups


def _offset_groups(offset: tuple[int, ...], kernel: Sequence[int], in_channels: int) -> int:
    """Return the number of offset groups that the offset's channels make."""
    taps = kernel[0] * kernel[1]
    channels = offset[1]
    if channels % (2 * taps):
        hint = ""
        if channels % (3 * taps) == 0:
            hint = (
                f" It is a multiple of 3 * kh * kw = {3 * taps}: offset and mask may still be in one tensor. "
                f"Pass the first {channels // 3 * 2} channels as offset, the sigmoid of the others as mask."
            )
        elif channels % taps == 0:
            hint = f" A multiple of kh * kw = {taps} alone is a mask's: offset and mask may be exchanged."
        raise SpecError(
            f"offset must have a multiple of 2 * kh * kw = {2 * taps} channels (y and x for each tap of the "
            f"{kernel[0]}x{kernel[1]} kernel), got {channels} (shape {offset}).{hint}"
        )
    groups = channels // (2 * taps)
    if in_channels % groups:
        raise SpecError(
            f"offset_groups={groups}, which follows from offset's {channels} channels / {2 * taps} for one "
            f"group, must divide the {in_channels} channels of input. Use an offset of {2 * taps} times a "
            f"divisor of {in_channels} channels."
        )
    return groups


def _check_batch_and_size(
    name: str, shape: tuple[int, ...], batch: int, size: tuple[int, int], derivation: str
) -> None:
    """Check the batch and the image size of offset or mask."""
    if shape[0] != batch:
        raise SpecError(f"{name} must have the batch size of input, {batch}, got {shape[0]} (shape {shape}).")
    if shape[2:] != size:
        raise SpecError(f"{name} must be of the output's size {size}, got {shape[2:]} (shape {shape}). {derivation}")
