# SPDX-License-Identifier: Apache-2.0
"""Calls of kernels of gradients: values, memory of any kind, what is not asked for, arguments that do not fit.

With kernels written by hand: this is about what surrounds them.
"""

from __future__ import annotations

import itertools

import handmade
import numpy as np
import pytest
from handmade import EXTENTS, SPEC, misaligned, read_only, strided, torch_of, variant

import tvmdcn
from tvmdcn.errors import ArtifactError, SpecError, SpecTypeError
from tvmdcn.grad_kernel import GradKernel
from tvmdcn.kernel import Kernel
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.spec import DeformConv2dGradSpec, Extents
from tvmdcn.tensors import Gradients, make_gradient_tensors

# Largest error of a gradient over its own largest value; storage dominates for the halves.
TOLERANCES = {"float64": 1e-13, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
ARGUMENTS = ("grad_output", "input", "offset", "weight", "mask")
FLAGS = ("grad_input", "grad_offset", "grad_weight", "grad_bias")


@pytest.fixture(autouse=True)
def builder(monkeypatch):
    handmade.install(monkeypatch)


def grad_spec(layer=SPEC, **flags):
    return DeformConv2dGradSpec.of(layer, **flags)


def kernel_of(spec=None, **options):
    return tvmdcn.load(grad_spec() if spec is None else spec, **options)


def tensors_of(spec=None, extents=EXTENTS, seed=0):
    return make_gradient_tensors(grad_spec() if spec is None else spec, extents, seed)


def call(kernel, tensors):
    return kernel(*(tensors.get(name) for name in ARGUMENTS))


def assert_right(found, spec, tensors, tolerance=None):
    """Compare all gradients with the reference, each with its own largest value as scale."""
    expected = expected_gradients(spec, tensors)
    assert type(found) is Gradients
    assert {f"grad_{name}" for name, value in found._asdict().items() if value is not None} == set(expected)
    for name, wanted in expected.items():
        value = np.asarray(getattr(found, name.removeprefix("grad_")), np.float64)
        assert value.shape == wanted.shape, name
        worst = np.abs(value - wanted).max(initial=0)
        limit = TOLERANCES[spec.dtype] if tolerance is None else tolerance
        assert worst <= limit * np.abs(wanted).max(initial=1e-30), (name, worst)


def assert_equal(found, expected):
    for name, one, other in zip(Gradients._fields, found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other), name)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_numpy(dtype, layout):
    spec = grad_spec(variant(dtype=dtype, layout=layout))
    kernel = kernel_of(spec)
    assert isinstance(kernel, GradKernel)
    # The third has fewer output pixels than a unit.
    for extents in (EXTENTS, Extents(33, 5, 4), Extents(2, 3, 2), Extents(2, 20, 13)):
        tensors = tensors_of(spec, extents)
        found = call(kernel, tensors)
        assert all(gradient.dtype == tensors["input"].dtype for gradient in found)
        assert_right(found, spec, tensors)
        packed = {**tensors, "weight": kernel.pack(tensors["weight"])}
        assert_equal(call(kernel, packed), found)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_torch(dtype, layout):
    """The same numbers as NumPy; an NHWC kernel takes tensors indexed N, C, H, W in channels_last."""
    torch = pytest.importorskip("torch")
    spec = grad_spec(variant(dtype=dtype))
    kernel = kernel_of(grad_spec(variant(dtype=dtype, layout=layout)))
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    for extents in (EXTENTS, Extents(33, 5, 4)):
        tensors = tensors_of(spec, extents)
        given = {name: torch_of(array) for name, array in tensors.items()}
        images = {n: t.contiguous(memory_format=memory_format) for n, t in given.items() if n != "weight"}
        found = call(kernel, {**given, **images})
        for name, gradient in found._asdict().items():
            assert type(gradient) is torch.Tensor
            assert gradient.dtype == given["input"].dtype
            if name not in ("weight", "bias"):
                assert gradient.is_contiguous(memory_format=memory_format), name
        assert found.weight.is_contiguous()
        assert_right(Gradients(*(gradient.double().numpy() for gradient in found)), spec, tensors)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("asked", [a for a in itertools.product((True, False), repeat=4) if any(a)], ids=str)
def test_only_what_is_asked_for(asked, mask):
    spec = grad_spec(variant(mask=mask), **dict(zip(FLAGS, asked, strict=True)))
    tensors = tensors_of(spec)
    assert_right(call(kernel_of(spec), tensors), spec, tensors)


