# SPDX-License-Identifier: Apache-2.0
"""Deformable convolutions as tuned native kernels, generated with TVM.

Everything is imported when it is first used: ``import tvmdcn`` takes milliseconds, and calling a kernel that
is already built never imports the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvmdcn import onnx as onnx
    from tvmdcn.api import deform_conv2d
    from tvmdcn.artifact import Artifact
    from tvmdcn.bench.protocol import compare
    from tvmdcn.builder import build
    from tvmdcn.errors import (
        ArtifactError,
        ArtifactMissing,
        BuildError,
        DeviceError,
        MissingExtra,
        RecordsError,
        SettingError,
        SpecError,
        SpecTypeError,
        TuningError,
        TvmdcnError,
    )
    from tvmdcn.grad_kernel import GradKernel
    from tvmdcn.gradient import deform_conv2d_backward
    from tvmdcn.kernel import Kernel
    from tvmdcn.packs.active import load_pack
    from tvmdcn.packs.pack import KernelPack
    from tvmdcn.runtime import load
    from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
    from tvmdcn.target import TargetInfo, detect_target, resolve_target
    from tvmdcn.tensors import Gradients
    from tvmdcn.torch.drop_in import ReplacementReport, replace_modules
    from tvmdcn.torch.modules import (
        DeformConv2d,
        DeformConv2dPack,
        ModulatedDeformConv2dPack,
        upgrade_state_dict,
    )
    from tvmdcn.torch.routing import route_torchvision
    from tvmdcn.tuning.tuner import tune
    from tvmdcn.weights import PackedWeight

    __version__: str

_MODULES = {
    "ArtifactError": "errors",
    "ArtifactMissing": "errors",
    "Artifact": "artifact",
    "BuildError": "errors",
    "DeviceError": "errors",
    "DeformConv2d": "torch.modules",
    "DeformConv2dGradSpec": "spec",
    "DeformConv2dPack": "torch.modules",
    "DeformConv2dSpec": "spec",
    "Extents": "spec",
    "GradKernel": "grad_kernel",
    "Gradients": "tensors",
    "Kernel": "kernel",
    "KernelPack": "packs.pack",
    "MissingExtra": "errors",
    "ModulatedDeformConv2dPack": "torch.modules",
    "PackedWeight": "weights",
    "RecordsError": "errors",
    "ReplacementReport": "torch.drop_in",
    "SettingError": "errors",
    "SpecError": "errors",
    "SpecTypeError": "errors",
    "TargetInfo": "target",
    "TuningError": "errors",
    "TvmdcnError": "errors",
    "build": "builder",
    "compare": "bench.protocol",
    "deform_conv2d": "api",
    "deform_conv2d_backward": "gradient",
    "detect_target": "target",
    "load": "runtime",
    "load_pack": "packs.active",
    "onnx": "onnx",
    "replace_modules": "torch.drop_in",
    "resolve_target": "target",
    "route_torchvision": "torch.routing",
    "tune": "tuning.tuner",
    "upgrade_state_dict": "torch.modules",
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "ArtifactMissing",
    "BuildError",
    "DeformConv2d",
    "DeformConv2dGradSpec",
    "DeformConv2dPack",
    "DeformConv2dSpec",
    "DeviceError",
    "Extents",
    "GradKernel",
    "Gradients",
    "Kernel",
    "KernelPack",
    "MissingExtra",
    "ModulatedDeformConv2dPack",
    "PackedWeight",
    "RecordsError",
    "ReplacementReport",
    "SettingError",
    "SpecError",
    "SpecTypeError",
    "TargetInfo",
    "TuningError",
    "TvmdcnError",
    "__version__",
    "build",
    "compare",
    "deform_conv2d",
    "deform_conv2d_backward",
    "detect_target",
    "load",
    "load_pack",
    "replace_modules",
    "resolve_target",
    "route_torchvision",
    "tune",
    "upgrade_state_dict",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name == "__version__":
        from importlib import metadata

        value: Any = metadata.version("tvmdcn")
    elif name in _MODULES:
        if _MODULES[name].startswith("torch."):
            from tvmdcn.extras import require

            require("torch", f"tvmdcn.{name}")
        module = _module(name)
        value = module if name == _MODULES[name] else getattr(module, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _module(name: str) -> Any:
    """Import the module of a name; explain it where a package is missing."""
    try:
        return importlib.import_module(f"tvmdcn.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        from tvmdcn.errors import MissingExtra
        from tvmdcn.extras import explain

        message = explain(error, f"tvmdcn.{name}")
        if message is None or isinstance(error, MissingExtra):
            raise
        raise MissingExtra(message, name=error.name) from error


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
