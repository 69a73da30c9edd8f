# SPDX-License-Identifier: Apache-2.0
"""``torch.onnx.export`` of our layers: standard nodes, and the same numbers in onnxruntime, in OpenVINO and in ours."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch", "2.8")
pytest.importorskip("onnxruntime", "1.25")
pytest.importorskip("onnxscript")

import numpy as np
import onnx
import onnxruntime
import torch

import tvmdcn
import tvmdcn.torch
from tvmdcn.errors import SpecError
from tvmdcn.onnx import InferenceSession, openvino_extension

CHANNELS = 6
# The size that is traced, and others: batch, height and width are free.
SIZES = ((2, 8, 9), (1, 12, 7), (3, 5, 14))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep torch's reports on its own internals out of the tests' output."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield
    logging.disable(logging.NOTSET)


class Layer(torch.nn.Module):
    """A layer with offsets from a plain convolution; nothing symmetric in it."""

    def __init__(
        self,
        bias: bool = True,
        mask: bool = True,
        groups: int = 2,
        offset_groups: int = 3,
        padding: Any = (1, 0),
        raw: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.geometry = (2, 1), padding, (1, 2)
        self.weight = torch.nn.Parameter(torch.randn(4, CHANNELS // groups, 3, 2) / 4)
        self.bias = torch.nn.Parameter(torch.randn(4)) if bias else None
        sides = (padding * 2)[:4]
        self.pad = torch.nn.ZeroPad2d((sides[1], sides[3], sides[0], sides[2]))
        self.offset = torch.nn.Conv2d(CHANNELS, offset_groups * 12, (3, 2), (2, 1), 0, (1, 2))
        self.mask = torch.nn.Conv2d(CHANNELS, offset_groups * 6, (3, 2), (2, 1), 0, (1, 2)) if mask else None
        self.raw = raw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = self.pad(x)
        mask = None if self.mask is None else self.mask(padded).sigmoid()
        arguments = (x, self.offset(padded), self.weight, self.bias, *self.geometry, mask)
        if self.raw:
            return torch.ops.tvmdcn.deform_conv2d(*arguments[:5], list(self.geometry[1] * 2)[:4], *arguments[6:])
        return tvmdcn.deform_conv2d(*arguments).tanh()


LAYERS: dict[str, dict[str, Any]] = {
    "v2": {},
    "v1": {"mask": False},
    "no-bias": {"bias": False},
    "v1-no-bias": {"bias": False, "mask": False},
    "one-group": {"groups": 1, "offset_groups": 1},
    "asymmetric": {"padding": (1, 0, 2, 1)},
}


def images(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, CHANNELS, h, w, dtype=dtype) for n, h, w in SIZES]


def dynamo(model: Any, opset: int | None = 22, **options: Any) -> Any:
    x = images()[0].to(next(iter(model.state_dict().values())).dtype)
    shapes = ({0: "n", 2: "h", 3: "w"},)
    program = torch.onnx.export(model, (x,), dynamic_shapes=shapes, opset_version=opset, verbose=False, **options)
    return program.model_proto


def torchscript(model: Any, opset: int = 19, free: tuple[int, ...] = (0, 2, 3)) -> Any:
    file = io.BytesIO()
    axes = {"x": {axis: f"axis{axis}" for axis in free}}
    torch.onnx.export(
        model, (images()[0],), file, input_names=["x"], dynamic_axes=axes, opset_version=opset, dynamo=False
    )
    return onnx.load_from_string(file.getvalue())


def run_openvino(proto: Any, x: np.ndarray) -> np.ndarray:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    core.add_extension(openvino_extension())
    model = core.read_model(proto.SerializeToString())
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return np.array(compiled([x])[0])


def check(proto: Any, model: Any, opset: int, others: bool = True) -> Any:
    """Check the nodes, and the numbers of whoever runs them; return the ``DeformConv`` node."""
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    (node,) = (node for node in proto.graph.node if node.op_type == "DeformConv")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [InferenceSession(proto, options)]
    if others:
        sessions.append(onnxruntime.InferenceSession(proto.SerializeToString(), options))
    (name,) = (entry.name for entry in sessions[0].get_inputs())
    for x in images():
        with torch.no_grad():
            expected = model(x).numpy()
        found = [session.run(None, {name: x.numpy()})[0] for session in sessions]
        for array in (*found, *([run_openvino(proto, x.numpy())] if others else [])):
            np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))
    return node


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("export", "opset"), [(dynamo, 22), (torchscript, 19)], ids=["dynamo", "torchscript"])
def test_every_kind_of_layer(name: str, export: Any, opset: int) -> None:
    model = Layer(**LAYERS[name]).eval()
    node = check(export(model, opset), model, opset)
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    padding = model.geometry[1]
    assert attributes == {
        "dilations": [1, 2],
        "group": LAYERS[name].get("groups", 2),
        "kernel_shape": [3, 2],
        "offset_group": LAYERS[name].get("offset_groups", 3),
        "pads": list((padding * 2)[:4]),
        "strides": [2, 1],
    }
    given = [bool(entry) for entry in node.input] + [False] * (5 - len(node.input))
    assert given == [True, True, True, model.bias is not None, model.mask is not None]


@pytest.mark.parametrize(("export", "opset", "expected"), [(dynamo, 19, 19), (dynamo, None, 20), (torchscript, 22, 22)])
def test_other_opsets(export: Any, opset: int | None, expected: int) -> None:
    model = Layer().eval()
    check(export(model, opset), model, expected)


@pytest.mark.parametrize("export", [dynamo, torchscript], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("pack", [tvmdcn.DeformConv2dPack, tvmdcn.ModulatedDeformConv2dPack])
def test_packs(pack: Any, export: Any) -> None:
    model = pack(CHANNELS, 4, 3, padding=1, deform_groups=2).eval()
    torch.nn.init.normal_(model.conv_offset.weight, std=0.2)
    check(export(model, 19), model, 19)


def test_layer_whose_offsets_are_inputs() -> None:
    layer = tvmdcn.DeformConv2d(CHANNELS, 4, 3, padding=1)
    x, offset, mask = torch.randn(1, CHANNELS, 7, 8), torch.randn(1, 18, 7, 8), torch.rand(1, 9, 7, 8)
    program = torch.onnx.export(layer.eval(), (x, offset, mask), opset_version=19, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    feeds = [tensor.numpy() for tensor in (x, offset, mask)]
    (found,) = session.run(None, dict(zip((entry.name for entry in session.get_inputs()), feeds, strict=True)))
    np.testing.assert_allclose(found, layer(x, offset, mask).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("raw", [False, True])
def test_program_that_was_exported_before(raw: bool) -> None:
    dim = torch.export.Dim
    model = Layer(raw=raw).eval()
    shapes = ({0: dim("n"), 2: dim("h", min=4), 3: dim("w", min=4)},)
    program = torch.export.export(model, (images()[0],), dynamic_shapes=shapes)
    check(torch.onnx.export(program, opset_version=19, verbose=False).model_proto, model, 19)
    # What was exported still computes: it is not the export's stand-in.
    torch.testing.assert_close(program.module()(images()[1]), model(images()[1]))


def test_inference_mode() -> None:
    model = Layer().eval()
    with torch.inference_mode():
        proto = dynamo(model)
    check(proto, model, 22, others=False)


def test_bfloat16_takes_opset_22() -> None:
    """Neither onnxruntime nor OpenVINO computes it; our session does."""
    model = tvmdcn.ModulatedDeformConv2dPack(CHANNELS, 4, 1).eval().to(torch.bfloat16)
    proto = dynamo(model, 22)
    onnx.checker.check_model(proto, full_check=True)
    (node,) = (node for node in proto.graph.node if node.op_type == "DeformConv")
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    assert kinds[node.input[1]] == onnx.TensorProto.BFLOAT16


FIRST_USE = """
import logging, sys, warnings
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
import torch
import tvmdcn

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.offset = torch.nn.Conv2d(4, 18, 3, padding=1)
        self.weight = torch.nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return tvmdcn.deform_conv2d(x, self.offset(x), self.weight, padding=1)

