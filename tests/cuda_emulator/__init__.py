# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA C that TVM generates on a CPU, and reports what would be a fault on a GPU.

Used by the tests only. Threads of a block are fibers that meet at barriers and warp instructions; each access
to shared and global memory is checked for bounds, alignment, initialisation and races. What is right here can
still be slow, or wrong in ways that depend on a real machine's memory model: it complements a run on a GPU.
"""

from __future__ import annotations

from cuda_emulator.host import run_emulated
from cuda_emulator.machine import DeviceMemory, Emulated, EmulationError
from cuda_emulator.ptx import UnknownInstructionError
from cuda_emulator.source import Kernel, Parameter

__all__ = [
    "DeviceMemory",
    "Emulated",
    "EmulationError",
    "Kernel",
    "Parameter",
    "UnknownInstructionError",
    "run_emulated",
]
