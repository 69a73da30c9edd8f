# SPDX-License-Identifier: Apache-2.0
"""Calls of gradients on a GPU, up to the compiled function: arguments, memory, streams, what is refused.

The function is one in Python with the arguments of the compiled one; that both agree on them is the last test.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from compiled import error_of

pytest.importorskip("torch")
pytest.importorskip("tvm")

import pretend_gpu
import torch

import tvmdcn
from tvmdcn import builder, gradient
from tvmdcn.arrays import arrays_of
from tvmdcn.cuda_grad_kernel import CudaGradKernel
from tvmdcn.errors import DeviceError, SpecError, SpecTypeError
from tvmdcn.grad_scratch import scratch_tensors, split_of
from tvmdcn.kernel_interface import KernelInterface
from tvmdcn.problems import TEST_PROBLEMS
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.space import Decisions, space_of
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.target import resolve_target
from tvmdcn.tensors import make_gradient_tensors
from tvmdcn.tuning import gpu_trial, trial

TARGET = resolve_target("cuda-sm_90")
LAYER = TEST_PROBLEMS["asymmetric"].spec
EXTENTS = Extents(3, 5, 4)
FLAGS = ("grad_input", "grad_offset", "grad_weight", "grad_bias")
ASKED = [dict(zip(FLAGS, bits, strict=True)) for bits in itertools.product((True, False), repeat=4) if any(bits)]
ORDER = ("grad_output", "input", "offset", "weight", "mask")
TOLERANCES = {"float16": 2e-3, "bfloat16": 1.2e-2, "float32": 4e-6, "float64": 1e-13}
GRANULE, UNITS = 8, 3


def interface_of(spec):
    """Return how the stand-in below is called: its packed weight is the weight, and some."""
    words = int(np.prod(spec.weight_shape)) * np.dtype(spec.dtype).itemsize // 4 + 4
    return KernelInterface(GRANULE, UNITS, (words,), "uint32", spec.layout, spec.operator, "pack_weight", 64)


class Compiled:
    """What computes gradients in the place of a compiled function, after a look at all its arguments."""

    def __init__(self, spec):
        self.spec, self.calls, self.spoiled = spec, [], None

    def __call__(self, name, values):
        self.calls.append(name)
        if name == "pack_weight":
            weight, packed = values
            assert weight.shape == (self.spec.out_channels, np.prod(self.spec.weight_shape[1:]))
            packed.view(np.uint8)[: weight.nbytes] = weight.view(np.uint8).ravel()
            return
        spec, names = self.spec, (*self.spec.inputs, *self.spec.outputs)
        *values, height, width, out_width, total, tiles, splits, tile_units = values
        size = spec.output_size(height, width)
        batch = total // np.prod(size)
        assert (out_width, total, tiles) == (size[1], batch * np.prod(size), -(-total // GRANULE))
        assert (splits, tile_units) == (-(-tiles // tile_units), min(tiles, UNITS))
        scratch = scratch_tensors(spec, batch * height * width, total, splits)
        inputs, outputs = values[: len(spec.inputs)], values[len(values) - len(spec.outputs) :]
        between = values[len(spec.inputs) : len(values) - len(spec.outputs)]
        assert [(array.shape, str(array.dtype)) for array in between] == list(scratch.values())
        assert len(values) == len(names) + len(scratch)
        assert all(array.ctypes.data % 256 == 0 for array in between)
        extents = Extents(batch, height, width)
        tensors = make_gradient_tensors(spec, extents)  # what is not read stands in for itself
        for given, array in zip(spec.inputs, inputs, strict=True):
            shape = spec.shape_of(given, extents)
            if given == "weight":
                array = array.view(spec.dtype)[: np.prod(shape)]
            elif spec.layout == "NCHW":
                assert array.shape == (*shape[:2], np.prod(shape[2:]))
            elif given in ("grad_output", "input"):
                assert array.shape == (np.prod(shape[:3]), shape[3])
                assert array.ctypes.data % 32 == 0
            else:
                assert array.shape == (shape[0], np.prod(shape[1:3]), shape[3])
            tensors[given] = array.reshape(shape)
        found = expected_gradients(spec, tensors)
        for given, array in zip(spec.outputs, outputs, strict=True):
            array[...] = found[given].reshape(array.shape)
            if given == self.spoiled:
                array[-1] *= 1.5
        for array in between:  # which lies nowhere in what else there is
            array.view(np.uint8)[...] = 0x55


@pytest.fixture
def gpu(monkeypatch):
    """Return what makes a kernel, with the stand-ins for its functions, for arrays and for TVM's runtime."""

    def make(spec):
        compiled = Compiled(spec)
        arrays, runtime = pretend_gpu.install(monkeypatch, compiled)
        kernel = pretend_gpu.kernel_of(spec, TARGET, interface_of(spec))
        assert type(kernel) is CudaGradKernel
        return kernel, compiled, arrays, runtime

    return make


