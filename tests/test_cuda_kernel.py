# SPDX-License-Identifier: Apache-2.0
"""Calls on a GPU, up to the compiled function, which an emulator runs: arguments, memory, streams, packed weights."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from compiled import error_of
from handmade import variant

pytest.importorskip("torch")
pytest.importorskip("tvm")
if shutil.which("g++") is None:
    pytest.skip("the emulator needs g++", allow_module_level=True)

import pretend_gpu
import torch
from pretend_gpu import program_of

from tvmdcn.errors import DeviceError, SpecError, SpecTypeError
from tvmdcn.problems import make_tensors
from tvmdcn.reference import reference
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import resolve_target

TARGET = resolve_target("cuda-sm_90")
TENSOR_CORES = DeformConv2dSpec(32, 32, padding=1, dtype="float16", layout="NHWC")
PLAIN = variant(mask=True)
TOLERANCES = {"float16": 2e-3, "float32": 4e-6}
ORDER = ("input", "offset", "weight", "bias", "mask")


@pytest.fixture
def gpu(monkeypatch):
    """Return what makes a kernel, with the stand-ins for arrays and for TVM's runtime."""

    def make(spec):
        program, interface = program_of(spec, TARGET)
        arrays, runtime = pretend_gpu.install(monkeypatch, program)
        return pretend_gpu.kernel_of(spec, TARGET, interface), arrays, runtime

    return make


def tensor_of(array, spec):
    if array is None:
        return None
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.permute(0, 3, 1, 2) if spec.layout == "NHWC" and tensor.dim() == 4 else tensor


def arguments_of(spec, extents, seed=0):
    tensors = make_tensors(spec, extents, seed, far=0.1)
    found = {name: tensor_of(getattr(tensors, name), spec) for name in ORDER}
    found["weight"] = torch.from_numpy(tensors.weight)
    expected = reference(spec, tensors)
    return found, expected.transpose(0, 3, 1, 2) if spec.layout == "NHWC" else expected


def call(kernel, arguments, **options):
    return kernel(*(arguments[name] for name in ORDER), **options)


def check(kernel, arguments, expected):
    found = call(kernel, arguments)
    assert error_of(found.double().numpy(), expected) <= TOLERANCES[kernel.spec.dtype]
    return found


@pytest.mark.parametrize(
    "spec",
    [TENSOR_CORES, dataclasses.replace(TENSOR_CORES, layout="NCHW", mask=False), PLAIN, variant(layout="NHWC")],
    ids=lambda spec: spec.slug,
)
def test_values(gpu, spec):
    kernel, _, _ = gpu(spec)
    for seed, extents in enumerate((Extents(2, 9, 10), Extents(1, 5, 6))):
        arguments, expected = arguments_of(spec, extents, seed)
        found = check(kernel, arguments, expected)
        last = torch.channels_last if spec.layout == "NHWC" else torch.contiguous_format
        assert found.is_contiguous(memory_format=last)
        without = {**arguments, "bias": None}
        bias = arguments["bias"].double().numpy()[:, None, None]
        assert error_of(call(kernel, without).double().numpy(), expected - bias) <= 2 * TOLERANCES[spec.dtype]


@pytest.mark.parametrize("name", ["input", "offset", "mask", "weight", "bias"])
def test_any_memory(gpu, name):
    kernel, _, _ = gpu(TENSOR_CORES)
    arguments, expected = arguments_of(TENSOR_CORES, Extents(1, 6, 7))
    tensor = arguments[name]
    odd = (
        torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)
    )
    for changed in (odd, torch.stack([tensor, tensor], -1)[..., 0], tensor.contiguous()):
        check(kernel, {**arguments, name: changed}, expected)


def test_out(gpu):
    kernel, _, _ = gpu(TENSOR_CORES)
    arguments, expected = arguments_of(TENSOR_CORES, Extents(1, 6, 7))
    version = None
    out = torch.full_like(check(kernel, arguments, expected), torch.nan)
    version = out._version
    assert call(kernel, arguments, out=out) is out
    assert out._version > version
    assert error_of(out.double().numpy(), expected) <= TOLERANCES["float16"]
    with pytest.raises(SpecError, match=r"out must be float16 of shape \(1, 32, 6, 7\)"):
        call(kernel, arguments, out=out[:, :8])
    with pytest.raises(SpecError, match="out must be contiguous in the layout NHWC"):
        call(kernel, arguments, out=out.contiguous())
    with pytest.raises(SpecError, match="out shares memory with an input"):
        call(kernel, {**arguments, "input": out}, out=out)


def test_nothing_to_compute(gpu):
    kernel, _, runtime = gpu(TENSOR_CORES)
    arguments, _ = arguments_of(TENSOR_CORES, Extents(1, 6, 7))
    none = {name: tensor[:0] for name, tensor in arguments.items() if name in ("input", "offset", "mask")}
    packed = kernel.pack(arguments["weight"])
    before = len(runtime.used)
    assert call(kernel, {**arguments, **none, "weight": packed}).shape == (0, 32, 6, 7)
    assert len(runtime.used) == before


def test_launches_go_to_the_current_stream(gpu):
    kernel, arrays, runtime = gpu(TENSOR_CORES)
    runtime.stream = 3
    arguments, expected = arguments_of(TENSOR_CORES, Extents(1, 6, 7))
    arrays.current = 11
    check(kernel, arguments, expected)
    # Weight and layer, each put on the caller's stream and the one before put back.
    assert runtime.used == [(0, 11), (0, 3)] * 2
    assert runtime.stream == 3


