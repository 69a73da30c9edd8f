# SPDX-License-Identifier: Apache-2.0
"""What the layers share: arguments, parameters, checks of what they are given, old checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from tvmdcn.arrays import arrays_of
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.shapes import INPUT_AXES
from tvmdcn.spec import BORDERS, DeformConv2dSpec
from tvmdcn.validation import check_dtype, check_flag, check_int, check_shape, shown

__all__ = ["Layer", "Pack", "check_channels", "check_image", "layer_spec", "offset_groups", "rename_old_keys"]


class Layer(torch.nn.Module):
    """What the three layers share: the arguments, the parameters, what is printed."""

    # Also for instances that another package's constructor made (see tvmdcn.torch.drop_in).
    border = "torchvision"
    padding_mode = "zeros"

    def __init__(
        self, spec: DeformConv2dSpec, bias: bool, padding_mode: str, border: str, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        if padding_mode != "zeros":
            raise SpecError(
                f"padding_mode must be 'zeros', got padding_mode={shown(padding_mode)}: samples outside the image "
                "are 0. Pad the input first, with torch.nn.functional.pad, and give padding=0."
            )
        if border not in BORDERS:
            raise SpecError(f"border must be one of {', '.join(BORDERS)}, got border={shown(border)}.")
        if dtype is not None:
            check_dtype({"weight": dtype})
        top, left, bottom, right = spec.padding
        self.in_channels = spec.in_channels
        self.out_channels = spec.out_channels
        self.kernel_size = spec.kernel_size
        self.stride = spec.stride
        self.padding = (top, left) if (top, left) == (bottom, right) else spec.padding
        self.dilation = spec.dilation
        self.groups = spec.groups
        self.border = border
        self.weight = torch.nn.Parameter(torch.empty(spec.weight_shape, device=device, dtype=dtype))
        if check_flag("bias", bias):
            self.bias = torch.nn.Parameter(torch.empty(spec.out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def extra_repr(self) -> str:
        """Return the arguments, those left out that have their default."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("deform_groups", 1)):
            value = getattr(self, name, default)
            text += f", {name}={value}" if value != default else ""
        text += ", bias=False" if self.bias is None else ""
        return text + (f", border={self.border!r}" if self.border != type(self).border else "")


class Pack(Layer):
    """A layer that predicts its offsets by a plain convolution of the same receptive field."""

    border = "mmcv"
    # mmcv's too; read by what counts operations, or folds batch norms, of any convolution.
    transposed = False
    output_padding = (0,)
    # Checkpoints of version 2 have the keys conv_offset.*; see rename_old_keys.
    _version = 2
    # Channels of conv_offset for each tap and offset group.
    per_tap: int

    def __init__(
        self,
        spec: DeformConv2dSpec,
        bias: bool,
        im2col_step: int,
        padding_mode: str,
        border: str,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__(spec, bias, padding_mode, border, device, dtype)
        if len(self.padding) == 4:
            raise SpecError(
                "padding must be an int or a pair (vertical, horizontal) here, got (top, left, bottom, right) = "
                f"{self.padding}: the convolution that predicts the offsets pads both sides alike. Pad the input "
                "first, with torch.nn.functional.pad."
            )
        self.deform_groups = spec.offset_groups
        self.im2col_step = im2col_step
        self._reset_weight()
        channels = spec.in_channels, spec.offset_groups * self.per_tap * spec.taps
        geometry = spec.kernel_size, spec.stride, self.padding, spec.dilation
        self.conv_offset = torch.nn.Conv2d(*channels, *geometry, device=device, dtype=dtype)

    def _reset_weight(self) -> None:
        raise NotImplementedError

    def init_offset(self) -> None:
        """Make all offsets 0 (and a mask 0.5): the layer starts as a plain convolution."""
        torch.nn.init.zeros_(self.conv_offset.weight)
        torch.nn.init.zeros_(self.conv_offset.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *others: Any) -> None:
        version = metadata.get("version")
        if version is None or version < 2:
            rename_old_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, *others)


# --- arguments ----------------------------------------------------------------------------------------------


def layer_spec(
    in_channels: int,
    out_channels: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    offset_groups: int = 1,
) -> DeformConv2dSpec:
    """Check a layer's arguments, and return them in their normal form."""
    return DeformConv2dSpec(*(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, offset_groups))


