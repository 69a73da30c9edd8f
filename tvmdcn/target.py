# SPDX-License-Identifier: Apache-2.0
"""What a kernel is built for: a processor by LLVM's name, or a GPU by its compute capability.

Nothing here needs the compiler, so that an artifact can be looked up where none is installed.
"""

from __future__ import annotations

import difflib
import functools
import os
import platform
from typing import Any

from tvmdcn import cuda_driver, env
from tvmdcn.cpus import CPUS
from tvmdcn.cuda_driver import Device
from tvmdcn.errors import DeviceError, SpecError, SpecTypeError
from tvmdcn.gpus import GPUS, Gpu
from tvmdcn.host_cpu import (
    available_processors,
    cpuinfo,
    features_of,
    host_arch,
    host_caches,
    host_cpu,
    host_features,
)
from tvmdcn.target_kinds import CpuTarget, CudaTarget, TargetInfo

__all__ = [
    "CpuTarget",
    "CudaTarget",
    "TargetInfo",
    "available_processors",
    "detect_target",
    "device_target",
    "host_features",
    "host_identity",
    "resolve_target",
]


@functools.lru_cache(maxsize=1)
def detect_target() -> CpuTarget:
    """Return this machine's processor as a target, without the compiler.

    The name is LLVM's of the same processor, so that records and artifacts of one kind of machine are found
    on another. Where the system hides features or the processor is unknown, it is a level of the x86-64
    psABI, or "generic" on ARM.

    Raises
    ------
    SpecError
        On an architecture other than x86-64 and AArch64.
    """
    arch = host_arch()
    if arch not in ("x86_64", "aarch64"):
        raise SpecError(f"this machine is {arch}; kernels exist for x86_64 and aarch64.")
    name = host_cpu(arch, cpuinfo())
    caches = host_caches()
    cpu = CPUS[name]
    return CpuTarget(
        kind="llvm",
        mcpu=name,
        arch=arch,
        features=cpu.features,
        l1d_bytes=caches.get(1) or cpu.l1d_bytes,
        l2_bytes=caches.get(2) or cpu.l2_bytes,
        l3_bytes=caches.get(3, 0),
        cores=len(available_processors()),
    )


@functools.lru_cache(maxsize=64)
def device_target(index: int = 0) -> CudaTarget:
    """Return a GPU of this machine as a target, without the compiler.

    Parameters
    ----------
    index : int
        The ``i`` of torch's ``cuda:i``.

    Raises
    ------
    DeviceError
        If there is no driver, no such GPU, or it is older or newer than kernels exist for.
    """
    gpu = cuda_driver.device(index)
    if gpu.arch not in GPUS:
        raise DeviceError(
            f"cuda:{index} is a {gpu.name} of compute capability {gpu.arch}; kernels exist for {', '.join(GPUS)}."
        )
    return _cuda_target(gpu.arch, gpu)


def _cuda_target(arch: str, gpu: Device | Gpu) -> CudaTarget:
    return CudaTarget(
        kind="cuda",
        arch=arch,
        host=detect_target().arch,
        features=GPUS[arch].features,
        shared_bytes=gpu.shared_bytes,
        shared_block_bytes=gpu.shared_block_bytes,
        registers=gpu.registers,
        threads=gpu.threads,
        l2_bytes=gpu.l2_bytes,
        multiprocessors=gpu.multiprocessors,
    )


def resolve_target(target: str | TargetInfo | None = None) -> TargetInfo:
    """Return a target from its name.

    Parameters
    ----------
    target : str, TargetInfo or None
        "llvm" is this machine's processor, "cuda" its first GPU, "cuda:1" its second; "llvm-NAME" or "NAME" a
        processor by LLVM's name, "cuda-sm_90" or "sm_90" a GPU by its compute capability; None is what
        TVMDCN_TARGET says, else this machine's processor.

    Raises
    ------
    SpecError
        If the name is not known.
    SpecTypeError
        If it is not a name.
    DeviceError
        If it is a GPU of this machine, and there is none.
    """
    if isinstance(target, TargetInfo):
        return target
    if target is None:
        target = env.target() or "llvm"
    if not isinstance(target, str):
        raise SpecTypeError(f"target must be a name or a TargetInfo, got {target!r} of type {type(target).__name__}.")
    if target == "llvm":
        return detect_target()
    if target.startswith(("cuda", "sm_")):
        return _resolve_gpu(target)
    name = {"llvm-aarch64": "generic"}.get(target, target.removeprefix("llvm-"))
    if name not in CPUS:
        near = difflib.get_close_matches(name, CPUS, n=3)
        raise SpecError(
            f"target {target!r} is not known. "
            + (f"Did you mean {' or '.join(near)}? " if near else "")
            + f"Use 'llvm' for this machine, or one of: {', '.join(CPUS)}."
        )
    if host_arch() == CPUS[name].arch and detect_target().mcpu == name:
        return detect_target()
    cpu = CPUS[name]
    return CpuTarget("llvm", name, cpu.arch, cpu.features, cpu.l1d_bytes, cpu.l2_bytes)


def _resolve_gpu(target: str) -> CudaTarget:
    kind, _, index = target.partition(":")
    if kind == "cuda" and (not index or (index.isascii() and index.isdecimal())) and not target.endswith(":"):
        return device_target(int(index or 0))
    name = target.removeprefix("cuda-")
    if name not in GPUS:
        raise SpecError(
            f"target {target!r} is not known. Use 'cuda' for this machine's GPU ('cuda:1' for the second), or one of: "
            f"{', '.join(f'cuda-{name}' for name in GPUS)}."
        )
    for number in range(cuda_driver.device_count()):
        if cuda_driver.device(number).arch == name:
            return device_target(number)
    return _cuda_target(name, GPUS[name])


def host_identity() -> dict[str, Any]:
    """Return what a measurement must be read with: processor, caches, GPUs if there are any, system, versions."""
    from importlib import metadata

    processors = cpuinfo()
    versions = {"python": platform.python_version()}
    for package in ("tvmdcn", "apache-tvm", "apache-tvm-ffi", "numpy", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    target = detect_target()
    identity = {
        "cpu": (processors[0].get("model name") if processors else None) or platform.processor() or target.mcpu,
        "target": target.to_json(),
        "processors": os.cpu_count() or 0,
        "hypervisor": bool(processors) and "hypervisor" in features_of(processors[0]),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }
    gpus = [cuda_driver.device(index) for index in range(cuda_driver.device_count())]
    if gpus:
        identity["gpus"] = [{"name": gpu.name, "arch": gpu.arch, "memory_bytes": gpu.memory_bytes} for gpu in gpus]
        versions["cuda driver"] = cuda_driver.driver_version()
    return identity
