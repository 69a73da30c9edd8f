# SPDX-License-Identifier: Apache-2.0
"""Stands for detectron2.layers.deform_conv (0.6): same names, signatures and attributes."""

from __future__ import annotations

import torch
from peer_layers import plain_of_call
from torch import nn
from torch.nn.modules.utils import _pair


def deform_conv(input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deformable_groups=1, im2col_step=64):
    geometry = _pair(stride), _pair(padding), _pair(dilation)
    return plain_of_call(input, offset, weight, None, *geometry, None, border="mmcv")


def modulated_deform_conv(
    input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, deformable_groups=1
):
    geometry = _pair(stride), _pair(padding), _pair(dilation)
    return plain_of_call(input, offset, weight, bias, *geometry, mask, border="mmcv")


class _Base(nn.Module):
    def _set(self, in_channels, out_channels, kernel_size, groups, deformable_groups, norm, activation):
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = _pair(kernel_size)
        self.groups, self.deformable_groups = groups, deformable_groups
        self.norm, self.activation = norm, activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def _finish(self, x):
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class DeformConv(_Base):
    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        deformable_groups=1,
        bias=False,
        norm=None,
        activation=None,
    ):
        super().__init__()
        assert not bias
        self.stride, self.padding, self.dilation = _pair(stride), _pair(padding), _pair(dilation)
        self._set(in_channels, out_channels, kernel_size, groups, deformable_groups, norm, activation)
        self.bias = None

    def forward(self, x, offset):
        geometry = self.stride, self.padding, self.dilation, self.groups, self.deformable_groups
        return self._finish(deform_conv(x, offset, self.weight, *geometry))


class ModulatedDeformConv(_Base):
    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        deformable_groups=1,
        bias=True,
        norm=None,
        activation=None,
    ):
        super().__init__()
        self.stride, self.padding, self.dilation, self.with_bias = stride, padding, dilation, bias
        self._set(in_channels, out_channels, kernel_size, groups, deformable_groups, norm, activation)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x, offset, mask):
        geometry = self.stride, self.padding, self.dilation, self.groups, self.deformable_groups
        return self._finish(modulated_deform_conv(x, offset, mask, self.weight, self.bias, *geometry))
