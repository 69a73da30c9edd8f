# SPDX-License-Identifier: Apache-2.0
"""The layers: constructors, parameters, checkpoints, values, and that a changed weight is always seen."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import pytest

pytest.importorskip("torch")

import peer_layers
import torch
from bad_calls import BAD_CALLS, GOOD_CALL, tensor_arguments, torch_tensor
from peer_layers import plain_of_call, randomized
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, parametrize, skip_init

import tvmdcn
from tvmdcn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.kernel import Kernel

# Largest error over the largest value. Gradients are sums of more products than outputs.
TOLERANCES = {
    "float64": 1e-12,
    "float32": 5e-6,
    "bfloat16": 4e-2,  # the offsets are rounded as well, after a convolution in bfloat16
    "gradient float64": 1e-11,
    "gradient float32": 5e-5,
}
# torchvision's asymmetric test problem.
GEOMETRY: dict[str, Any] = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)}
PACKS = (DeformConv2dPack, ModulatedDeformConv2dPack)


def layer_of(cls, **options) -> nn.Module:
    groups = {"groups": 2} if cls is DeformConv2d else {"groups": 2, "deform_groups": 3}
    return randomized(cls(6, 2, **{**GEOMETRY, **groups, "bias": True, **options}))


def image(dtype=torch.float32, batch: int = 2, seed: int = 1, **options) -> torch.Tensor:
    made = torch.randn(batch, 6, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype, **options)


def arguments_of(cls, dtype=torch.float32, batch: int = 2, **options) -> tuple[torch.Tensor, ...]:
    """Return what a layer is called with: offset and mask as well where it does not predict them."""
    if cls is not DeformConv2d:
        return (image(dtype, batch, **options),)
    generator = torch.Generator().manual_seed(2)
    offset, mask = (torch.randn(batch, n, 2, 3, generator=generator, dtype=torch.float64) for n in (36, 18))
    return image(dtype, batch, **options), offset.to(dtype, **options), mask.to(dtype, **options)


def expected_of(layer: nn.Module, *given: torch.Tensor) -> torch.Tensor:
    """Return what a layer must give, in plain torch operations on tensors of the same dtype."""
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, DeformConv2d):
        x, offset, mask = (*given, None)[:3]
    else:
        (x,) = given
        predicted = layer.conv_offset(x)
        thirds = predicted.chunk(3, 1)
        is_v2 = isinstance(layer, ModulatedDeformConv2dPack)
        offset, mask = (torch.cat(thirds[:2], 1), thirds[2].sigmoid()) if is_v2 else (predicted, None)
    return plain_of_call(x, offset, weight, bias, layer.stride, layer.padding, layer.dilation, mask, layer.border)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def check(layer: nn.Module, *given: torch.Tensor) -> torch.Tensor:
    found = layer(*given)
    assert error(found, expected_of(layer, *given)) <= TOLERANCES[str(found.dtype).removeprefix("torch.")]
    return found


@pytest.fixture
def peers(monkeypatch):
    return peer_layers.install(monkeypatch)


@pytest.fixture
def packings(monkeypatch) -> list[Any]:
    """The weights that kernels pack, as they do."""
    packed: list[Any] = []
    original = Kernel.pack

    def pack(self, weight):
        packed.append(weight)
        return original(self, weight)

    monkeypatch.setattr(Kernel, "pack", pack)
    return packed


# --- constructors -------------------------------------------------------------------------------------------


def names_and_defaults(cls) -> list[tuple[str, Any]]:
    parameters = list(inspect.signature(cls).parameters.values())
    return [(each.name, each.default) for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]


def test_constructors_are_the_peers(peers):
    assert names_and_defaults(DeformConv2d) == names_and_defaults(peers.torchvision.DeformConv2d)
    assert names_and_defaults(DeformConv2dPack) == names_and_defaults(peers.mmcv.DeformConv2d)
    v2 = names_and_defaults(peers.mmcv.ModulatedDeformConv2d)
    assert names_and_defaults(ModulatedDeformConv2dPack) == [*v2, ("im2col_step", 32)]
    for cls in (DeformConv2d, *PACKS):
        vanilla = list(inspect.signature(nn.Conv2d).parameters)
        assert list(inspect.signature(cls).parameters)[:7] == vanilla[:7]
        assert set(vanilla) <= set(inspect.signature(cls).parameters)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_attributes_keys_and_draws_are_the_peers(peers, cls, bias):
    """One seed gives the same parameters, and leaves the generator in the same state."""
    theirs = getattr(peers.torchvision if cls is DeformConv2d else peers.mmcv, cls.__name__)
    options = {**GEOMETRY, "groups": 2} | ({} if cls is DeformConv2d else {"deform_groups": 3})
    if cls is DeformConv2dPack and bias:
        with pytest.raises(AssertionError):
            theirs(6, 2, **options, bias=True)
        assert torch.equal(cls(6, 2, **options, bias=True).bias, torch.zeros(2))
        return
    made, following = [], []
    for each in (cls, theirs):
        torch.manual_seed(7)
        made.append(each(6, 2, **options, bias=bias))
        following.append(torch.rand(()))
    ours, peer = made
    assert following[0] == following[1]
    assert list(ours.state_dict()) == list(peer.state_dict())
    for name, value in peer.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert ours._version == peer._version
    for name in vars(peer).keys() - vars(nn.Module()).keys():
        assert getattr(ours, name) == getattr(peer, name)
    if cls is DeformConv2d:
        assert repr(ours) == repr(peer)


def test_torchvisions_draws_are_those_of_a_plain_convolution():
    made = []
    for cls in (nn.Conv2d, DeformConv2d):
        torch.manual_seed(3)
        made.append(cls(6, 4, (3, 2), groups=2))
    assert all(torch.equal(*pair) for pair in zip(*(layer.parameters() for layer in made), strict=True))


@pytest.mark.parametrize("cls", PACKS)
def test_new_packs_start_as_plain_convolutions(cls):
    layer = cls(6, 4, 3, padding=1, bias=True)
    plain = nn.functional.conv2d(image(), layer.weight, padding=1)
    assert error(layer(image()), plain if cls is DeformConv2dPack else plain / 2) <= TOLERANCES["float32"]
    randomized(layer)
    layer.reset_parameters()
    assert not layer.conv_offset.weight.any()
    assert not layer.conv_offset.bias.any()
    assert not layer.bias.any()
    assert layer.weight.std() < 0.5


def test_printed():
    assert repr(DeformConv2d(6, 4, 3)) == "DeformConv2d(6, 4, kernel_size=(3, 3), stride=(1, 1))"
    layer = DeformConv2d(6, 4, (3, 2), 2, (1, 2, 3, 4), 3, 2, False, border="mmcv")
    assert repr(layer) == (
        "DeformConv2d(6, 4, kernel_size=(3, 2), stride=(2, 2), padding=(1, 2, 3, 4), dilation=(3, 3), groups=2, "
        "bias=False, border='mmcv')"
    )
    text = repr(ModulatedDeformConv2dPack(6, 4, 3, padding=1, deform_groups=3, border="torchvision"))
    assert "padding=(1, 1), deform_groups=3, border='torchvision'\n  (conv_offset): Conv2d(6, 81, " in text
    assert "bias=False\n" in repr(DeformConv2dPack(6, 4, 3))


def test_old_name_of_an_argument():
    for cls in PACKS:
        with pytest.warns(DeprecationWarning, match="deformable_groups is now called deform_groups") as caught:
            assert cls(6, 4, 3, deformable_groups=3).deform_groups == 3
        assert caught[0].filename == __file__
        with pytest.raises(SpecError, match=r"deformable_groups=3 is the old name of deform_groups, .* too \(2\)"):
            cls(6, 4, 3, deform_groups=2, deformable_groups=3)


@pytest.mark.parametrize(
    ("options", "exception", "match"),
    [
        ({"in_channels": 0}, SpecError, "in_channels must be at least 1, got in_channels=0"),
        ({"out_channels": 2.0}, SpecTypeError, "out_channels must be made of ints"),
        ({"kernel_size": (3, 3, 3)}, SpecError, r"kernel_size must be .* got 3 values"),
        ({"kernel_size": 0}, SpecError, "kernel_size must be at least 1"),
        ({"stride": 0}, SpecError, "stride must be at least 1"),
        ({"padding": -1}, SpecError, "padding must be at least 0"),
        ({"padding": "same"}, SpecTypeError, "'same' and 'valid' are not understood"),
        ({"dilation": 0}, SpecError, "dilation must be at least 1"),
        ({"groups": 4}, SpecError, "groups must divide in_channels, got groups=4 and in_channels=6"),
        ({"groups": 3}, SpecError, "groups must divide out_channels, got groups=3 and out_channels=4"),
        ({"bias": "auto"}, SpecTypeError, "bias must be True or False, got bias='auto'"),
        ({"padding_mode": "reflect"}, SpecError, "padding_mode must be 'zeros', got padding_mode='reflect'.*pad"),
        ({"border": "zeros"}, SpecError, "border must be one of torchvision, mmcv, got border='zeros'"),
        ({"dtype": torch.int8}, SpecTypeError, "dtype int8 of weight is not supported"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_bad_constructor_is_refused_in_words(cls, options, exception, match):
    with pytest.raises(exception, match=match):
        cls(**{"in_channels": 6, "out_channels": 4, "kernel_size": 3, **options})


@pytest.mark.parametrize("cls", PACKS)
def test_bad_constructor_of_a_pack_is_refused_in_words(cls):
    with pytest.raises(SpecError, match="deform_groups must divide in_channels, got deform_groups=4 and in_channels=6"):
        cls(6, 4, 3, deform_groups=4)
    with pytest.raises(SpecError, match="deform_groups must be at least 1, got deform_groups=0"):
        cls(6, 4, 3, deform_groups=0)
    with pytest.raises(SpecTypeError, match=r"deform_groups must be an int, got True .* comes before bias"):
        cls(6, 4, 3, 1, 1, 1, 1, True)
    with pytest.raises(SpecError, match=r"padding must be an int or a pair .* got .*\(1, 0, 2, 0\)"):
        cls(6, 4, 3, padding=(1, 0, 2, 0))


def test_layers_need_torch_in_words():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as util, tvmdcn, tvmdcn.extras as extras\n"
        "extras.find_spec = lambda name: None\n"
        "try: tvmdcn.DeformConv2d\n"
        "except tvmdcn.MissingExtra as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "tvmdcn.DeformConv2d needs torch, not installed here: pip install 'tvmdcn[torch]'" in done.stdout


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 33])
@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_values_of_the_asymmetric_problem(cls, batch):
    layer, given = layer_of(cls), arguments_of(cls, batch=batch)
    found = layer(*given)
    assert found.shape == (batch, 2, 2, 3)
    if batch:
        assert error(found, expected_of(layer, *given)) <= TOLERANCES["float32"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_dtypes(cls, dtype):
    """A layer made with a dtype, and one converted to it."""
    layer, given = layer_of(cls), arguments_of(cls, dtype)
    for converted in (layer_of(cls, dtype=dtype), layer.to(dtype)):
        if dtype is torch.float64:
            check(converted, *given)
            continue
        wide = copy.deepcopy(converted).double()
        expected = expected_of(wide, *(tensor.double() for tensor in given))
        assert error(converted(*given).double(), expected) <= TOLERANCES["bfloat16"]


def test_half_is_a_dtype_like_others():
    layer = layer_of(DeformConv2d).half()
    given = arguments_of(DeformConv2d, torch.float16)
    expected = expected_of(copy.deepcopy(layer).double(), *(tensor.double() for tensor in given))
    assert error(layer(*given).double(), expected) <= 2e-3
    layer.float()
    check(layer, *arguments_of(DeformConv2d))


def test_layer_without_mask_or_bias_and_with_uneven_padding():
    layer = randomized(DeformConv2d(6, 2, (3, 2), (2, 1), (1, 0, 3, 1), (2, 1), 2, bias=False))
    x, offset, _ = arguments_of(DeformConv2d)
    offset = nn.functional.pad(offset, (0, 1, 0, 1), value=0.3)
    assert check(layer, x, offset).shape == (2, 2, 3, 4)


@pytest.mark.parametrize("border", ["torchvision", "mmcv"])
@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_gradients_of_every_parameter_and_argument(cls, border):
    layer = layer_of(cls, border=border, dtype=torch.float64)
    given = [tensor.requires_grad_() for tensor in arguments_of(cls, torch.float64)]
    leaves = [*given, *layer.parameters()]
    output = layer(*given)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
    found = torch.autograd.grad(output, leaves, direction)
    expected = torch.autograd.grad(expected_of(layer, *given), leaves, direction)
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) <= TOLERANCES["gradient float64"]


def test_border_of_a_new_pack_is_mmcvs():
    """With offsets of 0 and padding, samples lie exactly on -1: there the two gradients differ."""
    found = {}
    for border in ("mmcv", "torchvision"):
        torch.manual_seed(0)
        layer = DeformConv2dPack(6, 4, 3, padding=1, **({} if border == "mmcv" else {"border": border}))
        assert layer.border == border
        layer(image()).square().sum().backward()
        found[border] = layer.conv_offset.bias.grad
        expected = torch.autograd.grad(expected_of(layer, image()).square().sum(), layer.conv_offset.bias)
        assert error(found[border], *expected) <= TOLERANCES["gradient float32"]
    assert error(found["mmcv"], found["torchvision"]) > 0.01


GEOMETRIES = (
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 1, "stride": 3},
    {"kernel_size": (2, 5), "padding": 3, "groups": 2},
)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_vanilla_and_both_packs_stand_in_one_anothers_place(geometry):
    shapes = {cls(6, 4, **geometry)(image()).shape for cls in (nn.Conv2d, *PACKS)}
    assert len(shapes) == 1
    positional = [cls(6, 4, 3, 2, 1, 1, 2)(image()).shape for cls in (nn.Conv2d, *PACKS, DeformConv2d)[:3]]
    assert positional == [(2, 4, 3, 2)] * 3


def test_small_images_need_no_padding(peers):
    """mmcv pads an image smaller than the kernel and crops the output: the same values as without."""
    theirs = randomized(peers.mmcv.DeformConv2d(6, 2, 3, padding=2, deform_groups=3))
    ours = DeformConv2d(6, 2, 3, padding=2, bias=False, border="mmcv")
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(0)
    for size in ((2, 5), (1, 2), (5, 1)):
        x = torch.randn(2, 6, *size, generator=generator)
        offset = torch.randn(2, 54, size[0] + 2, size[1] + 2, generator=generator)
        offset[:, ::7] = torch.randint(-3, 4, offset[:, ::7].shape, generator=generator)  # also exactly on borders
        leaves = [x.requires_grad_(), offset.requires_grad_()]
        outputs = [layer(*leaves) for layer in (ours, theirs)]
        assert error(*outputs) <= TOLERANCES["float32"]
        gradients = [torch.autograd.grad(output.square().sum(), leaves) for output in outputs]
        for pair in zip(*gradients, strict=True):
            assert error(*pair) <= TOLERANCES["gradient float32"]


# --- memory format ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("converted", [False, True], ids=["weights as they are", "weights channels_last"])
@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_channels_last_in_gives_channels_last_out(cls, converted):
    layer = layer_of(cls)
    if converted:
        layer.to(memory_format=torch.channels_last)
        assert not layer.weight.is_contiguous()
    for batch in (1, 2):
        given = arguments_of(cls, batch=batch, memory_format=torch.channels_last)
        assert not given[0].is_contiguous()
        found = check(layer, *given)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert not found.is_contiguous()
    # Contiguous images, with weights of either format.
    check(layer, *arguments_of(cls))


@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_gradients_in_channels_last(cls):
    layer = layer_of(cls, dtype=torch.float64).to(memory_format=torch.channels_last)
    given = [tensor.requires_grad_() for tensor in arguments_of(cls, torch.float64, memory_format=torch.channels_last)]
    leaves = [*given, *layer.parameters()]
    found = torch.autograd.grad(layer(*given).square().sum(), leaves)
    expected = torch.autograd.grad(expected_of(layer, *given).square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) <= TOLERANCES["gradient float64"]


# --- changed weights ----------------------------------------------------------------------------------------


def train_step(layer: nn.Module, optimizer: Any, *given: torch.Tensor) -> None:
    optimizer.zero_grad()
    layer(*given).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2dPack])
def test_steps_of_an_optimizer_are_seen(cls, foreach):
    layer, given = layer_of(cls), arguments_of(cls)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=foreach)
    for _ in range(3):
        before = check(layer, *given).detach()
        train_step(layer, optimizer, *given)
        assert error(check(layer, *given), before) > 1e-3


def changes() -> dict[str, Any]:
    def averaged(layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.data.lerp_(torch.ones_like(parameter), 0.1)

    def through_numpy(layer: nn.Module) -> None:
        layer.weight.detach().numpy()[...] += 1

    def loaded(assign: bool) -> Any:
        def change(layer: nn.Module) -> None:
            other = randomized(copy.deepcopy(layer), seed=9).state_dict()
            layer.load_state_dict(other, strict=True, assign=assign)

        return change

    def replaced(layer: nn.Module) -> None:
        layer.weight = nn.Parameter(layer.weight.detach() * 3)

    def new_data(layer: nn.Module) -> None:
        layer.weight.data = layer.weight.data * 3

    def there_and_back(layer: nn.Module) -> None:
        layer.bfloat16().float()

    def in_inference_mode(layer: nn.Module) -> None:
        with torch.inference_mode():
            layer.weight.mul_(2)

    return {
        "averaged through .data": averaged,
        "written through NumPy": through_numpy,
        "state_dict": loaded(False),
        "state_dict, assigned": loaded(True),
        "another Parameter": replaced,
        "other .data": new_data,
        "dtype there and back": there_and_back,
        "inference mode": in_inference_mode,
        "reset": lambda layer: layer.reset_parameters(),
    }


@pytest.mark.parametrize("change", changes().values(), ids=changes())
@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2dPack])
def test_changed_weight_is_seen(cls, change):
    layer, given = layer_of(cls), arguments_of(cls)
    with torch.no_grad():
        before = check(layer, *given)
    change(layer)
    with torch.no_grad():
        assert error(check(layer, *given), before) > 1e-4


@pytest.mark.parametrize("frozen", [False, True])
def test_weight_is_packed_once(packings, frozen):
    layer, given = layer_of(DeformConv2d), arguments_of(DeformConv2d)
    layer.requires_grad_(not frozen)
    for _ in range(3):
        layer(*given)
    assert len(packings) == 1
    with torch.no_grad():
        layer.weight.add_(1)
    for _ in range(3):
        check(layer, *given)
    assert len(packings) == 2


def test_layers_of_one_kind_do_not_take_each_others_weights(packings):
    layers = [randomized(DeformConv2d(6, 2, **GEOMETRY, groups=2), seed) for seed in range(4)]
    given = arguments_of(DeformConv2d)
    for _ in range(2):
        for layer in layers:
            check(layer, *given)
    assert len(packings) == 4


# --- copies -------------------------------------------------------------------------------------------------


def saved_whole(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_whole],
    ids=["deepcopy", "pickle", "saved"],
)
@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_copies(cls, duplicate):
    layer, given = layer_of(cls, border="torchvision"), arguments_of(cls)
    before = check(layer, *given)
    again = duplicate(layer)
    assert type(again) is cls
    assert again.border == "torchvision"
    assert torch.equal(again(*given), before)
    with torch.no_grad():
        again.weight.mul_(2)
    check(again, *given)
    assert torch.equal(layer(*given), before)


@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2dPack])
def test_replicas_as_of_data_parallel(cls):
    """What torch.nn.parallel.replicate does, which needs a GPU: shallow copies with parameters put in."""
    layer, given = layer_of(cls), arguments_of(cls)
    modules = dict(layer.named_modules())
    for scale in (2, 3):
        replicas = {name: module._replicate_for_data_parallel() for name, module in modules.items()}
        for name, module in modules.items():
            for child in module._modules:
                setattr(replicas[name], child, replicas[f"{name}.{child}".lstrip(".")])
            for key, parameter in module._parameters.items():
                setattr(replicas[name], key, parameter * scale)
        replica = replicas[""]
        assert isinstance(replica, cls)
        found = replica(*given)
        assert error(found, expected_of(replica, *given)) <= TOLERANCES["float32"]
        (gradient,) = torch.autograd.grad(found.square().sum(), layer.weight, retain_graph=True)
        (expected,) = torch.autograd.grad(expected_of(replica, *given).square().sum(), layer.weight)
        assert error(gradient, expected) <= TOLERANCES["gradient float32"]


@pytest.mark.parametrize("register", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2dPack])
def test_parametrized_weights(cls, register):
    layer, given = register(layer_of(cls)).eval(), arguments_of(cls)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(2):
        check(layer, *given)
        with parametrize.cached():
            check(layer, *given)
        train_step(layer, optimizer, *given)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is cls
    check(layer, *given)


def test_weight_norm_of_the_old_kind():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(layer_of(DeformConv2d))
    given = arguments_of(DeformConv2d)
    for _ in range(2):
        check(layer, *given)
        with torch.no_grad():
            layer.weight_g.mul_(2)


@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_made_without_values(cls):
    options = {**GEOMETRY, "groups": 2}
    skipped = skip_init(cls, 6, 2, **options)
    assert skipped.weight.device.type == "cpu"
    for made in (cls(6, 2, **options, device="meta"), skipped):
        assert [*made.state_dict()] == [*cls(6, 2, **options).state_dict()]
    with torch.device("meta"):
        layer = cls(6, 2, **GEOMETRY, groups=2)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    for module in (layer, skipped):
        randomized(module).reset_parameters()
        given = arguments_of(cls)
        if cls is DeformConv2d:
            check(module, *given)
        else:
            found = module(*given)
            assert error(found, expected_of(module, *given)) <= TOLERANCES["float32"]


# --- checkpoints --------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 1)
        self.conv2 = layer_of(cls)

    def forward(self, x):
        return self.conv2(self.conv1(x))


def load_as_mmengine(model: nn.Module, state_dict: dict[str, Any]) -> list[str]:
    """Load with the whole checkpoint shown to every module, as mmengine's loader does; return what is wrong."""
    wrong: list[str] = []
    state_dict = OrderedDict(state_dict)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        module._load_from_state_dict(state_dict, prefix, {}, True, wrong, [], wrong)
    return wrong