def export():
    if sys.argv[1] == "dynamo":
        return torch.onnx.export(Model(), (torch.randn(1, 4, 6, 7),), verbose=False).model_proto
    import io, onnx
    file = io.BytesIO()
    torch.onnx.export(Model(), (torch.randn(1, 4, 6, 7),), file, dynamo=False, opset_version=19)
    return onnx.load_from_string(file.getvalue())

print([node.op_type for node in export().graph.node])
assert "tvmdcn.onnx" not in sys.modules
"""


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_first_use_of_all_is_the_export(exporter: str) -> None:
    """Nothing has to be imported, registered or called before."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE, exporter], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['Conv', 'DeformConv']"


def test_channels_must_be_known() -> None:
    class Given(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            offset = torch.zeros(x.shape[0], 18, *x.shape[2:])
            return tvmdcn.deform_conv2d(x, offset, torch.ones(4, CHANNELS, 3, 3), padding=1)

    with pytest.raises(SpecError, match=r"the channels of input and .* must be known .*: only the axes N, H and W"):
        torchscript(Given(), free=(0, 1, 2, 3))


def test_wrong_arguments_are_told_in_our_words() -> None:
    class Wrong(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return tvmdcn.deform_conv2d(x, torch.zeros(2, 17, 8, 9), torch.ones(4, CHANNELS, 3, 3), padding=1)

    with pytest.raises(Exception, match=r"offset must have a multiple of 2 \* kh \* kw = 18 channels"):
        torch.onnx.export(Wrong().eval(), (images()[0],), verbose=False)


def test_nothing_is_left_behind() -> None:
    """After an export the operator computes, traces and records as before."""
    model = Layer().eval()
    x = images()[0]
    before = model(x)
    dynamo(model)
    torchscript(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    torch.testing.assert_close(Layer(raw=True).eval()(x).tanh(), before, rtol=0, atol=0)
    model(x).sum().backward()
    assert model.weight.grad.abs().sum() > 0
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), before)
