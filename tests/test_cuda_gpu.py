# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU: numbers against float64, streams, graphs, devices, memory, torch's transformations.

Skipped where there is no NVIDIA GPU; there an emulator runs the same kernels (`tests/test_cuda_schedules.py`,
`tests/test_cuda_grad_schedules.py`, `tests/test_cuda_weight_gradients.py`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compiled import error_of
from strategies import Case

import tvmdcn
from tvmdcn import cuda_driver
from tvmdcn.errors import DeviceError, SpecError, SpecTypeError
from tvmdcn.reference import reference
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.tensors import numpy_dtype

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# Largest error over the largest value.
TOLERANCES = {"float64": 1e-13, "float32": 4e-6, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1.2e-2}
HAS_BFLOAT16 = importlib.util.find_spec("ml_dtypes") is not None
DTYPES = ("float16", "float32", "tf32", "float64", *(("bfloat16",) if HAS_BFLOAT16 else ()))

# Nothing symmetric; and the kinds of layers that have variants of their own.
ASYMMETRIC = DeformConv2dSpec(6, 2, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3, mask=True)
LAYERS = {
    "asymmetric": (ASYMMETRIC, Extents(3, 5, 4)),
    "plain": (DeformConv2dSpec(64, 64, padding=1), Extents(2, 19, 23)),
    "no mask": (DeformConv2dSpec(64, 96, padding=1, mask=False), Extents(1, 17, 40)),
    "few channels": (DeformConv2dSpec(3, 5, padding=1), Extents(2, 13, 11)),
    "odd channels": (DeformConv2dSpec(50, 70, padding=1), Extents(1, 14, 15)),
    "offset groups": (DeformConv2dSpec(64, 64, padding=1, offset_groups=8), Extents(2, 12, 17)),
    "many offset groups": (DeformConv2dSpec(64, 32, padding=1, offset_groups=16), Extents(1, 12, 17)),
    "groups": (DeformConv2dSpec(64, 64, padding=1, groups=4), Extents(2, 12, 17)),
    "narrow groups": (DeformConv2dSpec(64, 128, padding=1, groups=16), Extents(2, 9, 17)),
    "depthwise": (DeformConv2dSpec(48, 48, padding=1, groups=48), Extents(2, 12, 17)),
    "strided": (DeformConv2dSpec(32, 48, (5, 3), (2, 3), (2, 1), (1, 2)), Extents(2, 31, 29)),
    "few pixels": (DeformConv2dSpec(256, 256, padding=1), Extents(1, 4, 5)),
    "one pixel": (DeformConv2dSpec(64, 64, padding=1), Extents(1, 1, 1)),
    "wide": (DeformConv2dSpec(512, 512, padding=1), Extents(1, 8, 9)),
}


@pytest.fixture(autouse=True)
def true_float32(monkeypatch):
    """Float32 means float32, unless a test asks for tf32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def with_dtype(spec: DeformConv2dSpec, dtype: str, layout: str = "NCHW") -> DeformConv2dSpec:
    """Return the layer in another dtype and layout, and let torch have tf32 if that is asked for."""
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    return dataclasses.replace(spec, dtype="float32" if dtype == "tf32" else dtype, layout=layout)


def on_gpu(array, spec, device="cuda:0"):
    """Return an array of images in the order of the layout as a tensor of shape N, C, H, W."""
    if array is None:
        return None
    bits = array.view(np.int16) if array.dtype.itemsize == 2 else array
    tensor = torch.from_numpy(np.ascontiguousarray(bits)).to(device).view(getattr(torch, spec.dtype))
    return tensor.permute(0, 3, 1, 2) if spec.layout == "NHWC" and tensor.dim() == 4 else tensor


def arguments_of(tensors, spec, device="cuda:0"):
    found = {name: on_gpu(getattr(tensors, name), spec, device) for name in ("input", "offset", "mask", "bias")}
    weight = dataclasses.replace(spec, layout="NCHW")
    return {**found, "weight": on_gpu(tensors.weight, weight, device)}


def geometry(spec):
    return {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation}


def run(spec, tensors, device="cuda:0"):
    return tvmdcn.deform_conv2d(**arguments_of(tensors, spec, device), **geometry(spec))


def as_numpy(tensor, spec):
    tensor = tensor.permute(0, 2, 3, 1) if spec.layout == "NHWC" else tensor
    return tensor.double().cpu().numpy()


def case(spec, extents, offsets="learned", image="normal", bias=True, seed=0):
    return Case(spec, extents, offsets, image, bias, seed).tensors


# ---- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype, layout):
    layer, extents = LAYERS[name]
    spec = with_dtype(layer, dtype, layout)
    for seed, (sizes, bias) in enumerate(((extents, True), (Extents(1, extents.height + 3, extents.width + 1), False))):
        tensors = case(spec, sizes, bias=bias, seed=seed)
        found = run(spec, tensors)
        assert found.dtype == getattr(torch, spec.dtype)
        assert found.is_contiguous(memory_format=torch.channels_last if layout == "NHWC" else torch.contiguous_format)
        assert error_of(as_numpy(found, spec), reference(spec, tensors)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", ["float16", "float32", "tf32"])
@pytest.mark.parametrize("offsets", ["zero", "integer", "half", "border", "far", "huge", "infinite", "nan"])
def test_places(offsets, dtype):
    for layer, layout in ((LAYERS["plain"][0], "NHWC"), (ASYMMETRIC, "NCHW")):
        spec = with_dtype(layer, dtype, layout)
        tensors = case(spec, Extents(2, 11, 13), offsets)
        assert error_of(as_numpy(run(spec, tensors), spec), reference(spec, tensors)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("name", ["plain", "depthwise", "offset groups"])
def test_infinite_pixels_stay_where_they_are(name):
    layer, extents = LAYERS[name]
    spec = with_dtype(layer, "float32", "NHWC")
    tensors = case(spec, extents, "border", "infinite")
    found, expected = as_numpy(run(spec, tensors), spec), reference(spec, tensors)
    assert np.array_equal(np.isfinite(found), np.isfinite(expected))
    assert error_of(found, expected) <= TOLERANCES["float32"]


def test_any_memory_gives_the_same():
    spec, extents = with_dtype(LAYERS["plain"][0], "float16"), Extents(2, 9, 11)
    arguments = arguments_of(case(spec, extents), spec)
    expected = tvmdcn.deform_conv2d(**arguments, **geometry(spec))
    for name, tensor in arguments.items():
        shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:].view(tensor.shape)
        shifted.copy_(tensor)
        views = [shifted, torch.stack([tensor, tensor], -1)[..., 0], tensor.flip(-1).contiguous().flip(-1)]
        if tensor.dim() == 4:
            views.append(tensor.contiguous(memory_format=torch.channels_last))
        for view in views:
            found = tvmdcn.deform_conv2d(**{**arguments, name: view}, **geometry(spec))
            assert torch.equal(found, expected), name


def test_large_image_of_a_detector():
    """Beside torchvision, if it is there, else float64 on the GPU through the formula of second gradients."""
    spec = with_dtype(DeformConv2dSpec(64, 64, padding=1), "float32", "NHWC")
    arguments = arguments_of(case(spec, Extents(1, 200, 336)), spec)
    found = tvmdcn.deform_conv2d(**arguments, **geometry(spec))
    wide = {name: tensor.double() for name, tensor in arguments.items()}
    from tvmdcn.torch import formula

    layer = dataclasses.replace(spec, dtype="float64", layout="NCHW")
    order = ("input", "offset", "weight", "bias", "mask")
    expected = formula.output(layer, *(wide[name].contiguous() for name in order), "torchvision")
    assert error_of(found.double().cpu().numpy(), expected.cpu().numpy()) <= TOLERANCES["float32"]


def test_results_repeat_to_the_last_bit():
    for dtype in ("float16", "float32"):
        for name in ("plain", "few pixels", "depthwise"):
            layer, extents = LAYERS[name]
            spec = with_dtype(layer, dtype, "NHWC")
            tensors = case(spec, extents)
            first = run(spec, tensors)
            assert all(torch.equal(run(spec, tensors), first) for _ in range(5))


def test_tf32_follows_torch():
    spec = with_dtype(LAYERS["plain"][0], "float32")
    tensors = case(spec, Extents(1, 12, 13))
    exact = error_of(as_numpy(run(spec, tensors), spec), reference(spec, tensors))
    torch.backends.cudnn.allow_tf32 = True
    rounded = error_of(as_numpy(run(spec, tensors), spec), reference(spec, tensors))
    assert exact <= TOLERANCES["float32"] < rounded <= TOLERANCES["tf32"]


def test_empty_batch_and_results_into_memory():
    spec = with_dtype(LAYERS["plain"][0], "float16")
    kernel = tvmdcn.load(spec, "cuda")
    arguments = arguments_of(case(spec, Extents(2, 9, 10)), spec)
    order = ("input", "offset", "weight", "bias", "mask")
    expected = kernel(*(arguments[name] for name in order))
    out = torch.full_like(expected, math.nan)
    assert kernel(*(arguments[name] for name in order), out=out) is out
    assert torch.equal(out, expected)
    packed = kernel.pack(arguments["weight"])
    assert torch.equal(kernel(*({**arguments, "weight": packed}[name] for name in order)), expected)
    none = {name: tensor[:0] for name, tensor in arguments.items() if tensor.dim() == 4 and name != "weight"}
    empty = kernel(*({**arguments, **none}[name] for name in order))
    assert empty.shape == (0, *expected.shape[1:])
    with pytest.raises(SpecError, match="out shares memory with an input"):
        kernel(*({**arguments, "input": out}[name] for name in order), out=out)


# ---- streams, graphs, devices -------------------------------------------------------------------------------


def slow(milliseconds=50):
    """Keep the current stream busy."""
    torch.cuda._sleep(int(milliseconds * 1e6))


def test_work_goes_to_the_current_stream_and_nothing_waits():
    spec = with_dtype(LAYERS["plain"][0], "float16", "NHWC")
    tensors = case(spec, Extents(2, 19, 23))
    expected = run(spec, tensors)
    arguments = arguments_of(tensors, spec)
    late = torch.zeros_like(arguments["input"])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        slow()
        late.copy_(arguments["input"])
        found = tvmdcn.deform_conv2d(**{**arguments, "input": late}, **geometry(spec))
        done = torch.cuda.Event()
        done.record()
    assert not done.query()  # the call is back, its work is not done
    done.synchronize()
    assert torch.equal(found, expected)


def test_a_weight_packed_on_one_stream_is_read_on_another():
    spec = with_dtype(LAYERS["plain"][0], "float16", "NHWC")
    arguments = arguments_of(case(spec, Extents(2, 19, 23)), spec)
    expected = tvmdcn.deform_conv2d(**arguments, **geometry(spec))
    late = torch.zeros_like(arguments["weight"])
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        slow()
        late.copy_(arguments["weight"])
        tvmdcn.deform_conv2d(**{**arguments, "weight": late}, **geometry(spec))
    with torch.cuda.stream(second):  # waits for the packed weight, though the caller does not say so
        found = tvmdcn.deform_conv2d(**{**arguments, "weight": late}, **geometry(spec))
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_changed_weights_are_packed_again():
    spec = with_dtype(LAYERS["plain"][0], "float32")
    tensors = case(spec, Extents(1, 9, 10))
    arguments = arguments_of(tensors, spec)
    before = tvmdcn.deform_conv2d(**arguments, **geometry(spec))
    with torch.no_grad():
        arguments["weight"].mul_(2)
    bias = arguments["bias"][:, None, None]
    torch.testing.assert_close(tvmdcn.deform_conv2d(**arguments, **geometry(spec)), 2 * (before - bias) + bias)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_cuda_graph(layout):
    spec = with_dtype(LAYERS["plain"][0], "float16", layout)
    arguments = arguments_of(case(spec, Extents(2, 19, 23)), spec)
    call = lambda: tvmdcn.deform_conv2d(**arguments, **geometry(spec))  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    # Replays read what is in the tensors then: input and weight.
    for seed in (1, 2):
        for name, tensor in arguments_of(case(spec, Extents(2, 19, 23), seed=seed), spec).items():
            arguments[name].copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        replayed = found.clone()
        assert torch.equal(replayed, call())


def test_several_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    spec = with_dtype(LAYERS["plain"][0], "float32")
    tensors = case(spec, Extents(2, 9, 10))
    torch.cuda.set_device(0)
    first, second = run(spec, tensors, "cuda:0"), run(spec, tensors, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert second.device.index == 1
    torch.testing.assert_close(first.cpu(), second.cpu(), rtol=0, atol=1e-5)
    mixed = {**arguments_of(tensors, spec, "cuda:0"), "offset": arguments_of(tensors, spec, "cuda:1")["offset"]}
    with pytest.raises(SpecTypeError, match="offset is on cuda:1, and input is on cuda:0"):
        tvmdcn.deform_conv2d(**mixed, **geometry(spec))


def test_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    spec = with_dtype(LAYERS["plain"][0], "float16", "NHWC")
    cases = [case(spec, Extents(1, 9 + seed, 10), seed=seed) for seed in range(4)]
    expected = [run(spec, tensors) for tensors in cases]

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [run(spec, cases[number]) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(result, expected[number]) for result in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_memory_is_none_of_columns_size():
    for layout in ("NCHW", "NHWC"):
        spec = with_dtype(DeformConv2dSpec(128, 128, padding=1), "float16", layout)
        extents = Extents(4, 64, 64)
        arguments = arguments_of(case(spec, extents), spec)
        tvmdcn.deform_conv2d(**arguments, **geometry(spec))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        out = tvmdcn.deform_conv2d(**arguments, **geometry(spec))
        extra = torch.cuda.max_memory_allocated() - held - out.numel() * out.element_size()
        copy = 0 if layout == "NHWC" else arguments["input"].numel() * 2
        columns = extents.batch * 64 * 64 * 128 * 9 * 2
        # The bias in float32 besides.
        assert extra <= copy + (64 << 10) < columns / 4


# ---- refusals -----------------------------------------------------------------------------------------------


def test_mixed_devices_are_refused():
    spec = with_dtype(LAYERS["plain"][0], "float32")
    arguments = arguments_of(case(spec, Extents(1, 9, 10)), spec)
    for name in arguments:
        with pytest.raises(SpecTypeError, match=f"{name} is .*"):
            tvmdcn.deform_conv2d(**{**arguments, name: arguments[name].cpu()}, **geometry(spec))
    kernel = tvmdcn.load(dataclasses.replace(spec, tf32=False), "cuda")
    with pytest.raises(SpecTypeError, match=r"input is on cpu, and this kernel was built for cuda-sm_"):
        kernel(*(arguments[name].cpu() for name in ("input", "offset", "weight", "bias", "mask")))
    with pytest.raises(SpecTypeError, match="input is a ndarray, and this kernel was built for cuda-sm_"):
        kernel(*(arguments[name].cpu().numpy() for name in ("input", "offset", "weight", "bias", "mask")))


def test_kernels_of_another_gpu_are_refused():
    here = cuda_driver.device(0).arch
    other = "sm_80" if here != "sm_80" else "sm_86"
    with pytest.raises((DeviceError, tvmdcn.ArtifactError), match=f"needs an NVIDIA GPU of compute capability {other}"):
        tvmdcn.load(with_dtype(ASYMMETRIC, "float32"), f"cuda-{other}")


# ---- torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(mode):
    layer = tvmdcn.DeformConv2d(16, 24, 3, padding=1, bias=True).cuda().half()
    field = torch.nn.Conv2d(16, 18, 3, padding=1).cuda().half()

    def model(x):
        return torch.relu(layer(x, field(x)))

    x = torch.randn(2, 16, 20, 21, device="cuda", dtype=torch.half)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(4):
            torch.testing.assert_close(compiled(x), expected, rtol=2e-3, atol=2e-3)


def test_autocast():
    spec = with_dtype(LAYERS["plain"][0], "float32")
    arguments = arguments_of(case(spec, Extents(1, 9, 10)), spec)
    with torch.autocast("cuda", torch.float16):
        found = tvmdcn.deform_conv2d(**arguments, **geometry(spec))
    assert found.dtype == torch.float16
    halves = {name: tensor.half() for name, tensor in arguments.items()}
    assert torch.equal(found, tvmdcn.deform_conv2d(**halves, **geometry(spec)))


# ---- gradients ----------------------------------------------------------------------------------------------

NAMES = ("input", "offset", "weight", "bias", "mask")


def gradients_of(spec, tensors, drawn, needs=(True,) * 5, border="torchvision", device="cuda:0"):
    """Return the gradients as tensors, by the names of a kernel's outputs."""
    arguments = arguments_of(tensors, spec, device)
    del arguments["bias"]
    grad_output = on_gpu(drawn, spec, device)
    found = tvmdcn.deform_conv2d_backward(grad_output, **arguments, **geometry(spec), needs=needs, border=border)
    return {f"grad_{name}": tensor for name, tensor in found._asdict().items() if tensor is not None}


def drawn_for(spec, extents, seed=1):
    return np.random.default_rng(seed).standard_normal(spec.output_shape(extents)).astype(numpy_dtype(spec.dtype))


def expected_of(spec, tensors, drawn, **flags):
    given = {name: array for name, array in vars(tensors).items() if array is not None and name != "bias"}
    return expected_gradients(DeformConv2dGradSpec.of(spec, **flags), {"grad_output": drawn, **given})


def assert_gradients(spec, found, expected, dtype):
    assert set(found) == set(expected)
    for name, array in expected.items():
        tensor = found[name]
        assert tensor.dtype == getattr(torch, spec.dtype)
        image = name.removeprefix("grad_") in ("input", "offset", "mask")
        if image and spec.layout == "NHWC":
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            tensor = tensor.permute(0, 2, 3, 1)
        assert tensor.is_contiguous()
        assert error_of(tensor.double().cpu().numpy(), array) <= 4 * TOLERANCES[dtype], name


# A kernel of gradients takes its compiler ten seconds: few layers in all dtypes, more in those that people train with.
FEW = ("asymmetric", "plain", "groups")
MORE = (*FEW, "no mask", "odd channels", "offset groups", "depthwise", "few pixels", "wide")
GRADIENTS = [(name, dtype) for dtype in DTYPES for name in (MORE if dtype in ("float16", "float32") else FEW)]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("name", "dtype"), GRADIENTS)
def test_gradients(name, dtype, layout):
    layer, extents = LAYERS[name]
    spec = with_dtype(layer, dtype, layout)
    for seed, sizes in enumerate((extents, Extents(1, extents.height + 3, extents.width + 1))):
        tensors, drawn = case(spec, sizes, seed=seed), drawn_for(spec, sizes)
        assert_gradients(spec, gradients_of(spec, tensors, drawn), expected_of(spec, tensors, drawn), dtype)


