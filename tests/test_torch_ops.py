# SPDX-License-Identifier: Apache-2.0
"""The operators of torch's dispatcher: shapes without memory, bad calls, dtypes, formats, autocast, vmap.

Kernels are handmade here; derivatives are tested in test_autograd.py, compilers in test_torch_compile.py.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import handmade
import pytest
from bad_calls import BAD_CALLS, tensor_arguments, torch_tensor
from handmade import ROOT, variant

import tvmdcn
from tvmdcn import api
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.spec import DeformConv2dSpec, Extents

torch = pytest.importorskip("torch")
import torch_layers  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: E402
from torch_layers import GEOMETRY, NAMES, dispatched, layer_tensors, ours, relative_error  # noqa: E402

import tvmdcn.torch  # noqa: E402

# Largest error over the largest value.
TOLERANCES = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
LAYOUTS = ("NCHW", "NHWC")
TENSOR_CALLS = [bad for bad in BAD_CALLS if bad.as_tensors]


@pytest.fixture(autouse=True)
def builder(monkeypatch):
    handmade.install(monkeypatch)


def in_operator(tensors):
    """Return a call's arguments in the order of the operator."""
    return (*tensors[:4], *GEOMETRY.values(), tensors[4])


# --- values and formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values(dtype, layout):
    tensors = layer_tensors(variant(dtype=dtype, layout=layout))
    found = dispatched(*tensors)
    expected = torch_layers.plain(*(tensor.double() for tensor in tensors))
    assert relative_error(found, expected) < TOLERANCES[dtype]
    assert torch.equal(found, ours(*tensors))
    assert found.is_contiguous(memory_format=torch.channels_last if layout == "NHWC" else torch.contiguous_format)


def test_defaults_are_those_of_the_function():
    operator = torch.ops.tvmdcn.deform_conv2d
    x, offset, weight = torch.randn(1, 4, 5, 6), torch.randn(1, 2, 5, 6), torch.randn(3, 4, 1, 1)
    expected = tvmdcn.deform_conv2d(x, offset, weight)
    assert torch.equal(operator(x, offset, weight), expected)
    assert torch.equal(operator(x, offset, weight, None, 1, 0, 1, None), expected)
    padded = tvmdcn.deform_conv2d(
        x, torch.zeros(1, 2, 4, 4), weight, None, 2, (1, 0, 1, 2), mask=torch.ones(1, 1, 4, 4)
    )
    asymmetric = operator(x, torch.zeros(1, 2, 4, 4), weight, None, 2, (1, 0, 1, 2), 1, torch.ones(1, 1, 4, 4))
    assert torch.equal(padded, asymmetric)


def test_schema():
    """What exported programs hold: names, order and defaults must not change."""
    arguments = torch.ops.tvmdcn.deform_conv2d.default._schema.arguments
    names = ["input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask", "border"]
    assert [argument.name for argument in arguments] == names
    assert [argument.default_value for argument in arguments[3:]] == [
        None,
        [1] * 2,
        [0] * 4,
        [1] * 2,
        None,
        "torchvision",
    ]
    for operator in (torch.ops.tvmdcn.deform_conv2d, torch.ops.tvmdcn.deform_conv2d_backward):
        assert torch.Tag.pt2_compliant_tag in operator.default.tags


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [0, 1, 33])
def test_opcheck(layout, batch):
    tensors = layer_tensors(variant(layout=layout), Extents(batch, 5, 4))
    torch.library.opcheck(torch.ops.tvmdcn.deform_conv2d.default, in_operator(tensors))


def test_opcheck_of_the_backward():
    grad_output = torch.randn(2, 2, 2, 3)
    for layout in LAYOUTS:
        image, offset, weight, _, mask = layer_tensors(variant(layout=layout))
        arguments = grad_output, image, offset, weight, mask, *GEOMETRY.values()
        for needs in ((True,) * 5, (False, True, True, False, True)):
            torch.library.opcheck(torch.ops.tvmdcn.deform_conv2d_backward.default, (*arguments, needs))


def test_opcheck_of_strided_tensors():
    """Neither format: the results are contiguous."""
    tensors = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in layer_tensors()]
    torch.library.opcheck(torch.ops.tvmdcn.deform_conv2d.default, in_operator(tensors))
    image, offset, weight, _, mask = tensors
    grad_output = torch.randn(3, 2, 2, 2).permute(1, 2, 3, 0)
    arguments = grad_output, image, offset, weight, mask, *GEOMETRY.values()
    torch.library.opcheck(torch.ops.tvmdcn.deform_conv2d_backward.default, arguments)