def grad(layer=LAYER, **fields):
    flags = {name: fields.pop(name) for name in tuple(fields) if name in (*FLAGS, "border", "deterministic")}
    return DeformConv2dGradSpec.of(dataclasses.replace(layer, **fields), **flags)


def arguments_of(spec, extents=EXTENTS, seed=0):
    arrays = make_gradient_tensors(spec, extents, seed)
    found = dict.fromkeys(ORDER)
    for name, array in arrays.items():
        tensor = torch.from_numpy(array)
        found[name] = tensor.permute(0, 3, 1, 2) if spec.layout == "NHWC" and name != "weight" else tensor
    return found, expected_gradients(spec, arrays)


def call(kernel, arguments):
    return kernel(*(arguments[name] for name in ORDER))


def check(spec, found, expected):
    assert {f"grad_{name}" for name, tensor in found._asdict().items() if tensor is not None} == set(expected)
    for name, array in expected.items():
        tensor = getattr(found, name.removeprefix("grad_"))
        assert str(tensor.dtype) == f"torch.{spec.dtype}"
        if spec.layout == "NHWC" and tensor.dim() == 4 and name != "grad_weight":
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            tensor = tensor.permute(0, 2, 3, 1)
        assert tensor.is_contiguous()
        assert error_of(tensor.double().numpy(), array) <= TOLERANCES[spec.dtype]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_all_that_can_be_asked_for(gpu, dtype, layout):
    for number, flags in enumerate(ASKED):
        spec = grad(dtype=dtype, layout=layout, mask=number % 3 > 0, **flags, deterministic=number % 2 > 0)
        kernel, *_ = gpu(spec)
        for seed, extents in enumerate((EXTENTS, Extents(1, 3, 3))):
            arguments, expected = arguments_of(spec, extents, seed)
            check(spec, call(kernel, arguments), expected)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ORDER)
def test_any_memory(gpu, name, layout):
    spec = grad(layout=layout, dtype="float16")
    kernel, *_ = gpu(spec)
    arguments, expected = arguments_of(spec)
    tensor = arguments[name]
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    odd = memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
    for changed in (odd, torch.stack([tensor, tensor], -1)[..., 0], tensor.contiguous()):
        check(spec, call(kernel, {**arguments, name: changed}), expected)


def test_no_images(gpu):
    spec = grad()
    kernel, compiled, *_ = gpu(spec)
    arguments, _ = arguments_of(spec)
    none = {name: tensor[:0] for name, tensor in arguments.items() if name != "weight"}
    found = call(kernel, {**arguments, **none})
    assert [tuple(tensor.shape) for tensor in found] == [
        tuple(none["input"].shape),
        tuple(none["offset"].shape),
        spec.weight_shape,
        (spec.out_channels,),
        tuple(none["mask"].shape),
    ]
    assert not found.weight.any()
    assert not found.bias.any()
    assert spec.operator not in compiled.calls