@pytest.mark.parametrize("needs", ["input", "offset mask", "weight", "bias", "input weight", "offset mask bias"])
def test_gradients_that_are_asked_for(needs):
    asked = tuple(name in needs.split() for name in NAMES)
    flags = {f"grad_{name}": name in needs.split() for name in NAMES[:-1]}
    for layer, dtype, layout in ((LAYERS["plain"][0], "float16", "NHWC"), (ASYMMETRIC, "float32", "NCHW")):
        spec, extents = with_dtype(layer, dtype, layout), Extents(2, 11, 13)
        tensors, drawn = case(spec, extents), drawn_for(spec, extents)
        expected = expected_of(spec, tensors, drawn, **flags)
        assert_gradients(spec, gradients_of(spec, tensors, drawn, asked), expected, dtype)


@pytest.mark.parametrize(
    ("offsets", "dtype", "border"),
    [
        *itertools.product(
            ("zero", "integer", "half", "border", "far", "huge", "infinite", "nan"),
            ("float16", "float32", "tf32"),
            ("torchvision",),
        ),
        *itertools.product(("zero", "border"), ("float32",), ("mmcv",)),
    ],
)
def test_gradients_at_places(offsets, dtype, border):
    for layer, layout in ((LAYERS["plain"][0], "NHWC"), (ASYMMETRIC, "NCHW")):
        spec, extents = with_dtype(layer, dtype, layout), Extents(2, 11, 13)
        tensors, drawn = case(spec, extents, offsets), drawn_for(spec, extents)
        found = gradients_of(spec, tensors, drawn, border=border)
        assert_gradients(spec, found, expected_of(spec, tensors, drawn, border=border), dtype)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_gradients_by_autograd(layout):
    spec = with_dtype(LAYERS["plain"][0], "float32", layout)
    extents = LAYERS["plain"][1]
    tensors, drawn = case(spec, extents), drawn_for(spec, extents)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments_of(tensors, spec).items()}
    output = tvmdcn.deform_conv2d(**leaves, **geometry(spec))
    output.backward(on_gpu(drawn, spec))
    found = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    assert_gradients(spec, found, expected_of(spec, tensors, drawn), "float32")


