# SPDX-License-Identifier: Apache-2.0
"""Weights and outputs of calls: packed when they must be, written where they may be."""

from __future__ import annotations

import gc
import weakref

import handmade
import numpy as np
import pytest
from handmade import EXTENTS, SPEC, call, error, kernel_of, misaligned, read_only, torch_of, variant

from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.kernel import Kernel
from tvmdcn.spec import Extents
from tvmdcn.tensors import make_tensors


@pytest.fixture(autouse=True)
def builder(monkeypatch):
    handmade.install(monkeypatch)


def test_out_is_written_and_returned():
    tensors = make_tensors(SPEC, EXTENTS)
    expected = call(kernel_of(), tensors)
    out = np.full_like(expected, np.nan)
    assert call(kernel_of(), tensors, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_torch_out_is_marked_as_changed():
    torch = pytest.importorskip("torch")
    arguments = {name: torch_of(value) for name, value in vars(make_tensors(SPEC, EXTENTS)).items()}
    out = torch.zeros(3, 2, 2, 3)
    version = out._version
    assert kernel_of()(**arguments, out=out) is out
    assert out._version > version
    assert out.abs().sum() > 0


@pytest.mark.parametrize(
    ("out", "match"),
    [
        (
            np.zeros((3, 2, 3, 2), "f"),
            r"out must be float32 of shape \(3, 2, 2, 3\) .*got float32 of shape \(3, 2, 3, 2\)",
        ),
        (np.zeros((3, 2, 2, 3)), r"out must be float32 .* got float64"),
        (np.zeros((3, 2, 3, 2), "f").swapaxes(2, 3), "out must be contiguous in the layout NCHW"),
        (read_only(np.zeros((3, 2, 2, 3), "f")), "out is read-only"),
        (misaligned(np.zeros((3, 2, 2, 3), "f")), "out must lie at a multiple of its items' 4 bytes"),
        ([], "out must be a tensor, a numpy.ndarray"),
    ],
)
def test_unfit_out_is_refused(out, match):
    with pytest.raises((SpecError, SpecTypeError), match=match):
        call(kernel_of(), make_tensors(SPEC, EXTENTS), out=out)


@pytest.mark.parametrize("name", ["input", "offset", "mask"])
def test_out_in_an_input_is_refused(name):
    tensors = make_tensors(SPEC, EXTENTS)
    array = getattr(tensors, name)
    memory = np.concatenate([array.ravel(), np.zeros(36, "f")])
    setattr(tensors, name, memory[: array.size].reshape(array.shape))
    inside = memory[array.size - 1 :][:36].reshape(3, 2, 2, 3)
    with pytest.raises(SpecError, match="out shares memory with an input"):
        call(kernel_of(), tensors, out=inside)
    beside = memory[array.size :].reshape(3, 2, 2, 3)
    assert call(kernel_of(), tensors, out=beside) is beside


def test_packed_weight_is_for_one_kernel():
    tensors = make_tensors(SPEC, EXTENTS)
    packed = kernel_of().pack(tensors.weight)
    assert repr(packed).startswith("PackedWeight(2x1x6x3x4 float32, for deform_conv2d-")
    tensors.weight = packed
    with pytest.raises(SpecError, match=r"weight was packed for .*Pack it with this kernel's pack"):
        call(kernel_of(schedule="naive"), tensors)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (
            np.zeros((2, 3, 2, 3), "f"),
            r"weight must have the shape \(2, 3, 3, 2\) .*got \(2, 3, 2, 3\)",
        ),
        (np.zeros((2, 3, 3, 2)), "input is float32 and weight is float64"),
        (3, "input must be a tensor|weight must be a tensor"),
    ],
)
def test_pack_checks_the_weight(weight, match):
    with pytest.raises((SpecError, SpecTypeError), match=match):
        kernel_of().pack(weight)
    tensors = make_tensors(SPEC, EXTENTS)
    call(kernel_of(), tensors)
    tensors.weight = weight
    with pytest.raises((SpecError, SpecTypeError)):
        call(kernel_of(), tensors)


