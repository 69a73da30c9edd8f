# SPDX-License-Identifier: Apache-2.0
"""Gradients through torch: every kind of derivative, against a plain formulation that torch differentiates itself.

Kernels are compiled here, all at once in two processes; the signatures are those of other test modules.
"""

from __future__ import annotations

import threading
from concurrent.futures import wait

import pytest
from handmade import variant

import tvmdcn
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents

torch = pytest.importorskip("torch")
from compiled import build_only  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch_layers import GEOMETRY, NAMES, dispatched, layer_tensors, ours, plain, relative_error  # noqa: E402

# Largest error over the largest value, of any gradient, against float64. float32: what the issue asks for; the halves:
# the rounding of the gradient itself (2**-11 and 2**-8 of its own size), as sums and places are float32.
TOLERANCES = {"float64": 1e-13, "float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
LAYOUTS = ("NCHW", "NHWC")
DOUBLE = variant(dtype="float64")
PLAIN_LAYER = DeformConv2dSpec(4, 5, (3, 3), 1, 1, mask=False, dtype="float64")
SPECS = (
    *(variant(dtype=dtype, layout=layout) for dtype in ("float32", "float64") for layout in LAYOUTS),
    *(variant(dtype=dtype) for dtype in ("float16", "bfloat16")),
    PLAIN_LAYER,
)


# Of some layers not all gradients, or mmcv's.
FLAGS = ("grad_input", "grad_offset", "grad_weight", "grad_bias")
SOME = [
    DeformConv2dGradSpec.of(DOUBLE, **{flag: flag.removeprefix("grad_") in names for flag in FLAGS})
    for names in ({"bias"}, {"weight"}, {"input"}, {"offset"})
]
GRAD_SPECS = (
    *(DeformConv2dGradSpec.of(spec, grad_bias=spec is not PLAIN_LAYER) for spec in SPECS),
    *(*SOME, DeformConv2dGradSpec.of(DOUBLE, border="mmcv")),
)


@pytest.fixture(scope="module", autouse=True)
def builds(compilers, session_cache_dir):
    """Build beside one another what would be built at the first call; if that fails, it is the call that says so."""
    wait([compilers.submit(build_only, spec, "tuned", session_cache_dir) for spec in (*SPECS, *GRAD_SPECS)])


def gradients(call, tensors, grad_output=None, **options):
    """Return the gradients of all of `tensors`, as leaves of a new graph."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
    output = call(*leaves, **options)
    if grad_output is None:
        grad_output = torch.ones_like(output)
    return torch.autograd.grad(output, leaves, grad_output)


def made_grad_output(tensors, seed=0):
    """Return a gradient for the output of the asymmetric problem."""
    batch, _, height, width = tensors[1].shape
    generator = torch.Generator().manual_seed(seed)
    shape = batch, tensors[2].shape[0], height, width
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(tensors[0].dtype)


def assert_close(found, expected, tolerance):
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert relative_error(one, other) <= tolerance, name


# --- first gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("call", [ours, dispatched])
def test_gradcheck(call, batch, layout):
    tensors = layer_tensors(variant(dtype="float64", layout=layout), Extents(batch, 5, 4), requires_grad=NAMES)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=batch > 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_of_a_large_batch(layout):
    tensors = layer_tensors(variant(dtype="float64", layout=layout), Extents(33, 5, 4), requires_grad=NAMES)
    assert torch.autograd.gradcheck(ours, tensors, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", [ours, dispatched])
def test_empty_batch(call, layout):
    tensors = layer_tensors(variant(dtype="float64", layout=layout), Extents(0, 5, 4))
    for tensor, gradient in zip(tensors, gradients(call, tensors), strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_gradcheck_without_mask_and_bias():
    tensors = layer_tensors(PLAIN_LAYER, Extents(2, 4, 5), requires_grad=NAMES)
    tensors = [tensors[index] for index in (0, 1, 2)]

    def call(image, offset, weight):
        return tvmdcn.deform_conv2d(image, offset, weight, padding=1)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("extents", [Extents(2, 5, 4), Extents(33, 9, 8), Extents(1, 31, 26)], ids=str)
def test_parity_with_a_plain_formulation(extents, dtype, layout):
    tensors = layer_tensors(variant(dtype=dtype, layout=layout), extents)
    grad_output = made_grad_output(tensors)
    found = gradients(ours, tensors, grad_output)
    expected = gradients(plain, [tensor.double() for tensor in tensors], grad_output.double())
    assert_close(found, expected, TOLERANCES[dtype])
    for one, other in zip(found, gradients(dispatched, tensors, grad_output), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_at_columns_beyond_2000(dtype):
    """Places are float32: in the halves, those of neighbouring columns would be one."""
    tensors = layer_tensors(variant(dtype=dtype), Extents(1, 5, 2100))
    # Exact in both halves, and so that no place lies within rounding of where the derivative jumps.
    tensors[1] = ((tensors[1].float() * 32).round() / 32).clamp(-3.5, 3.5).add(1 / 64).to(tensors[1].dtype)
    tensors = [tensor.contiguous() for tensor in tensors]
    grad_output = made_grad_output(tensors)
    doubles = [tensor.double() for tensor in tensors]
    assert relative_error(ours(*tensors), plain(*doubles)) <= TOLERANCES[dtype]
    found = gradients(ours, tensors, grad_output)
    assert all(gradient.dtype == tensors[0].dtype for gradient in found)
    expected = gradients(plain, doubles, grad_output.double())
    assert_close(found, expected, TOLERANCES[dtype])
    for index in (0, 1, 4):  # and there, not only on the whole
        beyond = found[index][..., 2000:], expected[index][..., 2000:]
        assert relative_error(*beyond) <= TOLERANCES[dtype]


@pytest.mark.parametrize("border", ["torchvision", "mmcv"])
@pytest.mark.parametrize("call", [ours, dispatched])
def test_border(call, border):
    """With offsets of zero, the first row of taps of a padded layer lies at exactly -1."""
    tensors = layer_tensors(DOUBLE)
    tensors[1] = torch.zeros_like(tensors[1])
    found = gradients(call, tensors, border=border)
    expected = gradients(plain, tensors, border=border)
    assert_close(found, expected, TOLERANCES["float64"])
    first_taps = found[1].unflatten(1, (3, 3, 2, 2))[:, :, 0, :, 0, 0]
    assert bool(first_taps.any()) == (border == "torchvision")


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_strange_offsets_have_no_gradient(strange):
    tensors = layer_tensors(variant())
    tensors[1][:, ::3] = strange
    found = gradients(ours, tensors)
    assert all(gradient.isfinite().all() for gradient in found)
    assert not found[1][:, ::3].any()


# --- only what is asked for ----------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The `needs` of all calls of the backward."""
    from tvmdcn.torch import autograd, ops

    seen, backward = [], tvmdcn.deform_conv2d_backward

    def watched(*args, needs, **kwargs):
        seen.append(tuple(needs))
        return backward(*args, needs=needs, **kwargs)

    for module in (autograd, ops):
        monkeypatch.setattr(module, "deform_conv2d_backward", watched)
    return seen


# What is kept for the backward: input, offset, weight, mask.
KEPT = {
    ("bias",): (),
    ("weight",): ("input", "offset", "mask"),
    ("input",): ("offset", "weight", "mask"),
    ("offset", "mask"): ("input", "offset", "weight", "mask"),
}


@pytest.mark.parametrize("call", [ours, dispatched])
@pytest.mark.parametrize("names", KEPT, ids="-".join)
def test_only_what_is_asked_for(names, call, asked):
    tensors = layer_tensors(DOUBLE, requires_grad=names)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = call(*tensors)
    output.sum().backward()
    assert asked == [tuple(name in names for name in NAMES)]
    expected = gradients(plain, tensors)
    for name, tensor, gradient in zip(NAMES, tensors, expected, strict=True):
        assert (tensor.grad is not None) == (name in names)
        if tensor.grad is not None:
            assert relative_error(tensor.grad, gradient) <= TOLERANCES["float64"]
    pointers = {tensor.data_ptr(): name for name, tensor in zip(NAMES, tensors, strict=True)}
    assert sorted(pointers[tensor.data_ptr()] for tensor in kept) == sorted(KEPT[names])


def test_nothing_is_recorded_without_need():
    tensors = layer_tensors(DOUBLE, requires_grad=NAMES)
    with torch.no_grad():
        assert not ours(*tensors).requires_grad
        assert not dispatched(*tensors).requires_grad
    assert not ours(*(tensor.detach() for tensor in tensors)).requires_grad


@pytest.mark.parametrize("call", [ours, dispatched])
def test_changes_of_what_was_kept_are_noticed(call):
    for name in ("input", "offset", "weight", "mask"):
        tensors = layer_tensors(DOUBLE, requires_grad=NAMES)
        copies = [tensor.clone(memory_format=torch.preserve_format) for tensor in tensors]
        output = call(*copies)
        with torch.no_grad():
            copies[NAMES.index(name)].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    bias = tensors[3].detach().clone().requires_grad_()
    output = call(*tensors[:3], bias, tensors[4])
    with torch.no_grad():
        bias.add_(1)
    output.sum().backward()


# --- ways of going backward ----------------------------------------------------------------------------------


def expanded(grad_output):
    return grad_output[:1, :1, :1, :1].expand_as(grad_output)


def strided(grad_output):
    return torch.stack([grad_output, -grad_output], -1)[..., 0]


def channels_last(grad_output):
    return grad_output.contiguous(memory_format=torch.channels_last)


def planar(grad_output):
    return grad_output.contiguous()


def negated(grad_output):
    return torch.complex(torch.zeros_like(grad_output), -grad_output).conj().imag


@pytest.mark.parametrize("memory", [expanded, strided, channels_last, planar, negated])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", [ours, dispatched])
def test_any_memory_of_the_outputs_gradient(call, layout, memory):
    tensors = layer_tensors(variant(dtype="float64", layout=layout))
    grad_output = memory(made_grad_output(tensors))
    found = gradients(call, tensors, grad_output)
    assert_close(found, gradients(plain, tensors, grad_output.clone()), TOLERANCES["float64"])
    for index in (0, 1, 4):
        assert found[index].stride() == tensors[index].stride()


@pytest.mark.parametrize("name", ["input", "offset", "mask"])
def test_one_tensor_in_another_format(name):
    """Offset and mask come from plain convolutions, which answer in a format of their own choice."""
    tensors = layer_tensors(DOUBLE)
    grad_output = made_grad_output(tensors)
    expected = gradients(ours, tensors, grad_output)
    index = NAMES.index(name)
    tensors[index] = channels_last(tensors[index])
    assert_close(gradients(ours, tensors, grad_output), expected, TOLERANCES["float64"])
    tensors[index] = strided(tensors[index])
    assert_close(gradients(ours, tensors, grad_output), expected, TOLERANCES["float64"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    from torch.utils.checkpoint import checkpoint

    tensors = layer_tensors(DOUBLE, requires_grad=NAMES)
    checkpoint(ours, *tensors, use_reentrant=reentrant).sum().backward()
    assert_close([tensor.grad for tensor in tensors], gradients(plain, tensors), TOLERANCES["float64"])


def test_retained_graphs_hooks_and_accumulation():
    tensors = layer_tensors(DOUBLE, requires_grad=NAMES)
    seen = []
    tensors[2].register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    output = ours(*tensors)
    output.sum().backward(retain_graph=True)
    output.sum().backward()
    assert torch.equal(seen[0], seen[1])
    expected = gradients(plain, tensors)
    assert relative_error(tensors[2].grad, 4 * expected[2]) <= TOLERANCES["float64"]
    assert relative_error(tensors[0].grad, 2 * expected[0]) <= TOLERANCES["float64"]
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


def test_backward_in_many_threads_at_once():
    tensors = layer_tensors(extents=Extents(3, 21, 20))
    expected = gradients(ours, tensors)
    results, errors = [], []

    def work():
        try:
            for _ in range(3):
                results.append(gradients(ours, tensors))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 12
    for found in results:
        assert all(map(torch.equal, found, expected))


def test_backward_in_another_thread_than_forward():
    tensors = layer_tensors(requires_grad=NAMES)
    output = ours(*tensors)
    thread = threading.Thread(target=lambda: output.sum().backward())
    thread.start()
    thread.join()
    for tensor, gradient in zip(tensors, gradients(ours, tensors), strict=True):
        assert torch.equal(tensor.grad, gradient)


def test_the_number_of_threads_changes_no_bit():
    tensors = layer_tensors(extents=Extents(3, 31, 30))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gradients(ours, tensors))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_gives_gradients_of_the_parameters_dtype(dtype):
    tensors = layer_tensors(extents=Extents(2, 15, 14), requires_grad=NAMES)
    low = getattr(torch, dtype)
    with torch.autocast("cpu", dtype=low):
        output = ours(*tensors)
        assert output.dtype == low
    found = torch.autograd.grad(output, tensors, torch.ones_like(output))
    assert all(gradient.dtype == torch.float32 for gradient in found)
    rounded = [tensor.to(low).double() for tensor in tensors]
    assert_close(found, gradients(plain, rounded), TOLERANCES[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck_with_gradients(layout, batch):
    tensors = layer_tensors(variant(layout=layout), Extents(batch, 5, 4), requires_grad=NAMES)
    arguments = (*tensors[:4], *GEOMETRY.values(), tensors[4])
    torch.library.opcheck(torch.ops.tvmdcn.deform_conv2d.default, arguments)


# --- second derivatives, forward mode, torch.func ------------------------------------------------------------


def tangents_of(tensors):
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in tensors)


def second(call, tensors):
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
    grad_output = made_grad_output(tensors).requires_grad_()
    first = torch.autograd.grad(call(*leaves), leaves, grad_output, create_graph=True)
    total = sum((gradient * tangent).sum() for gradient, tangent in zip(first, tangents_of(leaves), strict=True))
    # Nothing of second order depends on the bias.
    return torch.autograd.grad(total, [grad_output, *leaves[:3], leaves[4]])


@pytest.mark.parametrize("call", [ours, dispatched])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_double_backward(layout, call):
    tensors = layer_tensors(variant(dtype="float64", layout=layout))
    assert_close(second(call, tensors), second(plain, tensors), TOLERANCES["float64"])


def test_gradgradcheck():
    tensors = layer_tensors(DOUBLE, Extents(1, 5, 4), requires_grad=NAMES)
    assert torch.autograd.gradgradcheck(ours, tensors, fast_mode=True)


def test_third_derivative():
    tensors = layer_tensors(DOUBLE)
    results = []
    for call in (ours, plain):
        mask = tensors[4].clone().requires_grad_()
        value = (call(*tensors[:4], mask) ** 3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, mask, create_graph=True)
            value = (gradient * torch.cos(mask)).sum()
        results.append(gradient)
    assert relative_error(*results) <= TOLERANCES["float64"]


@pytest.mark.parametrize("call", [ours, dispatched])
def test_forward_mode(call):
    tensors = layer_tensors(variant(dtype="float64", layout="NHWC"))
    tangents = tangents_of(tensors)
    for some in (slice(0, 1), slice(1, 2), slice(0, 5)):
        results = []
        for each in (call, plain):
            with forward_ad.dual_level():
                duals = list(tensors)
                duals[some] = map(forward_ad.make_dual, tensors[some], tangents[some])
                results.append(forward_ad.unpack_dual(each(*duals)))
        for found, expected in zip(*results, strict=True):
            assert relative_error(found, expected) <= TOLERANCES["float64"]
        assert results[0].primal.is_contiguous(memory_format=torch.channels_last)
    with forward_ad.dual_level():  # nothing has a tangent
        assert forward_ad.unpack_dual(call(*tensors)).tangent is None


def loss(call):
    return lambda *tensors: (call(*tensors) ** 2).sum()


def per_sample(call):
    """Map a gradient over images, as for differential privacy."""

    def single(image, offset, weight, bias, mask):
        return loss(call)(image[None], offset[None], weight, bias, mask[None])

    return torch.vmap(torch.func.grad(single, (0, 1, 2, 3, 4)), (0, 0, None, None, 0))


def mapped(call):
    return torch.vmap(call, (0, 0, None, None, 0))


def doubled(tensors):
    return [torch.stack([t, t / 2]) if index in (0, 1, 4) else t for index, t in enumerate(tensors)]


ALL = (0, 1, 2, 3, 4)
TRANSFORMS = {
    "grad": lambda call, tensors: torch.func.grad(loss(call), ALL)(*tensors),
    "vjp": lambda call, tensors: torch.func.vjp(call, *tensors)[1](made_grad_output(tensors)),
    "jvp": lambda call, tensors: torch.func.jvp(call, tuple(tensors), tangents_of(tensors)),
    "per_sample_grad": lambda call, tensors: per_sample(call)(*tensors),
    "vmap_of_grad": lambda call, tensors: mapped(torch.func.grad(loss(call), ALL))(*doubled(tensors)),
    "grad_of_vmap": lambda call, tensors: torch.func.grad(loss(mapped(call)), ALL)(*doubled(tensors)),
    "jvp_of_grad": lambda call, tensors: torch.func.jvp(
        torch.func.grad(loss(call), ALL), tuple(tensors), tangents_of(tensors)
    ),
    "grad_of_jvp": lambda call, tensors: torch.func.grad(
        lambda *a: torch.func.jvp(loss(call), a, tangents_of(tensors))[1], ALL
    )(*tensors),
    "grad_of_grad": lambda call, tensors: torch.func.grad(
        lambda *a: sum((g**2).sum() for g in torch.func.grad(loss(call), ALL)(*a)), (0, 1, 2, 4)
    )(*tensors),
    "jacrev": lambda call, tensors: torch.func.jacrev(call, ALL)(*tensors),
    "jacfwd": lambda call, tensors: torch.func.jacfwd(call, (1, 2))(*tensors),
}


def leaves_of(tree):
    return [tree] if torch.is_tensor(tree) else [leaf for branch in tree for leaf in leaves_of(branch)]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform):
    tensors = layer_tensors(DOUBLE, Extents(1, 5, 4) if "jac" in transform else Extents(2, 5, 4))
    found = leaves_of(TRANSFORMS[transform](ours, tensors))
    expected = leaves_of(TRANSFORMS[transform](plain, tensors))
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= TOLERANCES["float64"]


def test_hessian():
    tensors = layer_tensors(DOUBLE, Extents(1, 3, 2))
    results = []
    for call in (ours, plain):

        def of(weight, mask, call=call):
            return loss(call)(*tensors[:2], weight, tensors[3], mask)

        results.append(leaves_of(torch.func.hessian(of, (0, 1))(tensors[2], tensors[4])))
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) <= TOLERANCES["float64"]


def test_gradients_of_what_a_transform_closes_over():
    tensors = layer_tensors(DOUBLE)
    results = []
    for call in (ours, plain):
        image = tensors[0].clone().requires_grad_()

        def of(weight, call=call, image=image):
            return loss(call)(image, tensors[1], weight, *tensors[3:])

        inner = torch.func.grad(of)(tensors[2])
        results.append(torch.autograd.grad((inner**2).sum(), image)[0])
    assert relative_error(*results) <= TOLERANCES["float64"]
