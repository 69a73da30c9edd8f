# SPDX-License-Identifier: Apache-2.0
"""The processors that targets are named after: LLVM's names, how to recognise them, what they have.

Names, model numbers and implied features are LLVM 22's (``llvm/lib/TargetParser/Host.cpp`` and
``llvm_get_cpu_features`` of the pinned TVM; ``tests/test_target.py`` compares them). Kept here so that
looking up an artifact needs no compiler. Only features that a compiler may use unasked are listed; cache
sizes are those of one core of the usual part, used only when another machine's kernel is built.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import NamedTuple

__all__ = ["ARM_PARTS", "CPUS", "X86_LEVELS", "Cpu", "name_x86"]

_KIB = 1024
_V2 = frozenset({"sse4.2"})
_V3 = _V2 | {"avx", "avx2", "fma", "f16c", "bmi2"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_CASCADE = _V4 | {"avx512vnni"}
_ICE = _CASCADE | {"avx512vbmi", "avx512vbmi2", "avx512ifma", "avx512bitalg", "avx512vpopcntdq"}
_SAPPHIRE = _ICE | {"avx512bf16", "avx512fp16", "avxvnni"}
_V3_VNNI = _V3 | {"avxvnni"}
_NEON = frozenset({"neon"})
_NEON_82 = _NEON | {"fullfp16", "dotprod"}
_NEON_86 = _NEON_82 | {"bf16", "i8mm"}
_SVE2 = _NEON_86 | {"sve", "sve2"}


class Cpu(NamedTuple):
    """One processor: architecture, features that its name implies, and cache sizes of one core in KiB."""

    arch: str
    features: frozenset[str]
    l1d_kib: int
    l2_kib: int

    @property
    def l1d_bytes(self) -> int:
        """The size of the first-level data cache."""
        return self.l1d_kib * _KIB

    @property
    def l2_bytes(self) -> int:
        """The share of the second-level cache that one core has."""
        return self.l2_kib * _KIB


def _family(arch: str, rows: str, features: frozenset[str]) -> dict[str, Cpu]:
    table = {}
    for row in rows.split(","):
        name, l1d, l2 = row.split()
        table[name] = Cpu(arch, features, int(l1d), int(l2))
    return table


CPUS: dict[str, Cpu] = {
    **_family("x86_64", "x86-64 32 256", frozenset()),
    **_family("x86_64", "x86-64-v2 32 256, nehalem 32 256, westmere 32 256, goldmont 24 512, tremont 32 512", _V2),
    **_family("x86_64", "sandybridge 32 256", _V2 | {"avx"}),
    **_family("x86_64", "ivybridge 32 256", _V2 | {"avx", "f16c"}),
    **_family("x86_64", "x86-64-v3 32 256, haswell 32 256, broadwell 32 256, skylake 32 256", _V3),
    **_family("x86_64", "znver1 32 512, znver2 32 512, znver3 32 512", _V3),
    **_family("x86_64", "alderlake 48 1280, arrowlake 48 2048, arrowlake-s 48 2048, pantherlake 48 2048", _V3_VNNI),
    **_family("x86_64", "sierraforest 32 1024, grandridge 32 1024, clearwaterforest 32 1024", _V3_VNNI),
    **_family("x86_64", "x86-64-v4 32 512, skylake-avx512 32 1024", _V4),
    **_family("x86_64", "cascadelake 32 1024", _CASCADE),
    **_family("x86_64", "cooperlake 32 1024", _CASCADE | {"avx512bf16"}),
    **_family("x86_64", "icelake-client 48 512, icelake-server 48 1280, rocketlake 48 512, tigerlake 48 1280", _ICE),
    **_family("x86_64", "sapphirerapids 48 2048, graniterapids 48 2048, graniterapids-d 48 2048", _SAPPHIRE),
    **_family("x86_64", "znver4 32 1024", _ICE | {"avx512bf16"}),
    **_family("x86_64", "znver5 48 1024", _ICE | {"avx512bf16", "avxvnni"}),
    **_family("aarch64", "generic 32 256, cortex-a53 32 128, cortex-a57 32 256, cortex-a72 32 256", _NEON),
    **_family("aarch64", "cortex-a73 32 256, thunderx2t99 32 256", _NEON),
    **_family("aarch64", "cortex-a55 32 128, cortex-a75 64 256, cortex-a76 64 256, cortex-a77 64 256", _NEON_82),
    **_family("aarch64", "cortex-a78 64 256, cortex-x1 64 512, neoverse-n1 64 1024, tsv110 64 512", _NEON_82),
    **_family("aarch64", "apple-m1 128 3072", _NEON_82),
    **_family("aarch64", "ampere1 64 2048, ampere1a 64 2048, ampere1b 64 2048, oryon-1 96 3072", _NEON_86),
    **_family("aarch64", "apple-m2 128 4096, apple-m3 128 4096, apple-m4 128 4096", _NEON_86),
    **_family("aarch64", "a64fx 64 640", _NEON | {"fullfp16", "sve"}),
    **_family("aarch64", "neoverse-v1 64 1024", _NEON_86 | {"sve"}),
    **_family("aarch64", "cortex-a510 32 128, cortex-a520 32 128, cortex-a710 64 256, cortex-a715 64 256", _SVE2),
    **_family("aarch64", "cortex-a720 64 256, cortex-x2 64 512, cortex-x3 64 512, cortex-x4 64 1024", _SVE2),
    **_family("aarch64", "neoverse-n2 64 1024, neoverse-n3 64 1024, neoverse-v2 64 2048, neoverse-v3 64 2048", _SVE2),
}

# The levels of the x86-64 psABI, best first: what an unknown processor, or one whose features a hypervisor
# hides, is.
X86_LEVELS = ("x86-64-v4", "x86-64-v3", "x86-64-v2", "x86-64")

# /proc/cpuinfo "model" of family 6.
_INTEL_MODELS = {
    "nehalem": (0x1A, 0x1E, 0x1F, 0x2E),
    "westmere": (0x25, 0x2C, 0x2F),
    "sandybridge": (0x2A, 0x2D),
    "ivybridge": (0x3A, 0x3E),
    "haswell": (0x3C, 0x3F, 0x45, 0x46),
    "broadwell": (0x3D, 0x47, 0x4F, 0x56),
    "skylake": (0x4E, 0x5E, 0x8E, 0x9E, 0xA5, 0xA6),
    "rocketlake": (0xA7,),
    "icelake-client": (0x7D, 0x7E),
    "icelake-server": (0x6A, 0x6C),
    "tigerlake": (0x8C, 0x8D),
    "alderlake": (0x97, 0x9A, 0xBE, 0xB7, 0xBA, 0xBF, 0xAA, 0xAC),
    "arrowlake": (0xC5, 0xB5),
    "arrowlake-s": (0xC6, 0xBD),
    "pantherlake": (0xCC,),
    "sapphirerapids": (0x8F, 0xCF),
    "graniterapids": (0xAD,),
    "graniterapids-d": (0xAE,),
    "sierraforest": (0xAF,),
    "grandridge": (0xB6,),
    "clearwaterforest": (0xDD,),
    "goldmont": (0x5C, 0x5F, 0x7A),
    "tremont": (0x86, 0x8A, 0x96, 0x9C),
}
_INTEL_NAMES = {model: name for name, models in _INTEL_MODELS.items() for model in models}
_SKYLAKE_SERVER = 0x55

# (implementer, part) of an ARM core.
ARM_PARTS: dict[tuple[int, int], str] = {
    (0x41, 0xD03): "cortex-a53",
    (0x41, 0xD05): "cortex-a55",
    (0x41, 0xD07): "cortex-a57",
    (0x41, 0xD08): "cortex-a72",
    (0x41, 0xD09): "cortex-a73",
    (0x41, 0xD0A): "cortex-a75",
    (0x41, 0xD0B): "cortex-a76",
    (0x41, 0xD0C): "neoverse-n1",
    (0x41, 0xD0D): "cortex-a77",
    (0x41, 0xD40): "neoverse-v1",
    (0x41, 0xD41): "cortex-a78",
    (0x41, 0xD44): "cortex-x1",
    (0x41, 0xD46): "cortex-a510",
    (0x41, 0xD47): "cortex-a710",
    (0x41, 0xD48): "cortex-x2",
    (0x41, 0xD49): "neoverse-n2",
    (0x41, 0xD4D): "cortex-a715",
    (0x41, 0xD4E): "cortex-x3",
    (0x41, 0xD4F): "neoverse-v2",
    (0x41, 0xD80): "cortex-a520",
    (0x41, 0xD81): "cortex-a720",
    (0x41, 0xD82): "cortex-x4",
    (0x41, 0xD83): "neoverse-v3",
    (0x41, 0xD84): "neoverse-v3",
    (0x41, 0xD8E): "neoverse-n3",
    (0x42, 0x516): "thunderx2t99",
    (0x43, 0x0AF): "thunderx2t99",
    (0x46, 0x001): "a64fx",
    (0x48, 0xD01): "tsv110",
    (0x51, 0x001): "oryon-1",
    (0xC0, 0xAC3): "ampere1",
    (0xC0, 0xAC4): "ampere1a",
    (0xC0, 0xAC5): "ampere1b",
}


def _name_intel(family: int, model: int, features: AbstractSet[str]) -> str | None:
    if family != 6:
        return None
    if model == _SKYLAKE_SERVER:
        if "avx512bf16" in features:
            return "cooperlake"
        return "cascadelake" if "avx512vnni" in features else "skylake-avx512"
    return _INTEL_NAMES.get(model)


def _name_amd(family: int, model: int) -> str | None:
    if family == 0x17:
        return "znver2" if 0x30 <= model <= 0x4F or 0x60 <= model <= 0xAF else "znver1"
    if family == 0x19:
        zen4 = 0x10 <= model <= 0x1F or 0x60 <= model <= 0x7B or 0xA0 <= model <= 0xAF
        return "znver4" if zen4 else "znver3"
    if family == 0x1A:
        zen5 = model <= 0x4F or 0x60 <= model <= 0x77 or 0xD0 <= model <= 0xD7
        return "znver5" if zen5 else None
    return None


def name_x86(vendor: str, family: int, model: int, features: AbstractSet[str]) -> str:
    """Return the name of an x86-64 processor that `features` suffice for.

    An unknown processor, or one that lacks a feature its name implies (hypervisors mask features), is named
    after the best level of the psABI that it reaches: code for its name would end in an illegal instruction.
    """
    name = None
    if vendor == "GenuineIntel":
        name = _name_intel(family, model, features)
    elif vendor in ("AuthenticAMD", "HygonGenuine"):
        name = _name_amd(family, model)
    for candidate in (name, *X86_LEVELS):
        if candidate is not None and CPUS[candidate].features <= features:
            return candidate
    return X86_LEVELS[-1]
