# SPDX-License-Identifier: Apache-2.0
"""The deformable layers of a torch model: what to tune so that the model runs fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvmdcn.errors import SpecError
from tvmdcn.problems import Problem
from tvmdcn.spec import DeformConv2dSpec

__all__ = ["load_model", "parse_input", "problems_of_model"]


def load_model(text: str) -> Any:
    """Return the model that ``module:factory`` makes.

    Raises
    ------
    SpecError
        If there is no such module or factory, or it does not return a ``torch.nn.Module``.
    """
    import torch

    module_name, _, factory = text.partition(":")
    if not module_name or not factory:
        raise SpecError(f"--model must be MODULE:FACTORY, such as mypackage.models:make_detector, got {text!r}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SpecError(
            f"--model {text!r}: module {module_name} cannot be imported: {error}. Run where it can, or set PYTHONPATH."
        ) from error
    made = getattr(module, factory, None)
    model = made if isinstance(made, torch.nn.Module) else made() if callable(made) else None
    if not isinstance(model, torch.nn.Module):
        raise SpecError(f"--model {text!r}: {factory} of {module_name} is no torch.nn.Module and returns none.")
    return model


def parse_input(text: str) -> tuple[int, ...]:
    """Return the shape written as ``1x3x512x512``.

    Raises
    ------
    SpecError
        If it is not of that form.
    """
    parts = text.lower().split("x")
    if len(parts) < 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise SpecError(f"--input must be sizes joined by x, such as 1x3x512x512, got {text!r}.")
    return tuple(map(int, parts))


def problems_of_model(model: Any, shapes: Sequence[tuple[int, ...]]) -> list[Problem]:
    """Run a model once and return its deformable convolutions, each signature and size once.

    Calls of ``tvmdcn.deform_conv2d`` and of ``torchvision.ops.deform_conv2d`` are seen, whatever module makes them;
    they are answered with zeros, so nothing is built for this.

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

    import tvmdcn.api

    found: dict[Any, Problem] = {}

    def record(
        input: Any, offset: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, mask: Any = None,
    ) -> Any:
        layout = "NHWC" if not input.is_contiguous() and input.is_contiguous(
            memory_format=torch.channels_last
        ) else "NCHW"
        spec, extents = DeformConv2dSpec.from_shapes(
            tuple(input.shape), tuple(offset.shape), tuple(weight.shape),
            None if mask is None else tuple(mask.shape), None if bias is None else tuple(bias.shape),
            stride, padding, dilation, dtype=str(input.dtype).removeprefix("torch."), layout=layout,
        )
        name = f"layer{len(found) + 1}"
        found.setdefault((spec, extents), Problem(name, spec, extents, f"layer of {type(model).__name__}"))
        size = spec.output_size(extents.height, extents.width)
        return input.new_zeros((extents.batch, spec.out_channels, *size))

    patches = [(tvmdcn.api, "deform_conv2d"), (tvmdcn, "deform_conv2d")]
    for module_name in ("torchvision.ops", "torchvision.ops.deform_conv"):
        if module_name in sys.modules:
            patches.append((sys.modules[module_name], "deform_conv2d"))
    # Names that modules of the model imported for themselves.
    originals = {id(getattr(module, name)) for module, name in patches if hasattr(module, name)}
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in originals and callable(value) and (module, name) not in patches:
                patches.append((module, name))
    saved = [(module, name, module.__dict__.get(name)) for module, name in patches]
    inputs = [torch.randn(shape) for shape in shapes]
    try:
        for module, name, _ in saved:
            setattr(module, name, record)
        with torch.no_grad():
            model.eval()(*inputs)
    except (RuntimeError, TypeError) as error:
        raise SpecError(
            f"the model does not run on inputs of shape {', '.join(map(str, shapes))}: {str(error)[:300]} Give --input once "
            "for each of its inputs."
        ) from error
    finally:
        for module, name, value in saved:
            if value is None:
                module.__dict__.pop(name, None)
            else:
                setattr(module, name, value)
    if not found:
        raise SpecError(
            f"{type(model).__name__} made no call of tvmdcn.deform_conv2d or torchvision.ops.deform_conv2d."
        )
    return list(found.values())
