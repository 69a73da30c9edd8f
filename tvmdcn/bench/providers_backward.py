# SPDX-License-Identifier: Apache-2.0
"""Who can compute the gradients of a deformable convolution: see :mod:`tvmdcn.bench.providers`.

All gradients that the specification asks for, and nothing of the forward: autograd's graph is recorded
beforehand and kept, so peers that kept columns for it are spared computing them again, as ours has to. ONNX
Runtime and OpenVINO have no gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tvmdcn.bench.provider import (
    BackwardTensors,
    Prepared,
    Unsupported,
    copied_bytes,
    from_nchw,
    nchw_only,
    to_nchw,
    torch_tensor,
)
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.tensors import Tensors

__all__ = [
    "named_results",
    "prepare_conv2d",
    "prepare_grid_sample",
    "prepare_ours",
    "prepare_ours_numpy",
    "prepare_ours_torch",
    "prepare_torchvision",
    "torch_tensors",
]

_IMAGES = ("input", "offset", "mask")


def prepare_ours(
    spec: DeformConv2dGradSpec, extents: Extents, tensors: BackwardTensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare our kernel: built or found, weight packed, results in place."""
    import tvmdcn

    kernel = tvmdcn.load(spec, schedule=schedule or "tuned")
    given = {name: array for name, array in vars(tensors).items() if array is not None}
    return Prepared(kernel.bind(given), lambda results: results, artifact=kernel.artifact.path.name)