def test_streams_and_weights(gpu):
    spec = grad()
    kernel, compiled, arrays, runtime = gpu(spec)
    arguments, expected = arguments_of(spec)
    runtime.stream, arrays.current = 3, 11
    check(spec, call(kernel, arguments), expected)
    # Weight and gradients, each put on the caller's stream and the one before put back.
    assert runtime.used == [(0, 11), (0, 3)] * 2
    assert compiled.calls == ["pack_weight", spec.operator]
    arrays.current = 12
    check(spec, call(kernel, arguments), expected)
    assert arrays.waits == [(12, 11)]
    assert compiled.calls[2:] == [spec.operator]
    arrays.capturing = True
    check(spec, call(kernel, arguments), expected)
    assert compiled.calls[3:] == ["pack_weight", spec.operator]
    arrays.capturing = False
    packed = kernel.pack(arguments["weight"])
    check(spec, call(kernel, {**arguments, "weight": packed}), expected)
    assert compiled.calls[5:] == ["pack_weight", spec.operator]
    # One that is not read is not packed.
    kernel, compiled, *_ = gpu(grad(grad_input=False, grad_offset=False))
    call(kernel, arguments)
    assert compiled.calls == [spec.operator]


def test_changes_that_torch_does_not_count(gpu):
    """As `torch.autograd.gradcheck` makes them."""
    spec = grad(dtype="float64")
    kernel, *_ = gpu(spec)
    arguments, expected = arguments_of(spec)
    check(spec, call(kernel, arguments), expected)
    arguments["weight"].data.mul_(2)
    found = call(kernel, arguments)
    assert error_of(found.input.numpy(), 2 * expected["grad_input"]) <= TOLERANCES["float64"]


def test_refusals(gpu):
    spec = grad()
    kernel, compiled, arrays, _ = gpu(spec)
    arguments, _ = arguments_of(spec)
    for name in ORDER:
        with pytest.raises(SpecTypeError, match="have no derivatives of their own"):
            call(kernel, {**arguments, name: arguments[name].clone().requires_grad_()})
    with pytest.raises(SpecError, match="mask is missing"):
        call(kernel, {**arguments, "mask": None})
    with pytest.raises(SpecTypeError, match="offset must be a tensor"):
        call(kernel, {**arguments, "offset": 3})
    with pytest.raises(SpecTypeError, match="float64"):
        call(kernel, {**arguments, "grad_output": arguments["grad_output"].double()})
    with pytest.raises(SpecError, match=r"grad_output must be of the output's shape \(3, 2, "):
        call(kernel, {**arguments, "grad_output": arguments["grad_output"][:, :, :1]})
    without = gpu(grad(grad_input=False, grad_offset=False))[0]
    call(without, arguments)
    with pytest.raises(SpecError, match=r"weight must have the shape \(2, 3, 3, 2\)"):
        call(without, {**arguments, "weight": arguments["weight"][:1]})
    for name in ORDER[2:]:
        kernel, compiled, arrays, _ = gpu(spec)
        arrays.elsewhere.add(id(arguments[name]))
        with pytest.raises(SpecTypeError, match=f"{name} is on cpu, and input is on .*: bring it there"):
            call(kernel, arguments)
        assert spec.operator not in compiled.calls
    kernel, *_ = gpu(spec)
    with pytest.raises(SpecError, match="weight was packed for another"):
        call(kernel, {**arguments, "weight": tvmdcn.PackedWeight(torch.zeros(1), "another", 8)})


def test_indices_of_32_bits(gpu):
    kernel, *_ = gpu(grad())
    with pytest.raises(SpecError, match="would need indices beyond 32 bits for a batch of 4096 images of 400 x 400"):
        kernel._device_plan(Extents(4096, 400, 400))


def test_arrays_and_gpus_of_another_kind(monkeypatch, tmp_path):
    from fake_cuda import pretend_gpus

    spec = grad()
    kernel = pretend_gpu.kernel_of(spec, TARGET, interface_of(spec))
    arguments, _ = arguments_of(spec)
    with pytest.raises(SpecTypeError, match=r"input is on cpu, and this kernel was built for cuda-sm_90\."):
        call(kernel, arguments)
    with (
        pretend_gpus(tmp_path, monkeypatch, ["NVIDIA L4"]),
        pytest.raises(DeviceError, match="cuda:0 is a NVIDIA L4 of compute capability sm_89, and this kernel was"),
    ):
        kernel._check_gpu(0)


