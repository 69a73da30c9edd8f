# SPDX-License-Identifier: Apache-2.0
"""The gradients of a deformable convolution as a function: what autograd's backward calls."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import Any

from tvmdcn.arrays import NumpyArrays, TorchArrays, arrays_of
from tvmdcn.errors import SpecError
from tvmdcn.grad_kernel import GradKernel, refuse_second_derivatives
from tvmdcn.runtime import load_for
from tvmdcn.spec import BORDERS, DeformConv2dGradSpec, DeformConv2dSpec
from tvmdcn.tensors import Gradients
from tvmdcn.validation import check_padding, check_pair, shown

__all__ = ["deform_conv2d_backward"]

_kernels: dict[Hashable, GradKernel] = {}
_lock = threading.Lock()
_MAX_KERNELS = 1024


def deform_conv2d_backward(
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    mask: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    needs: Sequence[bool] = (True, True, True, True, True),
    border: str = "torchvision",
) -> Gradients:
    """Compute the gradients of :func:`tvmdcn.deform_conv2d`.

    A sample with an offset that is NaN, infinite or leads outside the image gets and gives no gradient. On a CPU the
    result is the same to the last bit whatever the number of threads. On a GPU the input's gradient is the same at
    every call only under ``torch.use_deterministic_algorithms(True)``; all others always are.

    Parameters
    ----------
    grad_output : (N, Cout, Ho, Wo)
        The gradient of the output; of the kind and dtype of `input`, as the following.
    input, offset, weight, mask, stride, padding, dilation
        As of :func:`tvmdcn.deform_conv2d`.
    needs : five of bool
        Which gradients to compute, in the order of :class:`Gradients`: input, offset, weight, bias, mask. What is
        not asked for is not computed, but offset and mask go together.
    border : {"torchvision", "mmcv"}
        The derivative by the offset of a sample exactly on -1 (such as those of a layer with padding whose
        offsets are still zeros): torchvision's is one-sided, that of mmcv and of the original DCNv2 is 0.

    Returns
    -------
    Gradients
        Each of the shape and dtype of what it is the gradient of, those of images in the memory format of
        `input`; None where it is not needed, and for a mask that is None.

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is wrong; also if a torch tensor requires gradients outside ``torch.no_grad()``: there
        is no second derivative.
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
    if type(needs) is not tuple or len(needs) != len(Gradients._fields):
        needs = _checked(needs)
    layout = "NCHW"
    kernel = None
    try:
        if isinstance(arrays, TorchArrays) and not input.is_contiguous() and arrays.is_dense(input, "NHWC"):
            layout = "NHWC"
        taps_and_channels = (weight.shape, offset.shape[1], input.shape[1])
        device = arrays.gpu(input), bool(needs[0]) and arrays.wants_determinism()
        key = (taps_and_channels, mask is None, input.dtype, stride, padding, dilation, layout, needs, border, device)
        kernel = _kernels.get(key)
    except (AttributeError, IndexError, TypeError):  # not an array, or too few axes: the check says which
        pass
    if kernel is None:
        found = _find(
            arrays, grad_output, input, offset, weight, stride, padding, dilation, mask, layout, needs, border
        )
        if found is None:
            return Gradients(None, None, None, None, None)
        with _lock:
            if len(_kernels) >= _MAX_KERNELS:
                _kernels.clear()
            kernel = _kernels[key] = found
    gradients = kernel(grad_output, input, offset, weight, mask)
    if mask is not None and needs[1] != needs[4]:  # a kernel gives both
        return gradients._replace(**{"offset" if needs[4] else "mask": None})
    return gradients


def _checked(needs: Any) -> tuple[bool, ...]:
    """Return which gradients are asked for."""
    names = Gradients._fields
    if not isinstance(needs, Sequence) or len(needs) != len(names):
        raise SpecError(f"needs must hold {len(names)} values ({', '.join(names)}), got {shown(needs)}.")
    return tuple(needs)


def _find(
    arrays: NumpyArrays | TorchArrays,
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    mask: Any,
    layout: str,
    needs: Sequence[bool],
    border: str,
) -> GradKernel | None:
    """Check a call's arguments and load the kernel for them; None if nothing is asked for."""
    named = {"input": input, "offset": offset, "weight": weight, "mask": mask}
    named = {name: array for name, array in named.items() if array is not None or name != "mask"}
    for name, array in named.items():
        arrays.check(name, array)
    layer, _ = DeformConv2dSpec.from_shapes(
        **{name: arrays.channels_first_shape(array, "NCHW") for name, array in named.items()},
        stride=stride,
        padding=padding,
        dilation=dilation,
        dtype={name: arrays.dtype(array) for name, array in named.items()},
        layout=layout,
    )
    arrays.check("grad_output", grad_output)
    if border not in BORDERS:
        raise SpecError(f"border must be one of {', '.join(BORDERS)}, got border={shown(border)}.")
    if isinstance(arrays, TorchArrays) and arrays.needs_gradients(grad_output, *named.values()):
        refuse_second_derivatives()  # before a build that would be for nothing
    of_offset = bool(needs[1]) or (mask is not None and bool(needs[4]))
    flags = {
        "grad_input": bool(needs[0]),
        "grad_offset": of_offset,
        "grad_weight": bool(needs[2]),
        "grad_bias": bool(needs[3]),
    }
    if not any(flags.values()):
        return None
    spec = DeformConv2dGradSpec.of(
        layer,
        **flags,
        border=border if of_offset else BORDERS[0],  # where nobody asks for the offset's, one kernel serves both
        deterministic=flags["grad_input"] and arrays.wants_determinism(),
    )
    return load_for(spec, arrays.gpu(input))