def prepare_ours_numpy(
    spec: DeformConv2dGradSpec, extents: Extents, tensors: BackwardTensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare our kernel as :func:`prepare_ours`, but new results at each call; for the overhead of a call."""
    import tvmdcn

    kernel = tvmdcn.load(spec, schedule=schedule or "tuned")
    arguments = (tensors.grad_output, tensors.input, tensors.offset, kernel.pack(tensors.weight), tensors.mask)
    return Prepared(
        lambda: kernel(*arguments),
        lambda found: {name: getattr(found, name.removeprefix("grad_")) for name in spec.outputs},
    )


def prepare_ours_torch(
    spec: DeformConv2dGradSpec, extents: Extents, tensors: BackwardTensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare our kernel for torch tensors; for the overhead of a call, else as :func:`prepare_ours`."""
    import torch

    import tvmdcn

    torch.set_num_threads(threads)
    kernel = tvmdcn.load(spec, schedule=schedule or "tuned")
    named = torch_tensors(spec, tensors)
    packed = kernel.pack(named["weight"])
    arguments = (named["grad_output"], named["input"], named["offset"], packed, named.get("mask"))
    return Prepared(lambda: kernel(*arguments), lambda found: named_results(spec, found._asdict()))


def torch_tensors(spec: DeformConv2dSpec, tensors: Tensors) -> dict[str, Any]:
    """Return the tensors that the problem has, by name, images as N, C, H, W in the memory of the arrays."""
    named = {}
    for name, array in vars(tensors).items():
        if array is not None:
            tensor = torch_tensor(array, spec)
            image = name in (*_IMAGES, "grad_output")
            named[name] = tensor.permute(0, 3, 1, 2) if image and spec.layout == "NHWC" else tensor
    return named


def named_results(spec: DeformConv2dSpec, found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return torch gradients, by what they are the gradients of, as arrays by the names of the outputs."""
    results = {}
    for output in spec.outputs:
        name = output.removeprefix("grad_")
        array = found[name].double().numpy()
        results[output] = from_nchw(array, spec) if name in _IMAGES else array
    return results


def _leaves(spec: DeformConv2dSpec, tensors: BackwardTensors) -> dict[str, Any]:
    """Return dense NCHW tensors by name; those whose gradients are asked for require them."""
    bias = np.zeros(spec.out_channels, tensors.weight.dtype) if tensors.bias is None else tensors.bias
    leaves = {"weight": torch_tensor(tensors.weight, spec), "bias": torch_tensor(bias, spec)}
    for name in (*_IMAGES, "grad_output"):
        array = getattr(tensors, name)
        if array is not None:
            leaves[name] = torch_tensor(to_nchw(array, spec), spec)
    for name in spec.outputs:
        leaves[name.removeprefix("grad_")].requires_grad_()
    return leaves


def _by_autograd(spec: DeformConv2dSpec, tensors: Tensors, leaves: dict[str, Any], output: Any) -> Prepared:
    """Return the backward of a recorded output; the graph is kept from call to call."""
    import torch

    asked = [name.removeprefix("grad_") for name in spec.outputs]
    inputs = [leaves[name] for name in asked]
    return Prepared(
        lambda: torch.autograd.grad(output, inputs, leaves["grad_output"], retain_graph=True),
        lambda found: named_results(spec, dict(zip(asked, found, strict=True))),
        copied_bytes(tensors, (leaves.get(name) for name in (*_IMAGES, "grad_output"))),
        note=nchw_only(spec),
    )


def prepare_torchvision(
    spec: DeformConv2dGradSpec, extents: Extents, tensors: BackwardTensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare the backward of ``torchvision.ops.deform_conv2d``."""
    import torch
    from torchvision.ops import deform_conv2d

    if spec.padding[:2] != spec.padding[2:]:
        raise Unsupported(f"torchvision has no asymmetric padding, asked for {spec.padding}.")
    torch.set_num_threads(threads)
    leaves = _leaves(spec, tensors)
    arguments = (leaves["input"], leaves["offset"], leaves["weight"], leaves["bias"])
    output = deform_conv2d(*arguments, spec.stride, spec.padding[:2], spec.dilation, mask=leaves.get("mask"))
    return _by_autograd(spec, tensors, leaves, output)


def prepare_grid_sample(
    spec: DeformConv2dGradSpec, extents: Extents, tensors: BackwardTensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare the backward of the layer written with ``torch.nn.functional.grid_sample`` and a product.

    Its zero padding is the border rule of a deformable convolution. The fastest of three such forms on Zen 5,
    2 threads, torch 2.13 (2026-11-22), r50_c3: 38 ms with the channels of an image divided among threads, as
    here; 66 ms undivided, for torch samples an image on one thread; 44 ms with ``embedding_bag`` of rows of channels.
    """
    import torch

    torch.set_num_threads(threads)
    leaves = _leaves(spec, tensors)
    image, offset = leaves["input"], leaves["offset"]
    batch, channels, height, width = image.shape
    size, taps = offset.shape[2:], spec.taps
    moved = offset.reshape(batch, spec.offset_groups, *spec.kernel_size, 2, *size)
    places = []
    for axis, extent in enumerate((height, width)):
        tap = torch.arange(spec.kernel_size[axis], dtype=offset.dtype) * spec.dilation[axis]
        pixel = torch.arange(size[axis], dtype=offset.dtype) * spec.stride[axis] - spec.padding[axis]
        base = tap[:, None, None, None] + pixel[:, None] if axis == 0 else tap[:, None, None] + pixel
        # grid_sample's coordinates: from -1 to 1 between the outer edges of the image, columns first.
        places.append((2 * (base + moved[:, :, :, :, axis]) + 1) / extent - 1)
    blocks = _blocks(channels // spec.offset_groups, -(-threads // max(batch * spec.offset_groups, 1)))
    images = batch * spec.offset_groups * blocks
    grid = torch.stack(places[::-1], -1).reshape(batch, spec.offset_groups, 1, taps * size[0], size[1], 2)
    samples = torch.nn.functional.grid_sample(
        image.reshape(images, channels // spec.offset_groups // blocks, height, width),
        grid.expand(-1, -1, blocks, -1, -1, -1).reshape(images, taps * size[0], size[1], 2),
        padding_mode="zeros",
        align_corners=False,
    ).reshape(batch, spec.offset_groups, -1, taps, size[0] * size[1])
    if spec.mask:
        samples = samples * leaves["mask"].reshape(batch, spec.offset_groups, 1, taps, -1)
    depth = channels // spec.groups * taps
    product = leaves["weight"].reshape(spec.groups, -1, depth) @ samples.reshape(batch, spec.groups, depth, -1)
    output = product.reshape(batch, spec.out_channels, *size) + leaves["bias"][:, None, None]
    return _by_autograd(spec, tensors, leaves, output)


def _blocks(channels: int, least: int) -> int:
    """Return the smallest divisor of `channels` that is at least `least`, all of them if there is none."""
    return next((count for count in range(least, channels) if channels % count == 0), channels)


def prepare_conv2d(
    spec: DeformConv2dGradSpec, extents: Extents, tensors: BackwardTensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare the gradients of ``torch.conv2d`` of the same shape, in the memory format that `schedule` names.

    Asymmetric padding is applied beforehand, untimed.
    """
    import torch

    torch.set_num_threads(threads)
    memory_format = getattr(torch, schedule or "contiguous_format")
    image, weight, grad_output = (
        torch_tensor(array, spec)
        for array in (to_nchw(tensors.input, spec), tensors.weight, to_nchw(tensors.grad_output, spec))
    )
    top, left, bottom, right = spec.padding
    padding: tuple[int, int] = (top, left)
    if (top, left) != (bottom, right):
        image, padding = torch.nn.functional.pad(image, (left, right, top, bottom)), (0, 0)
    arguments = [tensor.contiguous(memory_format=memory_format) for tensor in (grad_output, image, weight)]
    geometry = ([spec.out_channels], spec.stride, padding, spec.dilation, False, (0, 0), spec.groups)
    asked = (spec.grad_input or spec.grad_offset, spec.grad_weight, spec.grad_bias)

    def call() -> Any:
        with torch.inference_mode():
            return torch.ops.aten.convolution_backward(*arguments, *geometry, asked)

    return Prepared(call, None, copied_bytes(tensors, (arguments[0], arguments[1])))
