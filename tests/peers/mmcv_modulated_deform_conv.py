# SPDX-License-Identifier: Apache-2.0
"""Stands for mmcv.ops.modulated_deform_conv (2.x): same names, signatures, attributes, keys and random draws."""

from __future__ import annotations

import math

import torch
from peer_layers import plain_of_call
from torch import nn
from torch.nn.modules.utils import _pair, _single


class ModulatedDeformConv2dFunction:
    @staticmethod
    def apply(input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, deform_groups=1):
        input, weight, mask = (a.type_as(offset) for a in (input, weight, mask))
        bias = None if bias is None else bias.type_as(offset)
        geometry = _pair(stride), _pair(padding), _pair(dilation)
        return plain_of_call(input, offset, weight, bias, *geometry, mask, border="mmcv")


modulated_deform_conv2d = ModulatedDeformConv2dFunction.apply


class ModulatedDeformConv2d(nn.Module):
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
        bias=True,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.groups, self.deform_groups = groups, deform_groups
        self.transposed, self.output_padding = False, _single(0)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
        self.init_weights()

    def init_weights(self):
        bound = 1.0 / math.sqrt(self.in_channels * self.kernel_size[0] * self.kernel_size[1])
        self.weight.data.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.data.zero_()

    def forward(self, x, offset, mask):
        geometry = self.stride, self.padding, self.dilation, self.groups, self.deform_groups
        return modulated_deform_conv2d(x, offset, mask, self.weight, self.bias, *geometry)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    _version = 2

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv_offset = nn.Conv2d(
            self.in_channels,
            self.deform_groups * 3 * self.kernel_size[0] * self.kernel_size[1],
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            bias=True,
        )
        self.init_weights()

    def init_weights(self):
        super().init_weights()
        if hasattr(self, "conv_offset"):
            self.conv_offset.weight.data.zero_()
            self.conv_offset.bias.data.zero_()

    def forward(self, x):
        first, second, mask = torch.chunk(self.conv_offset(x), 3, dim=1)
        offset = torch.cat((first, second), dim=1)
        geometry = self.stride, self.padding, self.dilation, self.groups, self.deform_groups
        return modulated_deform_conv2d(x, offset, mask.sigmoid(), self.weight, self.bias, *geometry)
