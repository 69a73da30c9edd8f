# SPDX-License-Identifier: Apache-2.0
"""The function `deform_conv2d`: torchvision's signature for both kinds of arrays, and every bad call."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from typing import Any

import handmade
import numpy as np
import pytest
from bad_calls import BAD_CALLS, GOOD_CALL, numpy_tensor, tensor_arguments, torch_tensor
from handmade import EXTENTS, ROOT, SPEC, error, run, torch_of, variant

import tvmdcn
from tvmdcn import api
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.kernel import Kernel
from tvmdcn.reference import reference
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tensors import make_tensors

GEOMETRY = {"stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)}


@pytest.fixture(autouse=True)
def builder(monkeypatch):
    handmade.install(monkeypatch)


def tensors_of(spec: DeformConv2dSpec = SPEC, extents: Extents = EXTENTS, kind: str = "numpy") -> dict[str, Any]:
    tensors = vars(make_tensors(spec, extents))
    if kind == "torch":
        pytest.importorskip("torch")
        tensors = {name: None if a is None else torch_of(a) for name, a in tensors.items()}
    return dict(tensors)


def test_signature_is_torchvisions():
    names = ["input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask"]
    signature = inspect.signature(tvmdcn.deform_conv2d)
    assert list(signature.parameters) == [*names, "border"]
    assert signature.parameters["border"].kind is inspect.Parameter.KEYWORD_ONLY
    defaults = [parameter.default for parameter in signature.parameters.values()][3:]
    assert defaults == [None, 1, 0, 1, None, "torchvision"]
    torchvision = pytest.importorskip("torchvision")
    theirs = inspect.signature(torchvision.ops.deform_conv2d)
    assert list(theirs.parameters) == names


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_values(kind, dtype):
    spec = variant(dtype=dtype)
    result = tvmdcn.deform_conv2d(**tensors_of(spec, kind=kind), **GEOMETRY)
    if kind == "torch":
        result = result.double().numpy()
    tolerance = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    assert error(result, spec, make_tensors(spec, EXTENTS)) < tolerance


@pytest.mark.parametrize(
    "changes",
    [
        {"stride": [1, 1], "padding": [2, 1, 0, 3]},
        {"groups": 1},
        {"offset_groups": 1},
        {"mask": False},
        {"kernel_size": [1, 1], "padding": [0, 0, 0, 0]},
        {"out_channels": 4, "groups": 2},
    ],
)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_layers(kind, changes):
    """What the arguments say is what is computed; lists, tuples and ints of NumPy are taken."""
    spec = variant(**changes)
    top, left, bottom, right = spec.padding
    for as_sequence in (list, tuple, lambda values: tuple(map(np.int64, values))):
        result = tvmdcn.deform_conv2d(
            **tensors_of(spec, kind=kind),
            stride=as_sequence(spec.stride),
            padding=as_sequence((top, left, bottom, right)),
            dilation=as_sequence(spec.dilation),
        )
        assert error(np.asarray(result), spec, make_tensors(spec, EXTENTS)) < 1e-6


def test_ints_are_both_directions():
    spec = DeformConv2dSpec(4, 4, (3, 3), 2, 1, 1)
    tensors = tensors_of(spec)
    assert error(tvmdcn.deform_conv2d(**tensors, stride=2, padding=1), spec, make_tensors(spec, EXTENTS)) < 1e-6


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_one_kernel_for_all_sizes(kind, cache_dir, monkeypatch):
    builds = []
    build = handmade.build
    monkeypatch.setattr(handmade, "build", lambda *a, **k: builds.append(1) or build(*a, **k))
    for extents in (EXTENTS, Extents(1, 9, 9), Extents(0, 5, 4), Extents(7, 3, 2)):
        tensors = tensors_of(extents=extents, kind=kind)
        result = tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
        assert result.shape[0] == extents.batch
        tensors["bias"] = None
        tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    assert len(builds) == 1


# --- bad calls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("bad", [bad for bad in BAD_CALLS if bad.as_tensors], ids=lambda bad: bad.name)
def test_bad_calls(bad, kind):
    """Each is refused in its words; also when the layer was just called rightly, and once more."""
    if kind == "torch":
        pytest.importorskip("torch")
    make = numpy_tensor if kind == "numpy" else torch_tensor
    for _ in range(2):
        with pytest.raises(bad.exception) as caught:
            tvmdcn.deform_conv2d(**tensor_arguments(bad.arguments, make))
        assert re.search(bad.match, str(caught.value), re.S)
        good = tvmdcn.deform_conv2d(**tensor_arguments(GOOD_CALL, make))
        assert good.shape == (2, 2, 2, 3)


@pytest.mark.parametrize(
    ("argument", "value"), [("stride", True), ("stride", (True, 1)), ("stride", 1.0), ("padding", False)]
)
def test_what_equals_an_int_is_still_refused(argument, value):
    spec = DeformConv2dSpec(4, 4, (1, 1))
    tensors = tensors_of(spec)
    tvmdcn.deform_conv2d(**tensors)
    with pytest.raises(SpecTypeError, match=f"{argument} must be "):
        tvmdcn.deform_conv2d(**tensors, **{argument: value})


@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask", "bias"])
@pytest.mark.parametrize("value", [[[1.0]], 3, "x", object(), b"x", {"shape": (1,)}])
def test_what_is_no_array(name, value):
    tensors = tensors_of()
    tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    tensors[name] = value
    with pytest.raises(SpecTypeError, match=f"{name} must be a tensor"):
        tvmdcn.deform_conv2d(**tensors, **GEOMETRY)


def test_objects_that_only_look_like_arrays():
    class Lookalike:
        shape, strides, dtype, ndim = (3, 36, 2, 3), (864, 24, 12, 4), np.dtype("f"), 4

    tensors = tensors_of()
    tensors["offset"] = Lookalike()
    with pytest.raises(SpecTypeError, match=r"offset must be a tensor, a numpy\.ndarray like input"):
        tvmdcn.deform_conv2d(**tensors, **GEOMETRY)


# --- torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_channels_last_is_taken_without_a_copy(dtype, monkeypatch):
    torch = pytest.importorskip("torch")
    from tvmdcn.arrays import TorchArrays

    spec = variant(dtype=dtype)
    tensors = tensors_of(spec, kind="torch")
    expected = tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    assert expected.is_contiguous()
    last = {
        name: a.contiguous(memory_format=torch.channels_last) if name in ("input", "offset", "mask") else a
        for name, a in tensors.items()
    }
    tvmdcn.deform_conv2d(**last, **GEOMETRY)  # packs the weight
    with monkeypatch.context() as patch:
        patch.setattr(TorchArrays, "dense", lambda *arguments: pytest.fail("copied"))
        result = tvmdcn.deform_conv2d(**last, **GEOMETRY)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected)
    # an offset that is not in the input's format is copied, and the result the same
    last["offset"] = tensors["offset"]
    torch.testing.assert_close(tvmdcn.deform_conv2d(**last, **GEOMETRY), expected)


def test_strided_input_is_copied():
    torch = pytest.importorskip("torch")
    tensors = tensors_of(kind="torch")
    expected = tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    tensors["input"] = torch.cat([tensors["input"], tensors["input"]], dim=3)[..., :4]
    result = tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    assert torch.equal(result, expected)
    assert result.is_contiguous()


def test_parameters_and_inference_mode():
    torch = pytest.importorskip("torch")
    tensors = tensors_of(kind="torch")
    expected = tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    tensors["weight"] = torch.nn.Parameter(tensors["weight"])
    tensors["bias"] = torch.nn.Parameter(tensors["bias"])
    recorded = tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    assert recorded.requires_grad
    assert torch.equal(recorded, expected)
    with torch.no_grad():
        result = tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    assert not result.requires_grad
    assert torch.equal(result, expected)
    with torch.inference_mode():
        result = tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    assert result.is_inference()
    assert torch.equal(result, expected)


def test_weights_are_packed_once(monkeypatch):
    pytest.importorskip("torch")
    packs = []
    pack = Kernel.pack
    monkeypatch.setattr(Kernel, "pack", lambda self, weight: packs.append(1) or pack(self, weight))
    tensors = tensors_of(kind="torch")
    for _ in range(3):
        tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    assert len(packs) == 1


def test_other_devices_are_refused():
    pytest.importorskip("torch")
    tensors = {name: a.to("meta") for name, a in tensors_of(kind="torch").items()}
    kernel = tvmdcn.load(SPEC)
    with pytest.raises(SpecTypeError, match=r"input is on device meta; kernels run on CPUs and NVIDIA GPUs. Pass inp"):
        kernel(**tensors)


def test_default_device_and_dtype_of_torch_do_not_matter():
    torch = pytest.importorskip("torch")
    tensors = tensors_of(kind="torch")
    expected = tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            result = tvmdcn.deform_conv2d(**tensors, **GEOMETRY)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(result, expected)


# --- the package -------------------------------------------------------------------------------------------


def test_public_names():
    """Each is importable, and none is imported by importing the package."""
    for name in {*tvmdcn.__all__} - {"tune"}:  # imports the real builder, not the handmade one
        assert getattr(tvmdcn, name) is not None
        assert name in dir(tvmdcn)
    assert run("import tvmdcn; print(callable(tvmdcn.tune), callable(tvmdcn.build))").stdout.split()[-2:] == [
        "True",
        "True",
    ]
    with pytest.raises(AttributeError, match="module 'tvmdcn' has no attribute 'deform_conv3d'"):
        _ = tvmdcn.deform_conv3d
    code = "import tvmdcn; print(sorted(name for name in sys.modules if name.startswith('tvmdcn')))"
    assert run(code).stdout.strip() == "['tvmdcn']"


def test_kernels_in_memory_are_bounded(monkeypatch):
    monkeypatch.setattr(api, "_MAX_KERNELS", 2)
    for channels in (1, 2, 3):
        spec = DeformConv2dSpec(channels, 1, (1, 1))
        tvmdcn.deform_conv2d(**tensors_of(spec))
    assert len(api._kernels) <= 2


# --- with the compiler -------------------------------------------------------------------------------------

COMPILED = """
import json, sys
import numpy as np
import tvmdcn
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tensors import make_tensors
spec = DeformConv2dSpec(6, 2, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3)
errors = []
for extents in (Extents(3, 5, 4), Extents(2, 33, 17)):
    t = make_tensors(spec, extents)
    result = tvmdcn.deform_conv2d(
        t.input, t.offset, t.weight, t.bias, stride=(2, 1), padding=(1, 0), dilation=(2, 1), mask=t.mask
    )
    np.save(sys.argv[1] + f"/{extents.batch}.npy", result)
print("tvm" in sys.modules)
"""


def test_first_process_builds_and_later_ones_find_it(cache_dir, tmp_path):
    """With the real builder: who builds has the compiler loaded, who finds only the small runtime."""
    pytest.importorskip("tvmdcn.builder")
    for expected in ("True", "False"):
        done = subprocess.run(
            [sys.executable, "-c", COMPILED, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [expected]
        for extents in (Extents(3, 5, 4), Extents(2, 33, 17)):
            result = np.load(tmp_path / f"{extents.batch}.npy")
            tensors = make_tensors(SPEC, extents)
            wanted = reference(SPEC, tensors)
            assert np.abs(result - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_errors_are_of_the_package():
    assert issubclass(SpecError, tvmdcn.TvmdcnError)
    assert issubclass(SpecTypeError, tvmdcn.TvmdcnError)