def test_borders_differ_where_samples_lie_on_minus_one():
    found = {}
    for border in ("torchvision", "mmcv"):
        spec = grad_spec(border=border)
        tensors = tensors_of(spec)
        tensors["offset"][...] = 0
        found[border] = call(kernel_of(spec), tensors)
        assert_right(found[border], spec, tensors)
    assert not np.array_equal(found["torchvision"].offset, found["mmcv"].offset)
    assert_equal(found["torchvision"]._replace(offset=None), found["mmcv"]._replace(offset=None))


def test_batch_zero():
    kernel = kernel_of()
    for extents in (Extents(0, 5, 4), EXTENTS):
        tensors = tensors_of(extents=extents)
        assert_right(call(kernel, tensors), grad_spec(), tensors)
    torch = pytest.importorskip("torch")
    given = {name: torch_of(array) for name, array in tensors_of(extents=Extents(0, 5, 4)).items()}
    found = call(kernel, given)
    assert [tuple(gradient.shape) for gradient in found] == [
        *((0, 6, 5, 4), (0, 36, 2, 3), (2, 3, 3, 2), (2,), (0, 18, 2, 3))
    ]
    assert torch.equal(found.weight, torch.zeros(2, 3, 3, 2))
    assert torch.equal(found.bias, torch.zeros(2))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pixels_that_fill_up_a_unit_add_nothing(layout):
    # The kernel computes six pixels, four of which do not exist: an image of infinities would show in sums.
    spec = grad_spec(variant(layout=layout, padding=[0, 0, 0, 0], dilation=[1, 1], stride=[1, 1]))
    tensors = tensors_of(spec, Extents(1, 3, 3))
    tensors["input"][...] = np.inf
    tensors["offset"][...] = 100.0
    found = call(kernel_of(spec), tensors)
    assert not found.weight.any()
    assert not found.input.any()
    np.testing.assert_allclose(found.bias, tensors["grad_output"].sum((0, 1, 2) if layout == "NHWC" else (0, 2, 3)))


def test_partition_does_not_depend_on_threads():
    tensors = tensors_of(extents=Extents(3, 40, 31))
    kernels = [kernel_of(threads=count) for count in (1, 2, 7)]
    found = [call(kernel, tensors) for kernel in kernels]
    plans = [[a for a in next(iter(k._calls.values())).plan if isinstance(a, int)] for k in kernels]
    assert plans[0] == plans[1] == plans[2]
    for other in found[1:]:
        assert_equal(found[0], other)


# --- memory -------------------------------------------------------------------------------------------------

