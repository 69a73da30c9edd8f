# SPDX-License-Identifier: Apache-2.0
"""The operators in plain NumPy and float64: what every kernel is checked against.

Written from the equations and from torchvision's rules, and from nothing that the kernels are made of::

    v1:  y(p) = sum_k w(p_k) x(p + p_k + dp_k)
    v2:  y(p) = sum_k w(p_k) x(p + p_k + dp_k) dm(p_k)

(Dai et al. 2017, Zhu et al. 2019.) Speed matters only so far that a real layer takes about a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvmdcn.errors import SpecError
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tensors import Tensors
from tvmdcn.validation import shown

__all__ = ["deform_conv2d_reference", "expected_output", "reference", "sample_positions"]

# Output pixels are taken in blocks of about this many sampled numbers, which bounds the memory of a call.
_BLOCK_ELEMENTS = 1 << 20


def deform_conv2d_reference(
    input: np.ndarray,
    offset: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: np.ndarray | None = None,
    layout: str = "NCHW",
    coordinate_dtype: str = "float64",
) -> np.ndarray:
    """Compute a deformable convolution in float64.

    A sample at row <= -1, row >= H, column <= -1 or column >= W, or at a place that is not a number, is 0.
    Any other is bilinear, each corner outside the image worth 0 whatever lies at the border. The mask
    multiplies the sample.

    Parameters
    ----------
    input : (N, Cin, H, W)
        Any real dtype; converted to float64 exactly. With ``layout="NHWC"`` (N, H, W, Cin), and so on for
        `offset`, `mask` and the result.
    offset : (N, offset_groups * 2 * kh * kw, Ho, Wo)
        Per group and tap y before x, taps row by row.
    weight : (Cout, Cin / groups, kh, kw)
        The same for either layout.
    bias : (Cout,), optional
        Added to the sum.
    stride, dilation : int or pair
        As in a plain convolution.
    padding : int, pair or (top, left, bottom, right)
        Zero padding.
    mask : (N, offset_groups * kh * kw, Ho, Wo), optional
        None for DCNv1.
    layout : str
        NCHW or NHWC.
    coordinate_dtype : str
        float64, or float32: places are then rounded to float32 as kernels do, everything after stays float64.

    Returns
    -------
    ndarray of float64, (N, Cout, Ho, Wo)
        In the order of `layout`.

    Raises
    ------
    SpecError, SpecTypeError
        If the arguments do not fit one another.
    """
    if coordinate_dtype not in ("float32", "float64"):
        raise SpecError(f"coordinate_dtype must be float32 or float64, got {shown(coordinate_dtype)}.")
    if layout == "NHWC":
        input, offset = np.moveaxis(input, -1, 1), np.moveaxis(offset, -1, 1)
        mask = None if mask is None else np.moveaxis(mask, -1, 1)
    spec, extents = DeformConv2dSpec.from_shapes(
        input.shape,
        offset.shape,
        weight.shape,
        None if mask is None else mask.shape,
        None if bias is None else bias.shape,
        stride,
        padding,
        dilation,
        dtype="float64",
        layout=layout,
    )
    size = spec.output_size(extents.height, extents.width)
    output = np.empty((extents.batch, size[0] * size[1], spec.out_channels))
    # 1e300 becomes infinite in float32, and infinities in the image meet weights of 0: both are wanted.
    with np.errstate(over="ignore", invalid="ignore"):
        rows, columns = sample_positions(spec, extents, offset, np.dtype(coordinate_dtype))
        # [taps, groups, Cin / groups, Cout / groups]
        taps = weight.astype(np.float64).reshape(spec.groups, -1, spec.in_channels // spec.groups, spec.taps)
        taps = taps.transpose(3, 0, 2, 1)
        modulation = None if mask is None else mask.astype(np.float64).reshape(rows.shape)
        block = max(1, _BLOCK_ELEMENTS // spec.in_channels)
        for image in range(extents.batch):
            # One row per pixel, and a last one of zeros, which stands for all that lies outside.
            pixels = input[image].astype(np.float64).reshape(spec.in_channels, -1).T
            pixels = np.concatenate([pixels, np.zeros((1, spec.in_channels))])
            for start in range(0, output.shape[1], block):
                part = (image, slice(None), slice(None), slice(start, start + block))
                output[image, start : start + block] = _product(
                    spec,
                    _corners(extents, rows[part], columns[part]),
                    None if modulation is None else modulation[part],
                    pixels,
                    taps,
                )
        if bias is not None:
            output += bias.astype(np.float64)
    result = output.reshape(extents.batch, *size, spec.out_channels)
    return result if layout == "NHWC" else np.ascontiguousarray(np.moveaxis(result, -1, 1))


def reference(spec: DeformConv2dSpec, tensors: Tensors, coordinate_dtype: str | None = None) -> np.ndarray:
    """Compute the layer `spec` on `tensors` in float64.

    Parameters
    ----------
    spec : DeformConv2dSpec
        The layer; the tensors are in the order of its layout.
    tensors : Tensors
        Of any real dtype.
    coordinate_dtype : str, optional
        As of :func:`deform_conv2d_reference`; None is the dtype that kernels of `spec` compute places in,
        float64 for float64 and else float32.

    Returns
    -------
    ndarray of float64
        In the order of the layout.

    Raises
    ------
    SpecError, SpecTypeError
        If the tensors do not fit one another.
    """
    return deform_conv2d_reference(
        tensors.input,
        tensors.offset,
        tensors.weight,
        tensors.bias,
        spec.stride,
        spec.padding,
        spec.dilation,
        tensors.mask,
        spec.layout,
        spec.accumulator_dtype if coordinate_dtype is None else coordinate_dtype,
    )


def expected_output(spec: DeformConv2dSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what a kernel of `spec` has to compute from arguments by name, by the name of the output."""
    given: dict[str, Any] = {"mask": None, "bias": None, **tensors}
    return {"output": reference(spec, Tensors(**given))}


