# SPDX-License-Identifier: Apache-2.0
"""What NVIDIA's driver tells of the GPUs of this machine, through its C interface: no CUDA toolkit, no framework."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

from tvmdcn.errors import DeviceError

__all__ = ["Device", "device", "device_count", "driver_version"]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_SUCCESS = 0
# CUdevice_attribute
_ATTRIBUTES = {
    "threads": 39,  # of a multiprocessor
    "multiprocessors": 16,
    "l2_bytes": 38,
    "major": 75,
    "minor": 76,
    "shared_bytes": 81,  # of a multiprocessor
    "registers": 82,  # of a multiprocessor
    "shared_block_bytes": 97,  # of a block, when it asks
}


@dataclass(frozen=True)
class Device:
    """A GPU of this machine.

    Parameters
    ----------
    index : int
        Its number, as CUDA_VISIBLE_DEVICES leaves it: the ``i`` of torch's ``cuda:i``.
    name : str
        As the driver calls it, for example "NVIDIA H200".
    arch : str
        Its compute capability as a target names it, for example "sm_90".
    multiprocessors : int
    threads, registers, shared_bytes : int
        What a multiprocessor has.
    shared_block_bytes : int
        Shared memory that a block may have at most.
    l2_bytes, memory_bytes : int
    """

    index: int
    name: str
    arch: str
    multiprocessors: int
    threads: int
    registers: int
    shared_bytes: int
    shared_block_bytes: int
    l2_bytes: int
    memory_bytes: int


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    """Load and initialise the driver's library.

    Raises
    ------
    DeviceError
        If there is none, or it finds no device.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
        library.cuInit.argtypes = (ctypes.c_uint,)
        status = library.cuInit(0)
    except (OSError, AttributeError) as error:
        raise DeviceError(
            f"this machine has no NVIDIA driver ({_LIBRARY}: {error}). Run on a machine with an NVIDIA GPU, or name "
            "the one to build for: 'cuda-sm_90', for example."
        ) from error
    if status != _SUCCESS:
        raise DeviceError(
            f"NVIDIA's driver finds no GPU that this process may use (cuInit: {_error(library, status)}). Look at "
            "nvidia-smi and CUDA_VISIBLE_DEVICES, or name the GPU to build for: 'cuda-sm_90', for example."
        )
    return library


def _error(library: ctypes.CDLL, status: int) -> str:
    """Return the driver's name of a status."""
    text = ctypes.c_char_p()
    if library.cuGetErrorName(status, ctypes.byref(text)) == _SUCCESS and text.value:
        return f"{text.value.decode()}, {status}"
    return f"status {status}"


def _ask(name: str, *arguments: object) -> None:
    library = _driver()
    status = getattr(library, name)(*arguments)
    if status != _SUCCESS:
        raise DeviceError(f"NVIDIA's driver refuses {name}: {_error(library, status)}.")


def device_count() -> int:
    """Return how many GPUs this process may use; 0 where there is no driver."""
    count = ctypes.c_int()
    try:
        _ask("cuDeviceGetCount", ctypes.byref(count))
    except DeviceError:
        return 0
    return count.value


def driver_version() -> str:
    """Return the newest CUDA version that the driver can run, such as "13.0".

    Raises
    ------
    DeviceError
        If there is no driver.
    """
    version = ctypes.c_int()
    _ask("cuDriverGetVersion", ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


@functools.lru_cache(maxsize=64)
def device(index: int) -> Device:
    """Return a GPU of this machine.

    Raises
    ------
    DeviceError
        If there is no driver, or no such GPU.
    """
    _driver()
    count = device_count()
    if not 0 <= index < count:
        raise DeviceError(f"cuda:{index} does not exist: this process may use {count} GPU{'s' * (count != 1)}.")
    handle = ctypes.c_int()
    _ask("cuDeviceGet", ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(256)
    _ask("cuDeviceGetName", name, len(name), handle)
    memory = ctypes.c_size_t()
    _ask("cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
    found = {}
    for attribute, number in _ATTRIBUTES.items():
        value = ctypes.c_int()
        _ask("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
        found[attribute] = value.value
    arch = f"sm_{found.pop('major')}{found.pop('minor')}"
    return Device(index, name.value.decode(errors="replace"), arch, memory_bytes=memory.value, **found)
