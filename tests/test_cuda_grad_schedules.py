# SPDX-License-Identifier: Apache-2.0
"""The gradients of input, offset and mask for GPUs, without one: numbers on the emulator, and what nvcc makes of them.

Those of weight and bias: test_cuda_weight_gradients.py.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tvm")

from tvmdcn.builder import build, compile_kernels, new_schedule
from tvmdcn.problems import PROBLEMS
from tvmdcn.space import Decisions, space_of
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.target import resolve_target
from tvmdcn.te import operator_of
from tvmdcn.te.products import column_units, packed_shape, product_of

needs_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# Largest difference by the largest value, where the gradient itself is rounded to the dtype.
TOLERANCES = {"float16": 1e-3, "bfloat16": 8e-3, "tf32": 1e-3, "float32": 2e-6, "float64": 1e-13}
SIZE = Extents(2, 6, 7)
OPERATOR = DeformConv2dGradSpec.operator


def layer(in_channels=64, out_channels=64, **changes):
    """Return the gradients of input, offset and mask of a layer."""
    flags = {"grad_weight": False, "grad_bias": False}
    return DeformConv2dGradSpec(
        in_channels, out_channels, **{"padding": 1, "dtype": "float16", "layout": "NHWC", **flags, **changes}
    )


def decided(**values):
    return Decisions("", values)


CASES = {
    "tensor cores": (layer(), None),
    "planes": (layer(layout="NCHW", stride=2, padding=(2, 1, 0, 3)), None),
    "bfloat16": (layer(dtype="bfloat16", mask=False, layout="NCHW"), None),
    "tf32": (layer(64, 96, dtype="float32", tf32=True, layout="NCHW"), None),
    "tf32, channels last": (layer(32, 64, dtype="float32", tf32=True, grad_offset=False), decided(taps=3)),
    "all taps, no overlap": (layer(), decided(overlap=0, taps=9, warp_rows=2)),
    "two tiles of channels": (layer(128, 32), decided(warp_columns=4, taps=3, warps=2)),
    "channels that fill no tile": (layer(20, 33, layout="NCHW"), None),
    "odd channels": (layer(7, 24), None),
    "offset groups": (layer(offset_groups=4), None),
    "groups": (layer(128, 64, groups=2, offset_groups=4), decided(warps=8)),
    "more groups than offset groups": (layer(128, 128, groups=4, offset_groups=2, layout="NCHW"), None),
    "crossing groups": (layer(96, 64, groups=2, offset_groups=3, kernel_size=1, padding=0), None),
    "only the input's": (layer(grad_offset=False, mask=False), None),
    "only the offset's": (layer(grad_input=False), None),
    "one step": (layer(16, 16, kernel_size=1), decided(overlap=0)),
    "one step, overlap": (layer(1, 8, kernel_size=1, layout="NCHW"), decided(overlap=1)),
    "one step, tf32": (layer(8, 8, kernel_size=1, dtype="float32", tf32=True, grad_offset=False), None),
    "one step of multiply-adds": (layer(4, 4, kernel_size=1, dtype="float32"), None),
    "multiply-adds": (layer(32, 48, dtype="float32"), None),
    "multiply-adds, planes": (
        layer(20, 33, dtype="float64", layout="NCHW", border="mmcv"),
        decided(overlap=0, thread_pixels=2),
    ),
    "multiply-adds, offset groups": (layer(64, 16, dtype="float64", offset_groups=2), decided(taps=3)),
    "depthwise": (layer(groups=64), None),
    "depthwise, planes": (layer(64, 128, groups=64, offset_groups=2, dtype="float32", layout="NCHW"), None),
    "small groups": (layer(64, 32, groups=8), decided(taps=3, lanes_across=4, thread_vectors=2)),
    "crossing small groups": (layer(12, 18, groups=2, offset_groups=3, dtype="float32"), None),
}


def tensors_of(spec, extents=SIZE):
    """Return made-up tensors, some of whose samples lie where they must not be read, and some exactly on the border."""
    tensors = operator_of(spec).tensors(spec, extents)
    offset = tensors["offset"].reshape(-1)
    places = np.random.default_rng(3).permutation(offset.size)[: offset.size // 8 * 4].reshape(4, -1)
    offset[places[0][::3]], offset[places[0][1::3]] = np.nan, np.inf
    offset[places[1]] = -1e4
    # An integer, so that many samples of the first and the last rows and columns lie at -1 or the extent.
    offset[places[2]], offset[places[3]] = 0, -1
    return tensors


@needs_emulator
@pytest.mark.parametrize("case", CASES)
def test_numbers(case):
    from cuda_layers import Gradients, error_of

    spec, decisions = CASES[case]
    tensors = tensors_of(spec)
    expected = operator_of(spec).expected(spec, tensors)
    kernels = Gradients(spec, decisions)
    if decisions is not None:
        assert {name: kernels.made.values[name] for name in decisions.values} == decisions.values
    found = kernels(tensors, SIZE)
    assert set(found) == set(spec.outputs)
    for name, gradient in found.items():
        tolerance = TOLERANCES["tf32" if spec.tf32 else spec.dtype]
        assert error_of(gradient, expected[name]) < tolerance, name
    again = kernels(tensors, SIZE)
    for name in set(found) - {"grad_input"}:
        np.testing.assert_array_equal(found[name].view(np.uint8), again[name].view(np.uint8), err_msg=name)


@needs_emulator
@pytest.mark.parametrize("border", ["torchvision", "mmcv"])
def test_fresh_layer(border):
    """With zero offsets all pixels of the frame sample at exactly -1: worth 0, also of infinite gradients."""
    from cuda_layers import Gradients, error_of

    spec = layer(16, 16, kernel_size=1, dtype="float32", border=border)
    tensors = operator_of(spec).tensors(spec, SIZE)
    tensors["offset"][...] = 0
    kernels = Gradients(spec)
    expected = operator_of(spec).expected(spec, tensors)
    found = kernels(tensors, SIZE)
    assert np.any(found["grad_offset"][0, 0] != 0) == (border == "torchvision")
    for name, gradient in found.items():
        assert error_of(gradient, expected[name]) < TOLERANCES["float32"], name
    # The sample of the first pixel lies at (-1, -1).
    tensors["grad_output"][0, 0, 0, :] = np.inf
    infinite = kernels(tensors, SIZE)
    assert error_of(infinite["grad_input"], expected["grad_input"]) < TOLERANCES["float32"]
    assert infinite["grad_mask"][0, 0, 0, 0] == 0


DETERMINISTIC = {
    "tensor cores": layer(deterministic=True),
    "planes": layer(layout="NCHW", dtype="bfloat16", mask=False, deterministic=True),
    "tf32": layer(dtype="float32", tf32=True, grad_offset=False, deterministic=True),
    "multiply-adds": layer(16, 24, dtype="float32", layout="NCHW", deterministic=True),
    "doubles": layer(16, 16, dtype="float64", deterministic=True),
    "depthwise": layer(groups=64, grad_offset=False, deterministic=True),
}


@needs_emulator
@pytest.mark.parametrize("case", DETERMINISTIC)
def test_order_of_additions_does_not_matter(case):
    """Two schedules that add in another order give the same bits."""
    from cuda_layers import Gradients, error_of

    spec = DETERMINISTIC[case]
    tensors = tensors_of(spec)
    tolerance = 1e-11 if spec.dtype == "float64" else TOLERANCES["tf32" if spec.tf32 else spec.dtype]
    schedules = [Gradients(spec, decided(warps=4, taps=1)), Gradients(spec, decided(warps=1, taps=9))]
    assert schedules[0].made != schedules[1].made
    first, second = (kernels(tensors, SIZE)["grad_input"] for kernels in schedules)
    np.testing.assert_array_equal(first.view(np.uint8), second.view(np.uint8))
    expected = operator_of(spec).expected(spec, tensors)["grad_input"]
    assert error_of(first, expected) < tolerance
    # What is not finite reaches the elements that it should, and no other.
    tensors["grad_output"].reshape(-1)[3], tensors["grad_output"].reshape(-1)[-2] = np.inf, np.nan
    first, second = (kernels(tensors, SIZE)["grad_input"].astype(np.float64) for kernels in schedules)
    np.testing.assert_array_equal(first, second)
    finite = np.isfinite(first)
    assert 0.5 < finite.mean() < 1
    assert np.abs(first - expected)[finite].max() < tolerance * np.abs(expected).max()
    tensors["grad_output"][...] = 0
    assert not schedules[0](tensors, SIZE)["grad_input"].any()


@needs_emulator
def test_all_gradients_in_one_call():
    from cuda_layers import Gradients, error_of

    spec = layer(32, 32, layout="NCHW", grad_weight=True, grad_bias=True)
    tensors = tensors_of(spec, Extents(3, 11, 9))
    expected = operator_of(spec).expected(spec, tensors)
    found = Gradients(spec)(tensors, Extents(3, 11, 9), units=1)
    assert list(found) == ["grad_input", "grad_offset", "grad_mask", "grad_weight", "grad_bias"]
    for name, gradient in found.items():
        assert error_of(gradient, expected[name]) < TOLERANCES["float16"], name


def test_units_of_channels():
    assert column_units(layer(96, 64, groups=2, offset_groups=3)).channels == 16
    assert packed_shape(layer(96, 64, groups=2, offset_groups=3)) == (6, 9, 2, 1, 32, 4)
    assert packed_shape(layer(20, 33, dtype="float64")) == (1, 9, 36, 16, 2)
    assert packed_shape(layer(64, 128, groups=64)) == (9, 2, 64)
    layer_itself = DeformConv2dSpec(20, 33, dtype="float64")
    assert packed_shape(layer_itself) == (1, 9, 20, 24, 2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_default_schedule_of_named_layers_applies(name):
    dtype = ("float16", "tf32", "float32")[list(PROBLEMS).index(name) % 3]
    changes = {"dtype": "float32" if dtype == "tf32" else dtype, "tf32": dtype == "tf32"}
    spec = DeformConv2dGradSpec.of(replace(PROBLEMS[name].spec, **changes))
    target = resolve_target("cuda-sm_80")
    made = space_of(OPERATOR, "cuda").schedule(new_schedule(spec, target), spec, target)
    assert made.variant == product_of(spec).kind
    assert made.values["taps"] == 1


@needs_nvcc
def test_additions_of_vectors():
    """Hopper adds four numbers at once; what is before it one."""
    counts = {}
    for arch in ("sm_80", "sm_90"):
        spec, target = layer(grad_offset=False), resolve_target(f"cuda-{arch}")
        sch = new_schedule(spec, target)
        space_of(OPERATOR, "cuda").schedule(sch, spec, target)
        _, compiled = compile_kernels(spec, target, sch.mod)
        counts[arch] = max(kernel.instructions.get("RED", 0) for kernel in compiled.kernels)
        if not any(kernel.instructions for kernel in compiled.kernels):
            pytest.skip("nothing here disassembles machine code of GPUs")
    assert counts["sm_80"] == 4 * counts["sm_90"] > 0


@needs_nvcc
def test_artifact_of_another_machines_gpu(tmp_path):
    spec = layer(32, 32, grad_weight=True, grad_bias=True)
    artifact = build(spec, "cuda-sm_80", "default", cache_dir=tmp_path)
    assert "pack_weight_kernel" in artifact.schedule["device"]["kernels"]
    assert artifact.kernel.packed_shape == packed_shape(spec)
    assert artifact.kernel.max_tile_units == artifact.schedule["decisions"]["values"]["weight_tile_units"]
