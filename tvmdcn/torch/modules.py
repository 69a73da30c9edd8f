# SPDX-License-Identifier: Apache-2.0
"""Deformable convolutions as layers: torchvision's, and mmcv's two packs, which predict their own offsets.

A pack takes an image and gives an image, as ``torch.nn.Conv2d`` does with the same first seven arguments: the
vanilla convolution, DCNv1 and DCNv2 stand in one another's place.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tvmdcn.api import deform_conv2d
from tvmdcn.torch.layer import Layer, Pack, check_channels, check_image, layer_spec, offset_groups, rename_old_keys

__all__ = ["DeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2dPack", "upgrade_state_dict"]


class DeformConv2d(Layer):
    """A deformable convolution whose offsets, and mask for DCNv2, are given: ``torchvision.ops.DeformConv2d``.

    Constructor, attributes, initialisation and state_dict (``weight``, ``bias``) are torchvision's.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride, dilation : int or (vertical, horizontal)
    padding : int, (vertical, horizontal) or (top, left, bottom, right)
        Zero padding.
    groups : int
        Blocks of channels with weights of their own. The offset's channels say how many offset groups there
        are.
    bias : bool
    padding_mode : "zeros"
        As of ``torch.nn.Conv2d``; there is no other.
    border : {"torchvision", "mmcv"}
        The derivative by the offset of a sample exactly on -1; see :func:`tvmdcn.deform_conv2d`. The output
        does not depend on it.
    device, dtype
        Of the parameters, as of ``torch.nn.Conv2d``.

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is wrong.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        padding_mode: str = "zeros",
        border: str = "torchvision",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        spec = layer_spec(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(spec, bias, padding_mode, border, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters as torchvision does, which is as ``torch.nn.Conv2d`` does."""
        torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the layer.

        Parameters
        ----------
        input : (N, in_channels, H, W)
        offset : (N, offset_groups * 2 * kh * kw, Ho, Wo)
            y before x, taps row by row, offset groups outermost.
        mask : (N, offset_groups * kh * kw, Ho, Wo), optional

        Returns
        -------
        torch.Tensor
            (N, out_channels, Ho, Wo), in the memory format of `input`.

        Raises
        ------
        SpecError, SpecTypeError
            As of :func:`tvmdcn.deform_conv2d`; also if `input` has another number of channels than the layer.
        """
        weight = self.weight
        check_channels(self, weight, input, offset, mask)
        return deform_conv2d(
            input, offset, weight, self.bias, self.stride, self.padding, self.dilation, mask, border=self.border
        )


class DeformConv2dPack(Pack):
    """A deformable convolution (DCNv1) that predicts its offsets itself: mmcv's ``DeformConv2dPack``, or ``DCN``.

    Constructor, attributes, initialisation and state_dict (``weight``, ``conv_offset.weight``,
    ``conv_offset.bias``) are mmcv's; parameters drawn from one seed are the same. Checkpoints of the layer's
    first version are understood; see :func:`upgrade_state_dict`.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride, padding, dilation : int or (vertical, horizontal)
    groups : int
        Blocks of channels with weights of their own.
    deform_groups : int
        Blocks of channels with offsets of their own. As in mmcv it comes before `bias`.
    bias : bool
        mmcv's layer can have none; with one, there is the key ``bias``.
    im2col_step : int
        Not used: mmcv unfolds so many images of a batch at a time into memory; here nothing is unfolded, and
        any batch size will do.
    deformable_groups : int, optional
        Old name of `deform_groups`.
    padding_mode : "zeros"
    border : {"torchvision", "mmcv"}
        As of :class:`DeformConv2d`, but mmcv's by default: a model that changes over from mmcv trains as before.
    device, dtype
        Of the parameters, as of ``torch.nn.Conv2d``.

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is wrong.
    """

    per_tap = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
        *,
        deformable_groups: int | None = None,
        padding_mode: str = "zeros",
        border: str = "mmcv",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        blocks = offset_groups(in_channels, deform_groups, deformable_groups)
        spec = layer_spec(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, blocks)
        super().__init__(spec, bias, im2col_step, padding_mode, border, device, dtype)
        self.init_offset()

    def _reset_weight(self) -> None:
        torch.nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """Draw a new weight as mmcv does; bias and offsets become 0."""
        self._reset_weight()
        self.init_offset()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute the layer.

        Parameters
        ----------
        input : (N, in_channels, H, W)

        Returns
        -------
        torch.Tensor
            (N, out_channels, Ho, Wo), in the memory format of `input`.

        Raises
        ------
        SpecError, SpecTypeError
            If `input` is no image that the layer takes.
        """
        weight = self.weight
        check_image(self, weight, input)
        offset = self.conv_offset(input)
        return deform_conv2d(
            input, offset, weight, self.bias, self.stride, self.padding, self.dilation, border=self.border
        )


class ModulatedDeformConv2dPack(Pack):
    """A modulated deformable convolution (DCNv2) that predicts offsets and mask itself: mmcv's, or ``DCNv2``.

    Constructor, attributes, initialisation and state_dict (``weight``, ``bias``, ``conv_offset.weight``,
    ``conv_offset.bias``) are mmcv's; parameters drawn from one seed are the same. Of the channels of
    ``conv_offset`` the first two thirds are the offset, the last third passes a sigmoid and is the mask.
    Checkpoints of the layer's first version are understood; see :func:`upgrade_state_dict`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups
        As of :class:`DeformConv2dPack`, as are the following.
    bias : bool
    im2col_step, deformable_groups, padding_mode, border, device, dtype

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is wrong.
    """

    per_tap = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        im2col_step: int = 32,
        *,
        deformable_groups: int | None = None,
        padding_mode: str = "zeros",
        border: str = "mmcv",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        blocks = offset_groups(in_channels, deform_groups, deformable_groups)
        spec = layer_spec(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, blocks)
        super().__init__(spec, bias, im2col_step, padding_mode, border, device, dtype)
        self.init_weights()  # the weight a second time, as in mmcv: so one seed gives the same numbers

    def _reset_weight(self) -> None:
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        """Draw a new weight as mmcv does; bias and offsets become 0."""
        self._reset_weight()
        self.init_offset()

    def reset_parameters(self) -> None:
        """Do as :meth:`init_weights`, which is mmcv's name for it."""
        self.init_weights()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute the layer.

        Parameters
        ----------
        input : (N, in_channels, H, W)

        Returns
        -------
        torch.Tensor
            (N, out_channels, Ho, Wo), in the memory format of `input`.

        Raises
        ------
        SpecError, SpecTypeError
            If `input` is no image that the layer takes.
        """
        weight = self.weight
        check_image(self, weight, input)
        field = self.conv_offset(input)
        third = self.deform_groups * math.prod(self.kernel_size)  # no size of a tensor: an export knows the channels
        offset, mask = field.split((2 * third, third), 1)
        return deform_conv2d(
            *(input, offset, weight, self.bias, self.stride, self.padding, self.dilation, mask.sigmoid()),
            border=self.border,
        )


def upgrade_state_dict(model: torch.nn.Module, state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return a checkpoint with the present names of the parameters of all packs of a model.

    Checkpoints of the first mmdet hold the offset convolution of ``conv2`` as ``conv2_offset``, beside it.
    mmengine's loader shows every layer the whole checkpoint, and then nothing need be done.
    ``torch.nn.Module.load_state_dict`` shows a layer only the keys below its own name, so that neither these layers
    nor mmcv's can see an old one beside it. (``conv2.conv_offset_mask`` is below, and always understood.)

    Parameters
    ----------
    model : torch.nn.Module
        With layers :class:`DeformConv2dPack` or :class:`ModulatedDeformConv2dPack`.
    state_dict : mapping
        Not changed.

    Returns
    -------
    OrderedDict
        To be given to ``model.load_state_dict``.
    """
    renamed = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):  # the versions of the layers
        renamed._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, Pack):
            rename_old_keys(renamed, f"{name}.")
    return renamed