def offset_groups(in_channels: int, deform_groups: int, deformable_groups: int | None) -> int:
    """Check and return the number of offset groups, given by its new or its old name."""
    if deformable_groups is not None:
        if deform_groups != 1:
            raise SpecError(
                f"deformable_groups={shown(deformable_groups)} is the old name of deform_groups, which is given "
                f"too ({shown(deform_groups)}). Give deform_groups only."
            )
        warnings.warn("deformable_groups is now called deform_groups", DeprecationWarning, stacklevel=3)
        deform_groups = deformable_groups
    if isinstance(deform_groups, bool):
        raise SpecTypeError(
            f"deform_groups must be an int, got {deform_groups} of type bool: as in mmcv, and unlike in "
            "torch.nn.Conv2d, it comes before bias. Give bias by its name."
        )
    deform_groups = check_int("deform_groups", deform_groups, 1)
    if check_int("in_channels", in_channels, 1) % deform_groups:
        raise SpecError(
            f"deform_groups must divide in_channels, got deform_groups={deform_groups} and in_channels={in_channels}."
        )
    return deform_groups


# --- what calls are given -----------------------------------------------------------------------------------


def check_channels(layer: Any, weight: Any, input: Any, offset: Any, mask: Any) -> None:
    """Refuse an input of other channels than the layer's: the operator would infer other groups from it.

    Everything else the operator checks itself.
    """
    shape: Any = getattr(input, "shape", ())
    if len(shape) != 4 or shape[1] == layer.in_channels:
        return
    # What the operator would refuse is refused in its words.
    given = {"input": input, "offset": offset, "weight": weight}
    if mask is not None:
        given["mask"] = mask
    shapes: Any = {name: tuple(array.shape) if hasattr(array, "shape") else array for name, array in given.items()}
    dtypes = {name: array.dtype for name, array in given.items() if hasattr(array, "dtype")}
    geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    DeformConv2dSpec.from_shapes(**shapes, **geometry, dtype=dtypes)
    raise SpecError(_other_channels(layer, shape))


def _other_channels(layer: Any, shape: Sequence[int]) -> str:
    return (
        f"input has {shape[1]} channels (shape {tuple(shape)}, read as N, Cin, H, W), the layer takes "
        f"in_channels={layer.in_channels}. Make another layer, or call tvmdcn.deform_conv2d, which infers the "
        "groups from the input."
    )


def check_image(layer: Any, weight: Any, input: Any) -> None:
    """Refuse an input that a pack cannot take, in the operator's words rather than the offset convolution's."""
    shape: Any = getattr(input, "shape", ())
    if isinstance(input, torch.Tensor) and len(shape) == 4 and shape[1] == layer.in_channels:
        (top, left), (down, across), (rows, columns) = layer.padding, layer.dilation, layer.kernel_size
        fits = shape[2] + 2 * top > down * (rows - 1) and shape[3] + 2 * left > across * (columns - 1)
        if fits and (input.dtype == weight.dtype or torch.is_autocast_enabled(input.device.type)):
            return
    if not isinstance(input, torch.Tensor):
        arrays_of(input).check("weight", weight)
    check_dtype({"input": input.dtype, "weight": weight.dtype})
    batch, channels, height, width = check_shape("input", shape, INPUT_AXES)
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    spec = layer_spec(layer.in_channels, layer.out_channels, *geometry, layer.groups)
    size = spec.output_size(height, width)
    if channels != layer.in_channels:
        offset = batch, 2 * spec.taps, *size
        DeformConv2dSpec.from_shapes(shape, offset, weight.shape, None, None, *geometry[1:], dtype=input.dtype)
        raise SpecError(_other_channels(layer, shape))


# --- checkpoints --------------------------------------------------------------------------------------------


def rename_old_keys(state_dict: dict[str, Any], prefix: str) -> None:
    """Give the parameters of a pack's offset convolution their present names, where they have an old one.

    ``conv2_offset.*`` beside ``conv2.*`` is of the first mmdet, ``conv2.conv_offset_mask.*`` of its first DCNv2
    and of the DCNv2 that CenterNet and EDVR carry. All hold the same values in the same order.
    """
    for kind in ("weight", "bias"):
        present = f"{prefix}conv_offset.{kind}"
        for old in (f"{prefix[:-1]}_offset.{kind}", f"{prefix}conv_offset_mask.{kind}"):
            if present not in state_dict and old in state_dict:
                state_dict[present] = state_dict.pop(old)
