# SPDX-License-Identifier: Apache-2.0
"""Arrays of CuPy and JAX, exchanged by DLPack; where neither is installed, with a stand-in for CuPy."""

from __future__ import annotations

import importlib.util
import sys
import types

import handmade
import numpy as np
import pytest
from handmade import EXTENTS, SPEC

import tvmdcn
from tvmdcn.errors import SpecTypeError
from tvmdcn.foreign import call_with, framework_of
from tvmdcn.problems import make_tensors
from tvmdcn.reference import reference

GEOMETRY = {"stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)}


@pytest.fixture(autouse=True)
def builder(cache_dir, monkeypatch):
    if handmade.COMPILER is None:
        pytest.skip("no C compiler")
    handmade.install(monkeypatch)


class Array:
    """An array of a framework that is not there: its memory is NumPy's."""

    def __init__(self, data, device=1):
        self.data, self.device = data, device

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, **_):
        return self.data.__dlpack__()

    def __array__(self, dtype=None, copy=None):
        return self.data


Array.__module__ = "cupy._core"


@pytest.fixture
def cupy(monkeypatch):
    module = types.ModuleType("cupy")
    module.asarray = Array
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def arguments_of(convert):
    tensors = make_tensors(SPEC, EXTENTS)
    given = {name: array for name, array in vars(tensors).items() if array is not None}
    return {name: convert(array) for name, array in given.items()}, reference(SPEC, tensors)


def test_arrays_of_another_framework(cupy):
    arguments, expected = arguments_of(Array)
    found = tvmdcn.deform_conv2d(**arguments, **GEOMETRY)
    assert isinstance(found, Array)
    np.testing.assert_allclose(found.data, expected, rtol=0, atol=1e-5)
    assert framework_of(arguments["input"]) == "cupy"
    assert framework_of(np.zeros(1)) is None
    assert framework_of("text") is None


def test_refusals(cupy):
    arguments, _ = arguments_of(Array)
    with pytest.raises(SpecTypeError, match="offset must be an array of cupy, as input is, got ndarray"):
        tvmdcn.deform_conv2d(**{**arguments, "offset": arguments["offset"].data}, **GEOMETRY)
    elsewhere = Array(arguments["offset"].data, device=2)
    with pytest.raises(SpecTypeError, match="some arrays are on a GPU, and others are not"):
        tvmdcn.deform_conv2d(**{**arguments, "offset": elsewhere}, **GEOMETRY)


def test_a_gpus_arrays_go_through_torch(cupy):
    torch = pytest.importorskip("torch")
    cupy.from_dlpack = lambda tensor: ("cupy", tensor)
    # DLPack's exchange looks at the device once more, and the memory is the host's here.
    asked = iter([2, 1])
    array = Array(np.arange(4.0))
    array.__class__ = type(
        "Array", (Array,), {"__dlpack_device__": lambda self: (next(asked), 0), "__module__": "cupy"}
    )
    kind, result = call_with("cupy", {"x": array, "y": None}, lambda x, y: (x + 1, y))
    assert kind == "cupy"
    assert result[1] is None
    assert torch.equal(result[0], torch.arange(4.0, dtype=torch.float64) + 1)


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
def test_jax_arrays():
    import jax

    arguments, expected = arguments_of(jax.numpy.asarray)
    found = tvmdcn.deform_conv2d(**arguments, **GEOMETRY)
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-5)
    with pytest.raises(SpecTypeError, match=r"traced by jax: call outside of jax.jit"):
        jax.jit(lambda x: tvmdcn.deform_conv2d(**{**arguments, "input": x}, **GEOMETRY))(arguments["input"])
