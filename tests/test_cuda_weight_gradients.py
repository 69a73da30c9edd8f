# SPDX-License-Identifier: Apache-2.0
"""Gradients of weight and bias on GPUs, without one: right numbers on the emulator, and what nvcc makes of them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tvm")

from tvmdcn.builder import compile_kernels, interface_of, new_schedule
from tvmdcn.problems import PROBLEMS, TEST_PROBLEMS
from tvmdcn.space import Decisions, space_of
from tvmdcn.spec import DeformConv2dGradSpec, Extents
from tvmdcn.target import resolve_target
from tvmdcn.te import operator_of
from tvmdcn.te.products import product_of

needs_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# Largest difference by the largest value, where the gradient itself is rounded to the dtype.
TOLERANCES = {"float16": 1e-3, "bfloat16": 8e-3, "tf32": 1e-3, "float32": 2e-6, "float64": 1e-13}
ASKED = {"grad_input": False, "grad_offset": False}
LAYER = DeformConv2dGradSpec(64, 64, padding=1, dtype="float16", layout="NHWC", **ASKED)
SIZE = Extents(2, 9, 11)
# Three tiles of 256 pixels and a part of one: splits of one or two tiles, the last of them shorter.
LARGER = Extents(3, 17, 19)


def layer(**changes):
    return replace(LAYER, **changes)


# Specification, size, tiles of pixels in a split, decisions.
CASES = {
    "tensor cores": (layer(out_channels=32), LARGER, 2, {}),
    "planes, a plan a step": (
        layer(in_channels=32, out_channels=32, layout="NCHW"),
        LARGER,
        1,
        {"weight_plan_pixels": 32},
    ),
    "bfloat16, many warps": (
        layer(dtype="bfloat16", mask=False, out_channels=128),
        SIZE,
        1,
        {"weight_warp_rows": 2, "weight_warp_columns": 1, "weight_warps_across": 4, "weight_warps_down": 2},
    ),
    "tf32": (layer(dtype="float32", tf32=True, in_channels=32, out_channels=48), SIZE, 1, {}),
    "tf32, nothing overlaps": (
        layer(in_channels=40, out_channels=40, dtype="float32", tf32=True, layout="NCHW"),
        SIZE,
        1,
        {"weight_overlap": 0, "weight_warp_rows": 1, "weight_warps_down": 1},
    ),
    "channels that fill no tile": (layer(in_channels=20, out_channels=33, layout="NCHW"), SIZE, 1, {}),
    "offset groups": (layer(offset_groups=4, out_channels=32), SIZE, 1, {"weight_overlap": 0}),
    "offset groups that fit no tile": (
        layer(in_channels=72, out_channels=16, offset_groups=3),
        SIZE,
        1,
        {"weight_plan_pixels": 256},
    ),
    "groups": (layer(groups=2, in_channels=32, out_channels=32, offset_groups=4, mask=False), SIZE, 1, {}),
    "multiply-adds": (layer(in_channels=20, out_channels=33, dtype="float32"), LARGER, 2, {"weight_step_pixels": 8}),
    "multiply-adds, doubles": (layer(in_channels=6, out_channels=8, dtype="float64"), SIZE, 1, {}),
    "depthwise": (layer(groups=64, offset_groups=2, dtype="float32"), LARGER, 2, {}),
    "two outputs a channel": (layer(groups=64, out_channels=128), SIZE, 1, {"weight_thread_pixels": 4}),
    "small groups": (layer(groups=8, offset_groups=16, out_channels=40), SIZE, 1, {"weight_thread_outputs": 5}),
    "few outputs of many channels": (layer(groups=2, out_channels=12, dtype="bfloat16"), SIZE, 1, {"weight_warps": 2}),
    "asymmetric": (DeformConv2dGradSpec.of(TEST_PROBLEMS["asymmetric_v1"].spec, **ASKED), SIZE, 1, {}),
    "bias alone": (layer(grad_weight=False, layout="NCHW", out_channels=40), LARGER, 1, {}),
    "weight alone, one row": (layer(grad_bias=False, in_channels=16, out_channels=16), Extents(1, 1, 7), 1, {}),
}


def error_of(found, expected):
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


@needs_emulator
@pytest.mark.parametrize("case", CASES)
def test_numbers(case):
    from cuda_layers import Gradients

    spec, extents, units, values = CASES[case]
    gradients = Gradients(spec, Decisions(product_of(spec).kind, values))
    assert {name: gradients.made.values[name] for name in values} == values
    operator = operator_of(spec)
    tensors = operator.tensors(spec, extents)
    found, expected = gradients(tensors, extents, units), operator.expected(spec, tensors)
    assert set(found) == set(expected) == set(spec.outputs)
    tolerance = TOLERANCES["tf32" if spec.tf32 else spec.dtype]
    for name in spec.outputs:
        assert found[name].shape == expected[name].shape
        assert error_of(found[name], expected[name]) < tolerance, name
    if extents is LARGER:
        again = gradients(tensors, extents, units)
        for name in spec.outputs:
            np.testing.assert_array_equal(again[name].view(np.uint8), found[name].view(np.uint8))


@needs_emulator
def test_many_pixels_are_summed_in_float32():
    from cuda_layers import Gradients

    spec = layer(in_channels=16, out_channels=16, kernel_size=1, padding=0, dtype="float16")
    extents = Extents(1, 48, 49)
    rng = np.random.default_rng(3)
    # Sums grow to 2352, where neighbouring halves are 2 apart: added up in halves they would be wrong by hundreds.
    tensors = operator_of(spec).tensors(spec, extents)
    tensors |= {
        "grad_output": rng.uniform(0.5, 1.5, tensors["grad_output"].shape).astype(np.float16),
        "input": rng.uniform(0.5, 1.5, tensors["input"].shape).astype(np.float16),
        "offset": np.zeros_like(tensors["offset"]),
        "mask": np.ones_like(tensors["mask"]),
    }
    found, expected = Gradients(spec)(tensors, extents), operator_of(spec).expected(spec, tensors)
    for name in spec.outputs:
        assert expected[name].min() > 2000
        # All that is lost is lost where the result is rounded, by half a step of a half.
        np.testing.assert_allclose(found[name].astype(np.float64), expected[name], rtol=2**-11 * 1.01)


@needs_emulator
def test_samples_that_are_nowhere_are_zeros():
    from cuda_layers import Gradients

    spec = layer(in_channels=16, out_channels=16, grad_bias=False)
    operator = operator_of(spec)
    tensors = operator.tensors(spec, SIZE)
    # Samples outside of an infinite image, also where a split's pixels end, are worth 0 and not NaN.
    tensors["input"] = np.full_like(tensors["input"], np.inf)
    tensors["offset"] = np.resize(np.array([np.nan, np.inf, -np.inf, 6e4, -6e4], np.float16), tensors["offset"].shape)
    found = Gradients(spec)(tensors, SIZE)["grad_weight"]
    np.testing.assert_array_equal(found, np.zeros_like(found))


@pytest.mark.parametrize("asked", [{"grad_bias": False}, {"grad_weight": False}, {}])
def test_the_split_is_noted(asked):
    spec, target = layer(**asked), resolve_target("cuda-sm_80")
    sch = new_schedule(spec, target)
    decisions = Decisions("mma", {"weight_tile_units": 4})
    made = space_of(spec.operator, "cuda").schedule(sch, spec, target, decisions)
    assert made.values["weight_tile_units"] == interface_of(spec, target, sch.mod).max_tile_units == 4


# Dtypes, layouts and architectures take turns.
TURNS = [
    ("r50_c4", "float16", "NHWC", "sm_90"),
    ("r50_c3", "tf32", "NCHW", "sm_80"),
    ("aliked_b4c2", "bfloat16", "NHWC", "sm_80"),
    ("grouped32", "float16", "NCHW", "sm_90"),
]


@needs_nvcc
@pytest.mark.parametrize(("name", "dtype", "layout", "arch"), TURNS)
def test_machine_code(name, dtype, layout, arch):
    changes = {"dtype": "float32", "tf32": True} if dtype == "tf32" else {"dtype": dtype}
    spec = DeformConv2dGradSpec.of(replace(PROBLEMS[name].spec, layout=layout, **changes), **ASKED)
    target = resolve_target(f"cuda-{arch}")
    sch = new_schedule(spec, target)
    space_of(spec.operator, "cuda").schedule(sch, spec, target)
    _, compiled = compile_kernels(spec, target, sch.mod)
    for kernel in compiled.kernels:
        assert kernel.spill_loads == kernel.spill_stores == kernel.stack_bytes == 0, kernel
        assert kernel.occupancy > 0, kernel
    main = max((k for k in compiled.kernels if k.name.startswith(spec.operator)), key=lambda k: k.registers)
    if not main.instructions:
        pytest.skip("nothing here disassembles machine code of GPUs")
    tensor_cores = product_of(spec).kind == "mma"
    assert bool(main.instructions.get("HMMA")) == tensor_cores
    assert main.instructions["LDG.128"]
    if tensor_cores:
        assert main.instructions["LDGSTS"]
        assert main.instructions["STS.128"]
        # Both operands are transposed on their way from shared memory; tf32 has no instruction for that.
        transposing = "LDSM.16.MT88" in compiled.sass[main.name]
        assert transposing == bool(main.instructions.get("LDSM")) == (spec.dtype != "float32")
    assert not main.instructions.get("LDL", 0) + main.instructions.get("STL", 0)
