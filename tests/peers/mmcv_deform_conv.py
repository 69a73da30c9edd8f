# SPDX-License-Identifier: Apache-2.0
"""Stands for mmcv.ops.deform_conv (2.x): same names, signatures, attributes, keys and random draws."""

from __future__ import annotations

import torch
from peer_layers import plain_of_call
from torch import nn
from torch.nn.functional import pad
from torch.nn.modules.utils import _pair, _single


class DeformConv2dFunction:
    @staticmethod
    def apply(
        input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=False, im2col_step=32
    ):
        assert bias is False
        assert input.shape[0] % min(im2col_step, input.shape[0]) == 0
        input = input.type_as(offset)
        geometry = _pair(stride), _pair(padding), _pair(dilation)
        return plain_of_call(input, offset, weight.type_as(input), None, *geometry, None, border="mmcv")


deform_conv2d = DeformConv2dFunction.apply


class DeformConv2d(nn.Module):
    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        deform_groups=1,
        bias=False,
        im2col_step=32,
    ):
        super().__init__()
        assert not bias
        assert in_channels % groups == 0
        assert out_channels % groups == 0
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.groups, self.deform_groups, self.im2col_step = groups, deform_groups, im2col_step
        self.transposed, self.output_padding = False, _single(0)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x, offset):
        missing = [max(size - given, 0) for size, given in zip(self.kernel_size, x.shape[2:], strict=True)]
        if any(missing):
            sides = 0, missing[1], 0, missing[0]
            x, offset = pad(x, sides).contiguous(), pad(offset, sides).contiguous()
        arguments = self.weight, self.stride, self.padding, self.dilation, self.groups, self.deform_groups
        out = deform_conv2d(x, offset, *arguments, False, self.im2col_step)
        if any(missing):
            out = out[:, :, : out.shape[2] - missing[0], : out.shape[3] - missing[1]].contiguous()
        return out

    def __repr__(self):
        return f"{type(self).__name__}(in_channels={self.in_channels},\nout_channels={self.out_channels}, ...)"


class DeformConv2dPack(DeformConv2d):
    _version = 2

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv_offset = nn.Conv2d(
            self.in_channels,
            self.deform_groups * 2 * self.kernel_size[0] * self.kernel_size[1],
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            bias=True,
        )
        self.init_offset()

    def init_offset(self):
        self.conv_offset.weight.data.zero_()
        self.conv_offset.bias.data.zero_()

    def forward(self, x):
        offset = self.conv_offset(x)
        arguments = self.weight, self.stride, self.padding, self.dilation, self.groups, self.deform_groups
        return deform_conv2d(x, offset, *arguments, False, self.im2col_step)


class DeformConv2dPack_MLU(DeformConv2d):  # noqa: N801 - mmcv's name
    """A subclass with a forward of its own, for another kind of device."""

    def forward(self, x):
        return x * 0
