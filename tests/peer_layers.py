# SPDX-License-Identifier: Apache-2.0
"""The layers of torchvision, mmcv and detectron2, or what stands for them where they are not installed.

The files in `peers` were written after the peers' sources, and take their places among the imported modules; they
compute with plain torch operations. Tests that find the real torchvision use that as well.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from plain_torch import plain_deform_conv2d

from tvmdcn.spec import DeformConv2dSpec

FOLDER = Path(__file__).with_name("peers")
# Module: its file, and what the package takes over from it.
STAND_INS = {
    "torchvision.ops.deform_conv": ("torchvision_deform_conv", ("DeformConv2d", "deform_conv2d")),
    "mmcv.ops.deform_conv": ("mmcv_deform_conv", ("DeformConv2d", "DeformConv2dPack", "deform_conv2d")),
    "mmcv.ops.modulated_deform_conv": (
        "mmcv_modulated_deform_conv",
        ("ModulatedDeformConv2d", "ModulatedDeformConv2dPack", "modulated_deform_conv2d"),
    ),
    "detectron2.layers.deform_conv": ("detectron2_deform_conv", ("DeformConv", "ModulatedDeformConv")),
}


def plain_of_call(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    border: str = "torchvision",
) -> Any:
    """Compute the layer in plain torch operations, whose autograd works."""
    shapes = [None if a is None else tuple(a.shape) for a in (input, offset, weight, mask, bias)]
    spec, _ = DeformConv2dSpec.from_shapes(*shapes, stride, padding, dilation, dtype=input.dtype)
    return plain_deform_conv2d(spec, input, offset, weight, mask, bias, border)


def install(patch: Any) -> types.SimpleNamespace:
    """Put the stand-ins among the imported modules; `patch` is a MonkeyPatch. Return what a user imports from."""
    packages: dict[str, types.ModuleType] = {}
    for name, (stem, public) in STAND_INS.items():
        top, package, short = name.split(".")
        for parent in (top, f"{top}.{package}"):
            if parent not in packages:
                packages[parent] = types.ModuleType(parent)
                patch.setitem(sys.modules, parent, packages[parent])
        above = packages[f"{top}.{package}"]
        setattr(packages[top], package, above)
        found = importlib.util.spec_from_file_location(name, FOLDER / f"{stem}.py")
        module = importlib.util.module_from_spec(found)
        patch.setitem(sys.modules, name, module)
        found.loader.exec_module(module)
        for attribute, value in ((short, module), *((each, getattr(module, each)) for each in public)):
            setattr(above, attribute, value)
    return types.SimpleNamespace(
        torchvision=packages["torchvision.ops"], mmcv=packages["mmcv.ops"], detectron2=packages["detectron2.layers"]
    )


def randomized(layer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give all parameters of a layer random values, small ones to what predicts offsets."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values * (0.1 if "conv_offset" in name else 1))
    return layer
