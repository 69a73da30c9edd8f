# SPDX-License-Identifier: Apache-2.0
"""Who can compute a deformable convolution: our kernels, the peers, and a plain convolution as the floor.

Each provider is prepared as a user who infers with it would: weights constant or packed, the session
compiled, outputs in place where the library allows it. Tensors come in the order of the specification's
layout; those who know NCHW only get a copy in that order beforehand, so no conversion is timed. The functions
named in :data:`PROVIDERS` run in worker processes (:mod:`tvmdcn.bench.worker`) and import what they need
there. Those of gradients are in :mod:`tvmdcn.bench.providers_backward`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tvmdcn.bench.measurement import DIRECTIONS
from tvmdcn.bench.provider import (
    Prepared,
    Provider,
    Unsupported,
    copied_bytes,
    from_nchw,
    nchw_only,
    to_nchw,
    torch_tensor,
)
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tensors import Tensors

__all__ = ["PROVIDERS", "default_providers"]


def _table(*providers: Provider) -> dict[str, Provider]:
    return {provider.name: provider for provider in providers}


_HERE, _BACKWARD = "tvmdcn.bench.providers", "tvmdcn.bench.providers_backward"

PROVIDERS = _table(
    *(
        Provider(
            f"ours-{schedule}",
            "ours",
            f"{_HERE}:prepare_ours",
            schedule=schedule,
            backward=f"{_BACKWARD}:prepare_ours",
        )
        for schedule in ("tuned", "default", "naive")
    ),
    Provider("onnxruntime", "peer", f"{_HERE}:prepare_onnxruntime", "onnxruntime"),
    Provider("openvino", "peer", f"{_HERE}:prepare_openvino", "openvino"),
    Provider(
        "torchvision",
        "peer",
        f"{_HERE}:prepare_torchvision",
        "torchvision",
        optional=True,
        backward=f"{_BACKWARD}:prepare_torchvision",
    ),
    Provider("torch-grid-sample", "peer", None, "torch", backward=f"{_BACKWARD}:prepare_grid_sample"),
    *(
        Provider(
            name, "floor", f"{_HERE}:prepare_conv2d", "torch", memory_format, backward=f"{_BACKWARD}:prepare_conv2d"
        )
        for name, memory_format in (("conv2d-nchw", "contiguous_format"), ("conv2d-channels-last", "channels_last"))
    ),
)


def default_providers(directions: Iterable[str] = DIRECTIONS) -> list[Provider]:
    """Return the providers of a benchmark that names none.

    All that compute one of the directions but optional ones that are not installed.
    """
    wanted = list(directions)
    return [
        provider
        for provider in PROVIDERS.values()
        if (provider.installed or not provider.optional) and any(map(provider.source_of, wanted))
    ]


def _bias(tensors: Tensors, spec: DeformConv2dSpec) -> np.ndarray:
    if tensors.bias is not None:
        return tensors.bias
    return np.zeros(spec.out_channels, tensors.weight.dtype)


def prepare_ours(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare our kernel: built or found, weight packed, output in place."""
    import tvmdcn

    kernel = tvmdcn.load(spec, schedule=schedule or "tuned")
    packed = kernel.pack(tensors.weight)
    out = np.empty(spec.output_shape(extents), tensors.input.dtype)
    arguments = (tensors.input, tensors.offset, packed, tensors.bias, tensors.mask)
    artifact = kernel.artifact.path.name
    return Prepared(lambda: kernel(*arguments, out=out), lambda result: result, artifact=artifact)


def prepare_ours_torch(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare our kernel for torch tensors; for the overhead of a call, else as :func:`prepare_ours`."""
    import torch

    import tvmdcn

    torch.set_num_threads(threads)
    kernel = tvmdcn.load(spec, schedule=schedule or "tuned")

    def image(array: np.ndarray | None) -> Any:
        """Return a tensor in the order of NCHW over the array's memory: channels last where that is NHWC."""
        if array is None or spec.layout == "NCHW":
            return None if array is None else torch_tensor(array, spec)
        return torch_tensor(array, spec).permute(0, 3, 1, 2)

    out = image(np.empty(spec.output_shape(extents), tensors.input.dtype))
    bias = None if tensors.bias is None else torch_tensor(tensors.bias, spec)
    packed = kernel.pack(torch_tensor(tensors.weight, spec))
    arguments = (image(tensors.input), image(tensors.offset), packed, bias, image(tensors.mask))
    return Prepared(lambda: kernel(*arguments, out=out), lambda result: _torch_output(result, spec))


def prepare_onnxruntime(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare ONNX Runtime's ``DeformConv``: weight an initializer, inputs and output bound."""
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 25):
        raise Unsupported(
            f"onnxruntime {onnxruntime.__version__} has no competitive DeformConv on CPU; "
            "pip install 'onnxruntime>=1.25'."
        )
    feeds = {"X": to_nchw(tensors.input, spec), "offset": to_nchw(tensors.offset, spec)}
    if tensors.mask is not None:
        feeds["mask"] = to_nchw(tensors.mask, spec)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        _onnx_model(spec, feeds, tensors.weight, _bias(tensors, spec)),
        options,
        providers=["CPUExecutionProvider"],
    )
    shape = (extents.batch, spec.out_channels, *spec.output_size(extents.height, extents.width))
    out = np.empty(shape, tensors.input.dtype)
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("Y", "cpu", 0, out.dtype, shape, out.ctypes.data)

    def call() -> Any:
        session.run_with_iobinding(binding)
        return feeds  # the binding keeps their addresses only: this keeps them

    copied = copied_bytes(tensors, feeds.values())
    return Prepared(call, lambda _: from_nchw(out, spec), copied, note=nchw_only(spec))