def test_parts_of_sums():
    spec = grad()
    assert split_of(spec, 1, 8) == (1, 1)
    assert split_of(spec, 16, 8) == (2, 8)
    assert split_of(spec, 17, 8) == (3, 6)
    # Parts of a large weight take memory: 9.4 MB each, of which there are at most 14.
    large = DeformConv2dGradSpec.of(DeformConv2dSpec(512, 512, padding=1))
    splits, units = split_of(large, 1000, 2)
    assert (splits, units) == (14, 72)
    (shape, dtype) = scratch_tensors(large, 1, 1, splits)["weight_parts"]
    assert np.prod(shape) * np.dtype(dtype).itemsize <= 128 << 20
    # The bias has small ones.
    assert split_of(dataclasses.replace(large, grad_weight=False), 1000, 2) == (500, 2)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_bound(gpu, monkeypatch, layout):
    """What tuning and benchmarks call."""
    spec = grad(layout=layout, dtype="float16")
    kernel, compiled, *_ = gpu(spec)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    arrays = make_gradient_tensors(spec, EXTENTS)
    bound = kernel.bind(arrays)
    before = len(compiled.calls)
    first, second = bound(), bound()
    assert compiled.calls[before:] == [spec.operator] * 2
    assert list(first) == list(spec.outputs)
    for name, array in expected_gradients(spec, arrays).items():
        assert first[name].data_ptr() == second[name].data_ptr()
        assert error_of(first[name].double().numpy(), array) <= TOLERANCES["float16"]


def test_tuning_looks_at_all_results(gpu, monkeypatch):
    spec = grad(dtype="float16", layout="NHWC")
    kernel, compiled, *_ = gpu(spec)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    watch = SimpleNamespace(prepared=lambda call: call, times=lambda call, count: [call() and 0.01] * count)
    monkeypatch.setattr(gpu_trial, "Stopwatch", lambda: watch)
    tensors = make_gradient_tensors(spec, EXTENTS)
    expected = expected_gradients(spec, tensors)
    limit = trial.tolerance_of(spec)

    def measured():
        return gpu_trial.measure_kernels([kernel], tensors, lambda found: trial._error(found, expected), 2)

    ((times, error),) = measured()
    assert len(times) >= 10
    assert error < limit
    for compiled.spoiled in spec.outputs:
        ((_, error),) = measured()
        assert error > limit, compiled.spoiled