@pytest.mark.parametrize("old", ["conv2_offset", "conv2.conv_offset_mask"])
@pytest.mark.parametrize("cls", PACKS)
def test_old_checkpoints(cls, old):
    source = randomized(Block(cls), seed=4)
    expected = source(image())
    present = source.state_dict()
    names = {name: name.replace("conv2.conv_offset", old) for name in present}
    outdated = OrderedDict((names[name], value) for name, value in present.items())
    assert set(outdated) != set(present)

    loaders = {
        "upgraded": lambda model: model.load_state_dict(tvmdcn.upgrade_state_dict(model, outdated)),
        "mmengine": lambda model: load_as_mmengine(model, outdated),
    }
    if "." in old:
        loaders["torch"] = lambda model: model.load_state_dict(outdated)
    for load in loaders.values():
        model = Block(cls)
        assert not any(load(model))
        assert torch.equal(model(image()), expected)
    assert list(outdated) == list(names.values())  # not changed


def test_upgrading_keeps_what_is_right():
    model = nn.Sequential(OrderedDict(block=Block(DeformConv2dPack), block_offset=nn.Conv2d(6, 2, 1)))
    state = model.state_dict()
    upgraded = tvmdcn.upgrade_state_dict(model, state)
    assert list(upgraded) == list(state)
    assert upgraded._metadata == state._metadata
    assert state._metadata["block.conv2"] == {"version": 2}
    # A pack that is the model itself has no name that another key could be beside of.
    pack = model.block.conv2
    assert list(tvmdcn.upgrade_state_dict(pack, pack.state_dict())) == list(pack.state_dict())