def sample_positions(
    spec: DeformConv2dSpec, extents: Extents, offset: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and the columns of all samples, [N, offset_groups, taps, Ho * Wo], as float64."""
    size = spec.output_size(extents.height, extents.width)
    moved = offset.astype(dtype).reshape(extents.batch, spec.offset_groups, *spec.kernel_size, 2, *size)
    places = []
    for axis, index_shape in enumerate(((-1, 1, 1, 1), (1, -1, 1, 1))):
        tap = np.arange(spec.kernel_size[axis]).reshape(index_shape) * spec.dilation[axis]
        pixel = np.arange(size[axis]) * spec.stride[axis] - spec.padding[axis]
        base = tap + (pixel[:, None] if axis == 0 else pixel)
        place = base.astype(dtype) + moved[:, :, :, :, axis]
        places.append(place.astype(np.float64).reshape(extents.batch, spec.offset_groups, spec.taps, size[0] * size[1]))
    return places[0], places[1]


def _corners(extents: Extents, rows: np.ndarray, columns: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each of four corners the pixel's index, H * W where there is none, and its weight."""
    height, width = extents.height, extents.width
    # False also for places that are not a number.
    inside = (rows > -1) & (rows < height) & (columns > -1) & (columns < width)
    rows, columns = np.where(inside, rows, 0), np.where(inside, columns, 0)
    top, left = np.floor(rows), np.floor(columns)
    corners = []
    for down in (0, 1):
        for right in (0, 1):
            row, column = (top + down).astype(np.intp), (left + right).astype(np.intp)
            there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            vertical = rows - top if down else top + 1 - rows
            horizontal = columns - left if right else left + 1 - columns
            corners.append((np.where(there, row * width + column, height * width), vertical * horizontal))
    return corners


def _product(
    spec: DeformConv2dSpec,
    corners: list[tuple[np.ndarray, np.ndarray]],
    modulation: np.ndarray | None,
    pixels: np.ndarray,
    taps: np.ndarray,
) -> np.ndarray:
    """Return the output [block, Cout] of a block of pixels; the corners are [offset_groups, taps, block]."""
    block = corners[0][0].shape[-1]
    block_output = np.zeros((spec.groups, block, spec.out_channels // spec.groups))
    channels = spec.in_channels // spec.offset_groups
    sampled = np.empty((block, spec.in_channels))
    for tap in range(spec.taps):
        for group in range(spec.offset_groups):
            own = slice(group * channels, (group + 1) * channels)
            source = pixels[:, own]
            value: np.ndarray = np.zeros((block, channels))
            for index, weight in corners:
                value += source[index[group, tap]] * weight[group, tap, :, None]
            sampled[:, own] = value if modulation is None else value * modulation[group, tap, :, None]
        block_output += sampled.reshape(block, spec.groups, -1).transpose(1, 0, 2) @ taps[tap]
    return block_output.transpose(1, 0, 2).reshape(block, spec.out_channels)
