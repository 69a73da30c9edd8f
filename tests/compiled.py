# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for tests, in processes of their own: TVM holds Python's lock while it compiles."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from strategies import Case

from tvmdcn.grad_kernel import GradKernel
from tvmdcn.kernel import Kernel
from tvmdcn.problems import Tensors, make_tensors
from tvmdcn.reference import reference
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo, detect_target, host_features, resolve_target
from tvmdcn.tensors import Gradients, numpy_dtype

# Three units and a bit, in two images, so that tiles end inside an image and the last unit overlaps; and an
# image with hardly more than one unit of outputs, or fewer.
SIZES = (Extents(2, 9, 10), Extents(1, 5, 6))


def runnable_targets() -> dict[int, TargetInfo]:
    """Return, for each width of vectors in bits, a target that this machine can run; its own width first."""
    host = detect_target()
    targets = {host.vector_bits: host}
    for name in ("x86-64-v4", "x86-64-v3", "x86-64-v2"):
        target = resolve_target(name)
        if target.arch == host.arch and target.features <= host_features():
            targets.setdefault(target.vector_bits, target)
    return targets


def error_of(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest error over the largest value, infinite if what is not finite differs."""
    assert found.shape == expected.shape
    found, finite = found.astype(np.float64), np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True):
        return np.inf
    worst = np.abs(found[finite] - expected[finite]).max(initial=0)
    return float(worst / np.abs(expected[finite]).max(initial=1e-30)) if np.isfinite(worst) else np.inf


_Allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
_in_use: list[object] = []


def dirty(kernel: Kernel | GradKernel) -> None:
    """Let all memory that a kernel takes for a call begin as NaNs, so that one shows which it reads but nobody wrote.

    TVM's runtime tells a library, when it is loaded, which function gives it memory; here another is put in its place.
    """
    library = ctypes.CDLL(str(kernel.artifact.library))
    try:
        given = ctypes.c_void_p.in_dll(library, "__TVMBackendAllocWorkspace")
    except ValueError:
        return  # it needs none
    allocate = _Allocate(given.value)

    def allocate_dirty(device: int, index: int, size: int, code: int, bits: int) -> int | None:
        memory = allocate(device, index, size, code, bits)
        if memory:
            ctypes.memset(memory, 0xFF, size)
        return memory

    function = _Allocate(allocate_dirty)
    _in_use.append(function)  # or Python would free it
    given.value = ctypes.cast(function, ctypes.c_void_p).value


def run(kernel: Kernel, tensors: Tensors, **options) -> np.ndarray:
    """Call a kernel."""
    return kernel(tensors.input, tensors.offset, tensors.weight, tensors.bias, tensors.mask, **options)


@dataclass(frozen=True)
class Job:
    """A kernel to build; `schedule` as of `tvmdcn.build`."""

    spec: DeformConv2dSpec
    target: TargetInfo
    schedule: str | Decisions = "default"
    sizes: Sequence[Extents] = SIZES
    threads: int = 2


@dataclass(frozen=True)
class Outcome:
    """What came out: the manifest's account of the schedule, and the error for each of the sizes."""

    schedule: dict
    errors: list[float]


def build_and_compare(job: Job, cache_dir: Path) -> Outcome:
    """Build a kernel and compare it with the reference; the work of one process."""
    from tvmdcn.builder import build

    artifact = build(job.spec, job.target, job.schedule, cache_dir)
    kernel = Kernel(artifact, job.threads)
    dirty(kernel)
    errors = []
    for seed, extents in enumerate(job.sizes):
        tensors = make_tensors(job.spec, extents, seed, far=0.1)
        errors.append(error_of(run(kernel, tensors), reference(job.spec, tensors)))
    return Outcome(dict(artifact.schedule), errors)


def build_only(spec: DeformConv2dSpec, schedule: str, cache_dir: Path) -> None:
    """Build a kernel for this machine into a cache, for the process that asked to find it there."""
    from tvmdcn.builder import build

    build(spec, schedule=schedule, cache_dir=cache_dir)


# --- gradients ----------------------------------------------------------------------------------------------

# Several units, the last of which overlaps; hardly more than one unit, or fewer; three images of several tiles; strange
# places, and strange pixels, also where the border is.
GRADIENT_CALLS = (
    (Extents(2, 9, 10), "border", "normal"),
    (Extents(1, 5, 6), "nan", "normal"),
    (Extents(3, 12, 13), "huge", "normal"),
    (Extents(1, 6, 9), "far", "normal"),
    (Extents(2, 8, 7), "border", "infinite"),
)
_MOST_THREADS = 4


def gradient_arguments(case: Case) -> dict[str, np.ndarray]:
    """Return the arguments of the gradients of a case, by name."""
    tensors = {name: array for name, array in vars(case.tensors).items() if array is not None and name != "bias"}
    drawn = np.random.default_rng([case.seed, 1]).standard_normal(case.spec.output_shape(case.extents))
    return {"grad_output": drawn.astype(numpy_dtype(case.spec.dtype)), **tensors}


def gradients_of(kernel: GradKernel, arguments: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Call a kernel; return what its specification asks for, by the names of the outputs."""
    found = kernel(*(arguments.get(name) for name in ("grad_output", "input", "offset", "weight", "mask")))
    return {f"grad_{name}": getattr(found, name) for name in Gradients._fields if getattr(found, name) is not None}


@dataclass(frozen=True)
class GradientOutcome:
    """What came out.

    Attributes
    ----------
    schedule : dict
        The manifest's account of it.
    errors : dict
        Each gradient's largest error.
    unsteady : set
        The gradients that depend on the number of threads, change from call to call, or depend on where tensors lie.
    overrun : set
        The gradients that are written beyond their memory.
    """

    schedule: dict
    errors: dict[str, float]
    unsteady: set[str]
    overrun: set[str]


_BESIDE = 65


def _anywhere(kernel: GradKernel, arguments: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], set[str]]:
    """Call a kernel with tensors that lie at multiples of nothing but their items.

    Returns
    -------
    gradients : dict
    overrun : set
        Those that were written beyond their memory.
    """
    moved = {}
    for name, array in arguments.items():
        moved[name] = np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
        moved[name][...] = array
    given = [moved.get(name) for name in ("grad_output", "input", "offset", "weight", "mask")]
    names = kernel.spec.outputs
    shapes = {"grad_bias": (kernel.spec.out_channels,)}
    shapes |= {name: arguments[name.removeprefix("grad_")].shape for name in names if name != "grad_bias"}
    dtype = arguments["grad_output"].dtype
    memory = {name: np.full(math.prod(shapes[name]) + 2 * _BESIDE, 7, dtype) for name in names}
    found = {name: memory[name][_BESIDE:-_BESIDE].reshape(shapes[name]) for name in names}
    kernel._gradients(*given, list(found.values()))
    beside = {name: np.concatenate([memory[name][:_BESIDE], memory[name][-_BESIDE:]]) for name in names}
    return found, {name for name in names if (beside[name] != 7).any()}


@functools.cache
def _caller() -> ThreadPoolExecutor:
    """Return a thread whose pool of TVM's workers is made for as many threads as are ever asked for."""
    return ThreadPoolExecutor(1)


def build_and_compare_gradients(
    spec: DeformConv2dGradSpec, target: TargetInfo, schedule: str | Decisions, cache_dir: Path
) -> GradientOutcome:
    """Build a kernel; compare it with the reference, and with itself on other numbers of threads."""
    from tvmdcn.builder import build

    artifact = build(spec, target, schedule, cache_dir)

    def compare() -> GradientOutcome:
        kernels = [GradKernel(artifact, threads) for threads in range(_MOST_THREADS, 0, -1)]
        dirty(kernels[-1])  # they share a library
        errors, unsteady, overrun = dict.fromkeys(spec.outputs, 0.0), set(), set()
        for seed, (extents, offsets, image) in enumerate(GRADIENT_CALLS):
            arguments = gradient_arguments(Case(spec, extents, offsets, image, False, seed))
            found = gradients_of(kernels[0], arguments)
            for name, expected in expected_gradients(spec, arguments).items():
                errors[name] = max(errors[name], error_of(found[name], expected))
            elsewhere, beyond = _anywhere(kernels[0], arguments)
            overrun |= beyond
            for again in (elsewhere, *(gradients_of(kernel, arguments) for kernel in kernels)):
                unsteady |= {name for name in found if again[name].tobytes() != found[name].tobytes()}
        return GradientOutcome(dict(artifact.schedule), errors, unsteady, overrun)

    return _caller().submit(compare).result()