def test_weights_are_packed_once_and_waited_for(gpu):
    kernel, arrays, runtime = gpu(TENSOR_CORES)
    arguments, expected = arguments_of(TENSOR_CORES, Extents(1, 6, 7))
    check(kernel, arguments, expected)
    packs = lambda: len(runtime.used) // 2  # noqa: E731
    assert packs() == 2
    check(kernel, arguments, expected)
    assert packs() == 3
    assert arrays.waits == []
    # Another stream waits for the one that packed.
    arrays.current = 8
    check(kernel, arguments, expected)
    assert packs() == 4
    assert arrays.waits == [(8, 7)]
    # A change is seen, and a weight that is gone is forgotten.
    arguments["weight"].mul_(2)
    bias = arguments["bias"].double().numpy()[:, None, None]
    check(kernel, arguments, 2 * (expected - bias) + bias)
    assert packs() == 6
    assert len(kernel._cached) == 1
    del arguments["weight"]
    assert len(kernel._cached) == 0


def test_a_captured_graph_packs_for_itself(gpu):
    kernel, arrays, runtime = gpu(TENSOR_CORES)
    arguments, expected = arguments_of(TENSOR_CORES, Extents(1, 6, 7))
    check(kernel, {**arguments}, expected)
    arrays.capturing = True
    for _ in range(2):
        before = len(runtime.used)
        without = {**arguments, "bias": None}
        call(kernel, without)
        assert len(runtime.used) - before == 4  # both functions
    assert kernel._no_bias == {}
    arrays.capturing = False
    before = len(runtime.used)
    check(kernel, arguments, expected)
    assert len(runtime.used) - before == 2


def test_packed_weights(gpu):
    kernel, _, _ = gpu(TENSOR_CORES)
    arguments, expected = arguments_of(TENSOR_CORES, Extents(1, 6, 7))
    packed = kernel.pack(arguments["weight"])
    check(kernel, {**arguments, "weight": packed}, expected)
    assert "int32, for deform_conv2d-pretended" in repr(packed)
    other = type(packed)(packed.data, "another", packed.pointer)
    with pytest.raises(SpecError, match="weight was packed for another, this kernel is deform_conv2d-pretended"):
        call(kernel, {**arguments, "weight": other})
    with pytest.raises(SpecError, match=r"weight must have the shape \(32, 32, 3, 3\)"):
        kernel.pack(arguments["weight"][:8])
    with pytest.raises(SpecTypeError, match="weight"):
        kernel.pack(arguments["weight"].float())


def test_refusals(gpu):
    kernel, arrays, _ = gpu(TENSOR_CORES)
    arguments, _ = arguments_of(TENSOR_CORES, Extents(1, 6, 7))
    with pytest.raises(SpecError, match="mask is missing"):
        call(kernel, {**arguments, "mask": None})
    with pytest.raises(SpecTypeError, match="requires gradients"):
        call(kernel, {**arguments, "input": arguments["input"].clone().requires_grad_()})
    with pytest.raises(SpecTypeError, match="offset must be a tensor"):
        call(kernel, {**arguments, "offset": 3})
    with pytest.raises(SpecTypeError, match="float32"):
        call(kernel, {**arguments, "offset": arguments["offset"].float()})
    arrays.elsewhere.add(id(arguments["mask"]))
    with pytest.raises(SpecTypeError, match="mask is on cpu, and input is on cpu: bring it there"):
        call(kernel, arguments)
    arrays.elsewhere.clear()
    spec = dataclasses.replace(TENSOR_CORES, in_channels=65536, mask=False)
    kernel.spec = spec
    with pytest.raises(SpecError, match="would need indices beyond 32 bits for a batch of 2 images of 200 x 200"):
        kernel._device_plan(Extents(2, 200, 200), (200, 200))


def test_arrays_and_gpus_of_another_kind(gpu, monkeypatch, tmp_path):
    from fake_cuda import pretend_gpus

    _, interface = program_of(TENSOR_CORES, TARGET)
    kernel = pretend_gpu.kernel_of(TENSOR_CORES, TARGET, interface)
    arguments, _ = arguments_of(TENSOR_CORES, Extents(1, 6, 7))
    with pytest.raises(SpecTypeError, match=r"input is on cpu, and this kernel was built for cuda-sm_90. Pass a torch"):
        call(kernel, arguments)
    with pytest.raises(SpecTypeError, match="input is a ndarray, and this kernel was built for cuda-sm_90"):
        call(kernel, {**arguments, "input": arguments["input"].numpy()})
    with pretend_gpus(tmp_path, monkeypatch, ["NVIDIA H200", "NVIDIA L4"]):
        kernel._check_gpu(0)
        with pytest.raises(
            DeviceError, match=r"cuda:1 is a NVIDIA L4 of compute capability sm_89, and this kernel was"
        ):
            kernel._check_gpu(1)


def test_failed_launches_say_what_to_do(gpu, monkeypatch):
    kernel, _, runtime = gpu(TENSOR_CORES)
    arguments, _ = arguments_of(TENSOR_CORES, Extents(1, 6, 7))

    def fail(self):
        raise RuntimeError("deform_conv2d failed: CUDA_ERROR_ILLEGAL_ADDRESS")

    from tvmdcn import cuda_calls

    monkeypatch.setattr(cuda_calls.Frame, "run", fail)
    runtime.stream = 5
    with pytest.raises(DeviceError, match=r"ILLEGAL_ADDRESS \(on cuda:0\)\. .*CUDA_LAUNCH_BLOCKING=1"):
        call(kernel, arguments)
    assert runtime.stream == 5
