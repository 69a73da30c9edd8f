# SPDX-License-Identifier: Apache-2.0
"""A layer's kernels for a GPU, run on the emulator, beside the expected values."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from cuda_emulator import run_emulated
from cuda_emulator.host import compile_for_emulation

from tvmdcn.builder import OwnBarriers, device_module, interface_of, new_schedule
from tvmdcn.grad_scratch import scratch_tensors
from tvmdcn.problems import Problem
from tvmdcn.space import Decisions, space_of
from tvmdcn.target import TargetInfo, resolve_target
from tvmdcn.te import operator_of
from tvmdcn.tensors import numpy_dtype

__all__ = ["HOPPER", "Gradients", "device_schedule", "error_of", "run_on_emulator"]

HOPPER = resolve_target("cuda-sm_90")


def device_schedule(spec: Any, decisions: Decisions | None, target: TargetInfo = HOPPER) -> tuple[Any, Decisions]:
    """Return the module as it is compiled, and what was decided."""
    sch = new_schedule(spec, target)
    made = space_of(spec.operator, target.kind).schedule(sch, spec, target, decisions)
    return device_module(spec, target, sch.mod), made


def _bits(array: np.ndarray) -> np.ndarray:
    """Return bfloat16 as the emulator takes it."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def run_on_emulator(
    problem: Problem, decisions: Decisions | None = None, target: TargetInfo = HOPPER
) -> tuple[np.ndarray, np.ndarray, Decisions]:
    """Return the output, the expected one in float64, and what was decided."""
    spec, extents = problem.spec, problem.extents
    operator = operator_of(spec)
    form = operator.device
    assert form is not None
    tensors = operator.tensors(spec, extents)
    expected = operator.expected(spec, tensors)["output"]
    module, made = device_schedule(spec, decisions, target)
    interface = interface_of(spec, target, module)
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
        if not interface.planes:
            arguments.append(np.full((batch * size, spec.in_channels), np.nan).astype(out.dtype))
    else:
        arguments.append(given["input"].reshape(batch * size, spec.in_channels))
    for name in ("offset", "mask"):
        if name in given:
            array = given[name]
            arguments.append(array.reshape(batch, -1, pixels) if nchw else array.reshape(batch, pixels, -1))
    bias = tensors["bias"].astype(spec.accumulator_dtype)
    shape = (interface.splits, *out.shape)
    parts = [np.full(shape, np.nan, spec.accumulator_dtype)] if interface.splits > 1 else []
    arguments += [packed, bias, *parts, out, extents.height, extents.width]
    total = batch * pixels
    arguments += [spec.output_size(extents.height, extents.width)[1], total, -(-total // form.granule)]

    with tvm.transform.PassContext(instruments=[OwnBarriers()]):
        program = compile_for_emulation(module, target.to_tvm())
    for name, values in (("pack_weight", [weight, packed]), (operator.name, arguments)):
        run_emulated(program, None, [_bits(v) if isinstance(v, np.ndarray) else v for v in values], name)
    return out.reshape(expected.shape), expected, made


class Gradients:
    """A layer's gradients as kernels on the emulator, compiled once for any number of calls.

    Parameters
    ----------
    spec : DeformConv2dGradSpec
    decisions : Decisions, optional
    target : TargetInfo

    Attributes
    ----------
    made : Decisions
        What was decided.
    """

    def __init__(self, spec: Any, decisions: Decisions | None = None, target: TargetInfo = HOPPER) -> None:
        self.spec, self.form, self.target = spec, operator_of(spec).device, target.to_tvm()
        self.module, self.made = device_schedule(spec, decisions, target)
        self.units = interface_of(spec, target, self.module).max_tile_units
        self._compiled: dict[str, Any] = {}

    def _run(self, name: str, arguments: list[Any]) -> None:
        plain = [_bits(v) if isinstance(v, np.ndarray) else v for v in arguments]
        with tvm.transform.PassContext(instruments=[OwnBarriers()]), self.target:
            if name in self._compiled:
                run_emulated(self._compiled[name], None, plain)
            else:
                self._compiled[name] = run_emulated(tvm.IRModule({name: self.module[name]}), self.target, plain)

    def __call__(self, tensors: dict[str, np.ndarray], extents: Any, units: int | None = None) -> dict[str, np.ndarray]:
        """Return the gradients by name, in the shapes that the tensors have; `units`: tiles of a sum over pixels."""
        spec, form = self.spec, self.form
        assert form is not None
        batch, pixels = extents.batch, int(np.prod(spec.output_size(extents.height, extents.width)))
        size, total = extents.height * extents.width, batch * pixels
        tiles = -(-total // form.granule)
        units = min(units or self.units, tiles)
        splits = -(-tiles // units)

        def shaped(name: str, array: np.ndarray) -> np.ndarray:
            kind = name.removeprefix("grad_")
            if kind in ("weight", "bias"):
                return array.reshape(spec.out_channels, -1) if kind == "weight" else array
            count = size if kind == "input" else pixels
            if spec.layout == "NCHW":
                return array.reshape(batch, -1, count)
            return array.reshape(batch * count, -1) if kind in ("input", "output") else array.reshape(batch, count, -1)

        arguments: list[Any] = []
        for name in spec.inputs:
            array = shaped(name, np.ascontiguousarray(tensors[name]))
            if name == "weight":
                packed = np.full(form.packed_shape(spec), 7, form.packed_dtype(spec))
                self._run("pack_weight", [array, packed])
                array = packed
            arguments.append(array)
        for shape, dtype in scratch_tensors(spec, batch * size, total, splits).values():
            filled = np.full(shape, 7) if "int" in dtype else np.full(shape, np.nan)
            arguments.append(filled.astype(numpy_dtype(dtype) if dtype == spec.dtype else dtype))
        dtype = numpy_dtype(spec.dtype)
        results = {name: np.full(spec.shape_of(name, extents), np.nan).astype(dtype) for name in spec.outputs}
        arguments += [shaped(name, array) for name, array in results.items()]
        arguments += [extents.height, extents.width, spec.output_size(extents.height, extents.width)[1]]
        self._run(spec.operator, [*arguments, total, tiles, splits, units])
        return results


def error_of(output: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float(np.abs(output.astype(np.float64) - expected).max() / np.abs(expected).max())
