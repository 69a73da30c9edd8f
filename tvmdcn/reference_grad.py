# SPDX-License-Identifier: Apache-2.0
"""The gradients of the operators in plain NumPy and float64: what every backward kernel is checked against.

Written from the chain rule and from torchvision's and mmcv's rules, and from nothing that the kernels are made
of. With ``G`` the gradient of the output, ``c`` a channel of the input, ``s(p_k, c)`` its sample for tap ``k``
of output pixel ``p``, and ``g(p_k, c) = sum_o w(o, c, k) G(o, p)``::

    dw(o, c, k) = sum_p G(o, p) dm(p_k) s(p_k, c)
    ddm(p_k)    = sum_c g(p_k, c) s(p_k, c)
    ddp(p_k)    = sum_c g(p_k, c) dm(p_k) (the derivative of s(p_k, c) by the place)
    dx(q, c)    = sum_p,k g(p_k, c) dm(p_k) (the weight of q in s(p_k, c))
    db(o)       = sum_p G(o, p)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvmdcn.errors import SpecError
from tvmdcn.reference import sample_positions
from tvmdcn.shapes import OUTPUT_AXES
from tvmdcn.spec import BORDERS, DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.tensors import Gradients, Tensors
from tvmdcn.validation import check_shape, shown

__all__ = ["deform_conv2d_grad_reference", "expected_gradients", "reference_grad"]

# Output pixels are taken in blocks of about this many sampled numbers, which bounds the memory of a call.
_BLOCK_ELEMENTS = 1 << 19


def deform_conv2d_grad_reference(
    grad_output: np.ndarray,
    input: np.ndarray,
    offset: np.ndarray,
    weight: np.ndarray,
    mask: np.ndarray | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    layout: str = "NCHW",
    coordinate_dtype: str = "float64",
    border: str = "torchvision",
) -> Gradients:
    """Compute the gradients of a deformable convolution in float64.

    Where a sample is 0 because of its place (see :func:`deform_conv2d_reference`), input, weight and mask get
    nothing from it. Neither does the offset, with one exception that `border` decides about.

    Parameters
    ----------
    grad_output : (N, Cout, Ho, Wo)
        The gradient of the output; any real dtype, as are all others. With ``layout="NHWC"`` (N, Ho, Wo, Cout),
        and so on for `input`, `offset`, `mask` and their gradients.
    input, offset, weight, mask, stride, padding, dilation, layout, coordinate_dtype
        As of :func:`deform_conv2d_reference`.
    border : {"torchvision", "mmcv"}
        The derivative by the place of a sample exactly on -1: that of the interpolation to its right or below
        (corners at ``floor`` and ``floor + 1``, those outside worth 0), or 0.

    Returns
    -------
    Gradients
        float64, each of the shape of what it is the gradient of; the mask's is None without a mask.

    Raises
    ------
    SpecError, SpecTypeError
        If the arguments do not fit one another.
    """
    if coordinate_dtype not in ("float32", "float64"):
        raise SpecError(f"coordinate_dtype must be float32 or float64, got {shown(coordinate_dtype)}.")
    if border not in BORDERS:
        raise SpecError(f"border must be one of {', '.join(BORDERS)}, got {shown(border)}.")
    if layout == "NHWC":
        grad_output, input, offset = (np.moveaxis(array, -1, 1) for array in (grad_output, input, offset))
        mask = None if mask is None else np.moveaxis(mask, -1, 1)
    shapes = (input.shape, offset.shape, weight.shape, None if mask is None else mask.shape, None)
    spec, extents = DeformConv2dSpec.from_shapes(*shapes, stride, padding, dilation, dtype="float64")
    expected = spec.output_shape(extents)
    if check_shape("grad_output", grad_output.shape, OUTPUT_AXES) != expected:
        raise SpecError(f"grad_output must be of the output's shape {expected}, got {grad_output.shape}.")

    total = _Sums.zeros(spec, extents)
    # 1e300 becomes infinite in float32, and infinities in the image meet weights of 0: both are wanted.
    with np.errstate(over="ignore", invalid="ignore"):
        positions = np.stack(sample_positions(spec, extents, offset, np.dtype(coordinate_dtype)))
        # [taps, groups, Cout / groups, Cin / groups]
        taps = weight.astype(np.float64).reshape(spec.groups, -1, spec.in_channels // spec.groups, spec.taps)
        taps = taps.transpose(3, 0, 1, 2)
        modulation = None if mask is None else mask.astype(np.float64).reshape(positions.shape[1:])
        block = max(1, _BLOCK_ELEMENTS // spec.in_channels)
        for image in range(extents.batch):
            # One row per pixel, and a last one, which stands for all that lies outside.
            pixels = input[image].astype(np.float64).reshape(spec.in_channels, -1).T
            pixels = np.concatenate([pixels, np.zeros((1, spec.in_channels))])
            outer = grad_output[image].astype(np.float64).reshape(spec.out_channels, -1).T.copy()
            for start in range(0, len(outer), block):
                here = slice(start, start + block)
                part = (
                    outer[here],
                    positions[:, image, :, :, here],
                    None if modulation is None else modulation[image, :, :, here],
                )
                total.add(spec, extents, border, image, start, pixels, taps, *part)

    def ordered(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array if layout == "NCHW" else np.moveaxis(array, 1, -1))

    return Gradients(
        input=ordered(total.input[:, :-1].swapaxes(1, 2).reshape(spec.input_shape(extents))),
        offset=ordered(np.moveaxis(total.offset, 0, 3).reshape(spec.offset_shape(extents))),
        weight=np.ascontiguousarray(total.weight.transpose(1, 2, 3, 0)).reshape(spec.weight_shape),
        bias=total.bias,
        mask=None if mask is None else ordered(total.mask.reshape(spec.mask_shape(extents))),
    )


def reference_grad(
    spec: DeformConv2dGradSpec, tensors: Tensors, grad_output: np.ndarray, coordinate_dtype: str | None = None
) -> Gradients:
    """Compute the gradients of `spec` on `tensors` in float64; those not asked for are None.

    Parameters
    ----------
    spec : DeformConv2dGradSpec
        The layer and the gradients; the tensors are in the order of its layout.
    tensors : Tensors
        Of any real dtype.
    grad_output : ndarray
        The gradient of the output.
    coordinate_dtype : str, optional
        As of :func:`deform_conv2d_grad_reference`; None is the dtype that kernels of `spec` compute places in,
        float64 for float64 and else float32.

    Raises
    ------
    SpecError, SpecTypeError
        If the tensors do not fit one another.
    """
    found = deform_conv2d_grad_reference(
        grad_output,
        tensors.input,
        tensors.offset,
        tensors.weight,
        tensors.mask,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.layout,
        spec.accumulator_dtype if coordinate_dtype is None else coordinate_dtype,
        spec.border,
    )
    return Gradients(*(g if f"grad_{n}" in spec.outputs else None for n, g in zip(found._fields, found, strict=True)))


def expected_gradients(spec: DeformConv2dGradSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what a kernel of `spec` has to compute from arguments by name, by the names of its outputs."""
    given: dict[str, Any] = {"mask": None, "bias": None, **tensors}
    grad_output = given.pop("grad_output")
    found = reference_grad(spec, Tensors(**given), grad_output)
    return {name: getattr(found, name.removeprefix("grad_")) for name in spec.outputs}


