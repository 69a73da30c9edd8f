# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU: numbers against float64, streams, graphs, devices, memory, torch's transformations.

Skipped where there is no NVIDIA GPU; there `tests/test_cuda_schedules.py` runs the same kernels in an emulator.
"""

from __future__ import annotations

import dataclasses
import importlib.util
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


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "tf32", "float64"])
@pytest.mark.parametrize(
    "name", ["asymmetric", "plain", "offset groups", "groups", "depthwise", "no mask", "few pixels"]
)
def test_gradients(name, dtype, layout):
    layer, extents = LAYERS[name]
    spec = with_dtype(layer, dtype, layout)
    tensors = case(spec, extents)
    given = {name: array for name, array in vars(tensors).items() if array is not None}
    arguments = {name: tensor for name, tensor in arguments_of(tensors, spec).items() if tensor is not None}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    output = tvmdcn.deform_conv2d(**leaves, **geometry(spec))
    drawn = np.random.default_rng(1).standard_normal(spec.output_shape(extents)).astype(tensors.input.dtype)
    output.backward(on_gpu(drawn, spec))
    del given["bias"]
    expected = expected_gradients(DeformConv2dGradSpec.of(spec), {"grad_output": drawn, **given})
    tolerance = 4 * TOLERANCES[dtype]
    for name, array in expected.items():
        leaf = leaves[name.removeprefix("grad_")]
        found = leaf.grad.double().cpu().numpy()
        if layout == "NHWC" and leaf.dim() == 4 and name != "grad_weight":
            found = found.transpose(0, 2, 3, 1)
        assert error_of(found, array) <= tolerance, name


def test_deterministic_gradients():
    spec = with_dtype(LAYERS["plain"][0], "float16", "NHWC")
    arguments = arguments_of(case(spec, Extents(2, 19, 23)), spec)

    def gradients():
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
        tvmdcn.deform_conv2d(**leaves, **geometry(spec)).float().square().sum().backward()
        return [leaf.grad for leaf in leaves.values()]

    torch.use_deterministic_algorithms(True)
    try:
        first = gradients()
        assert all(all(map(torch.equal, first, gradients())) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)


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
    print(float(tvmdcn.deform_conv2d(x, offset, weight, None, 1, 1, 1, mask).float().abs().sum()))
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
