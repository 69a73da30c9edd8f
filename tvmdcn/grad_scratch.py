# SPDX-License-Identifier: Apache-2.0
"""Memory that a call of the gradients on a GPU needs beside its arguments: the caller of the compiled function has it.

So it comes from the caller's framework, can be captured in a CUDA graph, and is free again after the call.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvmdcn.spec import DeformConv2dGradSpec

__all__ = ["scratch_tensors", "split_of"]

_MOST_PARTS = 128 << 20
"""Bytes that the parts of the weight's gradient may take, if there is more than one."""


def split_of(spec: DeformConv2dGradSpec, tiles: int, max_tile_units: int) -> tuple[int, int]:
    """Return into how many parts of how many tiles the sums over pixels are divided.

    Parameters
    ----------
    spec : DeformConv2dGradSpec
    tiles : int
        Of output pixels, of all images; at least 1.
    max_tile_units : int
        How many the schedule wants to a part, at most; there are more where the parts would take too much memory.

    Returns
    -------
    (splits, tile_units)
        ``splits == ceil(tiles / tile_units)``. They depend on nothing but the arguments, and so do the sums.
    """
    units = min(max_tile_units, tiles)
    if spec.grad_weight:
        item = {"float32": 4, "float64": 8}[spec.accumulator_dtype]
        most = max(_MOST_PARTS // (prod(spec.weight_shape) * item), 1)
        units = max(units, -(-tiles // most))
    units = -(-tiles // -(-tiles // units))  # all parts alike, or nearly so
    return -(-tiles // units), units


def scratch_tensors(
    spec: DeformConv2dGradSpec, image_pixels: Any, out_pixels: Any, splits: Any
) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Return shape and dtype of each piece of memory by name, in the order of the arguments.

    Parameters
    ----------
    spec : DeformConv2dGradSpec
    image_pixels, out_pixels : int or expression
        Pixels of all images: of the input, and of the output.
    splits : int or expression
        Into how many parts sums over pixels are divided.

    Returns
    -------
    dict of str to (shape, dtype)
        * rows ``[N*P, Cout]`` and image ``[N*H*W, Cin]``: channels-last copies of the output's gradient and the input,
          for NCHW;
        * grad_image ``[N*H*W, Cin]``: where the input's gradient is added up, unless the result itself serves;
        * fixed ``[N*H*W, Cin]`` and bounds ``[4]``: the same in fixed point, and what its unit comes from, for a result
          that does not depend on the order of additions;
        * weight_parts ``[splits, K, Cout, Cin/groups]`` and bias_parts ``[splits, Cout]``.
    """
    acc, nchw = spec.accumulator_dtype, spec.layout == "NCHW"
    found: dict[str, tuple[tuple[Any, ...], str]] = {}
    image = (image_pixels, spec.in_channels)
    if nchw:
        found["rows"] = (out_pixels, spec.out_channels), spec.dtype
        if "input" in spec.inputs:
            found["image"] = image, spec.dtype
    if spec.grad_input and (nchw or spec.dtype != acc or spec.deterministic):
        found["grad_image"] = image, acc
    if spec.grad_input and spec.deterministic:
        found["fixed"] = image, "int64"
        found["bounds"] = (4,), "uint32"
    if spec.grad_weight:
        found["weight_parts"] = (splits, spec.taps, spec.out_channels, spec.in_channels // spec.groups), acc
    if spec.grad_bias:
        found["bias_parts"] = (splits, spec.out_channels), acc
    return found