def test_key_of_a_present_checkpoint_is_not_taken_for_an_old_one():
    """From version 2 on, `conv2_offset` is another layer, and missing parameters are missing."""
    model = Block(DeformConv2dPack)
    state = model.state_dict()
    state["conv2.conv_offset_mask.bias"] = state.pop("conv2.conv_offset.bias")
    found = model.load_state_dict(state, strict=False)
    assert found.missing_keys == ["conv2.conv_offset.bias"]
    assert found.unexpected_keys == ["conv2.conv_offset_mask.bias"]


# --- bad calls ----------------------------------------------------------------------------------------------


def as_layer(arguments: dict[str, Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a layer, and what to call it with, for the arguments of the operator."""
    layer = DeformConv2d(6, 2, **GEOMETRY, groups=2)
    layer.__dict__["_parameters"] = {"weight": arguments["weight"], "bias": arguments["bias"]}
    layer.stride, layer.padding, layer.dilation = (arguments[name] for name in ("stride", "padding", "dilation"))
    return layer, (arguments["input"], arguments["offset"], arguments["mask"])


@pytest.mark.parametrize("bad", [bad for bad in BAD_CALLS if bad.as_tensors], ids=lambda bad: bad.name)
def test_bad_calls_are_refused_in_the_operators_words(bad):
    layer, given = as_layer(tensor_arguments(bad.arguments, torch_tensor))
    with torch.no_grad(), pytest.raises(bad.exception, match=bad.match):
        layer(*given)


def test_good_call_is_one():
    layer, given = as_layer(tensor_arguments(GOOD_CALL, torch_tensor))
    assert layer(*given).shape == (2, 2, 2, 3)


@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_other_groups_than_the_layers_are_not_inferred(cls):
    """The operator takes 3 channels as one group for this weight, and computes."""
    layer, (_, *others) = layer_of(cls), arguments_of(cls)
    given = torch.zeros(2, 3, 5, 4), *others
    if cls is DeformConv2d:
        offset, mask = others
        arguments = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "mask": mask}
        assert tvmdcn.deform_conv2d(given[0], offset, layer.weight, layer.bias, **arguments).shape == (2, 2, 2, 3)
    with pytest.raises(SpecError, match=r"input has 3 channels \(shape \(2, 3, 5, 4\), .* takes in_channels=6"):
        layer(*given)


@pytest.mark.parametrize(
    ("name", "given", "exception"),
    [
        ("input_none", None, SpecTypeError),
        ("input_unbatched", torch.zeros(6, 5, 4), SpecError),
        ("input_five_axes", torch.zeros(1, 2, 6, 5, 4), SpecError),
        ("height_zero", torch.zeros(2, 6, 0, 4), SpecError),
        ("kernel_larger_than_input", torch.zeros(2, 6, 2, 4), SpecError),
        ("channels_not_of_weight", torch.zeros(2, 7, 5, 4), SpecError),
        ("channels_last_shape", torch.zeros(2, 5, 4, 6), SpecError),
        ("all_integers", torch.zeros(2, 6, 5, 4, dtype=torch.int32), SpecTypeError),
        ("complex_input", torch.zeros(2, 6, 5, 4, dtype=torch.complex64), SpecTypeError),
    ],
)
@pytest.mark.parametrize("cls", PACKS)
def test_bad_image_is_refused_in_the_operators_words(cls, name, given, exception):
    """Before the convolution that predicts the offsets sees it, which has other words."""
    (match,) = [bad.match for bad in BAD_CALLS if bad.name == name]
    with pytest.raises(exception, match=match):
        layer_of(cls)(given)


@pytest.mark.parametrize("cls", PACKS)
def test_other_bad_images(cls):
    layer = layer_of(cls)
    with pytest.raises(SpecTypeError, match=re.escape("input is float64 and weight is float32")):
        layer(image(torch.float64))
    with pytest.raises(SpecTypeError, match=r"weight must be a tensor, a numpy.ndarray like input"):
        layer(image().numpy())


# --- inside torch's transformations -------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_autocast(cls):
    """In bfloat16 all is computed, whatever the dtypes of the arguments."""
    layer, given = layer_of(cls), arguments_of(cls)
    expected = expected_of(layer, *given)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(*given)
        assert found.dtype == torch.bfloat16
        assert error(found.float(), expected) <= TOLERANCES["bfloat16"]
        assert layer(given[0].bfloat16(), *given[1:]).dtype == torch.bfloat16


@pytest.mark.parametrize("cls", [DeformConv2d, *PACKS])
def test_compiled_whole_and_once_for_all_sizes(cls):
    layer = layer_of(cls)
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    # At first all sizes differ, also from the channels: equal ones would be taken for one and the same.
    for batch, height, width in ((3, 9, 8), (2, 5, 4), (4, 20, 11)):
        x = torch.randn(batch, 6, height, width, generator=generator)
        size = (height - 3) // 2 + 1, width - 1
        others = [torch.randn(batch, n, *size, generator=generator) for n in (36, 18)] if cls is DeformConv2d else []
        assert error(compiled(x, *others), expected_of(layer, x, *others)) <= TOLERANCES["float32"]
    assert counter.frame_count == 1


def test_channels_last_weight_is_packed_once(packings):
    """As `.to(memory_format=torch.channels_last)` makes them."""
    layer, given = layer_of(DeformConv2d).to(memory_format=torch.channels_last), arguments_of(DeformConv2d)
    for _ in range(3):
        check(layer, *given)
    assert len(packings) == 1
    layer.weight.data.mul_(2)
    for _ in range(3):
        check(layer, *given)
    assert len(packings) == 2
