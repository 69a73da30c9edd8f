# SPDX-License-Identifier: Apache-2.0
"""A builder whose kernels are written by hand in C: for tests of what surrounds a kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

import tvmdcn
from tvmdcn import api, gradient, runtime
from tvmdcn.artifact import Artifact, build_once
from tvmdcn.cache_key import CacheKey
from tvmdcn.errors import BuildError
from tvmdcn.kernel import Kernel
from tvmdcn.kernel_interface import KernelInterface
from tvmdcn.reference import reference
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.target import resolve_target
from tvmdcn.tensors import Tensors

ROOT = Path(__file__).resolve().parent.parent
# torchvision's asymmetric test problem.
SPEC = DeformConv2dSpec(6, 2, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3)
EXTENTS = Extents(3, 5, 4)

SOURCES = {
    "deform_conv2d": Path(__file__).with_name("handmade_kernel.c"),
    "deform_conv2d_grad": Path(__file__).with_name("handmade_grad_kernel.c"),
}
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
    if isinstance(spec, DeformConv2dGradSpec):
        names = ("grad_input", "grad_offset", "grad_weight", "grad_bias")
        macros |= {name.upper(): int(getattr(spec, name)) for name in names}
        macros["MMCV"] = int(spec.border == "mmcv")
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    source = str(SOURCES[spec.operator])
    command = [COMPILER or "cc", "-O1", "-shared", "-fPIC", *defines, "-o", str(library), source, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise BuildError(f"the handmade kernel does not compile: {done.stderr}")
    in_group, out_group = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    shape: tuple[int, ...] = (spec.groups, -(-out_group // LANES), spec.taps, in_group, LANES)
    if isinstance(spec, DeformConv2dGradSpec):
        shape = (spec.groups, spec.taps, 1, out_group, in_group)
    return KernelInterface(GRANULE, MAX_UNITS, shape, spec.accumulator_dtype, spec.layout, spec.operator)


def build(
    spec: DeformConv2dSpec,
    target: Any = None,
    schedule: str = "tuned",
    cache_dir: Path | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Build as :func:`tvmdcn.build` does."""
    info = resolve_target(target)

    def make(directory: Path) -> tuple[KernelInterface, dict[str, Any]]:
        return compile_library(spec, directory / "kernel.so"), {"source": "handmade"}

    key = CacheKey.of(spec, info, schedule)
    return build_once(key, info, make, cache_dir, rebuild)


def install(patch: Any) -> None:
    """Take the place of :mod:`tvmdcn.builder`, with nothing in memory; `patch` is a MonkeyPatch."""
    module = sys.modules[__name__]
    patch.setitem(sys.modules, "tvmdcn.builder", module)
    patch.setattr(tvmdcn, "builder", module, raising=False)
    patch.setattr(runtime, "_loaded", {})
    patch.setattr(api, "_kernels", {})
    patch.setattr(gradient, "_kernels", {}, raising=False)
    # Not the cache that tests of compiled kernels share: one would take the other's artifacts for its own.
    shared = Path(os.environ.get("TVMDCN_CACHE_DIR") or "")
    if shared.name.startswith("session-cache"):
        own = shared.with_name(f"handmade-{shared.name}")
        own.mkdir(mode=0o700, exist_ok=True)
        patch.setenv("TVMDCN_CACHE_DIR", str(own))


def kernel_of(spec: DeformConv2dSpec = SPEC, **options) -> Kernel:
    return tvmdcn.load(spec, **options)


def variant(**changes) -> DeformConv2dSpec:
    return DeformConv2dSpec.from_json({**SPEC.to_json(), **changes})


def error(result, spec: DeformConv2dSpec, tensors: Tensors) -> float:
    expected = reference(spec, tensors)
    result = np.asarray(result, np.float64)
    assert result.shape == expected.shape
    return float(np.abs(result - expected).max(initial=0) / np.abs(expected).max(initial=1e-30))


def call(kernel: Kernel, tensors: Tensors, **options):
    return kernel(tensors.input, tensors.offset, tensors.weight, tensors.bias, tensors.mask, **options)


def torch_of(array: np.ndarray):
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def run(*parts: str, timeout: float = 60, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own, which knows the handmade builder."""
    prelude = """
    import sys, types
    sys.path[:0] = [{tests!r}, {root!r}]
    import pytest
    def handmade_builder():
        import handmade
        handmade.install(pytest.MonkeyPatch())
    """.format(tests=str(ROOT / "tests"), root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", "".join(map(textwrap.dedent, (prelude, *parts)))],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def strided(array: np.ndarray) -> np.ndarray:
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array