@dataclass
class _Corner:
    """One of four corners of samples [offset_groups, taps, block].

    Attributes
    ----------
    index : array of int
        The pixel's number, H * W where there is none.
    weight : array
        Its share of the sample.
    slopes : pair of arrays
        The derivatives of its share by the row and by the column.
    """

    index: np.ndarray
    weight: np.ndarray
    slopes: tuple[np.ndarray, np.ndarray]


def _corners(extents: Extents, positions: np.ndarray, border: str) -> tuple[np.ndarray, list[_Corner]]:
    """Return where samples are not 0 because of their place, and the corners that slopes are made of."""
    sizes = (extents.height, extents.width)
    inside = [(place > -1) & (place < size) for place, size in zip(positions, sizes, strict=True)]
    # A NaN is neither inside nor sloped.
    sloped = [(place >= -1) & (place < size) for place, size in zip(positions, sizes, strict=True)]
    sampled = inside[0] & inside[1]
    used = sampled if border == "mmcv" else sloped[0] & sloped[1]
    rows, columns = (np.where(used, place, 0) for place in positions)
    corners = []
    for down in (0, 1):
        for right in (0, 1):
            row, column = np.floor(rows) + down, np.floor(columns) + right
            there = used & (row >= 0) & (row < sizes[0]) & (column >= 0) & (column < sizes[1])
            # The share falls linearly with the distance from the corner, from 1 to 0.
            vertical, horizontal = 1 - np.abs(rows - row), 1 - np.abs(columns - column)
            corners.append(
                _Corner(
                    np.where(there, row * sizes[1] + column, sizes[0] * sizes[1]).astype(np.intp),
                    vertical * horizontal,
                    ((1 if down else -1) * horizontal, (1 if right else -1) * vertical),
                )
            )
    return sampled, corners


