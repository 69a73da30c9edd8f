# SPDX-License-Identifier: Apache-2.0
"""``python -m tvmdcn.packs.check``: is this pack whole, does it run here, is it right, how soon.

For the machine that a pack was made for: it needs what the pack needs, NumPy and no more, so no ``click``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tvmdcn.errors import ArtifactError, SpecError, TvmdcnError
from tvmdcn.packs.active import active_packs
from tvmdcn.packs.choice import best_processor, runs_here
from tvmdcn.packs.manifest import PackedKernel
from tvmdcn.packs.pack import KernelPack
from tvmdcn.reference import reference
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.runtime import open_kernel
from tvmdcn.spec import DeformConv2dGradSpec, Extents
from tvmdcn.target import CudaTarget, detect_target
from tvmdcn.tensors import make_gradient_tensors, make_layer_tensors, make_tensors

__all__ = ["error_of", "first_results", "main"]

# Of the largest value: kernels add in another order than the reference, in their own precision.
_TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
_SIZES = (Extents(2, 20, 24), Extents(1, 9, 11))

# What a program does, from its first import to its first result.
_PROGRAM = """
import time
start = time.perf_counter()
import numpy as np
import tvmdcn
x, offset, mask = (None if shape is None else np.zeros(shape, {dtype!r}) for shape in {shapes!r})
weight = np.zeros({weight!r}, {dtype!r})
y = tvmdcn.deform_conv2d(x, offset, weight, stride={stride!r}, padding={padding!r}, dilation={dilation!r}, mask=mask)
seconds = time.perf_counter() - start
import sys
assert "tvm" not in sys.modules and "tvm_ffi" not in sys.modules
print(seconds)
"""


def error_of(pack: KernelPack, kernel: PackedKernel) -> float:
    """Return the largest error of a kernel, in units of the largest value, against the float64 reference.

    Raises
    ------
    ArtifactError
        If the kernel cannot be loaded.
    SpecError
        If NumPy has no such dtype here.
    """
    spec, worst = kernel.spec, 0.0
    loaded = open_kernel(pack.artifact(kernel))
    for seed, extents in enumerate(_SIZES):
        if isinstance(spec, DeformConv2dGradSpec):
            tensors = make_gradient_tensors(spec, extents, seed)
            expected = expected_gradients(spec, tensors)
        else:
            tensors = make_layer_tensors(spec, extents, seed)
            expected = {"output": reference(spec, make_tensors(spec, extents, seed))}
        found = loaded.bind(tensors)()
        for name, right in expected.items():
            largest = np.abs(right).max(initial=1e-30)
            difference = np.abs(found[name].astype(np.float64).reshape(right.shape) - right).max(initial=0)
            worst = max(worst, float("inf") if np.isnan(difference) else float(difference / largest))
    return worst


def first_results(pack: KernelPack, processes: int = 5) -> list[float]:
    """Return the seconds from the first import to the first result of new processes; empty if no layer is fit for it.

    Each imports NumPy and tvmdcn, makes arguments (a batch of one image of 32 x 32 pixels), and calls
    ``tvmdcn.deform_conv2d``, with ``TVMDCN_BUILD=never``. One process before them, untimed, warms the file cache.

    Raises
    ------
    ArtifactError
        If a process fails; the message is its own.
    """
    fit = (k for k in pack.kernels if k.spec.operator == "deform_conv2d" and k.spec.layout == "NCHW")
    chosen = best_processor(k for k in fit if k.spec.dtype != "bfloat16")
    if chosen is None:
        return []
    spec, extents = chosen.spec, Extents(1, 32, 32)
    mask = spec.mask_shape(extents) if spec.mask else None
    code = _PROGRAM.format(
        dtype=spec.dtype,
        shapes=(spec.input_shape(extents), spec.offset_shape(extents), mask),
        weight=spec.weight_shape,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
    )
    environment = {**os.environ, "TVMDCN_BUILD": "never"}
    if not pack.installed:
        environment["TVMDCN_PACK"] = str(pack.path)
    seconds = []
    for _ in range(processes + 1):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
            raise ArtifactError(f"a new process found no result: {lines[-1][:400]}")
        seconds.append(float(done.stdout))
    return seconds[1:]


def _check(pack: KernelPack, processes: int) -> bool:
    """Print what can be said of a pack; return whether all of it is good."""
    pack.verify()
    files = len(pack.manifest.files)
    files = len(pack.manifest.files)
    print(f"{pack.manifest.name} {pack.manifest.version} in {pack.path}: all {files} files are right")
    print(f"sha256 {pack.sha256}; made {pack.manifest.created} by tvmdcn {pack.manifest.tvmdcn}")
    host = detect_target().tag
    good = runs = True
    for spec in dict.fromkeys(kernel.spec for kernel in pack.kernels):
        built = pack.of_layer(spec)
        title = f"{spec.operator} {spec.slug}"
        best = best_processor(built)
        chosen = [best] if best is not None else []
        chosen += [kernel for kernel in built if isinstance(kernel.target, CudaTarget) and runs_here(kernel.target)]
        if not chosen:
            print(f"{title}: none of {', '.join(kernel.target.tag for kernel in built)} runs on this {host}")
            runs = False
        for kernel in chosen:
            try:
                error = error_of(pack, kernel)
            except SpecError as refusal:
                print(f"{title}: {kernel.target.tag}, not compared: {refusal}")
                continue
            right = error <= _TOLERANCES[spec.dtype]
            good = good and right
            print(f"{title}: {kernel.target.tag}, max error {error:.0e}" + ("" if right else " IS TOO LARGE"))
    seconds = first_results(pack, processes) if processes else []
    if seconds:
        print(
            f"first result {statistics.median(seconds):.3f} s after the first import (median of {len(seconds)} new "
            f"processes, {min(seconds):.3f} to {max(seconds):.3f} s; {host}, Python {platform.python_version()}, "
            f"NumPy {np.__version__})"
        )
    return good and runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Check packs; return 0 if all is well, 1 if something is wrong or nothing runs here."""
    parser = argparse.ArgumentParser(prog="python -m tvmdcn.packs.check", description=__doc__)
    parser.add_argument(
        "packs", nargs="*", type=Path, help="directories; by default the packs of TVMDCN_PACK and those installed"
    )
    parser.add_argument("--sha256", help="the digest that the (one) pack must have")
    parser.add_argument(
        "--processes", type=int, default=5, help="new processes to time the first result in (default 5; 0: none)"
    )
    options = parser.parse_args(arguments)
    if options.sha256 is not None and len(options.packs) != 1:
        parser.error("--sha256 goes with one pack")
    try:
        packs = [KernelPack.read(path, options.sha256) for path in options.packs] or active_packs()
        if not packs:
            print("no pack is installed, and TVMDCN_PACK is not set: name a directory", file=sys.stderr)
            return 1
        return 0 if all([_check(pack, options.processes) for pack in packs]) else 1
    except TvmdcnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
