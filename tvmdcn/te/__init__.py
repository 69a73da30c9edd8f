# SPDX-License-Identifier: Apache-2.0
"""What the operators compute, in TE and TIR: the table of what exists.

Adding an operator is a file here, one per kind of target in ``schedules/``, its specification, its reference, and a
row below; and where it is called in another way than the others, a class in :data:`tvmdcn.runtime.KERNELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvmdcn.reference import expected_output
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec
from tvmdcn.te import (
    deform_conv2d,
    deform_conv2d_grad,
    device_sampling,
    implicit_gemm,
    implicit_gemm_grad,
    products,
)
from tvmdcn.tensors import make_gradient_tensors, make_layer_tensors

__all__ = ["OPERATORS", "DeviceForm", "Operator", "operator_of"]


@dataclass(frozen=True)
class DeviceForm:
    """An operator's form for GPUs.

    Parameters
    ----------
    kernel : callable
        ``kernel(spec)`` is the unscheduled function.
    pack : callable
        ``pack(spec)`` is the function that brings the weight into the kernel's order, with its threads.
    packed_shape, packed_dtype : callable
        ``packed_shape(spec)`` and ``packed_dtype(spec)`` are those of the packed weight.
    granule : int
        What the number of output pixels is padded to.
    """

    kernel: Callable[..., Any]
    pack: Callable[..., Any]
    packed_shape: Callable[..., tuple[int, ...]]
    packed_dtype: Callable[..., str]
    granule: int


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Parameters
    ----------
    name : str
        Name of the operator, of its files, and of its function in a compiled module.
    spec : type
        Its specification.
    kernel : callable
        ``kernel(spec, *form)`` is the unscheduled function.
    pack : callable
        ``pack(spec, *form)`` is the function that brings the weight into the kernel's order.
    packed_shape : callable
        ``packed_shape(spec, *form)`` is the shape of the packed weight.
    form : callable
        ``form(spec, target)`` is how channels lie in vectors: what the three above take behind the specification.
    tensors : callable
        ``tensors(spec, extents)``: made-up arguments of a call, by name, to tune and test with.
    expected : callable
        ``expected(spec, tensors)``: the outputs for them in float64, by name, from other code.
    granule : int
        Output pixels in a unit of work.
    device : DeviceForm or None
        The form for GPUs; the fields above, from `kernel` to `form` and `granule`, are of the form for CPUs.
    """

    name: str
    spec: type
    kernel: Callable[..., Any]
    pack: Callable[..., Any]
    packed_shape: Callable[..., tuple[int, ...]]
    form: Callable[..., tuple[int, ...]]
    tensors: Callable[..., dict[str, np.ndarray]]
    expected: Callable[..., dict[str, np.ndarray]]
    granule: int
    device: DeviceForm | None = None


OPERATORS = {
    row.name: row
    for row in (
        Operator(
            name=DeformConv2dSpec.operator,
            spec=DeformConv2dSpec,
            kernel=deform_conv2d.deform_conv2d,
            pack=deform_conv2d.pack_weight,
            packed_shape=deform_conv2d.packed_shape,
            form=deform_conv2d.form,
            tensors=make_layer_tensors,
            expected=expected_output,
            granule=deform_conv2d.GRANULE,
            device=DeviceForm(
                kernel=implicit_gemm.implicit_gemm,
                pack=products.pack_weight,
                packed_shape=products.packed_shape,
                packed_dtype=products.packed_dtype,
                granule=device_sampling.PIXELS,
            ),
        ),
        Operator(
            name=DeformConv2dGradSpec.operator,
            spec=DeformConv2dGradSpec,
            kernel=deform_conv2d_grad.deform_conv2d_grad,
            pack=deform_conv2d_grad.pack_weight,
            packed_shape=deform_conv2d_grad.packed_shape,
            form=deform_conv2d_grad.form,
            tensors=make_gradient_tensors,
            expected=expected_gradients,
            granule=deform_conv2d_grad.GRANULE,
            device=DeviceForm(
                kernel=implicit_gemm_grad.implicit_gemm_grad,
                pack=products.pack_weight,
                packed_shape=products.packed_shape,
                packed_dtype=products.packed_dtype,
                granule=device_sampling.PIXELS,
            ),
        ),
    )
}


def operator_of(spec: Any) -> Operator:
    """Return the operator that a specification belongs to."""
    return OPERATORS[spec.operator]
