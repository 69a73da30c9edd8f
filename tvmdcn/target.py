# SPDX-License-Identifier: Apache-2.0
"""What a kernel is built for: a processor by LLVM's name, its vectors and its caches.

Nothing here needs the compiler, so that an artifact can be looked up where none is installed.
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import logging
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmdcn import env
from tvmdcn.cpus import ARM_PARTS, CPUS, name_x86
from tvmdcn.errors import SpecError, SpecTypeError

__all__ = [
    "TargetInfo",
    "available_processors",
    "detect_target",
    "host_features",
    "host_identity",
    "resolve_target",
]

_log = logging.getLogger(__name__)

_SYSTEM = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
# Linux's names of features that LLVM spells otherwise.
_FEATURE_NAMES = {
    "sse4_2": "sse4.2",
    "avx_vnni": "avxvnni",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
}
# sysctl hw.cpufamily of Apple's processors; newer ones are taken for the newest one listed.
_APPLE_FAMILIES = {
    0x1B588BB3: "apple-m1",
    0xDA33D83D: "apple-m2",
    0x8765EDEA: "apple-m2",
    0xFA33415E: "apple-m3",
}


@dataclass(frozen=True)
class TargetInfo:
    """A target: what kernels are built for.

    Parameters
    ----------
    kind : str
        "llvm".
    mcpu : str
        LLVM's name of the processor: one of :data:`tvmdcn.cpus.CPUS`.
    arch : str
        "x86_64" or "aarch64".
    features : frozenset of str
        What code for `mcpu` may use, in LLVM's spelling ("avx2", "avx512f", "neon", ...).
    l1d_bytes, l2_bytes, l3_bytes : int
        Caches that one core has: its data cache, its share of the second level, the whole third level (0:
        unknown).
    cores : int
        Processors that a process on the target may use (0: unknown).
    """

    kind: str
    mcpu: str
    arch: str
    features: frozenset[str]
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int = 0
    cores: int = 0

    @property
    def tag(self) -> str:
        """The name of the target in paths, such as "llvm-znver5"."""
        return self.tag_of(self.identity())

    @staticmethod
    def tag_of(identity: Mapping[str, str]) -> str:
        """Return the tag of what :meth:`identity` returns."""
        name = identity["arch"] if identity["mcpu"] == "generic" else identity["mcpu"]
        return f"{identity['kind']}-{name}"

    @property
    def vector_bits(self) -> int:
        """The width of a vector register: 512, 256 or 128."""
        if {"avx512f", "avx512vl"} <= self.features:
            return 512
        return 256 if "avx" in self.features else 128

    @property
    def vector_registers(self) -> int:
        """The number of vector registers: 32 with AVX-512 and on ARM, else 16."""
        return 32 if self.vector_bits == 512 or self.arch == "aarch64" else 16

    def identity(self) -> dict[str, str]:
        """Return what decides which machine code is generated, and so belongs in the key of an artifact."""
        return {"kind": self.kind, "arch": self.arch, "mcpu": self.mcpu}

    def to_tvm(self) -> Any:
        """Return the target as TVM's ``Target``. Imports TVM's compiler."""
        import tvm

        config: dict[str, Any] = {"kind": self.kind, "mcpu": self.mcpu}
        if self.cores:
            config["num-cores"] = self.cores
        if self.arch != _host_arch():
            config["mtriple"] = f"{self.arch}-linux-gnu"
        return tvm.target.Target(config)

    def to_json(self) -> dict[str, Any]:
        """Return the target as a dict of JSON types."""
        return {
            **self.identity(),
            "features": sorted(self.features),
            "l1d_bytes": self.l1d_bytes,
            "l2_bytes": self.l2_bytes,
            "l3_bytes": self.l3_bytes,
            "cores": self.cores,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TargetInfo:
        """Return the target that :meth:`to_json` wrote.

        Raises
        ------
        SpecError
            If a field is missing, unknown, or of another type than was written.
        """
        sizes = ("l1d_bytes", "l2_bytes", "l3_bytes", "cores")
        texts = ("kind", "arch", "mcpu")
        valid = (
            isinstance(data, Mapping)
            and set(data) == {*sizes, *texts, "features"}
            and all(isinstance(data[name], str) for name in texts)
            and all(type(data[name]) is int and data[name] >= 0 for name in sizes)
            and isinstance(data["features"], list)
            and all(isinstance(feature, str) for feature in data["features"])
        )
        if not valid:
            raise SpecError(f"not a target as TargetInfo.to_json writes it: {str(data)[:200]}.")
        return cls(**{**data, "features": frozenset(data["features"])})


def available_processors() -> list[int]:
    """Return the numbers of the processors that the current thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _host_arch() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _cpuinfo() -> list[dict[str, str]]:
    """Return /proc/cpuinfo, one dict per processor; empty where there is none."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        return []
    processors = []
    for block in text.split("\n\n"):
        fields = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        processors.append({name.strip(): value.strip() for name, value in fields})
    return [processor for processor in processors if processor]


def _features(processor: Mapping[str, str]) -> frozenset[str]:
    words = (processor.get("flags") or processor.get("Features") or "").split()
    return frozenset(_FEATURE_NAMES.get(word, word.replace("avx512_", "avx512")) for word in words)


def host_features() -> frozenset[str]:
    """Return the features of this machine in LLVM's spelling; empty where the system does not say."""
    processors = _cpuinfo()
    # Big and little cores may differ: only what all have can be relied on.
    return frozenset.intersection(*map(_features, processors)) if processors else frozenset()


def _sysctl(name: str) -> int:
    """Return an integer of macOS's sysctl, 0 where there is none."""
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    libc = ctypes.CDLL(None)
    failed = libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 0 if failed else value.value