def _onnx_model(spec: DeformConv2dSpec, feeds: dict[str, np.ndarray], weight: np.ndarray, bias: np.ndarray) -> bytes:
    """Return an ONNX model of one ``DeformConv`` (opset 19; 22 for bfloat16)."""
    try:
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise Unsupported("building its model needs the package onnx: pip install onnx.") from error

    dtype = helper.np_dtype_to_tensor_dtype(weight.dtype)
    node = helper.make_node(
        "DeformConv",
        ["X", "W", "offset", "B", *(["mask"] if "mask" in feeds else [])],
        ["Y"],
        kernel_shape=spec.kernel_size,
        strides=spec.stride,
        pads=spec.padding,
        dilations=spec.dilation,
        group=spec.groups,
        offset_group=spec.offset_groups,
    )
    graph = helper.make_graph(
        [node],
        "deform_conv",
        [helper.make_tensor_value_info(name, dtype, array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info("Y", dtype, [None] * 4)],
        [numpy_helper.from_array(weight, "W"), numpy_helper.from_array(bias, "B")],
    )
    opset = 22 if spec.dtype == "bfloat16" else 19
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return model.SerializeToString()


def prepare_openvino(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare OpenVINO's ``DeformableConvolution`` with torchvision's border rule, weight constant."""
    import openvino
    from openvino import opset8

    if spec.dtype == "bfloat16":
        raise Unsupported("OpenVINO takes no bfloat16 NumPy arrays.")
    arrays = [to_nchw(tensors.input, spec), to_nchw(tensors.offset, spec)]
    if tensors.mask is not None:
        arrays.append(to_nchw(tensors.mask, spec))
    parameters = [opset8.parameter(array.shape, array.dtype) for array in arrays]
    product = opset8.deformable_convolution(
        parameters[0],
        parameters[1],
        opset8.constant(tensors.weight),
        list(spec.stride),
        list(spec.padding[:2]),
        list(spec.padding[2:]),
        list(spec.dilation),
        mask=parameters[2] if tensors.mask is not None else None,
        auto_pad="EXPLICIT",
        group=spec.groups,
        deformable_group=spec.offset_groups,
        bilinear_interpolation_pad=True,
    )
    if tensors.bias is not None:
        product = opset8.add(product, opset8.constant(tensors.bias.reshape(1, -1, 1, 1)))
    compiled = openvino.Core().compile_model(
        openvino.Model([product], parameters),
        "CPU",
        # Without the hint it would compute in bfloat16 where the processor can.
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": "f64" if spec.dtype == "float64" else "f32",
        },
    )
    request = compiled.create_infer_request()
    return Prepared(
        lambda: request.infer(arrays, share_inputs=True, share_outputs=True),
        lambda result: from_nchw(np.array(result[0]), spec),
        copied_bytes(tensors, arrays),
        note=nchw_only(spec),
    )


def _torch_output(result: Any, spec: DeformConv2dSpec) -> np.ndarray:
    return from_nchw(result.double().numpy(), spec)


def prepare_torchvision(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare ``torchvision.ops.deform_conv2d``."""
    import torch
    from torchvision.ops import deform_conv2d

    if spec.padding[:2] != spec.padding[2:]:
        raise Unsupported(f"torchvision has no asymmetric padding, asked for {spec.padding}.")
    torch.set_num_threads(threads)
    image, offset, mask = (
        None if array is None else torch_tensor(to_nchw(array, spec), spec)
        for array in (tensors.input, tensors.offset, tensors.mask)
    )
    weight = torch_tensor(tensors.weight, spec)
    bias = torch_tensor(_bias(tensors, spec), spec)
    geometry = (spec.stride, spec.padding[:2], spec.dilation)

    def call() -> Any:
        with torch.inference_mode():
            return deform_conv2d(image, offset, weight, bias, *geometry, mask=mask)

    copied = copied_bytes(tensors, (image, offset, mask))
    return Prepared(call, lambda result: _torch_output(result, spec), copied, note=nchw_only(spec))


def prepare_conv2d(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare ``torch.conv2d`` of the same shape, in the memory format that `schedule` names.

    Asymmetric padding is applied beforehand, untimed.
    """
    import torch

    torch.set_num_threads(threads)
    memory_format = getattr(torch, schedule or "contiguous_format")
    top, left, bottom, right = spec.padding
    image = torch_tensor(to_nchw(tensors.input, spec), spec)
    padding: tuple[int, int] = (top, left)
    if (top, left) != (bottom, right):
        image, padding = torch.nn.functional.pad(image, (left, right, top, bottom)), (0, 0)
    image = image.contiguous(memory_format=memory_format)
    weight = torch_tensor(tensors.weight, spec).contiguous(memory_format=memory_format)
    bias = torch_tensor(_bias(tensors, spec), spec)

    def call() -> Any:
        with torch.inference_mode():
            return torch.conv2d(image, weight, bias, spec.stride, padding, spec.dilation, spec.groups)

    return Prepared(call, None, copied_bytes(tensors, (image,)))
