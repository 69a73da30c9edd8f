# SPDX-License-Identifier: Apache-2.0
"""The GPUs that targets are named after: what a multiprocessor of each compute capability has, and how much fits.

Numbers are those of NVIDIA's CUDA C++ programming guide 13.0, "Compute capabilities"; ``tests/test_gpus.py``
compares :func:`occupancy` with the calculator that ships with CUDA (``cuda_occupancy.h``). Kept here so that
looking up an artifact needs neither CUDA nor a device. Multiprocessors and second-level cache are those of a usual
part, used only when another machine's kernel is built.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GPUS", "MAX_REGISTERS", "WARP", "Gpu", "Occupancy", "occupancy"]

WARP = 32
"""Threads of a warp."""

MAX_REGISTERS = 255
"""Registers that a thread can have."""

_KIB = 1024
# What the driver takes of shared memory for each block, from compute capability 8.0 on.
_RESERVED_SHARED = 1024
_REGISTERS_OF_WARP = 256  # the step in which a warp's registers are given out
_PARTITIONS = 4  # of a multiprocessor's registers and warps


class Gpu(NamedTuple):
    """What one multiprocessor has, and how many there are in a usual part.

    `shared_block_kib` is what a block may have at most, when it asks for it.
    """

    part: str
    multiprocessors: int
    l2_mib: int
    shared_kib: int
    shared_block_kib: int
    threads: int
    blocks: int
    features: frozenset[str]
    registers: int = 65536

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a multiprocessor."""
        return self.shared_kib * _KIB

    @property
    def shared_block_bytes(self) -> int:
        """Shared memory that a block may have."""
        return self.shared_block_kib * _KIB

    @property
    def l2_bytes(self) -> int:
        """The second-level cache of the whole GPU."""
        return self.l2_mib << 20


# What code may use without asking: matrix instructions by the type of their operands, asynchronous copies to
# shared memory, vector additions in global memory.
_VOLTA = frozenset({"mma.f16"})
_TURING = _VOLTA | {"ldmatrix"}
_AMPERE = _TURING | {"mma.bf16", "mma.tf32", "cp.async"}
_HOPPER = _AMPERE | {"red.vector", "wgmma", "tma"}
_BLACKWELL = _AMPERE | {"red.vector", "tma"}

# Those with a first digit of 10 and more have instructions of their own that we don't use; sm_90's run on sm_90 only.
GPUS: dict[str, Gpu] = {
    "sm_70": Gpu("V100", 80, 6, 96, 96, 2048, 32, _VOLTA),
    "sm_75": Gpu("T4", 40, 4, 64, 64, 1024, 16, _TURING),
    "sm_80": Gpu("A100", 108, 40, 164, 163, 2048, 32, _AMPERE),
    "sm_86": Gpu("RTX 3090", 82, 6, 100, 99, 1536, 16, _AMPERE),
    "sm_87": Gpu("Jetson AGX Orin", 16, 4, 164, 163, 1536, 16, _AMPERE),
    "sm_89": Gpu("RTX 4090", 128, 72, 100, 99, 1536, 24, _AMPERE),
    "sm_90": Gpu("H100 SXM", 132, 50, 228, 227, 2048, 32, _HOPPER),
    "sm_100": Gpu("B200", 148, 126, 228, 227, 2048, 32, _BLACKWELL),
    "sm_103": Gpu("B300", 148, 126, 228, 227, 2048, 32, _BLACKWELL),
    "sm_120": Gpu("RTX 5090", 170, 96, 100, 99, 1536, 24, _BLACKWELL),
}


class Occupancy(NamedTuple):
    """How many blocks of a kernel a multiprocessor holds at once.

    Parameters
    ----------
    blocks : int
        0 if not even one fits.
    fraction : float
        Warps at once, of all that a multiprocessor can hold.
    limit : str
        What keeps another block out: "registers", "shared memory", "warps" or "blocks".
    """

    blocks: int
    fraction: float
    limit: str


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Return how many blocks of a kernel a multiprocessor holds at once.

    Parameters
    ----------
    arch : str
        One of :data:`GPUS`.
    threads : int
        Threads of a block.
    registers : int
        Registers of a thread, as the compiler tells them.
    shared_bytes : int
        Shared memory of a block, static and dynamic.
    """
    gpu = GPUS[arch]
    major = int(arch.removeprefix("sm_")) // 10
    warps, all_warps = -(-threads // WARP), gpu.threads // WARP
    limits = {"warps": all_warps // warps, "blocks": gpu.blocks}
    per_warp = _round_up(max(registers, 1) * WARP, _REGISTERS_OF_WARP)
    fits = registers <= MAX_REGISTERS and per_warp * _round_up(warps, _PARTITIONS) <= gpu.registers
    per_partition = gpu.registers // _PARTITIONS // per_warp
    limits["registers"] = per_partition * _PARTITIONS // warps if fits else 0
    reserved, step = (_RESERVED_SHARED, 128) if major >= 8 else (0, 256)
    shared = _round_up(shared_bytes + reserved, step)
    if shared_bytes > gpu.shared_block_bytes:
        limits["shared memory"] = 0
    elif shared:
        limits["shared memory"] = gpu.shared_bytes // shared
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps / all_warps, limit)
