# SPDX-License-Identifier: Apache-2.0
"""Calls of a kernel: values, memory of any kind, arguments that do not fit, gradients, overhead."""

from __future__ import annotations

import handmade
import numpy as np
import pytest
from handmade import EXTENTS, SPEC, call, error, kernel_of, misaligned, read_only, strided, torch_of, variant

import tvmdcn
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.spec import Extents
from tvmdcn.tensors import make_tensors

# Largest error over the largest value; storage dominates for the halves.
TOLERANCES = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.fixture(autouse=True)
def builder(monkeypatch):
    handmade.install(monkeypatch)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_numpy(dtype, layout):
    spec = variant(dtype=dtype, layout=layout)
    kernel = kernel_of(spec)
    for extents in (EXTENTS, Extents(33, 5, 4), Extents(1, 3, 2), Extents(2, 40, 31)):
        tensors = make_tensors(spec, extents)
        result = call(kernel, tensors)
        assert type(result) is np.ndarray
        assert result.dtype == tensors.input.dtype
        assert error(result, spec, tensors) < TOLERANCES[dtype]
        again = kernel(tensors.input, tensors.offset, kernel.pack(tensors.weight), tensors.bias, tensors.mask)
        np.testing.assert_array_equal(again, result)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_torch(dtype, layout):
    """The same numbers as NumPy; an NHWC kernel takes tensors indexed N, C, H, W in channels_last."""
    torch = pytest.importorskip("torch")
    spec = variant(dtype=dtype)
    kernel = kernel_of(variant(dtype=dtype, layout=layout))
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    for extents in (EXTENTS, Extents(33, 5, 4)):
        tensors = make_tensors(spec, extents)
        image, offset, mask = (
            torch_of(array).contiguous(memory_format=memory_format)
            for array in (tensors.input, tensors.offset, tensors.mask)
        )
        result = kernel(image, offset, torch_of(tensors.weight), torch_of(tensors.bias), mask)
        assert type(result) is torch.Tensor
        assert result.dtype == image.dtype
        assert result.is_contiguous(memory_format=memory_format)
        assert error(result.double().numpy(), spec, tensors) < TOLERANCES[dtype]


def test_without_mask_and_bias():
    spec = variant(mask=False)
    tensors = make_tensors(spec, EXTENTS)
    tensors.bias = None
    assert error(call(kernel_of(spec), tensors), spec, tensors) < 1e-6


def test_batch_zero():
    kernel = kernel_of()
    for extents in (Extents(0, 5, 4), EXTENTS):
        assert call(kernel, make_tensors(SPEC, extents)).shape == (extents.batch, 2, 2, 3)
    torch = pytest.importorskip("torch")
    empty = [torch_of(a) for a in vars(make_tensors(SPEC, Extents(0, 5, 4))).values()]
    image, offset, weight, mask, bias = empty
    assert kernel(image, offset, weight, bias, mask).shape == (0, 2, 2, 3)
    assert torch.is_tensor(kernel(image, offset, weight, bias, mask))


