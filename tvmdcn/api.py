# SPDX-License-Identifier: Apache-2.0
"""The operator as a function, with torchvision's signature: the kernel is found, or built, by itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

from tvmdcn.arrays import NumpyArrays, TorchArrays, arrays_of
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.foreign import call_with, framework_of
from tvmdcn.kernel import Kernel
from tvmdcn.runtime import load_for
from tvmdcn.spec import BORDERS, DeformConv2dSpec
from tvmdcn.validation import check_padding, check_pair, shown

__all__ = ["call_kernel", "check_border", "deform_conv2d"]

_kernels: dict[Hashable, Kernel] = {}
_lock = threading.Lock()
_MAX_KERNELS = 1024


def deform_conv2d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Any = None,
    *,
    border: str = "torchvision",
) -> Any:
    """Compute a deformable convolution (DCNv1; DCNv2 with a mask).

    ``out[n, o, y, x] = bias[o] + sum over taps k and channels c of weight[o, c, k] * mask[k] * input[n, c,
    p]`` with ``p = (y, x) * stride - padding + k * dilation + offset[k]``, interpolated bilinearly; 0 outside
    the image. The signature and the meaning are those of ``torchvision.ops.deform_conv2d``.

    The first call of a layer loads its kernel, or builds it and keeps it on disk for later processes
    (seconds; see TVMDCN_BUILD). One kernel serves all batch and image sizes.

    With torch tensors, autograd, ``torch.compile``, ``torch.export``, ``torch.func``, autocast and fake tensors
    work as with torch's own operators; inside them the call is one of ``torch.ops.tvmdcn.deform_conv2d``.

    Parameters
    ----------
    input : (N, Cin, H, W)
        torch.Tensor on the CPU or an NVIDIA GPU (or "meta"), numpy.ndarray, or an array of CuPy or JAX; float16,
        bfloat16, float32 or float64. A torch tensor in ``torch.channels_last`` is taken as it is, and so is the
        result.
    offset : (N, offset_groups * 2 * kh * kw, Ho, Wo)
        y before x, taps row by row, offset groups outermost. Of the kind and dtype of `input`, as the
        following.
    weight : (Cout, Cin / groups, kh, kw)
        A torch weight is brought into the kernel's order once, and again when it changes.
    bias : (Cout,), optional
    stride, padding, dilation : int or (vertical, horizontal)
        Padding also (top, left, bottom, right).
    mask : (N, offset_groups * kh * kw, Ho, Wo), optional
        Modulation of the samples.
    border : {"torchvision", "mmcv"}
        Changes only the offset's gradient, at samples exactly on -1, as those of a padded layer with offsets of
        zero: torchvision's is the derivative to the right or below, that of mmcv and of the original DCNv2 is 0.

    Returns
    -------
    torch.Tensor or numpy.ndarray
        (N, Cout, Ho, Wo), of the input's kind, dtype and memory format.

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is wrong.
    ArtifactError, BuildError
        If there is no kernel, and none can be built.
    """
    check_border(border)
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling() and isinstance(input, torch.Tensor):
        from tvmdcn.torch.ops import call_operator

        return call_operator(input, offset, weight, bias, stride, padding, dilation, mask, border)
    try:
        arrays = arrays_of(input)
    except SpecTypeError:
        framework = framework_of(input)
        if framework is None:
            raise
        given = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
        options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "border": border}
        return call_with(framework, given, partial(deform_conv2d, **options))
    if isinstance(arrays, TorchArrays):
        if not arrays.is_plain_call(input, offset, weight, bias, mask):
            from tvmdcn.torch.ops import call_operator

            return call_operator(input, offset, weight, bias, stride, padding, dilation, mask, border)
        if arrays.needs_gradients(input, offset, weight, bias, mask):
            from tvmdcn.torch.autograd import call_recorded

            return call_recorded(input, offset, weight, bias, stride, padding, dilation, mask, border)
    return call_kernel(arrays, input, offset, weight, bias, stride, padding, dilation, mask)


def check_border(border: Any) -> None:
    """Raise SpecError unless `border` is known."""
    if border not in BORDERS:
        raise SpecError(f"border must be one of {', '.join(BORDERS)}, got border={shown(border)}.")


def call_kernel(
    arrays: NumpyArrays | TorchArrays,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    mask: Any,
) -> Any:
    """Check the arguments of :func:`deform_conv2d`, find the kernel for them, and call it.

    Raises
    ------
    SpecError, SpecTypeError, ArtifactError, BuildError
        As :func:`deform_conv2d`; also if a torch tensor requires gradients.
    """
    if type(stride) is not int:
        stride = check_pair("stride", stride, 1)
    if type(padding) is not int:
        padding = check_padding(padding)
    if type(dilation) is not int:
        dilation = check_pair("dilation", dilation, 1)
    layout = _layout(arrays, input)
    try:
        taps_and_channels = (weight.shape, offset.shape[1], input.shape[1])
        key = (taps_and_channels, mask is None, input.dtype, stride, padding, dilation, layout, arrays.gpu(input))
        kernel = _kernels.get(key)
    except (AttributeError, IndexError, TypeError):  # not an array, or too few axes: the check says which
        kernel = None
    if kernel is None:
        kernel = _find(arrays, input, offset, weight, bias, stride, padding, dilation, mask, layout)
        with _lock:
            if len(_kernels) >= _MAX_KERNELS:
                _kernels.clear()
            _kernels[key] = kernel
    return kernel(input, offset, weight, bias, mask)


def _layout(arrays: NumpyArrays | TorchArrays, input: Any) -> str:
    """Return the layout in which an input needs no copy; NCHW if both do, or neither."""
    if type(arrays) is NumpyArrays or input.is_contiguous():
        return "NCHW"
    return "NHWC" if arrays.is_dense(input, "NHWC") else "NCHW"


def _find(
    arrays: NumpyArrays | TorchArrays,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    mask: Any,
    layout: str,
) -> Kernel:
    """Check a call's arguments and load the kernel for them."""
    named = {"input": input, "offset": offset, "weight": weight, "mask": mask, "bias": bias}
    named = {name: array for name, array in named.items() if array is not None or name in ("offset", "weight")}
    for name, array in named.items():
        arrays.check(name, array)
    spec, _ = DeformConv2dSpec.from_shapes(
        **{name: arrays.channels_first_shape(array, "NCHW") for name, array in named.items()},
        stride=stride,
        padding=padding,
        dilation=dilation,
        dtype={name: arrays.dtype(array) for name, array in named.items()},
        layout=layout,
    )
    return load_for(spec, arrays.gpu(input))
