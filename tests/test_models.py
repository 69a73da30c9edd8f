# SPDX-License-Identifier: Apache-2.0
"""Which layers a torch model has: found by running it, whoever calls; refused in words if it cannot run."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

import tvmdcn
from tvmdcn.errors import SpecError
from tvmdcn.problems import PROBLEMS, TEST_PROBLEMS, parse_problem, problem_text
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tuning.models import load_model, parse_input, problems_of_model

SOURCE = '''
import torch
import tvmdcn
from tvmdcn import deform_conv2d
from torch import nn


class Block(nn.Module):
    """A deformable layer, offsets and mask from plain convolutions; `call` is the operator by some name."""

    def __init__(self, channels, outputs, stride, call):
        super().__init__()
        self.offset = nn.Conv2d(channels, 18, 3, stride, 1)
        self.mask = nn.Conv2d(channels, 9, 3, stride, 1)
        self.weight = nn.Parameter(torch.randn(outputs, channels, 3, 3))
        self.stride, self.call = stride, call

    def forward(self, x):
        mask = self.mask(x).sigmoid()
        return self.call(x, self.offset(x), self.weight, None, self.stride, 1, mask=mask)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        # the operator through a name of this module, and through the package
        self.first = Block(8, 12, 1, lambda *args, **options: deform_conv2d(*args, **options))
        self.second = Block(12, 16, 2, lambda *args, **options: tvmdcn.deform_conv2d(*args, **options))
        self.third = Block(16, 16, 1, lambda *args, **options: tvmdcn.deform_conv2d(*args, **options))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = self.second(self.first(self.stem(x)))
        return self.dropout(self.third(self.third(y)))


def make():
    return Net()


ready = Net()
number = 7


def wrong():
    return "no model"


def fails():
    raise ValueError("the weights are missing")


def needs(argument):
    return Net()


class Two(nn.Module):
    def forward(self, x, y):
        return tvmdcn.deform_conv2d(x, torch.zeros(1, 18, 4, 4), y, padding=1)


class Plain(nn.Module):
    def forward(self, x):
        return x


class Broken(nn.Module):
    def forward(self, x):
        return tvmdcn.deform_conv2d(x, torch.zeros(1, 17, 4, 4), torch.zeros(4, 3, 3, 3), padding=1)


class Asserts(nn.Module):
    def forward(self, x):
        assert x.shape[0] == 99, "a batch of 99 is needed"
'''
LAYERS = [
    (DeformConv2dSpec(8, 12, padding=1), Extents(2, 10, 12)),
    (DeformConv2dSpec(12, 16, stride=2, padding=1), Extents(2, 10, 12)),
    (DeformConv2dSpec(16, 16, padding=1), Extents(2, 5, 6)),
]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of models in the working directory."""
    name = "models_of_a_test"
    (tmp_path / f"{name}.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "broken_module.py").write_text("def\n", encoding="utf-8")
    (tmp_path / "needy_module.py").write_text("import no_such_package\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield name
    for loaded in (name, "broken_module", "needy_module"):
        sys.modules.pop(loaded, None)


def test_layers_of_a_model_are_found_once_each(module: str) -> None:
    found = problems_of_model(load_model(f"{module}:make"), [(2, 3, 10, 12)])
    assert [(problem.spec, problem.extents) for problem in found] == LAYERS
    assert {problem.source for problem in found} == {"layer of Net"}


def test_names_of_found_layers_are_understood_by_other_commands(module: str) -> None:
    found = problems_of_model(load_model(f"{module}:make"), [(2, 3, 10, 12)])
    for problem in found:
        again = parse_problem(problem.name)
        assert (again.spec, again.extents) == (problem.spec, problem.extents)
    assert len({problem.name for problem in found}) == len(found)


@pytest.mark.parametrize("problem", [*PROBLEMS.values(), *TEST_PROBLEMS.values()], ids=lambda p: p.name)
def test_every_layer_can_be_described(problem) -> None:
    again = parse_problem(problem_text(problem.spec, problem.extents))
    assert (again.spec, again.extents) == (problem.spec, problem.extents)


def test_looking_changes_nothing(module: str) -> None:
    model = load_model(f"{module}:make")
    before = tvmdcn.deform_conv2d
    for shape in ((2, 3, 10, 12), (2, 4, 10, 12)):  # the second does not fit
        try:
            problems_of_model(model, [shape])
        except SpecError:
            assert shape[1] == 4
        assert tvmdcn.deform_conv2d is tvmdcn.api.deform_conv2d is before
        assert sys.modules[module].deform_conv2d is before
        assert model.training


def test_model_that_exists_already_is_taken(module: str) -> None:
    assert load_model(f"{module}:ready") is sys.modules[module].ready
    assert isinstance(load_model(f"{module}:Plain"), torch.nn.Module)


def test_channels_last_and_other_dtypes_are_seen(module: str) -> None:
    class Last(torch.nn.Module):
        def forward(self, x):
            x = x.to(torch.bfloat16, memory_format=torch.channels_last)
            offset = torch.zeros(1, 18, 6, 7, dtype=x.dtype)
            return tvmdcn.deform_conv2d(x, offset, torch.zeros(8, 4, 3, 3, dtype=x.dtype), padding=1)

    (found,) = problems_of_model(Last(), [(1, 4, 6, 7)])
    assert found.spec == DeformConv2dSpec(4, 8, padding=1, mask=False, dtype="bfloat16", layout="NHWC")


def test_torchvisions_layers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ops, layers = types.ModuleType("torchvision.ops"), types.ModuleType("torchvision.ops.deform_conv")

    def deform_conv2d(*args, **options):
        raise AssertionError("the original was called")

    ops.deform_conv2d = layers.deform_conv2d = deform_conv2d
    monkeypatch.setitem(sys.modules, "torchvision.ops", ops)
    monkeypatch.setitem(sys.modules, "torchvision.ops.deform_conv", layers)

    class DeformConv2d(torch.nn.Module):
        def forward(self, x):
            offset, weight = torch.zeros(1, 2 * 2 * 9, 6, 7), torch.zeros(8, 4, 3, 3)
            return layers.deform_conv2d(x, offset, weight, None, padding=(1, 1), mask=torch.ones(1, 18, 6, 7))

    (found,) = problems_of_model(DeformConv2d(), [(1, 4, 6, 7)])
    assert found.spec == DeformConv2dSpec(4, 8, padding=1, offset_groups=2)
    assert ops.deform_conv2d is layers.deform_conv2d is deform_conv2d


def test_several_inputs_are_given_in_order(module: str) -> None:
    (found,) = problems_of_model(load_model(f"{module}:Two"), [(1, 3, 4, 4), (5, 3, 3, 3)])
    assert (found.spec.in_channels, found.spec.out_channels, found.spec.mask) == (3, 5, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be MODULE:FACTORY"),
        ("models", "must be MODULE:FACTORY"),
        ("models:", "must be MODULE:FACTORY"),
        (":make", "must be MODULE:FACTORY"),
        (".models:make", "must be MODULE:FACTORY"),
        ("models..b:make", "must be MODULE:FACTORY"),
        ("models.py:make", "module models.py cannot be imported: ModuleNotFoundError"),
        ("a/models.py:make", "must be MODULE:FACTORY"),
        ("models:make()", "must be MODULE:FACTORY"),
        ("no_such_module:make", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("needy_module:make", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("broken_module:make", "cannot be imported: SyntaxError"),
        ("models_of_a_test:absent", "module models_of_a_test has no absent"),
        ("models_of_a_test:number", r"number of models_of_a_test is no torch\.nn\.Module and returns none"),
        ("models_of_a_test:wrong", r"wrong of models_of_a_test is no torch\.nn\.Module and returns none"),
        ("models_of_a_test:fails", r"fails\(\) failed: ValueError: the weights are missing"),
        ("models_of_a_test:needs", r"needs\(\) failed: TypeError: .*It is called without arguments"),
    ],
)
def test_bad_model_is_refused_in_words(module: str, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_model(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "x",
        "1x",
        "1x3xax5",
        "1,3,5,5",
        "1x0x5",
        "1x-3x5",
        "1x3.5x5",
        "1x3x",
        "1x\u00b2",
        "1x" + "9" * 5000,
    ],
    ids=lambda text: text[:12],
)
def test_bad_input_is_refused_in_words(text: str) -> None:
    with pytest.raises(SpecError, match=r"--input must be sizes joined by x, such as 1x3x512x512, got"):
        parse_input(text)


def test_inputs_are_understood() -> None:
    assert parse_input("1x3x512x640") == (1, 3, 512, 640)
    assert parse_input("2X7") == (2, 7)


@pytest.mark.parametrize(
    ("factory", "shapes", "message"),
    [
        ("make", [(1, 4, 8, 8)], r"does not run on inputs of shape \(1, 4, 8, 8\): RuntimeError"),
        (
            "make",
            [(1, 3, 8, 8), (1, 3, 8, 8)],
            "does not run on inputs of shape .* Give --input once for each",
        ),
        ("Two", [(1, 3, 4, 4)], "does not run on inputs"),
        ("Asserts", [(1, 3, 4, 4)], "AssertionError: a batch of 99 is needed"),
        ("Plain", [(1, 3, 4, 4)], r"Plain made no call of tvmdcn\.deform_conv2d or torchvision\.ops"),
        ("Broken", [(1, 3, 4, 4)], "offset"),
        ("make", [(1 << 30, 3, 1 << 20, 1 << 20)], "does not run on inputs of shape"),
    ],
)
def test_model_that_does_not_run_is_refused_in_words(
    module: str, factory: str, shapes: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        problems_of_model(load_model(f"{module}:{factory}"), shapes)
