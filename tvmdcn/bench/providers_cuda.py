# SPDX-License-Identifier: Apache-2.0
"""Who can compute a deformable convolution on a GPU: see :mod:`tvmdcn.bench.providers`.

Tensors are on the GPU beforehand, in the order of the problem's layout, and stay there. Those who know NCHW only get a
copy in that order, untimed. tf32 is allowed where the problem says so, to everyone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tvmdcn.bench.provider import BackwardTensors, Prepared, Provider, Unsupported, from_nchw, nchw_only, torch_tensor
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.tensors import Tensors

__all__ = ["GPU_PROVIDERS"]

_HERE = "tvmdcn.bench.providers_cuda"
_IMAGES = ("input", "offset", "mask", "grad_output")

GPU_PROVIDERS = {
    provider.name: provider
    for provider in (
        *(
            Provider(
                f"ours-cuda-{schedule}",
                "ours",
                f"{_HERE}:prepare_ours",
                "torch",
                schedule,
                backward=f"{_HERE}:prepare_ours_backward",
                device="cuda",
            )
            for schedule in ("tuned", "default")
        ),
        Provider(
            "torchvision-cuda",
            "peer",
            f"{_HERE}:prepare_torchvision",
            "torchvision",
            optional=True,
            backward=f"{_HERE}:prepare_torchvision_backward",
            device="cuda",
        ),
        *(
            Provider(
                name,
                "floor",
                f"{_HERE}:prepare_conv2d",
                "torch",
                memory_format,
                backward=f"{_HERE}:prepare_conv2d_backward",
                device="cuda",
            )
            for name, memory_format in (
                ("cudnn-conv2d-nchw", "contiguous_format"),
                ("cudnn-conv2d-channels-last", "channels_last"),
            )
        ),
    )
}
"""By name; none of them is measured unless it is asked for."""


def _torch(spec: DeformConv2dSpec) -> Any:
    """Return torch, set up for the problem."""
    import torch

    if not torch.cuda.is_available():
        raise Unsupported("torch finds no NVIDIA GPU.")
    torch.backends.cudnn.allow_tf32 = spec.tf32
    torch.backends.cuda.matmul.allow_tf32 = spec.tf32
    # The fastest of cuDNN's algorithms, found by trying them in the calls before the first measured one.
    torch.backends.cudnn.benchmark = True
    return torch


def _on_gpu(spec: DeformConv2dSpec, tensors: Tensors) -> dict[str, Any]:
    """Return the tensors that the problem has, by name, images as N, C, H, W in the memory of the layout."""
    named = {}
    for name, array in vars(tensors).items():
        if array is not None:
            tensor = torch_tensor(np.ascontiguousarray(array), spec).cuda()
            named[name] = tensor.permute(0, 3, 1, 2) if name in _IMAGES and spec.layout == "NHWC" else tensor
    if "bias" not in named:
        named["bias"] = named["weight"].new_zeros(spec.out_channels)
    return named


def _on_host(tensor: Any, spec: DeformConv2dSpec) -> np.ndarray:
    return from_nchw(tensor.double().cpu().numpy(), spec)


def prepare_ours(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare our kernel: built or found, weight packed, output in place."""
    import tvmdcn

    torch = _torch(spec)
    kernel = tvmdcn.load(spec, "cuda", schedule=schedule or "tuned")
    named = _on_gpu(spec, tensors)
    arguments = (named["input"], named["offset"], kernel.pack(named["weight"]), named["bias"], named.get("mask"))
    out = torch.empty_like(kernel(*arguments))
    return Prepared(
        lambda: kernel(*arguments, out=out), lambda result: _on_host(result, spec), artifact=kernel.artifact.path.name
    )


def _planar(named: dict[str, Any]) -> dict[str, Any]:
    """Return tensors contiguous in NCHW."""
    return {name: tensor.contiguous() for name, tensor in named.items()}