@dataclass
class _Sums:
    """The gradients as they grow, in the order in which they are computed.

    Attributes
    ----------
    input : ``[N, H * W + 1, Cin]``; the last row takes what falls outside
    offset : ``[2, N, offset_groups, taps, Ho * Wo]``
    mask : ``[N, offset_groups, taps, Ho * Wo]``
    weight : ``[taps, groups, Cout / groups, Cin / groups]``
    bias : ``[Cout]``
    """

    input: np.ndarray
    offset: np.ndarray
    mask: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def zeros(cls, spec: DeformConv2dSpec, extents: Extents) -> _Sums:
        height, width = spec.output_size(extents.height, extents.width)
        samples = (extents.batch, spec.offset_groups, spec.taps, height * width)
        return cls(
            np.zeros((extents.batch, extents.height * extents.width + 1, spec.in_channels)),
            np.zeros((2, *samples)),
            np.zeros(samples),
            np.zeros((spec.taps, spec.groups, spec.out_channels // spec.groups, spec.in_channels // spec.groups)),
            np.zeros(spec.out_channels),
        )

    def add(
        self,
        spec: DeformConv2dSpec,
        extents: Extents,
        border: str,
        image: int,
        start: int,
        pixels: np.ndarray,
        taps: np.ndarray,
        outer: np.ndarray,
        positions: np.ndarray,
        modulation: np.ndarray | None,
    ) -> None:
        """Add what a block of output pixels contributes."""
        block = len(outer)
        here = slice(start, start + block)
        sampled, corners = _corners(extents, positions, border)
        grouped = outer.reshape(block, spec.groups, -1).transpose(1, 0, 2)
        channels = spec.in_channels // spec.offset_groups
        columns = np.empty((block, spec.in_channels))
        self.bias += outer.sum(axis=0)
        for tap in range(spec.taps):
            # The gradient of the modulated samples, [block, Cin].
            back = (grouped @ taps[tap]).transpose(1, 0, 2).reshape(block, spec.in_channels)
            for group in range(spec.offset_groups):
                own = slice(group * channels, (group + 1) * channels)
                at = (group, tap)
                strength = np.ones(block) if modulation is None else modulation[at]
                source, gradient = pixels[:, own], back[:, own]
                modulated = gradient * strength[:, None]
                value = np.zeros((block, channels))
                for corner in corners:
                    read = source[corner.index[at]]
                    value += read * corner.weight[at][:, None]
                    along = np.einsum("pc,pc->p", modulated, read)
                    for axis in (0, 1):
                        self.offset[(axis, image, *at, here)] += along * corner.slopes[axis][at]
                    # A corner outside, and any of a sample that is 0, adds to the last row.
                    target = np.where(sampled[at], corner.index[at], len(pixels) - 1)
                    _scatter(self.input[image, :, own], target, modulated * corner.weight[at][:, None])
                value[~sampled[at]] = 0
                self.mask[(image, *at, here)] = np.einsum("pc,pc->p", gradient, value)
                columns[:, own] = value * strength[:, None]
            self.weight[tap] += grouped.transpose(0, 2, 1) @ columns.reshape(block, spec.groups, -1).transpose(1, 0, 2)


def _scatter(into: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
    """Add each row of `values` to the row of `into` with the number that `rows` gives."""
    order = np.argsort(rows, kind="stable")
    targets, first = np.unique(rows[order], return_index=True)
    into[targets] += np.add.reduceat(values[order], first, axis=0)