def test_which_kernel_is_called(monkeypatch):
    arrays = pretend_gpu.PretendArrays()
    asked = []

    def load_for(spec, gpu):
        asked.append((spec, gpu))
        return lambda *arguments: tvmdcn.Gradients(*[None] * 5)

    monkeypatch.setattr(gradient, "arrays_of", lambda array: arrays)
    monkeypatch.setattr(gradient, "load_for", load_for)
    monkeypatch.setattr(gradient, "_kernels", {})
    monkeypatch.setattr(arrays, "gpu", lambda array: (1, True))
    arguments, _ = arguments_of(grad(LAYER, stride=(1, 1), padding=0, dilation=(1, 1), kernel_size=(3, 2)))

    def backward(*needs):
        tvmdcn.deform_conv2d_backward(*(arguments[name] for name in ORDER), needs=needs)

    def spec(**fields):
        return grad(LAYER, stride=(1, 1), padding=0, dilation=(1, 1), kernel_size=(3, 2), **fields)

    backward(True, True, True, True, True)
    assert asked == [(spec(), (1, True))]
    torch.use_deterministic_algorithms(True)
    try:
        backward(True, True, True, True, True)
        assert asked[1:] == [(spec(deterministic=True), (1, True))]
        backward(False, False, True, True, False)
        assert asked[2:] == [(spec(grad_input=False, grad_offset=False), (1, True))]
        backward(True, True, True, True, True)
        assert not arrays_of(torch.zeros(1)).wants_determinism()  # on the host
    finally:
        torch.use_deterministic_algorithms(False)
    backward(False, False, True, True, False)
    backward(True, True, True, True, True)
    assert len(asked) == 3


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_autograd(gpu, monkeypatch, layout):
    """Of a layer whose tensors pass for those of a GPU; its forward is the reference."""
    from tvmdcn import api
    from tvmdcn.reference import reference
    from tvmdcn.tensors import Tensors
    from tvmdcn.torch import autograd

    spec = grad(layout=layout)
    kernel, _, arrays, _ = gpu(spec)
    for name, value in {"_is_here": operator.attrgetter("is_cpu"), "device_type": "cpu"}.items():
        monkeypatch.setattr(arrays, name, value, raising=False)
    for module in (api, gradient, autograd):
        monkeypatch.setattr(module, "arrays_of", lambda array: arrays)

    def forward(input, offset, weight, bias, mask):
        images = [tensor.permute(0, 2, 3, 1).contiguous().numpy() for tensor in (input, offset, mask)]
        last = dataclasses.replace(spec.layer, layout="NHWC")
        found = reference(last, Tensors(images[0], images[1], weight.detach().numpy(), images[2], None))
        memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        return torch.from_numpy(found).float().permute(0, 3, 1, 2).contiguous(memory_format=memory_format)

    asked = []
    monkeypatch.setattr(api, "load_for", lambda spec, gpu: forward)
    monkeypatch.setattr(gradient, "load_for", lambda spec, gpu: asked.append((spec, gpu)) or kernel)
    for module in (api, gradient):
        monkeypatch.setattr(module, "_kernels", {})
    arguments, expected = arguments_of(spec)
    leaves = {name: arguments[name].clone().requires_grad_() for name in ORDER[1:]}
    leaves["bias"] = torch.zeros(spec.out_channels, requires_grad=True)
    geometry = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation}
    tvmdcn.deform_conv2d(**leaves, **geometry).backward(arguments["grad_output"])
    found = tvmdcn.Gradients(**{name: leaf.grad for name, leaf in leaves.items()})
    check(spec, found, expected)
    assert asked == [(spec, (0, False))]


@pytest.mark.parametrize("units", [2, 16])
def test_sums_are_as_long_as_the_schedule_says(units):
    spec = grad(DeformConv2dSpec(16, 32, padding=1, dtype="float16", layout="NHWC"), grad_input=False)
    schedule, space = builder.new_schedule(spec, TARGET), space_of(spec.operator, "cuda")
    made = space.schedule(schedule, spec, TARGET, Decisions("mma", {"weight_tile_units": units}))
    assert made.values["weight_tile_units"] == units
    assert builder.interface_of(spec, TARGET, schedule.mod).max_tile_units == units


def test_processors_are_deterministic_anyway():
    target = resolve_target("x86-64-v3")
    one, other = (builder.new_schedule(grad(deterministic=fixed), target).mod.script() for fixed in (False, True))
    assert one == other


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
@pytest.mark.parametrize(
    "spec",
    [
        grad(DeformConv2dSpec(16, 32, padding=1, dtype="float16", layout="NHWC")),
        grad(dtype="float32", deterministic=True),
        grad(dtype="float16", grad_weight=False),
    ],
    ids=lambda spec: spec.slug,
)
def test_compiled_functions_have_these_arguments(monkeypatch, spec):
    program, interface = pretend_gpu.program_of(spec, TARGET)
    pretend_gpu.install(monkeypatch, program)
    kernel = pretend_gpu.kernel_of(spec, TARGET, interface)
    for seed, extents in enumerate((Extents(2, 13, 14), Extents(1, 5, 6))):
        arguments, expected = arguments_of(spec, extents, seed)
        check(spec, call(kernel, arguments), expected)
