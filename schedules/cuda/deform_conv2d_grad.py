# SPDX-License-Identifier: Apache-2.0
"""The gradients of a deformable convolution on NVIDIA GPUs: kernels one after the other, see `implicit_gemm_grad`.

    channels_last_rows, channels_last:  copies, where the layout is NCHW
    the gradients of input, offset and mask: grad_columns.py
    the gradients of weight and bias: grad_weight.py

The variant is the kind of both products, as in the forward: ``mma``: on tensor cores. ``simt``: multiply-adds of
float32 and float64. ``gather``: groups of few channels, depthwise among them.
"""

from __future__ import annotations

from typing import Any

from tvmdcn.schedules.cuda.grad_columns import schedule_columns
from tvmdcn.schedules.cuda.grad_weight import schedule_weight
from tvmdcn.schedules.cuda.threads import finish
from tvmdcn.space import VARIANT, Choices, design_space
from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.te.products import product_of

FUNCTION = DeformConv2dGradSpec.operator


def variants(spec: DeformConv2dGradSpec, target: Any) -> list[str]:
    """Return the names of the variants that make sense for a layer, the default first."""
    del target
    return [product_of(spec).kind]


def naive(sch: Any, spec: DeformConv2dGradSpec) -> None:
    """Leave everything as the algorithm is written."""


@design_space(FUNCTION, "cuda", variants=variants, naive=naive, finish=finish)
def deform_conv2d_grad(sch: Any, spec: DeformConv2dGradSpec, target: Any, variant: str, choices: Choices) -> None:
    """Schedule the gradients that are asked for."""
    sch.work_on(FUNCTION)
    columns, weight = spec.grad_input or spec.grad_offset, spec.grad_weight or spec.grad_bias
    if spec.layout == "NCHW":
        copies = ["channels_last_rows", *(["channels_last"] if "input" in spec.inputs else [])]
        for name in copies:
            for loop, axis in zip(sch.get_loops(sch.get_sblock(name)), "zxy", strict=True):
                sch.bind(loop, f"blockIdx.{axis}")
    if columns:
        schedule_columns(sch, spec, target, choices)
    if weight:
        schedule_weight(sch, spec, target, choices)
    first = "pixel_n" if columns else {True: "weight_grad_pixel_n", False: "bias_grad_total"}[spec.grad_weight]
    sch.annotate(sch.get_sblock(first), VARIANT, variant)
