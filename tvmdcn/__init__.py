# SPDX-License-Identifier: Apache-2.0
"""Deformable convolutions as tuned native kernels, generated with TVM.

Everything is imported when it is first used: ``import tvmdcn`` takes milliseconds, and calling a kernel that
is already built never imports the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvmdcn.api import deform_conv2d
    from tvmdcn.artifact import Artifact
    from tvmdcn.bench import compare
    from tvmdcn.builder import build
    from tvmdcn.errors import (
        ArtifactError,
        ArtifactMissing,
        BuildError,
        MissingExtra,
        RecordsError,
        SettingError,
        SpecError,
        SpecTypeError,
        TuningError,
        TvmdcnError,
    )
    from tvmdcn.kernel import Kernel
    from tvmdcn.runtime import load
    from tvmdcn.spec import DeformConv2dSpec, Extents
    from tvmdcn.target import TargetInfo, detect_target, resolve_target
    from tvmdcn.tuner import tune
    from tvmdcn.weights import PackedWeight

    __version__: str

_MODULES = {
    "ArtifactError": "errors",
    "ArtifactMissing": "errors",
    "Artifact": "artifact",
    "BuildError": "errors",
    "DeformConv2dSpec": "spec",
    "Extents": "spec",
    "Kernel": "kernel",
    "MissingExtra": "errors",
    "PackedWeight": "weights",
    "RecordsError": "errors",
    "SettingError": "errors",
    "SpecError": "errors",
    "SpecTypeError": "errors",
    "TargetInfo": "target",
    "TuningError": "errors",
    "TvmdcnError": "errors",
    "build": "builder",
    "compare": "bench",
    "deform_conv2d": "api",
    "detect_target": "target",
    "load": "runtime",
    "resolve_target": "target",
    "tune": "tuner",
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "ArtifactMissing",
    "BuildError",
    "DeformConv2dSpec",
    "Extents",
    "Kernel",
    "MissingExtra",
    "PackedWeight",
    "RecordsError",
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
    "detect_target",
    "load",
    "resolve_target",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name == "__version__":
        from importlib import metadata

        value: Any = metadata.version("tvmdcn")
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"tvmdcn.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
