# SPDX-License-Identifier: Apache-2.0
"""What the operators compute, in TE and TIR: the table of what exists.

Adding an operator is a file here, one per kind of target in ``schedules/``, its reference, and a row below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvmdcn.reference import reference
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.te import deform_conv2d

__all__ = ["OPERATORS", "Operator", "operator_of"]


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
        ``kernel(spec, lanes)`` is the unscheduled function.
    pack : callable
        ``pack(spec, lanes)`` is the function that brings the weight into the kernel's order.
    packed_shape : callable
        ``packed_shape(spec, lanes)`` is the shape of the packed weight.
    lanes : callable
        ``lanes(spec, vector_lanes)`` is the number of output channels in a vector.
    reference : callable
        ``reference(spec, tensors)`` is the result in float64, from other code.
    granule : int
        Output pixels in a unit of work.
    """

    name: str
    spec: type
    kernel: Callable[..., Any]
    pack: Callable[..., Any]
    packed_shape: Callable[..., tuple[int, ...]]
    lanes: Callable[..., int]
    reference: Callable[..., Any]
    granule: int


OPERATORS = {
    row.name: row
    for row in (
        Operator(
            name=DeformConv2dSpec.operator,
            spec=DeformConv2dSpec,
            kernel=deform_conv2d.deform_conv2d,
            pack=deform_conv2d.pack_weight,
            packed_shape=deform_conv2d.packed_shape,
            lanes=deform_conv2d.lanes_for,
            reference=reference,
            granule=deform_conv2d.GRANULE,
        ),
    )
}


def operator_of(spec: Any) -> Operator:
    """Return the operator that a specification belongs to."""
    return OPERATORS[spec.operator]
