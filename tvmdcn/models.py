# SPDX-License-Identifier: Apache-2.0
"""The deformable layers of a torch model: what to tune so that the model runs fast."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvmdcn
from tvmdcn.errors import SpecError, TvmdcnError
from tvmdcn.extras import require
from tvmdcn.problems import Problem, problem_text
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.validation import shown

__all__ = ["load_model", "parse_input", "problems_of_model"]


def load_model(text: str) -> Any:
    """Return the model that ``module:factory`` makes.

    Raises
    ------
    SpecError
        If there is no such module or factory, or it does not return a ``torch.nn.Module``.
    MissingExtra
        If torch is not installed.
    """
    require("torch", "--model")
    import torch

    module_name, _, factory = text.partition(":")
    if not all(map(str.isidentifier, (*module_name.split("."), factory))):
        raise SpecError(f"--model must be MODULE:FACTORY, such as mypackage.models:make_detector, got {shown(text)}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of the user's does
        raise SpecError(
            f"--model {shown(text)}: module {module_name} cannot be imported: {_described(error)}. "
            "Run where it can, or set PYTHONPATH."
        ) from error
    made = getattr(module, factory, None)
    if made is None:
        raise SpecError(f"--model {shown(text)}: module {module_name} has no {factory}.")
    try:
        model = made if isinstance(made, torch.nn.Module) else made() if callable(made) else None
    except Exception as error:  # whatever a factory of the user's does
        raise SpecError(
            f"--model {shown(text)}: {factory}() failed: {_described(error)}. It is called without arguments."
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise SpecError(f"--model {shown(text)}: {factory} of {module_name} is no torch.nn.Module and returns none.")
    return model


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}".rstrip(".: ")


def parse_input(text: str) -> tuple[int, ...]:
    """Return the shape written as ``1x3x512x512``.

    Raises
    ------
    SpecError
        If it is not of that form.
    """
    parts = text.lower().split("x")
    if len(parts) < 2 or not all(re.fullmatch("[0-9]{1,9}", part) and int(part) > 0 for part in parts):
        raise SpecError(f"--input must be sizes joined by x, such as 1x3x512x512, got {shown(text)}.")
    return tuple(map(int, parts))


def problems_of_model(model: Any, shapes: Sequence[tuple[int, ...]]) -> list[Problem]:
    """Run a model once and return its deformable convolutions, each signature and size once.

    Calls of ``tvmdcn.deform_conv2d`` and of ``torchvision.ops.deform_conv2d`` are seen, whatever module makes
    them; they are answered with zeros, so nothing is built for this. A problem's name is its description,
    which other commands understand.

    Parameters
    ----------
    model : torch.nn.Module
    shapes : sequence of tuple of int
        Shapes of its inputs; they are given normal random numbers.

    Raises
    ------
    SpecError
        If the model has no deformable layer, or does not run on such inputs.
    """
    import torch

    found: dict[Any, Problem] = {}

    def record(
        input: Any,
        offset: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        mask: Any = None,
    ) -> Any:
        last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        spec, extents = DeformConv2dSpec.from_shapes(
            tuple(input.shape),
            tuple(offset.shape),
            tuple(weight.shape),
            None if mask is None else tuple(mask.shape),
            None if bias is None else tuple(bias.shape),
            stride,
            padding,
            dilation,
            dtype=str(input.dtype).removeprefix("torch."),
            layout="NHWC" if last and not input.is_contiguous() else "NCHW",
        )
        layer = Problem(problem_text(spec, extents), spec, extents, f"layer of {type(model).__name__}")
        found.setdefault((spec, extents), layer)
        size = spec.output_size(extents.height, extents.width)
        return input.new_zeros((extents.batch, spec.out_channels, *size))

    training = model.training
    saved = _call_sites()
    try:
        for module, name, _ in saved:
            setattr(module, name, record)
        inputs = [torch.randn(shape) for shape in shapes]
        with torch.no_grad():
            model.eval()(*inputs)
    except TvmdcnError:
        raise
    except Exception as error:  # whatever a model of the user's does
        raise SpecError(
            f"the model does not run on inputs of shape {', '.join(map(str, shapes))}: {_described(error)}. "
            "Give --input once for each of its inputs."
        ) from error
    finally:
        model.train(training)
        for module, name, value in saved:
            setattr(module, name, value)
    if not found:
        raise SpecError(
            f"{type(model).__name__} made no call of tvmdcn.deform_conv2d or torchvision.ops.deform_conv2d."
        )
    return list(found.values())


def _call_sites() -> list[tuple[Any, str, Any]]:
    """Return every name of a module that stands for the operator, with its value."""
    originals = {id(tvmdcn.deform_conv2d)}
    for name in ("torchvision.ops", "torchvision.ops.deform_conv"):
        if name in sys.modules and hasattr(sys.modules[name], "deform_conv2d"):
            originals.add(id(sys.modules[name].deform_conv2d))
    return [
        (module, name, value)
        for module in list(sys.modules.values())
        for name, value in list(getattr(module, "__dict__", {}).items())
        if id(value) in originals
    ]