ODD_MEMORY = {
    "strided": strided,
    "misaligned": misaligned,
    "read_only": read_only,
    "fortran": np.asfortranarray,
    "swapped_bytes": lambda a: a.astype(a.dtype.newbyteorder()),
    "odd_start": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("memory", ODD_MEMORY)
def test_any_memory_is_understood(memory, name, layout):
    spec = grad_spec(variant(layout=layout))
    tensors, kernel = tensors_of(spec), kernel_of(spec)
    expected = call(kernel, tensors)
    array = ODD_MEMORY[memory](tensors[name])
    before = array.copy()
    for _ in range(2):
        assert_equal(call(kernel, {**tensors, name: array}), expected)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("memory", ["strided", "odd_start", "negative", "channels_last"])
def test_any_torch_memory_is_understood(memory, name):
    torch = pytest.importorskip("torch")
    tensors, kernel = tensors_of(), kernel_of()
    expected = call(kernel, tensors)
    given = {key: torch_of(value) for key, value in tensors.items()}
    if memory == "negative":  # a tensor whose memory holds the negated values
        given[name] = torch.complex(torch.zeros_like(given[name]), -given[name]).conj().imag
        assert given[name].is_neg()
    elif memory == "channels_last":
        given[name] = given[name].contiguous(memory_format=torch.channels_last)
    else:
        given[name] = torch.from_numpy(ODD_MEMORY[memory](tensors[name]))
    for _ in range(2):
        assert_equal(call(kernel, given), expected)


def test_results_are_new_each_time():
    kernel, tensors = kernel_of(), tensors_of()
    first = call(kernel, tensors)
    kept = [gradient.copy() for gradient in first]
    second = call(kernel, {**tensors, "grad_output": tensors["grad_output"] * 2})
    assert_equal(first, kept)
    assert not any(np.shares_memory(one, other) for one, other in zip(first, second, strict=True))


def test_bind_computes_into_the_same_memory():
    for layout, mask in itertools.product(("NCHW", "NHWC"), (True, False)):
        spec = grad_spec(variant(layout=layout, mask=mask), grad_bias=False)
        kernel, tensors = kernel_of(spec), tensors_of(spec)
        bound = kernel.bind(tensors)
        found = bound()
        assert list(found) == list(spec.outputs)
        expected = call(kernel, tensors)
        for name, value in found.items():
            np.testing.assert_array_equal(value, getattr(expected, name.removeprefix("grad_")))
            value[...] = np.nan
        assert all(found[name] is value for name, value in bound().items())
        assert all(np.isfinite(value).all() for value in found.values())


def test_bind_of_a_layer():
    for layout in ("NCHW", "NHWC"):
        spec = variant(layout=layout)
        kernel, tensors = tvmdcn.load(spec), tensors_of(grad_spec(spec))
        others = {name: array for name, array in tensors.items() if name != "grad_output"}
        bound = kernel.bind(others)
        found = bound()["output"]
        np.testing.assert_array_equal(found, kernel(**others))
        assert bound()["output"] is found


# --- the weight ---------------------------------------------------------------------------------------------


def test_weights_are_packed_once(monkeypatch):
    torch = pytest.importorskip("torch")
    packs = []
    pack = GradKernel.pack
    monkeypatch.setattr(GradKernel, "pack", lambda self, weight: packs.append(1) or pack(self, weight))
    kernel = kernel_of()
    given = {name: torch_of(array) for name, array in tensors_of().items()}
    given["weight"] = torch.nn.Parameter(given["weight"])
    with torch.no_grad():
        first = call(kernel, given)
        assert_equal(call(kernel, given), first)
        assert len(packs) == 1
        given["weight"].mul_(2)
        torch.testing.assert_close(call(kernel, given).input, 2 * first.input)
        assert len(packs) == 2


def test_weights_of_other_kernels_are_refused():
    kernel, tensors = kernel_of(), tensors_of()
    for other in (tvmdcn.load(SPEC), kernel_of(grad_spec(grad_bias=False))):
        with pytest.raises(SpecError, match=r"weight was packed for .*Pack it with this kernel's pack"):
            call(kernel, {**tensors, "weight": other.pack(tensors["weight"])})


def test_weight_that_is_not_read_is_not_packed(monkeypatch):
    monkeypatch.setattr(GradKernel, "pack", lambda self, weight: pytest.fail("packed"))
    spec = grad_spec(grad_input=False, grad_offset=False)
    tensors = tensors_of(spec)
    kernel = kernel_of(spec)
    assert_right(call(kernel, tensors), spec, tensors)
    with pytest.raises(SpecError, match=r"weight must have the shape \(2, 3, 3, 2\)"):
        call(kernel, {**tensors, "weight": tensors["weight"][:1]})


@pytest.mark.parametrize("weight", [None, 1.0, np.zeros((2, 3, 3), np.float32), np.zeros((2, 3, 2, 3), np.float32)])
@pytest.mark.parametrize("flags", [{}, {"grad_input": False, "grad_offset": False}], ids=str)
def test_wrong_weights_are_refused_also_after_right_ones(weight, flags):
    kernel, tensors = kernel_of(grad_spec(**flags)), tensors_of()
    with pytest.raises((SpecError, SpecTypeError), match=r"weight|kernel"):
        call(kernel, {**tensors, "weight": weight})
    call(kernel, tensors)
    with pytest.raises((SpecError, SpecTypeError), match="weight"):
        call(kernel, {**tensors, "weight": weight})


# --- arguments that do not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exception", "match", "change"),
    [
        (SpecError, r"grad_output must be of the output's shape \(3, 2, 2, 3\), got \(3, 2, 3, 2\)", (3, 2, 3, 2)),
        (SpecError, r"grad_output must be of the output's shape .* got \(1, 2, 2, 3\)", (1, 2, 2, 3)),
        (SpecError, r"grad_output must have the 4 dimensions N, Cout, Ho, Wo, got 3", (2, 2, 3)),
        (SpecTypeError, r"grad_output must be a tensor.*NoneType", None),
        (SpecTypeError, r"input is float32 and grad_output is float64", "float64"),
        (SpecTypeError, r"dtype int32 of grad_output is not supported", "int32"),
    ],
)
def test_grad_output_is_checked(exception, match, change):
    kernel, tensors = kernel_of(), tensors_of()
    right = tensors["grad_output"]
    wrong = None if change is None else right.astype(change) if isinstance(change, str) else np.zeros(change, "float32")
    for _ in range(2):
        with pytest.raises(exception, match=match):
            call(kernel, {**tensors, "grad_output": wrong})
        call(kernel, tensors)