def _host_cpu(arch: str, processors: list[dict[str, str]]) -> str:
    """Return LLVM's name of this machine's processor, or of the nearest one that it can run code for."""
    if sys.platform == "darwin":
        if arch == "aarch64":
            return _APPLE_FAMILIES.get(_sysctl("hw.cpufamily"), "apple-m4")
        return "x86-64-v3" if _sysctl("hw.optional.avx2_0") else "x86-64-v2"
    if arch == "aarch64":
        return _host_arm(processors)
    if not processors:
        return "x86-64-v2"
    first = processors[0]
    numbers = [first.get(name, "") for name in ("cpu family", "model")]
    family, model = (int(number) if number.isdigit() else -1 for number in numbers)
    return name_x86(first.get("vendor_id", ""), family, model, host_features())


def _host_arm(processors: list[dict[str, str]]) -> str:
    features = host_features()
    # Big cores come last; code for them runs on the little ones as long as all have the features.
    for processor in reversed(processors):
        try:
            part = int(processor["CPU implementer"], 0), int(processor["CPU part"], 0)
        except (KeyError, ValueError):
            continue
        name = ARM_PARTS.get(part)
        if name is not None and CPUS[name].features <= features:
            return name
    return "generic"


def _cache_count(text: str) -> int:
    """Return how many processors a list such as "0-3,8-11" names."""
    count = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


def _host_caches() -> dict[int, int]:
    """Return the cache sizes in bytes by level, the second level divided by the cores that share it."""
    if sys.platform == "darwin":
        # perflevel0 are the fast cores.
        sharing = max(_sysctl("hw.perflevel0.cpusperl2"), 1)
        level2 = (_sysctl("hw.perflevel0.l2cachesize") or _sysctl("hw.l2cachesize")) // sharing
        return {1: _sysctl("hw.perflevel0.l1dcachesize") or _sysctl("hw.l1dcachesize"), 2: level2}
    sizes: dict[int, int] = {}
    shared: dict[int, int] = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for index in sorted(_SYSTEM.glob(f"cpu{available_processors()[-1]}/cache/index[0-9]*")):
        try:
            kind, level, size, processors = (
                (index / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
            if kind in ("Data", "Unified"):
                sizes[int(level)] = int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)
                shared[int(level)] = _cache_count(processors)
        except (OSError, ValueError, IndexError) as error:
            _log.debug("%s cannot be read: %s", index, error)
    if 2 in sizes and 1 in shared:
        # Threads of one core share its first level: the ratio counts cores.
        sizes[2] //= max(shared[2] // shared[1], 1)
    return sizes


@functools.lru_cache(maxsize=1)
def detect_target() -> TargetInfo:
    """Return this machine as a target, without the compiler.

    The name is LLVM's of the same processor, so that records and artifacts of one kind of machine are found
    on another. Where the system hides features or the processor is unknown, it is a level of the x86-64
    psABI, or "generic" on ARM.

    Raises
    ------
    SpecError
        On an architecture other than x86-64 and AArch64.
    """
    arch = _host_arch()
    if arch not in ("x86_64", "aarch64"):
        raise SpecError(f"this machine is {arch}; kernels exist for x86_64 and aarch64.")
    name = _host_cpu(arch, _cpuinfo())
    caches = _host_caches()
    cpu = CPUS[name]
    return TargetInfo(
        kind="llvm",
        mcpu=name,
        arch=arch,
        features=cpu.features,
        l1d_bytes=caches.get(1) or cpu.l1d_bytes,
        l2_bytes=caches.get(2) or cpu.l2_bytes,
        l3_bytes=caches.get(3, 0),
        cores=len(available_processors()),
    )


def resolve_target(target: str | TargetInfo | None = None) -> TargetInfo:
    """Return a target from its name.

    Parameters
    ----------
    target : str, TargetInfo or None
        "llvm" is this machine; "llvm-NAME" or "NAME" a processor by LLVM's name; None is what TVMDCN_TARGET
        says, else this machine.

    Raises
    ------
    SpecError
        If the name is not known.
    SpecTypeError
        If it is not a name.
    """
    if isinstance(target, TargetInfo):
        return target
    if target is None:
        target = env.target() or "llvm"
    if not isinstance(target, str):
        raise SpecTypeError(f"target must be a name or a TargetInfo, got {target!r} of type {type(target).__name__}.")
    if target == "llvm":
        return detect_target()
    name = {"llvm-aarch64": "generic"}.get(target, target.removeprefix("llvm-"))
    if name not in CPUS:
        if name.startswith("cuda"):
            raise SpecError(f"target {target!r}: this version builds for CPUs only (llvm, llvm-znver5, ...).")
        near = difflib.get_close_matches(name, CPUS, n=3)
        raise SpecError(
            f"target {target!r} is not known. "
            + (f"Did you mean {' or '.join(near)}? " if near else "")
            + f"Use 'llvm' for this machine, or one of: {', '.join(CPUS)}."
        )
    if _host_arch() == CPUS[name].arch and detect_target().mcpu == name:
        return detect_target()
    cpu = CPUS[name]
    return TargetInfo("llvm", name, cpu.arch, cpu.features, cpu.l1d_bytes, cpu.l2_bytes)


def host_identity() -> dict[str, Any]:
    """Return what a measurement must be read with: processor, caches, system, versions."""
    from importlib import metadata

    processors = _cpuinfo()
    versions = {"python": platform.python_version()}
    for package in ("tvmdcn", "apache-tvm", "apache-tvm-ffi", "numpy", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    target = detect_target()
    return {
        "cpu": (processors[0].get("model name") if processors else None) or platform.processor() or target.mcpu,
        "target": target.to_json(),
        "processors": os.cpu_count() or 0,
        "hypervisor": bool(processors) and "hypervisor" in _features(processors[0]),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }
