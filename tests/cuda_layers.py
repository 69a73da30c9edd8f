# SPDX-License-Identifier: Apache-2.0
"""A layer's kernels for a GPU, run on the emulator, beside the expected values."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from cuda_emulator import run_emulated

from tvmdcn.builder import OwnBarriers, device_module, new_schedule
from tvmdcn.problems import Problem
from tvmdcn.space import Decisions, space_of
from tvmdcn.target import TargetInfo, resolve_target
from tvmdcn.te import operator_of

__all__ = ["HOPPER", "device_schedule", "error_of", "run_on_emulator"]

HOPPER = resolve_target("cuda-sm_90")


def device_schedule(spec: Any, decisions: Decisions | None, target: TargetInfo = HOPPER) -> tuple[Any, Decisions]:
    """Return the module as it is compiled, and what was decided."""
    sch = new_schedule(spec, target)
    made = space_of(spec.operator, target.kind).schedule(sch, spec, target, decisions)
    return device_module(spec, target, sch.mod), made


def _bits(array: np.ndarray) -> np.ndarray:
    """Return bfloat16 as the emulator takes it."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def run_on_emulator(problem: Problem, decisions: Decisions | None = None) -> tuple[np.ndarray, np.ndarray, Decisions]:
    """Return the output, the expected one in float64, and what was decided."""
    spec, extents = problem.spec, problem.extents
    operator = operator_of(spec)
    form = operator.device
    assert form is not None
    tensors = operator.tensors(spec, extents)
    expected = operator.expected(spec, tensors)["output"]
    module, made = device_schedule(spec, decisions)
    batch, pixels = extents.batch, int(np.prod(spec.output_size(extents.height, extents.width)))
    nchw, size = spec.layout == "NCHW", extents.height * extents.width

    packed = np.full(form.packed_shape(spec), 7, form.packed_dtype(spec))
    weight = tensors["weight"].reshape(spec.out_channels, -1)
    given = {name: np.ascontiguousarray(tensors[name]) for name in ("input", "offset", "mask") if name in tensors}
    out = np.full((batch, spec.out_channels, pixels) if nchw else (batch * pixels, spec.out_channels), np.nan)
    out = out.astype(tensors["input"].dtype)
    arguments: list[Any] = []
    if nchw:
        arguments.append(given["input"].reshape(batch, spec.in_channels, size))
        arguments.append(np.full((batch * size, spec.in_channels), np.nan).astype(out.dtype))
    else:
        arguments.append(given["input"].reshape(batch * size, spec.in_channels))
    for name in ("offset", "mask"):
        if name in given:
            array = given[name]
            arguments.append(array.reshape(batch, -1, pixels) if nchw else array.reshape(batch, pixels, -1))
    bias = tensors["bias"].astype(spec.accumulator_dtype)
    arguments += [packed, bias, out, extents.height, extents.width]
    total = batch * pixels
    arguments += [spec.output_size(extents.height, extents.width)[1], total, -(-total // form.granule)]

    target = HOPPER.to_tvm()
    with tvm.transform.PassContext(instruments=[OwnBarriers()]), target:
        for name, values in (("pack_weight", [weight, packed]), (operator.name, arguments)):
            function = tvm.IRModule({name: module[name]})
            run_emulated(function, target, [_bits(v) if isinstance(v, np.ndarray) else v for v in values])
    return out.reshape(expected.shape), expected, made


def error_of(output: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float(np.abs(output.astype(np.float64) - expected).max() / np.abs(expected).max())