def test_weights_of_another_kind_are_refused_also_after_right_ones():
    pytest.importorskip("torch")
    kernel, tensors = kernel_of(), make_tensors(SPEC, EXTENTS)
    arguments = {name: torch_of(value) for name, value in vars(tensors).items()}
    kernel(**arguments)
    call(kernel, tensors)
    with pytest.raises(SpecTypeError, match=r"weight must be a tensor, a torch.Tensor like input"):
        kernel(**{**arguments, "weight": tensors.weight})
    with pytest.raises(SpecTypeError, match=r"weight must be a tensor, a numpy.ndarray like input"):
        kernel(**{**vars(tensors), "weight": arguments["weight"]})


def test_numpy_weight_may_change():
    tensors = make_tensors(SPEC, EXTENTS)
    tensors.bias = None
    first = call(kernel_of(), tensors)
    tensors.weight *= 2
    np.testing.assert_allclose(call(kernel_of(), tensors), 2 * first, rtol=1e-6)


CHANGES = {
    "in_place": lambda torch, weight: weight.mul_(2),
    "data": lambda torch, weight: weight.data.mul_(2),
    "numpy": lambda torch, weight: weight.detach().numpy().__imul__(2),
    "replaced": lambda torch, weight: setattr(weight, "data", weight.data * 2),
    "copied": lambda torch, weight: weight.copy_(weight * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_torch_weight_is_packed_again_when_it_changes(change, monkeypatch):
    torch = pytest.importorskip("torch")
    packs = []
    pack = Kernel.pack
    monkeypatch.setattr(Kernel, "pack", lambda self, weight: packs.append(1) or pack(self, weight))
    arguments = {name: torch_of(value) for name, value in vars(make_tensors(SPEC, EXTENTS)).items()}
    arguments["weight"] = torch.nn.Parameter(arguments["weight"])
    del arguments["bias"]
    with torch.no_grad():
        first = kernel_of()(**arguments)
        assert torch.equal(kernel_of()(**arguments), first)
        assert len(packs) == 1
        CHANGES[change](torch, arguments["weight"])
        torch.testing.assert_close(kernel_of()(**arguments), 2 * first)
        assert len(packs) == 2


def test_torch_weight_that_is_turned_in_place():
    pytest.importorskip("torch")
    spec = variant(kernel_size=[2, 2], stride=[1, 1], dilation=[1, 1], padding=[0, 0, 0, 0])
    kernel = kernel_of(spec)
    tensors = make_tensors(spec, EXTENTS)
    arguments = {name: torch_of(value) for name, value in vars(tensors).items()}
    kernel(**arguments)
    arguments["weight"].data = arguments["weight"].data.transpose(2, 3)
    tensors.weight = tensors.weight.transpose(0, 1, 3, 2)
    assert error(kernel(**arguments).numpy(), spec, tensors) < 1e-6


def test_torch_weights_of_inference_mode():
    """They have no version, so they are packed at every call."""
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        arguments = {name: torch_of(value).clone() for name, value in vars(make_tensors(SPEC, EXTENTS)).items()}
        del arguments["bias"]
        first = kernel_of()(**arguments)
        arguments["weight"].view(-1)[1] += 1
        assert not torch.equal(kernel_of()(**arguments), first)


def test_weights_are_not_kept_alive():
    torch = pytest.importorskip("torch")
    kernel = kernel_of()
    arguments = {name: torch_of(value).clone() for name, value in vars(make_tensors(SPEC, EXTENTS)).items()}
    dead = weakref.ref(arguments["weight"])
    kernel(**arguments)
    assert len(kernel._weights) == 1
    del arguments["weight"]
    gc.collect()
    assert dead() is None
    assert not kernel._weights
    for _ in range(100):
        kernel(**arguments, weight=torch.zeros(2, 3, 3, 2))
    assert len(kernel._weights) <= 1


def test_prepared_calls_are_bounded():
    kernel = kernel_of()
    for width in range(2, 300):
        call(kernel, make_tensors(SPEC, Extents(1, 3, width)))
    assert len(kernel._calls) <= 256
    tensors = make_tensors(SPEC, EXTENTS)
    assert error(call(kernel, tensors), SPEC, tensors) < 1e-6
