# SPDX-License-Identifier: Apache-2.0
"""Design spaces for GPUs, without one: right numbers on the emulator, and what nvcc makes of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("tvm")

from tvmdcn.builder import build
from tvmdcn.errors import SpecError
from tvmdcn.problems import PROBLEMS, TEST_PROBLEMS, Problem
from tvmdcn.space import Decisions, space_of
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import resolve_target

needs_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# Largest difference by the largest value, where the output itself is rounded to the dtype.
TOLERANCES = {"float16": 1e-3, "bfloat16": 8e-3, "tf32": 1e-3, "float32": 2e-6, "float64": 1e-13}
LAYER = DeformConv2dSpec(64, 64, padding=1, dtype="float16", layout="NHWC")
SIZE = Extents(2, 9, 11)


FEW = Extents(1, 7, 7)


def layer(extents=SIZE, **changes):
    return Problem("layer", replace(LAYER, **changes), extents, "made up")


def decided(variant, **values):
    return Decisions(variant, values)


CASES = {
    "tensor cores": (layer(), None),
    "tf32": (layer(dtype="float32", tf32=True, out_channels=96), None),
    "eight warps": (
        layer(in_channels=128, out_channels=128),
        decided("mma-block", warps_down=4, warps_across=2, step_depth=4),
    ),
    "large tiles of a warp": (
        layer(dtype="bfloat16"),
        decided("mma-block", warp_rows=4, warp_columns=2, warps_down=1, step_depth=1),
    ),
    "channels that fill no tile": (layer(in_channels=20, out_channels=33), None),
    "offset groups": (layer(offset_groups=4), decided("mma-block", step_depth=1)),
    # Few samples a thread: compiling them takes most of the time.
    "groups": (
        layer(groups=2, offset_groups=4, in_channels=128),
        decided("mma-thread", step_depth=1, warp_columns=1, warps_across=2),
    ),
    "plan of a thread": (
        layer(offset_groups=8, layout="NCHW"),
        decided("mma-thread", step_depth=1, warp_columns=2, warps_across=2),
    ),
    "parts of sums, planes": (
        layer(FEW, dtype="float32", tf32=True, layout="NCHW", in_channels=32, out_channels=33),
        decided("mma-thread", splits=4, step_depth=1, warp_columns=1, warps_across=3),
    ),
    "parts that end within a tap": (
        layer(FEW, dtype="bfloat16", out_channels=32, mask=False),
        decided("mma-block", splits=2, overlap=0),
    ),
    "parts of multiply-adds": (
        layer(FEW, in_channels=32, out_channels=48, dtype="float32"),
        decided("simt-block", splits=3, thread_pixels=2),
    ),
    "multiply-adds, planes": (
        layer(in_channels=20, out_channels=33, dtype="float64", layout="NCHW"),
        decided("simt-thread", overlap=0, thread_pixels=2),
    ),
    "corners from planes": (
        layer(dtype="float32", layout="NCHW", in_channels=20, out_channels=33),
        decided("simt-thread-planes", thread_pixels=2),
    ),
    "depthwise": (layer(groups=64), None),
    "depthwise, planes": (layer(groups=64, offset_groups=2, dtype="float32", layout="NCHW"), None),
    "depthwise, plan of a thread": (layer(groups=64, offset_groups=2), decided("gather-thread")),
    "two outputs a channel": (layer(groups=64, out_channels=128), decided("gather-block", thread_pixels=4)),
    "small groups": (layer(groups=8, out_channels=32), None),
    "asymmetric": (TEST_PROBLEMS["asymmetric_v1"], None),
    "uneven padding": (TEST_PROBLEMS["uneven_padding"], None),
    "one pixel": (TEST_PROBLEMS["pixel"], None),
    "one row": (TEST_PROBLEMS["row"], None),
    # Loops that could be of one step, or that overlap leaves one step of.
    "one tap, one step": (layer(in_channels=16, kernel_size=1, padding=0), None),
    "one tap, two steps": (layer(in_channels=16, kernel_size=1, padding=0, dtype="float32", tf32=True), None),
}


@needs_emulator
@pytest.mark.parametrize("case", CASES)
def test_numbers(case):
    from cuda_layers import error_of, run_on_emulator

    problem, decisions = CASES[case]
    output, expected, made = run_on_emulator(problem, decisions)
    if decisions is not None:
        assert made.variant == decisions.variant
        assert {name: made.values[name] for name in decisions.values} == decisions.values
    assert error_of(output, expected) < TOLERANCES["tf32" if problem.spec.tf32 else problem.spec.dtype]


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_variant_of_named_layers_applies(name):
    from tvmdcn.builder import new_schedule

    dtype = ("float16", "tf32", "float32")[list(PROBLEMS).index(name) % 3]
    spec = replace(PROBLEMS[name].spec, dtype="float32" if dtype == "tf32" else dtype, tf32=dtype == "tf32")
    target = resolve_target("cuda-sm_80")
    space = space_of(spec.operator, "cuda")
    for variant in space.variants(spec, target):
        made = space.schedule(new_schedule(spec, target), spec, target, Decisions(variant, {}))
        assert made.variant == variant


@needs_emulator
def test_memory_of_a_call(monkeypatch):
    """The artifact says which a call brings; artifacts from before there was a choice are read as well."""
    pytest.importorskip("torch")
    import pretend_gpu
    import torch
    import tvm
    from cuda_emulator.host import compile_for_emulation
    from cuda_layers import HOPPER, device_schedule, error_of

    from tvmdcn.builder import OwnBarriers, interface_of
    from tvmdcn.kernel_interface import KernelInterface
    from tvmdcn.te import operator_of

    spec = replace(LAYER, in_channels=32, out_channels=32, layout="NCHW")
    module, _ = device_schedule(spec, decided("mma-block-planes", splits=3))
    interface = interface_of(spec, HOPPER, module)
    assert (interface.splits, interface.planes) == (3, True)
    assert KernelInterface.from_json(json.loads(json.dumps(interface.to_json()))) == interface
    whole = replace(interface, splits=1, planes=False)
    assert not {"splits", "planes"} & set(whole.to_json())
    assert KernelInterface.from_json(json.loads(json.dumps(whole.to_json()))) == whole

    with tvm.transform.PassContext(instruments=[OwnBarriers()]):
        program = compile_for_emulation(module, HOPPER.to_tvm())
    pretend_gpu.install(monkeypatch, program)
    kernel = pretend_gpu.kernel_of(spec, HOPPER, interface)
    operator = operator_of(spec)
    tensors = operator.tensors(spec, FEW)
    given = {name: torch.from_numpy(array) for name, array in tensors.items()}
    results = [kernel(*(given[name] for name in ("input", "offset", "weight", "bias", "mask"))) for _ in range(2)]
    assert error_of(results[0].numpy(), operator.expected(spec, tensors)["output"]) < 1e-3
    assert torch.equal(*results)


@needs_nvcc
def test_artifact_of_another_machines_gpu(tmp_path):
    spec = replace(LAYER, in_channels=32, out_channels=32)
    artifact = build(spec, "cuda-sm_80", decided("mma-block", splits=6, step_depth=1), cache_dir=tmp_path)
    device = artifact.schedule["device"]
    assert device["compiler"].startswith(("nvcc", "NVRTC"))
    assert set(device["kernels"]) == {"deform_conv2d_kernel", "deform_conv2d_kernel_1", "pack_weight_kernel"}
    for kernel in device["kernels"].values():
        assert kernel["spill_loads"] == kernel["spill_stores"] == kernel["stack_bytes"] == 0, kernel
    assert artifact.kernel.packed_dtype == "uint32"
    assert artifact.kernel.packed_shape == (1, 9, 2, 2, 32, 4)
    assert artifact.kernel.splits == 6


def test_tf32_is_for_float32():
    with pytest.raises(SpecError, match="tf32 is a way to multiply float32, got tf32=True and dtype='float16'"):
        replace(LAYER, tf32=True)
