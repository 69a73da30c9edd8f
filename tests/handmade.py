# SPDX-License-Identifier: Apache-2.0
"""A builder whose kernels are written by hand in C: for tests of what surrounds a kernel."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from tvmdcn import env
from tvmdcn.artifact import Artifact, KernelInterface, build_once
from tvmdcn.cache_key import CacheKey
from tvmdcn.errors import BuildError
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import resolve_target

SOURCE = Path(__file__).with_name("handmade_kernel.c")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
LANES, GRANULE, MAX_UNITS = 4, 6, 3
_DTYPES = {"float16": (2, 16), "bfloat16": (4, 16), "float32": (2, 32), "float64": (2, 64)}


def compile_library(spec: DeformConv2dSpec, library: Path) -> KernelInterface:
    """Compile the kernel of a specification; return how it is called."""
    code, bits = _DTYPES[spec.dtype]
    macros = {
        "CIN": spec.in_channels,
        "COUT": spec.out_channels,
        "KH": spec.kernel_size[0],
        "KW": spec.kernel_size[1],
        "SH": spec.stride[0],
        "SW": spec.stride[1],
        "TOP": spec.padding[0],
        "LEFT": spec.padding[1],
        "DH": spec.dilation[0],
        "DW": spec.dilation[1],
        "GROUPS": spec.groups,
        "OFFSET_GROUPS": spec.offset_groups,
        "MASK": int(spec.mask),
        "NHWC": int(spec.layout == "NHWC"),
        "DTYPE_CODE": code,
        "DTYPE_BITS": bits,
        "LANES": LANES,
        "GRANULE": GRANULE,
        "MAX_UNITS": MAX_UNITS,
    }
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    command = [COMPILER or "cc", "-O1", "-shared", "-fPIC", *defines, "-o", str(library), str(SOURCE), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise BuildError(f"the handmade kernel does not compile: {done.stderr}")
    blocks = -(-(spec.out_channels // spec.groups) // LANES)
    shape = (spec.groups, blocks, spec.taps, spec.in_channels // spec.groups, LANES)
    return KernelInterface(GRANULE, MAX_UNITS, shape, spec.accumulator_dtype, spec.layout)


def build(
    spec: DeformConv2dSpec, target: Any = None, schedule: str = "tuned", cache_dir: Path | None = None
) -> Artifact:
    """Build as :func:`tvmdcn.build` does."""
    info = resolve_target(target)

    def make(directory: Path) -> tuple[KernelInterface, dict[str, Any]]:
        return compile_library(spec, directory / "kernel.so"), {"source": "handmade"}

    key = CacheKey.of(spec, info, schedule)
    return build_once(key, info, make, cache_dir, rebuild=env.build_mode() == "rebuild")


def install(patch: Any) -> None:
    """Take the place of :mod:`tvmdcn.builder`, with nothing in memory; `patch` is a MonkeyPatch."""
    import sys

    import tvmdcn
    from tvmdcn import api, runtime

    module = sys.modules[__name__]
    patch.setitem(sys.modules, "tvmdcn.builder", module)
    patch.setattr(tvmdcn, "builder", module, raising=False)
    patch.setattr(runtime, "_loaded", {})
    patch.setattr(api, "_kernels", {})