def test_what_is_not_needed_is_empty():
    image, offset, weight, _ = layer_tensors(variant(mask=False))
    found = torch.ops.tvmdcn.deform_conv2d_backward(
        torch.randn(2, 2, 2, 3), image, offset, weight, None, *GEOMETRY.values(), (False, False, False, True, True)
    )
    assert [tuple(gradient.shape) for gradient in found] == [(0,), (0,), (0,), (2,), (0,)]


# --- without memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_meta_and_fake_tensors(layout):
    tensors = layer_tensors(variant(layout=layout))
    expected = ours(*tensors)
    with FakeTensorMode() as mode:
        fake = ours(*(mode.from_tensor(tensor) for tensor in tensors))
    assert isinstance(fake, FakeTensor)
    for found in (fake, ours(*(tensor.to("meta") for tensor in tensors))):
        assert found.shape == expected.shape
        assert found.stride() == expected.stride()
        assert found.dtype == expected.dtype
    assert found.device.type == "meta"


def test_gradients_of_meta_tensors():
    tensors = [tensor.to("meta").requires_grad_() for tensor in layer_tensors(variant(layout="NHWC"))]
    for tensor, gradient in zip(tensors, torch.autograd.grad(ours(*tensors).sum(), tensors), strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.is_meta
    assert gradient.stride() == tensor.stride()


def symbolic_fakes(tensors, mode):
    """Return fake tensors of which batch and image sizes are symbols."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    fakes = []
    for name, tensor in zip(NAMES, tensors, strict=True):
        free = (0, 2, 3) if name in ("input", "offset", "mask") else ()
        sizes = [DimDynamic.DYNAMIC if axis in free else DimDynamic.STATIC for axis in range(tensor.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(tensor, symbolic_context=context))
    return fakes


def test_sizes_stay_symbols():
    shapes = ShapeEnv(duck_shape=False)
    tensors = layer_tensors(extents=Extents(7, 25, 24))
    with FakeTensorMode(shape_env=shapes) as mode:
        found = ours(*symbolic_fakes(tensors, mode))
    assert [type(size) for size in found.shape] == [torch.SymInt, int, torch.SymInt, torch.SymInt]
    assert not any(size.node.expr.is_number for size in (found.shape[0], *found.shape[2:]))
    assert tuple(map(int, found.shape)) == (7, 2, 12, 23)


def test_wrong_sizes_that_are_symbols_are_refused_in_the_same_words():
    for bad in TENSOR_CALLS:
        with FakeTensorMode(shape_env=ShapeEnv(duck_shape=False)) as mode:
            arguments = tensor_arguments(bad.arguments, torch_tensor)
            tensors = [arguments[name] for name in NAMES]
            if not all(torch.is_tensor(tensor) and tensor.numel() for tensor in tensors):
                continue
            if any(tensor.dim() != 4 for name, tensor in zip(NAMES, tensors, strict=True) if name != "bias"):
                continue
            fakes = dict(zip(NAMES, symbolic_fakes(tensors, mode), strict=True))
            if "too_large" in bad.name:  # the limit of 32-bit indices is left to the call, or exports were limited
                continue
            with pytest.raises(bad.exception) as caught:
                tvmdcn.deform_conv2d(**{**arguments, **fakes})
            assert re.search(bad.match, str(caught.value), re.S), bad.name


# --- bad calls -----------------------------------------------------------------------------------------------


# What the schema of the operator does not let through; the dispatcher's message names the argument, too.
NOT_OF_THE_SCHEMA = {
    *("stride_float", "stride_float_in_pair", "stride_text", "stride_none", "padding_float", "padding_same"),
    *("dilation_float", "weight_number", "mask_text", "bias_bool"),
}


def call_operator(arguments):
    return torch.ops.tvmdcn.deform_conv2d(**arguments)


@pytest.mark.parametrize("bad", TENSOR_CALLS, ids=lambda bad: bad.name)
def test_bad_calls_of_the_operator(bad):
    if bad.name in NOT_OF_THE_SCHEMA:
        with pytest.raises((RuntimeError, TypeError), match=bad.name.partition("_")[0]):
            call_operator(tensor_arguments(bad.arguments, torch_tensor))
        return
    if bad.name == "stride_bool":  # the dispatcher makes it 1, which only does not fit
        bad = dataclasses.replace(bad, exception=SpecError, match=r"offset must be of the output's size \(3, 3\)")
    for call in (call_operator, on_meta):
        with pytest.raises(bad.exception) as caught:
            call(tensor_arguments(bad.arguments, torch_tensor))
        assert re.search(bad.match, str(caught.value), re.S)


def on_meta(arguments):
    return call_operator({name: a.to("meta") if torch.is_tensor(a) else a for name, a in arguments.items()})


def with_gradients(arguments):
    """Make what can require gradients do so."""
    for tensor in arguments.values():
        if torch.is_tensor(tensor) and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.requires_grad_()
    return tvmdcn.deform_conv2d(**arguments)


def with_fakes(arguments):
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(a) if torch.is_tensor(a) else a for name, a in arguments.items()}
        return tvmdcn.deform_conv2d(**fakes)


def inside_vmap(arguments):
    return torch.vmap(lambda _: tvmdcn.deform_conv2d(**arguments))(torch.zeros(1))


@pytest.mark.parametrize("call", [with_gradients, with_fakes, inside_vmap])
@pytest.mark.parametrize("bad", TENSOR_CALLS, ids=lambda bad: bad.name)
def test_bad_calls(bad, call):
    """Each is refused in the words of test_api.py, however torch is told about it."""
    with pytest.raises(bad.exception) as caught:
        call(tensor_arguments(bad.arguments, torch_tensor))
    assert re.search(bad.match, str(caught.value), re.S)


@pytest.mark.parametrize("border", ["torch", "", None, 1])
def test_border_is_checked(border):
    tensors = layer_tensors()
    with pytest.raises(SpecError, match=f"border must be one of torchvision, mmcv, got border={border!r}"):
        ours(*tensors, border=border)
    if isinstance(border, str):
        with pytest.raises(SpecError, match="border must be one of torchvision, mmcv"):
            dispatched(*tensors, border=border)


def test_grad_output_is_checked_without_memory():
    image, offset, weight, _, mask = (tensor.to("meta") for tensor in layer_tensors())
    with pytest.raises(
        SpecError, match=r"grad_output must be of the output's shape \(2, 2, 2, 3\), got \(2, 2, 3, 3\)"
    ):
        torch.ops.tvmdcn.deform_conv2d_backward(
            torch.empty(2, 2, 3, 3, device="meta"), image, offset, weight, mask, *GEOMETRY.values()
        )


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*[Ss]parse")
@pytest.mark.parametrize("call", [ours, dispatched])
def test_tensors_of_other_kinds(call):
    image, *others = layer_tensors()
    for wrong, match in (
        (image.to_sparse(), "input has layout torch.sparse_coo; pass input.to_dense"),
        (torch.quantize_per_tensor(image, 0.1, 0, torch.qint8), "input is quantized"),
    ):
        with pytest.raises(SpecTypeError, match=match):
            call(wrong, *others)


# --- which way a call goes -----------------------------------------------------------------------------------


@pytest.fixture
def operator_calls(monkeypatch):
    """Count calls of the function that went through the dispatcher."""
    from tvmdcn.torch import ops

    calls, call = [], ops.call_operator
    monkeypatch.setattr(ops, "call_operator", lambda *a: calls.append(1) or call(*a))
    return calls


def test_plain_calls_take_the_short_way(operator_calls):
    tensors = layer_tensors()
    ours(*tensors)
    tensors[2] = torch.nn.Parameter(tensors[2])
    with torch.no_grad():
        ours(*tensors)
    with torch.inference_mode():
        ours(*tensors)
    ours(*tensors)
    assert not operator_calls


def test_what_torch_has_to_see_goes_through_the_dispatcher(operator_calls):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    tensors = layer_tensors()
    expected = ours(*tensors)
    with Watching():
        assert torch.equal(ours(*tensors), expected)
    assert torch.ops.tvmdcn.deform_conv2d.default in seen
    assert len(operator_calls) == 1

    class Subclass(torch.Tensor):
        pass

    tensors[0] = tensors[0].as_subclass(Subclass)
    found = ours(*tensors)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
    assert len(operator_calls) == 2


def test_tracing_records_the_operator():
    tensors = layer_tensors()
    traced = torch.jit.trace(ours, tuple(tensors), check_trace=False)
    assert "tvmdcn::deform_conv2d" in str(traced.graph)
    other = layer_tensors(extents=Extents(3, 9, 8))
    assert torch.equal(traced(*other), ours(*other))


def test_operators_come_with_tvmdcn_torch_and_not_with_tvmdcn():
    code = """
import sys, tvmdcn
assert "torch" not in sys.modules
import torch
assert not hasattr(torch.ops.tvmdcn, "deform_conv2d")
import tvmdcn.torch
print(torch.ops.tvmdcn.deform_conv2d.default._schema.name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "tvmdcn::deform_conv2d", done.stderr


# --- autocast ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_computes_in_low_precision(dtype):
    low = getattr(torch, dtype)
    tensors = layer_tensors(extents=Extents(2, 15, 14))
    expected = ours(*(tensor.to(low) for tensor in tensors))
    # Convolutions before give what autocast chose, parameters are float32.
    mixed = [tensors[0].to(low), *tensors[1:]]
    with torch.autocast("cpu", dtype=low):
        for call in (ours, dispatched):
            for given in (tensors, mixed):
                found = call(*given)
                assert found.dtype == low
                assert torch.equal(found, expected)
        doubles = [tensor.double() for tensor in tensors]
        assert ours(*doubles).dtype == torch.float64
    with torch.autocast("cpu", dtype=low, enabled=False):
        assert ours(*tensors).dtype == torch.float32


def test_autocast_of_another_device_changes_nothing():
    tensors = layer_tensors()
    expected = ours(*tensors)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(ours(*tensors), expected)
        assert torch.equal(dispatched(*tensors), expected)
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_autocast_on_cuda():
    """As far as it can be seen without a device."""
    tensors = layer_tensors()
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            found = ours(*(torch.empty(tensor.shape, device="cuda") for tensor in tensors))
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    assert found.device.type == "cuda"
    assert found.dtype == torch.get_autocast_dtype("cuda")


def test_autocast_in_inference_mode():
    tensors = layer_tensors()
    expected = ours(*(tensor.bfloat16() for tensor in tensors))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(*tensors), expected)


def test_autocast_does_not_mix_float64_with_others():
    tensors = layer_tensors()
    tensors[0] = tensors[0].double()
    with torch.autocast("cpu"), pytest.raises(SpecTypeError, match="input is float64 and offset is bfloat16"):
        ours(*tensors)


# --- vmap ----------------------------------------------------------------------------------------------------


def stacked(mapped, size=3, **options):
    """Return the tensors of several calls, those named in `mapped` along a new last axis, and the axes."""
    calls = [layer_tensors(seed=seed, **options) for seed in range(size)]
    axes = [(0 if name == "bias" else -1) if name in mapped else None for name in NAMES]
    tensors = [
        calls[0][index] if axis is None else torch.stack([call[index] for call in calls], axis)
        for index, axis in enumerate(axes)
    ]
    singles = [
        [call[index] if axis is not None else calls[0][index] for index, axis in enumerate(axes)] for call in calls
    ]
    return tensors, tuple(axes), singles


@pytest.mark.parametrize(
    "mapped",
    [
        ("input", "offset", "mask"),
        ("input",),
        ("offset",),
        ("mask",),
        ("weight",),
        ("bias",),
        ("input", "weight", "bias"),
        NAMES,
    ],
    ids="-".join,
)
def test_vmap(mapped):
    tensors, axes, singles = stacked(mapped)
    expected = torch.stack([ours(*single) for single in singles])
    for call in (ours, dispatched):
        torch.testing.assert_close(torch.vmap(call, axes)(*tensors), expected)


def test_nested_vmap():
    tensors, _, singles = stacked(("input", "weight"), size=2)
    pairs = torch.vmap(torch.vmap(ours, (-1, *[None] * 4)), (None, None, -1, None, None))(*tensors)
    for row, other in enumerate(singles):
        for column, single in enumerate(singles):
            torch.testing.assert_close(pairs[row, column], ours(single[0], *single[1:2], other[2], *single[3:]))


def test_vmap_without_a_mask():
    spec = DeformConv2dSpec(4, 4, (1, 1), mask=False)
    calls = [layer_tensors_without_mask(spec, seed) for seed in range(2)]
    expected = torch.stack([tvmdcn.deform_conv2d(*call) for call in calls])
    image, offset = (torch.stack(parts) for parts in list(zip(*calls, strict=True))[:2])
    found = torch.vmap(tvmdcn.deform_conv2d, (0, 0, None))(image, offset, calls[0][2])
    torch.testing.assert_close(found[0], expected[0])


def layer_tensors_without_mask(spec, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, 5, 6), (2, 2, 5, 6), spec.weight_shape
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_kernels_found_by_the_operator_are_those_of_the_function():
    ours(*layer_tensors())
    count = len(api._kernels)
    dispatched(*layer_tensors())
    assert len(api._kernels) <= count + 1
