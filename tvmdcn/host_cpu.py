# SPDX-License-Identifier: Apache-2.0
"""What processor this machine has: its name as LLVM has it, its features, its caches. Reads the system, no compiler."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from tvmdcn.cpus import ARM_PARTS, CPUS, name_x86

__all__ = ["available_processors", "cpuinfo", "features_of", "host_arch", "host_caches", "host_cpu", "host_features"]

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


def available_processors() -> list[int]:
    """Return the numbers of the processors that the current thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def host_arch() -> str:
    """Return the architecture of this machine as LLVM spells it."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def cpuinfo() -> list[dict[str, str]]:
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


def features_of(processor: Mapping[str, str]) -> frozenset[str]:
    """Return the features that /proc/cpuinfo lists for a processor, in LLVM's spelling."""
    words = (processor.get("flags") or processor.get("Features") or "").split()
    return frozenset(_FEATURE_NAMES.get(word, word.replace("avx512_", "avx512")) for word in words)


def host_features() -> frozenset[str]:
    """Return the features of this machine in LLVM's spelling; empty where the system does not say."""
    processors = cpuinfo()
    # Big and little cores may differ: only what all have can be relied on.
    return frozenset.intersection(*map(features_of, processors)) if processors else frozenset()


def _sysctl(name: str) -> int:
    """Return an integer of macOS's sysctl, 0 where there is none."""
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    libc = ctypes.CDLL(None)
    failed = libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 0 if failed else value.value


def host_cpu(arch: str, processors: list[dict[str, str]]) -> str:
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


def host_caches() -> dict[int, int]:
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
