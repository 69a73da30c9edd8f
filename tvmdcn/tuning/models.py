# SPDX-License-Identifier: Apache-2.0
"""The deformable layers of a model, of torch or in ONNX: what to tune so that the model runs fast."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tvmdcn
from tvmdcn.errors import SpecError, TvmdcnError
from tvmdcn.extras import require
from tvmdcn.problems import Problem, problem_text
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.validation import shown

__all__ = ["is_onnx", "load_model", "names_of", "parse_input", "problems_of_model"]


def load_model(text: str) -> Any:
    """Return the model that ``module:factory`` makes, or that a file whose name ends in ``.onnx`` holds.

    Returns
    -------
    torch.nn.Module or onnx.ModelProto

    Raises
    ------
    SpecError
        If there is no such file, module or factory, or it is no model.
    MissingExtra
        If torch, or onnx and onnxruntime, are not installed.
    """
    if is_onnx(text):
        from tvmdcn.onnx.session import load_model as load_file

        return load_file(text)
    require("torch", "--model")
    import torch

    module_name, _, factory = text.partition(":")
    if not all(map(str.isidentifier, (*module_name.split("."), factory))):
        raise SpecError(
            "--model must be MODULE:FACTORY, such as mypackage.models:make_detector, or a path that ends in .onnx, got "
            f"{shown(text)}."
        )
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


def is_onnx(text: str) -> bool:
    """Return whether the text names a file in ONNX."""
    return text.lower().endswith(".onnx")


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
    """Run a model once and return its deformable convolutions, each signature and size once, with how often it occurs.

    Calls of ``tvmdcn.deform_conv2d``, of ``torchvision.ops.deform_conv2d`` and of the functions of mmcv and
    detectron2 are seen, whatever module makes them: so also those of tvmdcn's layers and of theirs. They are
    answered with zeros, so nothing is built for this. A problem's name is its description, which other commands
    understand.

    Parameters
    ----------
    model : torch.nn.Module or onnx.ModelProto
        In ONNX the layers are its ``DeformConv`` nodes, see :func:`tvmdcn.onnx.find_layers`.
    shapes : sequence of tuple of int
        Shapes of its inputs; they are given normal random numbers. May be empty for a model in ONNX with fixed shapes.

    Raises
    ------
    SpecError
        If the model has no deformable layer, or does not run on such inputs.
    """
    if type(model).__module__.startswith("onnx"):
        from tvmdcn.onnx import find_layers

        return find_layers(model, shapes or None)
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
        **_: Any,
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
        layer = Problem(problem_text(spec, extents), spec, extents, f"layer of {type(model).__name__}", 0)
        known = found.setdefault((spec, extents), layer)
        found[spec, extents] = replace(known, count=known.count + 1)
        size = spec.output_size(extents.height, extents.width)
        return input.new_zeros((extents.batch, spec.out_channels, *size))

    training = model.training
    forms = _operators()
    saved = names_of(*(operator for operator, _ in forms))
    try:
        for module, name, value in saved:
            form = next(form for operator, form in forms if operator is value)
            setattr(module, name, form(record))
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
            f"{type(model).__name__} made no call of tvmdcn.deform_conv2d or torchvision.ops.deform_conv2d, nor of "
            "mmcv's or detectron2's functions."
        )
    return list(found.values())


def names_of(*values: Any) -> list[tuple[Any, str, Any]]:
    """Return every name of an imported module that stands for one of these objects: module, name, object."""
    wanted = {id(value) for value in values}
    return [
        (module, name, value)
        for module in list(sys.modules.values())
        for name, value in list(getattr(module, "__dict__", {}).items())
        if id(value) in wanted
    ]


def _operators() -> list[tuple[Any, Callable[..., Any]]]:
    """Return the functions that compute a deformable convolution, and how to answer in the form of each."""
    found: list[tuple[Any, Callable[..., Any]]] = [(tvmdcn.deform_conv2d, lambda record: record)]
    for module, name, form in (
        ("torchvision.ops", "deform_conv2d", lambda record: record),
        ("torchvision.ops.deform_conv", "deform_conv2d", lambda record: record),
        ("mmcv.ops.deform_conv", "deform_conv2d", _without_mask),
        ("mmcv.ops.modulated_deform_conv", "modulated_deform_conv2d", _with_mask),
        ("detectron2.layers.deform_conv", "deform_conv", _without_mask),
        ("detectron2.layers.deform_conv", "modulated_deform_conv", _with_mask),
    ):
        operator = getattr(sys.modules.get(module), name, None)
        if operator is not None:
            found.append((operator, form))
    return found


# The two forms of mmcv and detectron2, whose last arguments (groups, deform_groups, im2col_step) follow from the
# shapes or do not matter. mmcv converts to the dtype of the offset.


def _without_mask(record: Callable[..., Any]) -> Callable[..., Any]:
    def operator(
        input: Any, offset: Any, weight: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1, *_: Any
    ) -> Any:
        return record(input.type_as(offset), offset, weight.type_as(offset), None, stride, padding, dilation)

    return operator


def _with_mask(record: Callable[..., Any]) -> Callable[..., Any]:
    def operator(
        input: Any,
        offset: Any,
        mask: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        *_: Any,
    ) -> Any:
        input, mask, weight, bias = (None if a is None else a.type_as(offset) for a in (input, mask, weight, bias))
        return record(input, offset, weight, bias, stride, padding, dilation, mask)

    return operator