def test_gradients_of_gradients():
    """First derivatives by differences, and second ones, which are the formula's."""
    spec = with_dtype(DeformConv2dSpec(4, 2, (2, 1), padding=(1, 0), groups=2, offset_groups=2), "float64")
    leaves = arguments_of(case(spec, Extents(1, 4, 3)), spec)
    inputs = [leaves[name].detach().requires_grad_() for name in NAMES]

    def layer(*tensors):
        return tvmdcn.deform_conv2d(**dict(zip(NAMES, tensors, strict=True)), **geometry(spec))

    # The input's gradient is added up in any order.
    assert torch.autograd.gradcheck(layer, inputs, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(layer, inputs, nondet_tol=1e-12)


@pytest.mark.parametrize("name", ["plain", "groups", "few channels"])
@pytest.mark.parametrize(("dtype", "layout"), [("float16", "NHWC"), ("float32", "NCHW"), ("float32", "NHWC")])
def test_gradients_that_repeat_to_the_last_bit(name, dtype, layout):
    layer, extents = LAYERS[name]
    spec = with_dtype(layer, dtype, layout)
    tensors, drawn = case(spec, extents), drawn_for(spec, extents)

    def repeated(names):
        first = gradients_of(spec, tensors, drawn)
        for _ in range(5):
            again = gradients_of(spec, tensors, drawn)
            assert all(torch.equal(first[name], again[name]) for name in names)
        return first

    repeated(["grad_offset", "grad_mask", "grad_weight", "grad_bias"])
    torch.use_deterministic_algorithms(True)
    try:
        found = repeated(["grad_input", "grad_offset", "grad_mask", "grad_weight", "grad_bias"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_gradients(spec, found, expected_of(spec, tensors, drawn), dtype)


def test_gradients_of_no_images():
    spec = with_dtype(LAYERS["plain"][0], "float16", "NHWC")
    leaves = {
        name: t.detach().requires_grad_() for name, t in arguments_of(case(spec, Extents(1, 9, 10)), spec).items()
    }
    none = {name: leaf[:0] if name not in ("weight", "bias") else leaf for name, leaf in leaves.items()}
    tvmdcn.deform_conv2d(**none, **geometry(spec)).sum().backward()
    assert all(not leaf.grad.any() for leaf in leaves.values())


def test_gradients_on_the_current_stream():
    spec, extents = with_dtype(LAYERS["plain"][0], "float16", "NHWC"), Extents(2, 19, 23)
    tensors, drawn = case(spec, extents), drawn_for(spec, extents)
    expected = gradients_of(spec, tensors, drawn)
    arguments = arguments_of(tensors, spec)
    del arguments["bias"]
    given = on_gpu(drawn, spec)
    late = torch.zeros_like(given)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        slow()
        late.copy_(given)
        found = tvmdcn.deform_conv2d_backward(late, **arguments, **geometry(spec))
        done = torch.cuda.Event()
        done.record()
    assert not done.query()  # the call is back, its work is not done
    done.synchronize()
    assert torch.equal(found.weight, expected["grad_weight"])
    torch.testing.assert_close(found.input, expected["grad_input"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_gradients_in_a_cuda_graph(layout, deterministic):
    """A step of a training: forward, backward, and a change of the weight, which is packed in the graph."""
    spec, extents = with_dtype(LAYERS["plain"][0], "float32", layout), Extents(2, 19, 23)
    arguments = arguments_of(case(spec, extents), spec)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    weights = [leaves["weight"], leaves["bias"]]
    start = [weight.detach().clone() for weight in weights]

    def step():
        output = tvmdcn.deform_conv2d(**leaves, **geometry(spec))
        found = torch.autograd.grad(output.square().sum(), list(leaves.values()))
        with torch.no_grad():
            for weight, gradient in zip(leaves.values(), found, strict=True):
                if weight is leaves["weight"] or weight is leaves["bias"]:
                    weight.sub_(gradient, alpha=1e-5)
        return found

    def restart():
        with torch.no_grad():
            for weight, value in zip(weights, start, strict=True):
                weight.copy_(value)

    torch.use_deterministic_algorithms(deterministic)
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        restart()
        for _ in range(3):
            graph.replay()
        replayed = [tensor.clone() for tensor in (*found, *weights)]
        restart()
        for _ in range(3):
            last = step()
        for one, other in zip(replayed, (*last, *weights), strict=True):
            if deterministic:
                assert torch.equal(one, other)
            else:
                torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-3)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_on_several_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    spec, extents = with_dtype(LAYERS["plain"][0], "float32"), Extents(2, 9, 10)
    tensors, drawn = case(spec, extents), drawn_for(spec, extents)
    torch.cuda.set_device(0)
    first, second = (gradients_of(spec, tensors, drawn, device=device) for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    for name, tensor in second.items():
        assert tensor.device.index == 1
        torch.testing.assert_close(first[name].cpu(), tensor.cpu(), rtol=1e-5, atol=1e-5)


def test_gradients_take_the_memory_that_they_say():
    from tvmdcn.grad_scratch import scratch_tensors, split_of

    for layout in ("NCHW", "NHWC"):
        spec, extents = with_dtype(DeformConv2dSpec(128, 128, padding=1), "float16", layout), Extents(4, 64, 64)
        tensors, drawn = case(spec, extents), drawn_for(spec, extents)
        kernel = tvmdcn.load(DeformConv2dGradSpec.of(spec), "cuda")
        arguments = arguments_of(tensors, spec)
        given = on_gpu(drawn, spec), arguments["input"], arguments["offset"], arguments["weight"], arguments["mask"]
        kernel(*given)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        found = [tensor for tensor in kernel(*given) if tensor is not None]
        extra = torch.cuda.max_memory_allocated() - held - sum(t.numel() * t.element_size() for t in found)
        pixels = extents.batch * extents.height * extents.width
        interface = kernel.artifact.kernel
        splits, _ = split_of(kernel.spec, -(-pixels // interface.granule), interface.max_tile_units)
        scratch = scratch_tensors(kernel.spec, pixels, pixels, splits)
        said = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in scratch.values())
        assert extra <= said + (64 << 10)


def test_gradients_of_mixed_devices_are_refused():
    spec, extents = with_dtype(LAYERS["plain"][0], "float32"), Extents(1, 9, 10)
    arguments = arguments_of(case(spec, extents), spec)
    del arguments["bias"]
    arguments["grad_output"] = on_gpu(drawn_for(spec, extents), spec)
    for name in arguments:
        with pytest.raises(SpecTypeError, match=f"{name} is .*"):
            tvmdcn.deform_conv2d_backward(**{**arguments, name: arguments[name].cpu()}, **geometry(spec))


def test_gradients_under_autocast_and_compile():
    layer = tvmdcn.DeformConv2d(16, 24, 3, padding=1, bias=True).cuda()
    field = torch.nn.Conv2d(16, 18, 3, padding=1).cuda()
    x = torch.randn(2, 16, 20, 21, device="cuda")
    parameters = [*layer.parameters(), *field.parameters()]

    def model(x):
        return layer(x, field(x)).float().square().sum()

    def gradients(function, dtype=None):
        with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
            loss = function(x)
        return torch.autograd.grad(loss, parameters)

    expected = gradients(model)
    for one, other in zip(expected, gradients(torch.compile(model, fullgraph=True)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))
    for one, other in zip(expected, gradients(model, torch.float16), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.05 * float(one.abs().max()))


# ---- other frameworks, and the sanitizer --------------------------------------------------------------------


def test_cupy_and_jax_arrays():
    spec = with_dtype(LAYERS["plain"][0], "float32")
    arguments = arguments_of(case(spec, Extents(2, 9, 10)), spec)
    expected = tvmdcn.deform_conv2d(**arguments, **geometry(spec))
    tried = 0
    for name in ("cupy", "jax"):
        if importlib.util.find_spec(name) is None:
            continue
        module = __import__(name)
        convert = module.from_dlpack if name == "cupy" else __import__("jax.dlpack").dlpack.from_dlpack
        try:
            arrays = {key: convert(tensor.contiguous()) for key, tensor in arguments.items()}
        except (RuntimeError, ValueError) as error:  # jax for CPUs only
            print(f"{name}: {error}")
            continue
        found = tvmdcn.deform_conv2d(**arrays, **geometry(spec))
        assert type(found) is type(arrays["input"])
        torch.testing.assert_close(torch.from_dlpack(found), expected)
        tried += 1
    if not tried:
        pytest.skip("needs CuPy or JAX for CUDA")


SANITIZED = """
import math, torch, tvmdcn
torch.backends.cudnn.allow_tf32 = {tf32}
for layout in (torch.contiguous_format, torch.channels_last):
    x = torch.randn(2, 32, 13, 11, device="cuda", dtype=torch.{dtype}).contiguous(memory_format=layout)
    offset = torch.randn(2, 2 * {groups} * 9, 13, 11, device="cuda", dtype=torch.{dtype}) * 8
    offset.view(-1)[::5], offset.view(-1)[1::7] = math.nan, math.inf
    mask = torch.rand(2, {groups} * 9, 13, 11, device="cuda", dtype=torch.{dtype})
    weight = torch.randn(48, 32, 3, 3, device="cuda", dtype=torch.{dtype})
    output = tvmdcn.deform_conv2d(x, offset, weight, None, 1, 1, 1, mask)
    print(float(output.float().abs().sum()))
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for found in tvmdcn.deform_conv2d_backward(output, x, offset, weight, mask, 1, 1, 1):
            print(float(found.float().abs().sum()))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    ("dtype", "tf32", "groups"), [("float16", False, 1), ("float32", False, 4), ("float32", True, 1)]
)
def test_nan_offsets_under_the_sanitizer(dtype, tf32, groups):
    sanitizer = shutil.which("compute-sanitizer") or next(
        (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    code = SANITIZED.format(dtype=dtype, tf32=tf32, groups=groups)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)  # builds the kernels
    done = subprocess.run(
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "3", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not run on this machine")
    assert done.returncode == 0, done.stdout[-4000:]
