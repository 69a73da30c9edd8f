# SPDX-License-Identifier: Apache-2.0
"""The default schedules of the named layers for GPUs, without one: what nvcc makes of them, numbers on the emulator.

Dtypes, layouts and GPUs take turns. All of them, about four hours of one core:

    scripts/test --every-schedule --dist worksteal tests/test_cuda_named_layers.py
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

pytest.importorskip("tvm")

from tvmdcn.builder import compile_kernels, new_schedule
from tvmdcn.problems import PROBLEMS, Problem
from tvmdcn.space import space_of
from tvmdcn.spec import DeformConv2dGradSpec, Extents
from tvmdcn.target import resolve_target
from tvmdcn.te import operator_of
from tvmdcn.te.products import column_units, product_of

needs_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

DTYPES = ("float16", "bfloat16", "tf32", "float32")
LAYOUTS = ("NHWC", "NCHW")
ARCHS = ("sm_90", "sm_80")
# Largest difference by the largest value, where the result itself is rounded to the dtype.
TOLERANCES = {"float16": 1e-3, "bfloat16": 8e-3, "tf32": 1e-3, "float32": 3e-6}
# Kernels are of free sizes: what they do for a small image they do for a large one.
SIZE = Extents(1, 5, 7)


def pytest_generate_tests(metafunc):
    cases = [
        (name, gradients, DTYPES[(i + gradients) % 4], LAYOUTS[i // 2 % 2], ARCHS[(i // 4 + gradients) % 2])
        for i, name in enumerate(PROBLEMS)
        for gradients in (False, True)
        if not gradients or i % 2
    ]
    if metafunc.config.getoption("--every-schedule"):
        cases = list(product(PROBLEMS, (False, True), DTYPES, LAYOUTS, ARCHS))
    words = [f"{n}-{'gradients' if g else 'forward'}-{d}-{y}-{a}" for n, g, d, y, a in cases]
    metafunc.parametrize(("name", "gradients", "dtype", "layout", "arch"), cases, ids=words)


def spec_of(name, gradients, dtype, layout):
    changes = {"dtype": "float32" if dtype == "tf32" else dtype, "tf32": dtype == "tf32", "layout": layout}
    spec = replace(PROBLEMS[name].spec, **changes)
    # One layer's additions are those whose order does not matter.
    return DeformConv2dGradSpec.of(spec, deterministic=name == "yolact_c4") if gradients else spec


def check_forward(spec, found):
    if product_of(spec).kind == "mma":
        assert all(found[word] for word in ("LDSM", "LDGSTS", "STS.128")), found
    if spec.in_channels // spec.offset_groups % 8 == 0:
        assert found["LDG.128"], found


def check_gradients(spec, found):
    if product_of(spec).kind == "mma":
        assert all(found[word] for word in ("LDSM", "SHFL")), found
        if spec.out_channels // spec.groups % 16 == 0:
            assert found["LDGSTS"], found
    assert found["RED"], found
    if column_units(spec).channels % 8 == 0:
        assert found["LDG.128"], found


@needs_nvcc
def test_machine_code(name, gradients, dtype, layout, arch):
    spec, target = spec_of(name, gradients, dtype, layout), resolve_target(f"cuda-{arch}")
    sch = new_schedule(spec, target)
    assert space_of(spec.operator, target.kind).schedule(sch, spec, target).values
    _, compiled = compile_kernels(spec, target, sch.mod)
    for kernel in compiled.kernels:
        assert kernel.spill_loads == kernel.spill_stores == kernel.stack_bytes == 0, kernel
        assert kernel.occupancy > 0, kernel
    if not any(kernel.instructions for kernel in compiled.kernels):
        pytest.skip("nothing here disassembles machine code of GPUs")
    found = Counter()
    for kernel in compiled.kernels:
        found.update(kernel.instructions)
    assert not found["LDL"] + found["STL"], found
    assert bool(found["HMMA"]) == (product_of(spec).kind == "mma"), found
    (check_gradients if gradients else check_forward)(spec, found)


@needs_emulator
def test_numbers(name, gradients, dtype, layout, arch):
    from cuda_layers import Gradients, error_of, run_on_emulator

    spec, target = spec_of(name, gradients, dtype, layout), resolve_target(f"cuda-{arch}")
    if not gradients:
        output, expected, _ = run_on_emulator(Problem(name, spec, SIZE, "small"), target=target)
        assert error_of(output, expected) < TOLERANCES[dtype]
        return
    operator = operator_of(spec)
    tensors = operator.tensors(spec, SIZE)
    expected = operator.expected(spec, tensors)
    found = Gradients(spec, target=target)(tensors, SIZE)
    assert set(found) == set(spec.outputs)
    for result, gradient in found.items():
        assert np.isfinite(gradient.astype(np.float64)).all(), result
        assert error_of(gradient, expected[result]) < TOLERANCES[dtype], result
