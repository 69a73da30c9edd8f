# SPDX-License-Identifier: Apache-2.0
"""The operator as a function, with torchvision's signature: the kernel is found, or built, by itself."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import Any

from tvmdcn.arrays import NumpyArrays, TorchArrays, arrays_of
from tvmdcn.kernel import Kernel
from tvmdcn.runtime import load
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.validation import check_padding, check_pair

__all__ = ["deform_conv2d"]

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
) -> Any:
    """Compute a deformable convolution (DCNv1; DCNv2 with a mask).

    ``out[n, o, y, x] = bias[o] + sum over taps k and channels c of weight[o, c, k] * mask[k] * input[n, c,
    p]`` with ``p = (y, x) * stride - padding + k * dilation + offset[k]``, interpolated bilinearly; 0 outside
    the image. The signature and the meaning are those of ``torchvision.ops.deform_conv2d``.

    The first call of a layer loads its kernel, or builds it and keeps it on disk for later processes
    (seconds; see TVMDCN_BUILD). One kernel serves all batch and image sizes.

    Parameters
    ----------
    input : (N, Cin, H, W)
        torch.Tensor on the CPU or numpy.ndarray; float16, bfloat16, float32 or float64. A torch tensor in
        ``torch.channels_last`` is taken as it is, and so is the result.
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

    Returns
    -------
    torch.Tensor or numpy.ndarray
        (N, Cout, Ho, Wo), of the input's kind, dtype and memory format.

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is wrong; also if a torch tensor requires gradients outside ``torch.no_grad()``.
    ArtifactError, BuildError
        If there is no kernel, and none can be built.
    """
    arrays = arrays_of(input)
    if type(stride) is not int:
        stride = check_pair("stride", stride, 1)
    if type(padding) is not int:
        padding = check_padding(padding)
    if type(dilation) is not int:
        dilation = check_pair("dilation", dilation, 1)
    layout = _layout(arrays, input)
    try:
        taps_and_channels = (weight.shape, offset.shape[1], input.shape[1])
        key = (taps_and_channels, mask is None, input.dtype, stride, padding, dilation, layout)
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
    if isinstance(arrays, TorchArrays):
        # Before a build that would be for nothing.
        arrays.refuse_gradients(*named.values())
    return load(spec)