ODD_MEMORY = {
    "strided": strided,
    "misaligned": misaligned,
    "read_only": read_only,
    "fortran": np.asfortranarray,
    "reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "swapped_bytes": lambda a: a.astype(a.dtype.newbyteorder()),
    "odd_start": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
    "subclass": lambda a: a.view(type("Sub", (np.ndarray,), {})),
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask", "bias"])
@pytest.mark.parametrize("memory", ODD_MEMORY)
def test_any_memory_is_understood(memory, name, layout):
    spec = variant(layout=layout)
    tensors = make_tensors(spec, EXTENTS)
    kernel = kernel_of(spec)
    expected = call(kernel, tensors)
    array = ODD_MEMORY[memory](getattr(tensors, name))
    before = array.copy()
    setattr(tensors, name, array)
    for _ in range(2):
        np.testing.assert_array_equal(call(kernel, tensors), expected)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask", "bias"])
@pytest.mark.parametrize("memory", ["strided", "odd_start", "negative"])
def test_any_torch_memory_is_understood(memory, name):
    torch = pytest.importorskip("torch")
    tensors = make_tensors(SPEC, EXTENTS)
    kernel = kernel_of()
    expected = call(kernel, tensors)
    arguments = {key: torch_of(value) for key, value in vars(tensors).items()}
    value = arguments[name]
    if memory == "negative":  # a tensor whose memory holds the negated values
        arguments[name] = torch.complex(torch.zeros_like(value), -value).conj().imag
        assert arguments[name].is_neg()
    else:
        arguments[name] = torch.from_numpy(ODD_MEMORY[memory](getattr(tensors, name)))
    for _ in range(2):
        np.testing.assert_array_equal(kernel(**arguments).numpy(), expected)


def test_memory_maps_are_read(tmp_path):
    tensors = make_tensors(SPEC, EXTENTS)
    expected = call(kernel_of(), tensors)
    np.save(tmp_path / "x.npy", tensors.input)
    tensors.input = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(call(kernel_of(), tensors), expected)


def test_masked_arrays_are_refused_also_after_plain_ones():
    tensors = make_tensors(SPEC, EXTENTS)
    call(kernel_of(), tensors)
    tensors.offset = np.ma.masked_greater(tensors.offset, 1.0)
    with pytest.raises(SpecTypeError, match="offset must be a plain array, got a MaskedArray"):
        call(kernel_of(), tensors)


def test_arguments_of_another_layer():
    tensors = make_tensors(variant(groups=1), EXTENTS)
    with pytest.raises(SpecError, match=r"another layer than Kernel\(.*groups 1, not 2.*tvmdcn.deform_conv2d"):
        call(kernel_of(), tensors)
    tensors = make_tensors(variant(dtype="float64"), EXTENTS)
    with pytest.raises(SpecError, match="dtype 'float64', not 'float32'"):
        call(kernel_of(), tensors)


def test_mask_is_missing_or_too_much():
    tensors = make_tensors(SPEC, EXTENTS)
    with pytest.raises(SpecError, match="mask is missing"):
        kernel_of()(tensors.input, tensors.offset, tensors.weight)
    with pytest.raises(SpecError, match="mask True, not False"):
        call(kernel_of(variant(mask=False)), tensors)


def test_kinds_are_not_mixed():
    torch = pytest.importorskip("torch")
    tensors = make_tensors(SPEC, EXTENTS)
    with pytest.raises(SpecTypeError, match=r"offset must be a tensor, a numpy.ndarray like input, got tensor"):
        kernel_of()(tensors.input, torch.from_numpy(tensors.offset), tensors.weight, mask=tensors.mask)
    with pytest.raises(SpecTypeError, match=r"mask must be a tensor, a torch.Tensor like input, got array"):
        kernel_of()(*map(torch_of, (tensors.input, tensors.offset, tensors.weight)), mask=tensors.mask)
    with pytest.raises(SpecTypeError, match=r"input must be a tensor.*got \[1\] of type list"):
        kernel_of()([1], tensors.offset, tensors.weight)


@pytest.mark.parametrize("spec", [None, "r50_c4", (1, 2)])
def test_load_wants_a_spec(spec):
    with pytest.raises(SpecTypeError, match="spec must be a DeformConv2dSpec"):
        tvmdcn.load(spec)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"schedule": "fast"}, "schedule must be 'tuned', 'default' or 'naive', got 'fast'"),
        ({"schedule": None}, "schedule must be .* got None"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"threads": 1.5}, "threads must be "),
        ({"target": "z80"}, "target 'z80' is not known"),
    ],
)
def test_load_checks_its_arguments(options, match):
    with pytest.raises((SpecError, SpecTypeError), match=match):
        kernel_of(**options)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask", "bias"])
def test_gradients_are_refused(name):
    torch = pytest.importorskip("torch")
    arguments = {key: torch_of(value) for key, value in vars(make_tensors(SPEC, EXTENTS)).items()}
    arguments[name].requires_grad_()
    with pytest.raises(SpecTypeError, match=r"requires gradients, .*no backward operators.*torch.no_grad\(\)"):
        kernel_of()(**arguments)
    with torch.no_grad():
        assert not kernel_of()(**arguments).requires_grad
    with torch.inference_mode():
        kernel_of()(**arguments)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_without_memory_are_refused_also_after_real_ones():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = {key: torch_of(value) for key, value in vars(make_tensors(SPEC, EXTENTS)).items()}
    kernel = kernel_of()
    kernel(**arguments)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in arguments.items()}
        with pytest.raises(SpecTypeError, match="has no memory of its own"):
            kernel(**fake)
    real = arguments.pop("input")
    with pytest.raises(SpecTypeError, match="input has no memory of its own"):
        torch.vmap(lambda x: kernel(x, **arguments))(real[None])
    for wrong, match in (
        (real.to("meta"), "input is on device meta"),
        (real.to_sparse(), "input has layout torch.sparse_coo; pass input.to_dense"),
        (torch.quantize_per_tensor(real, 0.1, 0, torch.qint8), "input is quantized"),
        (real.to(torch.complex64), "dtype complex64 of input is not supported"),
    ):
        with pytest.raises(SpecTypeError, match=match):
            kernel(wrong, **arguments)
