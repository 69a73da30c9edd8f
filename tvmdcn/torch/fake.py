# SPDX-License-Identifier: Apache-2.0
"""Shapes and memory formats without memory: what fake and meta tensors, compilers and exports compute with.

Sizes may be symbols. Those that a kernel is built for (channels, taps) become numbers; batch and image sizes
stay symbols, and are only compared with one another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tvmdcn.arrays import TorchArrays
from tvmdcn.errors import SpecError, SpecTypeError, TvmdcnError
from tvmdcn.spec import DeformConv2dSpec

__all__ = ["Geometry", "arrays", "check", "empty_gradients", "empty_output", "layout_of", "new_image"]

Geometry = tuple[Any, Any, Any]
"""stride, padding, dilation, as :class:`tvmdcn.DeformConv2dSpec` takes them."""
Shape = tuple[Any, ...]
"""Sizes that are ints or symbols."""

arrays = TorchArrays(torch)


def check(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: Geometry
) -> tuple[DeformConv2dSpec, Shape]:
    """Check a call's shapes and dtypes as the kernels do, in the same words.

    Returns
    -------
    (DeformConv2dSpec, (N, Cout, Ho, Wo))
        The layer, in NCHW, and the output's shape.

    Raises
    ------
    SpecError, SpecTypeError
        If the arguments do not fit one another, for sizes that are symbols: as far as that is known.
    """
    named = {"input": input, "offset": offset, "weight": weight, "mask": mask, "bias": bias}
    for name in ("input", "offset", "weight"):
        arrays.check_kind(name, named[name])  # the dispatcher lets None through
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor.device != input.device:
            raise SpecTypeError(f"{name} is on device {tensor.device}, and input on {input.device}: bring it there.")
    shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    options: dict[str, Any] = dict(zip(("stride", "padding", "dilation"), geometry, strict=True))
    options["dtype"] = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    if any(type(size) is not int for shape in shapes.values() for size in shape):
        layer = _layer_of_symbols(shapes, options)
        if layer is not None:
            return layer, (shapes["input"][0], layer.out_channels, *shapes["offset"][2:])
    numbers: dict[str, Any] = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
    layer, extents = DeformConv2dSpec.from_shapes(**numbers, **options)
    return layer, layer.output_shape(extents)


def _layer_of_symbols(shapes: dict[str, Shape], options: dict[str, Any]) -> DeformConv2dSpec | None:
    """Return the layer of shapes with symbols; None if something is wrong, so that numbers are needed to say it."""
    if any(len(shapes[name]) != 4 for name in shapes if name != "bias"):
        return None
    # The layer depends on no batch and image size: it is derived as for an image of one output pixel.
    kernel = [int(size) for size in shapes["weight"][2:]]
    dilation = options["dilation"] if isinstance(options["dilation"], Sequence) else [options["dilation"]] * 2
    sizes = {
        "input": [each * (taps - 1) + 1 for each, taps in zip(dilation, kernel, strict=False)],
        "weight": kernel,
    }
    stand_ins: dict[str, Any] = {
        name: tuple(map(int, shape)) if name == "bias" else (1, int(shape[1]), *sizes.get(name, (1, 1)))
        for name, shape in shapes.items()
    }
    stand_ins["weight"] = (int(shapes["weight"][0]), *stand_ins["weight"][1:])
    try:
        layer, _ = DeformConv2dSpec.from_shapes(**stand_ins, **{**options, "padding": 0})
        layer = dataclasses.replace(layer, padding=options["padding"])
    except TvmdcnError:
        return None
    batch, _, *image = shapes["input"]
    relations = [size >= 1 for size in image]
    for axis, size in enumerate(image):
        spare = size + layer.padding[axis] + layer.padding[axis + 2] - sizes["input"][axis]
        relations.append(spare >= 0)
        for name in ("offset", "mask"):
            if name in shapes:
                relations.append(shapes[name][2 + axis] == spare // layer.stride[axis] + 1)
    relations.extend(shapes[name][0] == batch for name in ("offset", "mask") if name in shapes)
    return layer if all(map(_holds, relations)) else None


def _holds(relation: Any) -> bool:
    """Return whether a relation between sizes is true; where it depends on data, it is asserted at run time."""
    try:
        return bool(relation)
    except GuardOnDataDependentSymNode:
        torch._check(relation)
        return True


def layout_of(input: Tensor) -> str:
    """Return the layout in which the kernels compute: NHWC for an input in channels_last, else NCHW."""
    if _is_contiguous(input, torch.contiguous_format):
        return "NCHW"
    return "NHWC" if _is_contiguous(input, torch.channels_last) else "NCHW"


def _is_contiguous(input: Tensor, memory_format: torch.memory_format) -> bool:
    try:
        return input.is_contiguous(memory_format=memory_format)
    except GuardOnDataDependentSymNode:  # a part of an image, as large as the data says
        return False


def new_image(like: Tensor, shape: Shape, layout: str) -> Tensor:
    """Return an uninitialised tensor (N, C, H, W) in the memory format of a layout."""
    if layout == "NCHW":
        return like.new_empty(shape)
    _, channels, height, width = shape
    return like.new_empty_strided(shape, (height * width * channels, 1, width * channels, channels))


def empty_output(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: Geometry
) -> Tensor:
    """Return what stands for the output of ``tvmdcn::deform_conv2d``."""
    _, shape = check(input, offset, weight, bias, mask, geometry)
    return new_image(input, shape, layout_of(input))


def empty_gradients(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return what stands for the outputs of ``tvmdcn::deform_conv2d_backward``."""
    layer, shape = check(input, offset, weight, None, mask, geometry)
    if grad_output.device != input.device:
        raise SpecTypeError(f"grad_output is on device {grad_output.device}, and input on {input.device}.")
    found = tuple(grad_output.shape)
    if len(found) != 4 or not all(_holds(size == wanted) for size, wanted in zip(found, shape, strict=True)):
        raise SpecError(f"grad_output must be of the output's shape {shape}, got {found}.")
    layout = layout_of(input)

    def image(like: Tensor | None, needed: bool) -> Tensor:
        return input.new_empty(0) if like is None or not needed else new_image(input, tuple(like.shape), layout)

    def plain(shape: Shape, needed: bool) -> Tensor:
        return input.new_empty(shape if needed else (0,))

    return (
        image(input, needs[0]),
        image(offset, needs[1]),
        plain(layer.weight_shape, needs[2]),
        plain((layer.out_channels,), needs[3]),
        image(mask, needs[4]),
    )