def _copied(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Return the bytes of tensors that are held a second time, in another order."""
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in after.items()
        if tensor.data_ptr() != before[name].data_ptr()
    )


def _symmetric(spec: DeformConv2dSpec) -> tuple[int, int]:
    if spec.padding[:2] != spec.padding[2:]:
        raise Unsupported(f"torchvision has no asymmetric padding, asked for {spec.padding}.")
    return spec.padding[0], spec.padding[1]


def prepare_torchvision(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare ``torchvision.ops.deform_conv2d``."""
    from torchvision.ops import deform_conv2d

    padding, torch = _symmetric(spec), _torch(spec)
    given = _on_gpu(spec, tensors)
    named = _planar(given)
    arguments = (named["input"], named["offset"], named["weight"], named["bias"], spec.stride, padding, spec.dilation)

    def call() -> Any:
        with torch.inference_mode():
            return deform_conv2d(*arguments, mask=named.get("mask"))

    return Prepared(call, lambda result: _on_host(result, spec), _copied(given, named), note=nchw_only(spec))


def _convolved(spec: DeformConv2dSpec, named: dict[str, Any], schedule: str | None, torch: Any) -> tuple[Any, Any]:
    """Return image and padding of a plain convolution, and its weight in the memory format that `schedule` names."""
    memory_format = getattr(torch, schedule or "contiguous_format")
    top, left, bottom, right = spec.padding
    image, padding = named["input"], (top, left)
    if (top, left) != (bottom, right):
        image, padding = torch.nn.functional.pad(image, (left, right, top, bottom)), (0, 0)
    named["input"] = image.contiguous(memory_format=memory_format)
    named["weight"] = named["weight"].contiguous(memory_format=memory_format)
    return named, padding


def prepare_conv2d(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare ``torch.conv2d`` of the same shape, which cuDNN computes; asymmetric padding is applied beforehand."""
    torch = _torch(spec)
    named, padding = _convolved(spec, _on_gpu(spec, tensors), schedule, torch)

    def call() -> Any:
        with torch.inference_mode():
            return torch.conv2d(
                named["input"], named["weight"], named["bias"], spec.stride, padding, spec.dilation, spec.groups
            )

    call()  # cuDNN tries its algorithms
    return Prepared(call, None)


# --- gradients --------------------------------------------------------------------------------------------------------


def _results(spec: DeformConv2dGradSpec, found: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return gradients, by what they are the gradients of, as arrays by the names of the outputs."""
    results = {}
    for output in spec.outputs:
        name = output.removeprefix("grad_")
        tensor = found[name]
        results[output] = _on_host(tensor, spec) if name in _IMAGES else tensor.double().cpu().numpy()
    return results


def prepare_ours_backward(
    spec: DeformConv2dGradSpec, extents: Extents, tensors: BackwardTensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare our kernel: built or found, weight packed."""
    import tvmdcn

    _torch(spec)
    kernel = tvmdcn.load(spec, "cuda", schedule=schedule or "tuned")
    named = _on_gpu(spec, tensors)
    packed = kernel.pack(named["weight"])
    arguments = (named["grad_output"], named["input"], named["offset"], packed, named.get("mask"))
    return Prepared(
        lambda: kernel(*arguments),
        lambda found: _results(spec, found._asdict()),
        artifact=kernel.artifact.path.name,
    )


def prepare_torchvision_backward(
    spec: DeformConv2dGradSpec, extents: Extents, tensors: BackwardTensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare the backward of ``torchvision.ops.deform_conv2d``."""
    from torchvision.ops import deform_conv2d

    padding, torch = _symmetric(spec), _torch(spec)
    given = _on_gpu(spec, tensors)
    named = _planar(given)
    asked = [name.removeprefix("grad_") for name in spec.outputs]
    for name in asked:
        named[name].requires_grad_()
    arguments = (named["input"], named["offset"], named["weight"], named["bias"], spec.stride, padding, spec.dilation)
    output, inputs = deform_conv2d(*arguments, mask=named.get("mask")), [named[name] for name in asked]
    return Prepared(
        # The graph is kept from call to call.
        lambda: torch.autograd.grad(output, inputs, named["grad_output"], retain_graph=True),
        lambda found: _results(spec, dict(zip(asked, found, strict=True))),
        _copied(given, {name: tensor.detach() for name, tensor in named.items()}),
        note=nchw_only(spec),
    )


def prepare_conv2d_backward(
    spec: DeformConv2dGradSpec, extents: Extents, tensors: BackwardTensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare the gradients of ``torch.conv2d`` of the same shape."""
    torch = _torch(spec)
    named, padding = _convolved(spec, _on_gpu(spec, tensors), schedule, torch)
    memory_format = getattr(torch, schedule or "contiguous_format")
    arguments = named["grad_output"].contiguous(memory_format=memory_format), named["input"], named["weight"]
    geometry = ([spec.out_channels], spec.stride, padding, spec.dilation, False, (0, 0), spec.groups)
    asked = (spec.grad_input or spec.grad_offset, spec.grad_weight, spec.grad_bias)

    def call() -> Any:
        with torch.inference_mode():
            return torch.ops.aten.convolution_backward(*arguments, *geometry, asked)

    call()  # cuDNN tries its algorithms
    return Prepared(call, None)
