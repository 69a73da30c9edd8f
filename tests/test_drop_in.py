# SPDX-License-Identifier: Apache-2.0
"""Other packages' layers in existing models, and calls of torchvision's function, made to compute with ours.

The peers are stand-ins (see peer_layers.py); where torchvision is installed, the tests at the end use it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import io
import pickle
import re
import sys
import threading
import types
from typing import Any

import pytest

pytest.importorskip("torch")

import peer_layers
import torch
from peer_layers import randomized
from torch import nn
from torch.nn.utils import parametrizations

import tvmdcn
from tvmdcn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, replace_modules, route_torchvision
from tvmdcn.errors import MissingExtra, SpecError, SpecTypeError
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tuning.models import problems_of_model

# Largest difference over the largest value.
TOLERANCES = {"output": 5e-6, "gradient": 5e-5, "output float64": 1e-12, "gradient float64": 1e-11}
GEOMETRY: dict[str, Any] = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)}
# detectron2's v2 layer takes no pairs.
SQUARE: dict[str, Any] = {"kernel_size": (3, 2), "stride": 2, "padding": 1, "dilation": 2}


@pytest.fixture
def peers(monkeypatch):
    return peer_layers.install(monkeypatch)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    difference = (found.detach() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(1e-30))


def torchvisions(peers, **options) -> nn.Module:
    return randomized(peers.torchvision.DeformConv2d(6, 2, **GEOMETRY, groups=2, **options))


# For each layer of a peer: how it is made, what it is given, what it becomes (None: its own class, recomputed).
LAYERS: dict[str, tuple[Any, tuple[tuple[int, ...], ...], type | None]] = {
    "torchvision": (torchvisions, ((2, 6, 5, 4), (2, 36, 2, 3), (2, 18, 2, 3)), DeformConv2d),
    "torchvision v1 without bias": (
        lambda peers: torchvisions(peers, bias=False),
        ((2, 6, 5, 4), (2, 36, 2, 3)),
        DeformConv2d,
    ),
    "mmcv v1": (
        lambda peers: peers.mmcv.DeformConv2d(6, 2, **GEOMETRY, groups=2, deform_groups=3),
        ((2, 6, 5, 4), (2, 36, 2, 3)),
        None,
    ),
    "mmcv v2": (
        lambda peers: peers.mmcv.ModulatedDeformConv2d(6, 2, **GEOMETRY, groups=2, deform_groups=3),
        ((2, 6, 5, 4), (2, 36, 2, 3), (2, 18, 2, 3)),
        None,
    ),
    "mmcv v1 pack": (
        lambda peers: peers.mmcv.DeformConv2dPack(6, 2, **GEOMETRY, groups=2, deform_groups=3),
        ((2, 6, 5, 4),),
        DeformConv2dPack,
    ),
    "mmcv v2 pack": (
        lambda peers: peers.mmcv.ModulatedDeformConv2dPack(6, 2, **GEOMETRY, groups=2, deform_groups=3),
        ((2, 6, 5, 4),),
        ModulatedDeformConv2dPack,
    ),
    "detectron2 v1": (
        lambda peers: peers.detectron2.DeformConv(
            6, 2, **GEOMETRY, groups=2, deformable_groups=3, norm=nn.GroupNorm(1, 2), activation=torch.tanh
        ),
        ((2, 6, 5, 4), (2, 36, 2, 3)),
        None,
    ),
    "detectron2 v2": (
        lambda peers: peers.detectron2.ModulatedDeformConv(6, 2, **SQUARE, groups=2, deformable_groups=3),
        ((2, 6, 5, 4), (2, 36, 2, 2), (2, 18, 2, 2)),
        None,
    ),
}


class Deep(nn.Module):
    """Layers inside of others, one of them in two places."""

    def __init__(self, layer):
        super().__init__()
        self.stem = nn.Conv2d(6, 6, 1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.ReLU(), layer), nn.Identity()])
        self.again = layer

    def forward(self, x, *given):
        return self.again(self.stem(x), *given)


@pytest.mark.parametrize("name", LAYERS)
def test_replaced_layer_computes_the_same(peers, name):
    """Output and gradients, those at the border as well; its object, parameters, hooks and mode stay."""
    make, shapes, becomes = LAYERS[name]
    layer = randomized(make(peers)).eval()
    given = [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    with torch.no_grad():
        for tensor in given[1:2]:
            tensor[:, ::5] = tensor[:, ::5].round()  # samples exactly on the border
    model = Deep(layer)
    seen: list[tuple[int, ...]] = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    parameters = dict(model.named_parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    leaves = [*given, *parameters.values()]
    expected = model(*given)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)

    report = replace_modules(model)

    assert [row.names for row in report.replaced] == [("blocks.0.1", "again")]
    assert report.left == ()
    assert model.again is model.blocks[0][1] is layer
    assert type(layer) is becomes if becomes else layer.forward.__module__ == "tvmdcn.torch.drop_in"
    assert isinstance(layer, becomes or type(make(peers)))
    assert not layer.training
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[key] for key, value in model.named_parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    found = model(*given)
    assert error(found, expected) <= TOLERANCES["output"]
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), leaves), gradients, strict=True):
        assert error(ours, theirs) <= TOLERANCES["gradient"]
    assert seen == [tuple(expected.shape)] * 2


@pytest.mark.parametrize("name", LAYERS)
def test_replaced_layer_is_not_the_peers_any_more(peers, name, monkeypatch):
    make, shapes, _ = LAYERS[name]
    layer = randomized(make(peers))
    replace_modules(layer)
    for module in [sys.modules[peer] for peer in peer_layers.STAND_INS]:
        for function in ("deform_conv2d", "modulated_deform_conv2d", "deform_conv", "modulated_deform_conv"):
            monkeypatch.setattr(module, function, None, raising=False)
    layer(*(normal(*shape) for shape in shapes))


def whole(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, whole, *(functools.partial(pickle.dumps, protocol=each) for each in (2, 5))]
)
@pytest.mark.parametrize("name", LAYERS)
def test_replaced_layer_can_be_copied(peers, name, duplicate):
    make, shapes, becomes = LAYERS[name]
    layer = randomized(make(peers))
    replace_modules(layer)
    again = duplicate(layer)
    again = pickle.loads(again) if isinstance(again, bytes) else again
    assert type(again) is type(layer)
    assert becomes is None or type(again) is becomes
    given = [normal(*shape) for shape in shapes]
    before = layer(*given)
    assert torch.equal(again(*given), before)
    with torch.no_grad():
        again.weight.mul_(2)
    assert not torch.equal(again(*given), before)
    assert torch.equal(layer(*given), before)


def test_optimizer_of_before_trains_the_replaced_model(peers):
    model = Deep(randomized(peers.mmcv.ModulatedDeformConv2dPack(6, 4, 3, padding=1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    replace_modules(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    outputs = []
    for _ in range(2):
        optimizer.zero_grad()
        output = model(normal(2, 6, 5, 4))
        outputs.append(output.detach())
        output.square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert error(outputs[1], outputs[0]) > 1e-3


def test_dtype_and_format_stay(peers):
    layer = torchvisions(peers).to(torch.float64).to(memory_format=torch.channels_last)
    strides = layer.weight.stride()
    replace_modules(layer)
    assert layer.weight.dtype == torch.float64
    assert layer.weight.stride() == strides
    meta = peers.mmcv.ModulatedDeformConv2dPack(6, 4, 3).to("meta")
    assert len(replace_modules(meta).replaced) == 1
    assert meta.weight.is_meta


def test_mmcvs_conversions_stay(peers):
    """mmcv brings everything to the dtype of the offset."""
    layer = randomized(peers.mmcv.ModulatedDeformConv2d(6, 2, 3, padding=1))
    given = normal(1, 6, 5, 4).bfloat16(), normal(1, 18, 5, 4).double(), normal(1, 9, 5, 4)
    expected = layer(*given)
    replace_modules(layer)
    found = layer(*given)
    assert found.dtype == torch.float64
    assert error(found, expected) <= TOLERANCES["output float64"]


# --- what is left -------------------------------------------------------------------------------------------


def test_subclass_is_replaced_unless_it_computes_otherwise(peers):
    class Named(peers.torchvision.DeformConv2d):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.note = "mine"

        def doubled(self):
            return self.weight * 2

    class Changed(peers.mmcv.DeformConv2dPack):
        def forward(self, x):
            return super().forward(x) + 1

    layers = nn.ModuleDict({"named": Named(6, 2, 3, padding=1), "changed": Changed(6, 2, 3)})
    expected = layers["named"](normal(1, 6, 5, 4), normal(1, 18, 5, 4))
    report = replace_modules(layers)
    assert [row.names for row in report.replaced] == [("named",)]
    (left,) = report.left
    assert left.names == ("changed",)
    assert left.was == left.now
    assert left.reason == ("its class has a forward of its own (it derives from mmcv.ops.deform_conv.DeformConv2dPack)")
    assert type(layers["changed"]) is Changed
    assert isinstance(layers["named"], Named)
    assert layers["named"].note == "mine"
    assert torch.equal(layers["named"].doubled(), layers["named"].weight * 2)
    assert error(layers["named"](normal(1, 6, 5, 4), normal(1, 18, 5, 4)), expected) <= TOLERANCES["output"]


def scripted(peers) -> nn.Module:
    layer = nn.Conv2d(6, 2, 3)
    layer.__class__ = type("DeformConv2d", (nn.Conv2d,), {})
    return torch.jit.script(layer)


def with_own_forward(peers) -> nn.Module:
    layer = torchvisions(peers)
    layer.forward = lambda *given: given
    return layer


def lookalike(peers) -> nn.Module:
    return type("DCNv2", (nn.Conv2d,), {"__module__": "detector.ops.dcn"})(6, 2, 3)


def of_another_dtype(peers) -> nn.Module:
    layer = torchvisions(peers)
    layer.weight = nn.Parameter(layer.weight.to(torch.complex64))
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (scripted, "it is scripted, and calls torch.ops by itself; replace first"),
        (with_own_forward, "its forward was replaced on the object"),
        (lambda peers: peers.mmcv.deform_conv.DeformConv2dPack_MLU(6, 2, 3), "its class has a forward of its own"),
        (
            lambda peers: parametrizations.weight_norm(torchvisions(peers)),
            "it is parametrized; replace first, then parametrize",
        ),
        (of_another_dtype, "its dtype is complex64, and tvmdcn's are float16, bfloat16, float32, float64"),
        (lookalike, "a class of detector.ops.dcn is not known; .* also={DCNv2: tvmdcn"),
        (lambda peers: DeformConv2d(6, 2, 3), "it is tvmdcn's already"),
    ],
    ids=["scripted", "forward", "mlu", "parametrized", "dtype", "lookalike", "ours"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_left_with_a_reason(peers, make, reason):
    layer = make(peers)
    before = type(layer)
    report = replace_modules(nn.Sequential(nn.ReLU(), layer))
    assert report.replaced == ()
    (left,) = report.left
    assert left.names == ("1",)
    assert type(layer) is before
    assert re.search(reason, left.reason)
    assert f"left: {left.reason}" in str(report)


def test_layer_on_another_device_is_left(peers):
    """A weight on a GPU of another make, as far as can be seen without one."""
    layer = torchvisions(peers)
    del layer.weight
    layer.weight = types.SimpleNamespace(device=torch.device("xpu", 1), dtype=torch.float32)
    (left,) = replace_modules(layer).left
    assert left.reason == "it is on xpu:1, and tvmdcn computes on CPUs and NVIDIA GPUs; move the model first"


def test_other_layers_are_no_part_of_the_report(peers):
    class DCN(nn.Module):
        """Deep and cross network: no convolution."""

    report = replace_modules(nn.Sequential(nn.Conv2d(6, 2, 3), nn.Linear(3, 3), DCN()))
    assert (report.replaced, report.left) == ((), ())
    assert str(report) == "torch.nn.modules.container.Sequential: 0 deformable layers replaced, 0 left"


def test_second_time_changes_nothing(peers):
    model = nn.ModuleList([make(peers) for make, _, _ in LAYERS.values()])
    first = replace_modules(model)
    types_before = [type(layer) for layer in model]
    second = replace_modules(model)
    assert len(first.replaced) == len(LAYERS)
    assert second.replaced == ()
    assert {row.reason for row in second.left} == {"it is tvmdcn's already"}
    assert [type(layer) for layer in model] == types_before


# --- the report, the model itself, classes of one's own -----------------------------------------------------


def test_model_itself_can_be_the_layer(peers):
    layer = torchvisions(peers)
    report = replace_modules(layer)
    assert type(layer) is DeformConv2d
    assert [row.names for row in report.replaced] == [("",)]
    assert str(report) == (
        "torchvision.ops.deform_conv.DeformConv2d: 1 deformable layer replaced, 0 left\n"
        "  (the model itself)  torchvision.ops.deform_conv.DeformConv2d -> tvmdcn.DeformConv2d"
    )


def test_report_reads_as_a_table(peers):
    model = nn.ModuleDict(
        {
            "neck": nn.ModuleDict({"dcn": peers.mmcv.ModulatedDeformConv2dPack(6, 4, 3)}),
            "align": peers.mmcv.DeformConv2d(6, 4, 3),
            "odd": with_own_forward(peers),
        }
    )
    model["twin"] = model["align"]
    report = replace_modules(model)
    assert str(report).splitlines() == [
        "torch.nn.modules.container.ModuleDict: 2 deformable layers replaced, 1 left",
        "  neck.dcn     mmcv.ops.modulated_deform_conv.ModulatedDeformConv2dPack -> tvmdcn.ModulatedDeformConv2dPack",
        "  align, twin  mmcv.ops.deform_conv.DeformConv2d -> mmcv.ops.deform_conv.DeformConv2d with tvmdcn's forward",
        "  odd          torchvision.ops.deform_conv.DeformConv2d left: its forward was replaced on the object",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.left = ()


def test_class_of_ones_own(peers):
    """A copy of mmcv's pack in another package, with the old name of deform_groups."""

    class DCNv2(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = None
            peer = peers.mmcv.ModulatedDeformConv2dPack(6, 4, 3, padding=1, deform_groups=3)
            self.__dict__.update({name: value for name, value in vars(peer).items() if name != "deform_groups"})
            self.deformable_groups = 3

        forward = peers.mmcv.ModulatedDeformConv2dPack.forward

    layer = randomized(DCNv2())
    layer.deform_groups = 3
    expected = layer(normal(2, 6, 5, 4))
    del layer.deform_groups
    (row,) = replace_modules(layer, also={DCNv2: ModulatedDeformConv2dPack}).replaced
    assert row.now == "tvmdcn.ModulatedDeformConv2dPack"
    assert layer.deform_groups == 3
    assert error(layer(normal(2, 6, 5, 4)), expected) <= TOLERANCES["output"]

    class Lacking(nn.Conv2d):
        pass

    (left,) = replace_modules(Lacking(6, 4, 3), also={Lacking: ModulatedDeformConv2dPack}).left
    assert left.reason == "it has no conv_offset"


@pytest.mark.parametrize(
    ("model", "also", "exception", "match"),
    [
        (None, {}, SpecTypeError, "model must be a torch.nn.Module, got None of type NoneType"),
        (nn.Identity, {}, SpecTypeError, "model must be a torch.nn.Module, got <class .*Identity.* of type type"),
        (nn.Identity(), [nn.Conv2d], SpecTypeError, "also must map classes to classes, got .* of type list"),
        (nn.Identity(), {"DCN": DeformConv2d}, SpecTypeError, "also must map subclasses of torch.nn.Module, got 'DCN'"),
        (
            nn.Identity(),
            {nn.Conv2d: nn.Conv2d},
            SpecError,
            "also must map torch.nn.modules.conv.Conv2d to one of tvmdcn.DeformConv2d, tvmdcn.DeformConv2dPack, .*got",
        ),
    ],
)
def test_bad_arguments_are_refused_in_words(model, also, exception, match):
    with pytest.raises(exception, match=match):
        replace_modules(model, also=also)


@pytest.mark.parametrize("name", LAYERS)
def test_bad_calls_of_replaced_layers_are_refused_in_words(peers, name):
    make, shapes, _ = LAYERS[name]
    layer = make(peers)
    replace_modules(layer)
    x, *others = (normal(*shape) for shape in shapes)
    with pytest.raises(SpecError, match="input has 7 channels"):
        layer(normal(2, 7, 5, 4), *others)
    if others:
        with pytest.raises(SpecError, match=r"offset must be of the output's size \(\d, \d\), got \(7, 7\)"):
            layer(x, normal(2, 36, 7, 7), *others[1:])
        with pytest.raises(SpecTypeError, match=r"offset must be a tensor.*NoneType"):
            layer(x, None, *others[1:])


def test_tuning_finds_the_layers_of_every_package(peers):
    """Before they are replaced, and after."""
    expected = {
        "torchvision": DeformConv2dSpec(6, 2, **GEOMETRY, groups=2, offset_groups=3),
        "mmcv v1": DeformConv2dSpec(6, 2, **GEOMETRY, groups=2, offset_groups=3, mask=False),
        "mmcv v2": DeformConv2dSpec(6, 2, **GEOMETRY, groups=2, offset_groups=3),
        "mmcv v1 pack": DeformConv2dSpec(6, 2, **GEOMETRY, groups=2, offset_groups=3, mask=False),
        "mmcv v2 pack": DeformConv2dSpec(6, 2, **GEOMETRY, groups=2, offset_groups=3),
        "detectron2 v1": DeformConv2dSpec(6, 2, **GEOMETRY, groups=2, offset_groups=3, mask=False),
        "detectron2 v2": DeformConv2dSpec(6, 2, **SQUARE, groups=2, offset_groups=3),
    }
    functions = peers.torchvision.deform_conv2d, peers.mmcv.deform_conv2d
    for name, spec in expected.items():
        make, shapes, _ = LAYERS[name]
        layer = make(peers)
        for _ in range(2):
            (found,) = problems_of_model(layer, shapes)
            assert (found.spec, found.extents) == (spec, Extents(2, 5, 4))
            replace_modules(layer)
    assert (peers.torchvision.deform_conv2d, peers.mmcv.deform_conv2d) == functions


# --- routing ------------------------------------------------------------------------------------------------


@pytest.fixture
def caller(peers, monkeypatch):
    """A module that one cannot edit, which has taken torchvision's function under a name of its own."""
    module = types.ModuleType("code_one_cannot_edit")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(
        "from torchvision.ops import deform_conv2d as dcn\ndef call(*args, **opts): return dcn(*args, **opts)",
        vars(module),
    )
    return module


def call_of_torchvisions(function) -> torch.Tensor:
    x, offset, weight, mask = (
        normal(*shape, seed=seed)
        for seed, shape in enumerate(((2, 6, 5, 4), (2, 36, 2, 3), (2, 3, 3, 2), (2, 18, 2, 3)))
    )
    return function(x, offset, weight, None, (2, 1), padding=(1, 0), dilation=(2, 1), mask=mask)


def test_calls_are_routed_inside_and_only_there(peers, caller):
    module = sys.modules["torchvision.ops.deform_conv"]
    original = module.deform_conv2d
    layer = torchvisions(peers)
    given = normal(2, 6, 5, 4), normal(2, 36, 2, 3)
    expected, by_layer = call_of_torchvisions(caller.call), layer(*given)
    counted = module.calls
    with route_torchvision():
        for function in (caller.call, peers.torchvision.deform_conv2d, module.deform_conv2d):
            assert error(call_of_torchvisions(function), expected) <= TOLERANCES["output"]
        assert error(layer(*given), by_layer) <= TOLERANCES["output"]
        assert module.deform_conv2d.__name__ == "deform_conv2d"
        assert module.calls == counted
    assert module.deform_conv2d is peers.torchvision.deform_conv2d is caller.dcn is original
    call_of_torchvisions(caller.call)
    assert module.calls == counted + 1


def test_gradients_of_routed_calls(peers):
    weight = normal(2, 3, 3, 2).requires_grad_()
    gradients = []
    for context in (route_torchvision(), torch.enable_grad()):
        with context:
            output = peers.torchvision.deform_conv2d(normal(2, 6, 5, 4), normal(2, 36, 3, 3), weight, padding=(0, 0))
            gradients += torch.autograd.grad(output.square().sum(), weight)
    assert error(*gradients) <= TOLERANCES["gradient"]


def test_nested_and_raising_blocks(peers, caller):
    original = caller.dcn
    with route_torchvision():
        routed = caller.dcn
        with pytest.raises(SpecError, match="stride must be at least 1"), route_torchvision():
            caller.call(normal(1, 2, 3, 3), normal(1, 2, 3, 3), normal(2, 2, 1, 1), stride=0)
        assert caller.dcn is routed is not original
        with route_torchvision():
            assert caller.dcn is routed
        assert caller.dcn is routed
    assert caller.dcn is original


def test_routing_as_a_decorator(caller):
    original = caller.dcn

    @route_torchvision()
    def inside():
        return caller.dcn

    assert inside() is not original
    assert inside() is not original
    assert caller.dcn is original


def test_name_taken_inside_is_torchvisions_afterwards(caller, monkeypatch):
    original = caller.dcn
    late = types.ModuleType("imported_inside")
    monkeypatch.setitem(sys.modules, late.__name__, late)
    with route_torchvision():
        exec("from torchvision.ops import deform_conv2d", vars(late))
        assert late.deform_conv2d is caller.dcn
    assert late.deform_conv2d is original


def test_all_threads_are_routed_until_the_last_has_left(caller):
    original = caller.dcn
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with route_torchvision():
            entered.set()
            assert leave.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(30)
    try:
        assert caller.dcn is not original  # this thread has entered nothing
        with route_torchvision():
            pass
        assert caller.dcn is not original
    finally:
        leave.set()
        thread.join()
    assert caller.dcn is original


def test_many_threads_enter_and_leave(caller):
    original = caller.dcn
    wrong: list[Any] = []

    def enter_and_leave() -> None:
        for _ in range(20):
            with route_torchvision():
                if caller.dcn is original:
                    wrong.append(threading.current_thread())

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert caller.dcn is original


@pytest.mark.parametrize("failure", [None, "operator torchvision::nms does not exist"])
def test_routing_without_torchvision_is_refused_in_words(monkeypatch, failure):
    """Not installed, or a build for another torch, which raises RuntimeError when imported."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name in ("torchvision.ops", "torchvision.ops.deform_conv"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if failure is not None:

        def find_spec(self, name, path=None, target=None):
            if name.startswith("torchvision"):
                raise RuntimeError(failure)

        monkeypatch.delitem(sys.modules, "torchvision")
        finder = type("Broken", (), {"find_spec": find_spec})()
        monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    message = "route_torchvision needs torchvision, which cannot be imported"
    with pytest.raises(MissingExtra, match=message) as caught, route_torchvision():
        pass
    assert caught.value.name == "torchvision"
    assert failure is None or failure in str(caught.value)
    assert isinstance(caught.value, ImportError)


# --- the real torchvision -----------------------------------------------------------------------------------


@pytest.fixture
def torchvision():
    """The real one: never a stand-in, for those are gone when their test is."""
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as failure:  # RuntimeError: a build for another torch
        pytest.skip(f"no torchvision that works with this torch: {failure}")


REAL_PROBLEMS = (
    DeformConv2dSpec(6, 2, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3),
    DeformConv2dSpec(6, 4, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3, mask=False),
    DeformConv2dSpec(8, 12, 3, padding=1),
    DeformConv2dSpec(8, 8, (1, 5), padding=(0, 2), groups=8, offset_groups=4),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", REAL_PROBLEMS, ids=lambda spec: spec.slug)
def test_real_torchvisions_numbers(torchvision, spec, dtype):
    extents = Extents(3, 11, 9)
    shapes = [spec.input_shape(extents), spec.offset_shape(extents), spec.weight_shape, (spec.out_channels,)]
    shapes += [spec.mask_shape(extents)] if spec.mask else []
    leaves = [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    leaves[1] *= 3
    leaves[1][:, ::3] = leaves[1][:, ::3].round()  # samples exactly on -1 and on the last row
    for leaf in leaves:
        leaf.requires_grad_()
    x, offset, weight, bias, *mask = leaves
    outputs = [
        function(x, offset, weight, bias, spec.stride, spec.padding[:2], spec.dilation, *mask)
        for function in (tvmdcn.deform_conv2d, torchvision.ops.deform_conv2d)
    ]
    suffix = " float64" if dtype == torch.float64 else ""
    assert error(*outputs) <= TOLERANCES[f"output{suffix}"]
    gradients = [torch.autograd.grad(output.sin().sum(), leaves) for output in outputs]
    for ours, theirs in zip(*gradients, strict=True):
        assert error(ours, theirs) <= TOLERANCES[f"gradient{suffix}"]


@pytest.mark.parametrize("bias", [False, True])
def test_real_torchvisions_layer(torchvision, bias):
    made = []
    for cls in (DeformConv2d, torchvision.ops.DeformConv2d):
        torch.manual_seed(3)
        made.append(cls(6, 2, **GEOMETRY, groups=2, bias=bias))
    ours, theirs = made
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), theirs.parameters(), strict=True))
    given = normal(2, 6, 5, 4), normal(2, 36, 2, 3), normal(2, 18, 2, 3)
    expected = theirs(*given)
    assert error(ours(*given), expected) <= TOLERANCES["output"]
    report = replace_modules(nn.Sequential(theirs))
    assert [row.was for row in report.replaced] == ["torchvision.ops.deform_conv.DeformConv2d"]
    assert type(theirs) is DeformConv2d
    assert torch.equal(theirs(*given), ours(*given))


def test_real_torchvisions_calls_are_routed(torchvision):
    original = torchvision.ops.deform_conv2d
    layer = torchvision.ops.DeformConv2d(6, 2, 3, padding=1)
    given = normal(2, 6, 5, 4), normal(2, 18, 5, 4)
    expected = layer(*given)
    with route_torchvision():
        # Ours refuses what torchvision takes for other groups.
        with pytest.raises(SpecError, match="input has 7 channels"):
            torchvision.ops.deform_conv2d(normal(2, 7, 5, 4), given[1], layer.weight, padding=(1, 1))
        assert error(layer(*given), expected) <= TOLERANCES["output"]
        assert torchvision.ops.deform_conv.deform_conv2d is not original
    assert torchvision.ops.deform_conv.deform_conv2d is torchvision.ops.deform_conv2d is original
    (found,) = problems_of_model(layer, [tuple(tensor.shape) for tensor in given])
    assert found.spec == DeformConv2dSpec(6, 2, padding=1, mask=False)


def test_real_torchvisions_scripted_layer_is_left(torchvision):
    layer = torch.jit.script(torchvision.ops.DeformConv2d(6, 2, 3, padding=1))
    (left,) = replace_modules(nn.Sequential(layer)).left
    assert left.reason.startswith("it is scripted")
