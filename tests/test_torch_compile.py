# SPDX-License-Identifier: Apache-2.0
"""torch.compile and torch.export: one graph, without breaks, for all batch and image sizes.

With the backend "aot_eager" everything is compiled but the code itself; "inductor" needs a C++ compiler.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import wait

import pytest
from handmade import ROOT, variant

import tvmdcn
from tvmdcn.errors import SpecError
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents

torch = pytest.importorskip("torch")
from compiled import build_only  # noqa: E402
from torch_layers import NAMES, layer_tensors, ours  # noqa: E402

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
LAYOUTS = ("NCHW", "NHWC")
LAYER = DeformConv2dSpec(6, 8, (3, 3), 1, 1)
SPECS = (*(variant(layout=layout) for layout in LAYOUTS), LAYER)
# Where weights are arguments, torch.compile takes equal sizes for one symbol: the first are unlike any channels.
SIZES = (Extents(5, 15, 11), Extents(3, 9, 8), Extents(2, 33, 20), Extents(7, 6, 30))
# float32: compiled graphs call the same kernels, and compute what is around them in other orders.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def builds(compilers, session_cache_dir):
    """Build beside one another what would be built at the first call; if that fails, it is the call that says so."""
    specs = [*SPECS, *map(DeformConv2dGradSpec.of, SPECS[:2]), DeformConv2dGradSpec.of(LAYER)]
    wait([compilers.submit(build_only, spec, "tuned", session_cache_dir) for spec in specs])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Layer(torch.nn.Module):
    """A v2 layer and the convolution that gives its offsets and masks, with something around them."""

    def __init__(self, border: str = "torchvision") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(LAYER.weight_shape, generator=generator) / 8)
        self.bias = torch.nn.Parameter(torch.randn(LAYER.out_channels, generator=generator))
        self.places = torch.nn.Conv2d(LAYER.in_channels, 27, 3, padding=1)
        self.border = border
        with torch.no_grad():
            self.places.weight.copy_(torch.randn(self.places.weight.shape, generator=generator) / 8)
            self.places.bias.zero_()

    def forward(self, x):
        places = self.places(x * 2)
        offset, mask = places[:, :18], places[:, 18:].sigmoid()
        return tvmdcn.deform_conv2d(x, offset, self.weight, self.bias, padding=1, mask=mask, border=self.border).relu()


def image(extents, layout="NCHW"):
    made = torch.randn(
        extents.batch, LAYER.in_channels, extents.height, extents.width, generator=torch.Generator().manual_seed(1)
    )
    return made if layout == "NCHW" else made.contiguous(memory_format=torch.channels_last)


def compiled(function, backend):
    if backend == "inductor" and not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("inductor needs a C++ compiler")
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def check_one_graph():
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("requires_grad", [(), NAMES], ids=["inference", "training"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_graph_for_all_sizes(layout, requires_grad):
    function = compiled(ours, "aot_eager")
    for index, extents in enumerate(SIZES):
        tensors = layer_tensors(variant(layout=layout), extents, requires_grad=requires_grad)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = function(*tensors)
        expected = ours(*tensors)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        if requires_grad:
            grad_output = torch.randn_like(found)
            theirs = torch.autograd.grad(expected, tensors, grad_output)
            for one, other in zip(torch.autograd.grad(found, tensors, grad_output), theirs, strict=True):
                assert torch.equal(one, other)
                assert one.stride() == other.stride()
    check_one_graph()


@pytest.mark.parametrize(("backend", "layout"), [("aot_eager", "NCHW"), ("inductor", "NHWC")])
def test_a_module_that_is_trained(backend, layout):
    layer = Layer()
    function = compiled(layer, backend)
    for index, extents in enumerate(SIZES[:3]):
        x = image(extents, layout)
        layer.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = function(x)
            found.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in layer.parameters()]
        layer.zero_grad()
        expected = layer(x)
        expected.square().mean().backward()
        same(found, expected)
        for one, parameter in zip(gradients, layer.parameters(), strict=True):
            torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=TOLERANCE)
    check_one_graph()


def test_autocast_inside():
    layer = Layer()

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    found = compiled(step, "aot_eager")(image(SIZES[0]))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, step(image(SIZES[0])), rtol=1e-2, atol=1e-2)
    check_one_graph()


def test_transforms_inside():
    tensors = layer_tensors(extents=Extents(2, 5, 4))

    def per_sample(*tensors):
        def loss(image, offset, weight, bias, mask):
            return ours(image[None], offset[None], weight, bias, mask[None]).square().sum()

        return torch.vmap(torch.func.grad(loss, (0, 1, 2, 3, 4)), (0, 0, None, None, 0))(*tensors)

    function = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    for one, other in zip(function(*tensors), per_sample(*tensors), strict=True):
        assert torch.equal(one, other)


def test_wrong_sizes_are_refused_while_compiling():
    tensors = layer_tensors(extents=SIZES[0])
    tensors[1] = tensors[1][..., :-1]
    with pytest.raises(Exception, match=r"offset must be of the output's size \(7, 10\), got \(7, 9\)"):
        compiled(ours, "aot_eager")(*tensors)
    with pytest.raises(SpecError, match="border must be one of"):
        ours(*tensors, border="nobody's")


FIRST_CALL = """
import sys
sys.path.insert(0, "tests")
import torch
import tvmdcn
from torch_layers import layer_tensors, ours
from tvmdcn.spec import Extents

tensors = layer_tensors(extents=Extents(5, 15, 11))
function = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
found = function(*tensors)
with torch._dynamo.config.patch(error_on_recompile=True):
    function(*layer_tensors(extents=Extents(3, 9, 8)))
    assert torch.equal(found, ours(*tensors))
    function(*tensors)
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_the_first_call_of_a_process_may_be_compiled():
    """Nothing that is only known after a first call may be part of what the graph depends on."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    layer = Layer()
    batch, height, width = (torch.export.Dim(name, min=2, max=4000) for name in ("batch", "height", "width"))
    program = torch.export.export(
        layer, (image(SIZES[0]),), dynamic_shapes=({0: batch, 2: height, 3: width},), strict=strict
    )
    assert "torch.ops.tvmdcn.deform_conv2d.default" in program.graph_module.code
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    for extents in SIZES:
        same(loaded.module()(image(extents)), layer(image(extents)))


@pytest.mark.skipif(VERSION < (2, 6), reason="torch.narrow itself cannot be exported so")
def test_export_of_sizes_that_depend_on_data():
    class Cropped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x, width):
            columns = width.item()
            torch._check(columns >= 2)
            torch._check(columns <= x.shape[3])
            return self.layer(x.narrow(3, 0, columns))

    module, x = Cropped(), image(SIZES[0])
    program = torch.export.export(module, (x, torch.tensor(5)), strict=False)
    for columns in (3, 11):
        same(program.module()(x, torch.tensor(columns)), module.layer(x[..., :columns]))


def test_export_of_the_training_graph():
    """What a compiler for training gets: forward and backward as operators, nothing decomposed."""
    from torch._functorch.aot_autograd import aot_module_simplified

    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.code))
        return graph

    layer = Layer(border="mmcv")
    x = image(SIZES[0])

    def backend(graph, inputs):
        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep)

    torch.compile(layer, backend=backend, fullgraph=True)(x).sum().backward()
    forward, backward = graphs
    assert forward.count("tvmdcn.deform_conv2d.default") == 1
    assert backward.count("tvmdcn.deform_conv2d_backward.default") == 1
    # The image needs no gradient, and the border is kept.
    assert "[False, True, True, True, True], 'mmcv'" in backward