def test_arguments_of_another_layer():
    wanted = r"another layer than GradKernel\(.*groups 1, not 2.*tvmdcn.deform_conv2d_backward"
    with pytest.raises(SpecError, match=wanted):
        call(kernel_of(), tensors_of(grad_spec(variant(groups=1))))
    with pytest.raises(SpecError, match="mask is missing: GradKernel"):
        call(kernel_of(), {**tensors_of(), "mask": None})
    with pytest.raises(SpecError, match="mask True, not False"):
        call(kernel_of(grad_spec(variant(mask=False))), tensors_of())


@pytest.mark.parametrize("name", ARGUMENTS)
def test_kinds_are_not_mixed(name):
    pytest.importorskip("torch")
    kernel, tensors = kernel_of(), tensors_of()
    call(kernel, tensors)
    with pytest.raises(SpecTypeError, match=r"must be a tensor, a .* like input"):
        call(kernel, {**tensors, name: torch_of(tensors[name])})
    given = {key: torch_of(value) for key, value in tensors.items()}
    call(kernel, given)
    with pytest.raises(SpecTypeError, match=r"must be a tensor, a .* like input"):
        call(kernel, {**given, name: tensors[name]})
    masked = np.ma.masked_greater(tensors[name], 1.0)
    with pytest.raises(SpecTypeError, match=f"{name} must be a plain array, got a MaskedArray"):
        call(kernel, {**tensors, name: masked})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_second_derivatives_are_refused(name):
    torch = pytest.importorskip("torch")
    given = {key: torch_of(value) for key, value in tensors_of().items()}
    given[name].requires_grad_()
    kernel = kernel_of()
    for _ in range(2):
        with pytest.raises(SpecTypeError, match=r"requires gradients, .*no derivatives.*torch.no_grad\(\)"):
            call(kernel, given)
        with torch.no_grad():
            assert not any(gradient.requires_grad for gradient in call(kernel, given))
    with torch.inference_mode():
        call(kernel, given)


def test_tensors_without_memory_are_refused_also_after_real_ones():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = {key: torch_of(value) for key, value in tensors_of().items()}
    kernel = kernel_of()
    call(kernel, given)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in given.items()}
        with pytest.raises(SpecTypeError, match="has no memory of its own"):
            call(kernel, fake)
    with pytest.raises(SpecTypeError, match="grad_output has no memory of its own"):
        torch.vmap(lambda g: call(kernel, {**given, "grad_output": g}).bias)(given["grad_output"][None])


def test_sizes_beyond_32_bit_indices_are_refused():
    spec = grad_spec(variant(kernel_size=[1, 1], stride=[9, 9], padding=[0, 0, 0, 0]))
    huge = Extents(1, 30000, 12000)
    given = {
        name: np.broadcast_to(np.zeros((), np.float32), spec.shape_of(name, huge))
        for name in ("grad_output", "input", "offset", "weight", "mask")
    }
    with pytest.raises(SpecError, match="input has 2160000000 elements"):
        call(kernel_of(spec), given)


# --- which kernel -------------------------------------------------------------------------------------------


def test_artifacts_of_other_operators_are_refused():
    layer, gradient = handmade.build(SPEC), handmade.build(grad_spec())
    assert layer.path.name.startswith("deform_conv2d-c6x2")
    assert gradient.path.name.startswith("deform_conv2d_grad-c6x2")
    with pytest.raises(ArtifactError, match=r"computes deform_conv2d_grad, and Kernel calls deform_conv2d\. Use tv"):
        Kernel(gradient)
    with pytest.raises(ArtifactError, match=r"computes deform_conv2d, and GradKernel calls deform_conv2d_grad"):
        GradKernel(layer)
    assert repr(GradKernel(gradient)) == f"GradKernel({gradient.path.name}, tuned, {gradient.target.tag})"


def test_kernels_are_loaded_once_for_each_flag():
    specs = [grad_spec(), grad_spec(border="mmcv"), grad_spec(grad_input=False)]
    kernels = [kernel_of(spec) for spec in specs]
    assert len({id(kernel) for kernel in kernels}) == 3
    assert [kernel_of(spec) for spec in specs] == kernels
    assert [kernel.spec for kernel in kernels] == specs
    assert type(tvmdcn.load(SPEC)) is Kernel
