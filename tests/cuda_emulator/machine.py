# SPDX-License-Identifier: Apache-2.0
"""Compiles translated kernels and launches them on the emulated machine."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from cuda_emulator.source import Kernel, Parameter, find_kernels, translate_source

__all__ = ["DeviceMemory", "Emulated", "EmulationError"]

_HERE = Path(__file__).parent
_FLAGS = ["-std=c++17", "-fPIC", "-shared", "-march=native", "-fvisibility=hidden"]
# -fno-tree-sra: a 16-byte access stays one access, so that its alignment is checked. Local variables start as
# rubbish that shows (NaN in halves, -1.7e38 in floats). Hopper's architecture: kernels take its vector additions.
_KERNEL_FLAGS = [
    *_FLAGS,
    "-D__CUDA_ARCH__=900",
    *("-O1", "-g1", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-tree-sra"),
    *("-ftrivial-auto-var-init=pattern", "-fsanitize=thread,bounds"),
]
# What a block may have on the largest multiprocessor, in bytes (compute capability 9.0 and 10.0).
_MAX_SHARED = 227 << 10
_MAX_THREADS = 1024
# The machine has one state.
_lock = threading.RLock()


class EmulationError(RuntimeError):
    """A kernel did something that it must not do on a GPU.

    The message names array, index, thread and block, and the line of the source where it is known.
    """


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cuda-emulator-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compile(arguments: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(["g++", *arguments], capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise EmulationError("the emulator needs g++ in PATH.") from None
    if done.returncode:
        raise EmulationError(f"g++ does not compile {what}:\n{done.stderr[:4000]}")


@functools.cache
def _machine() -> ctypes.CDLL:
    """Compile and load the machine, once per process."""
    path = _folder() / "libmachine.so"
    _compile([*_FLAGS, "-O2", "-o", str(path), str(_HERE / "machine.cpp")], "the machine")
    library = ctypes.CDLL(str(path))
    library.emulator_allocate.restype = ctypes.c_void_p
    library.emulator_allocate.argtypes = [ctypes.c_size_t] * 3 + [ctypes.c_int] * 2
    library.emulator_name.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    library.emulator_message.restype = ctypes.c_char_p
    library.emulator_site.restype = ctypes.c_void_p
    library.emulator_launch.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_size_t, *[ctypes.c_void_p] * 2]
    return library


class DeviceMemory:
    """Arrays on the emulated device: copies of NumPy arrays, or memory that nothing has written yet.

    A context manager: one at a time; leaving it frees everything.
    """

    def __enter__(self) -> DeviceMemory:
        _lock.acquire()
        self._arrays: list[tuple[int, np.ndarray]] = []
        _machine().emulator_reset()
        return self

    def __exit__(self, *_error: object) -> None:
        _machine().emulator_reset()
        _lock.release()

    def _allocate(self, size: int, phase: int, itemsize: int, writable: bool, defined: bool) -> int:
        address = _machine().emulator_allocate(size, phase, itemsize, writable, defined)
        if address is None:
            raise EmulationError(f"the emulated device has no {size} bytes left.")
        return int(address)

    def copy_in(self, array: np.ndarray, *, defined: bool = True) -> int:
        """Copy an array to the device; return its address there.

        A read-only array may not be written by kernels. The address is as far from a multiple of 16 as the
        array's own, so that views with an odd beginning stay odd. With ``defined=False`` the kernels must
        write an element before they read it.
        """
        if not array.flags.c_contiguous:
            raise ValueError(f"an array of shape {array.shape} and strides {array.strides} is not contiguous.")
        phase = array.ctypes.data % 16
        address = self._allocate(array.nbytes, phase, array.itemsize, array.flags.writeable, defined)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        self._arrays.append((address, array))
        return address

    def allocate(self, size: int, itemsize: int) -> int:
        """Return the address of `size` bytes that nothing has written."""
        return self._allocate(size, 0, itemsize, writable=True, defined=False)

    def copy_out(self) -> None:
        """Copy the arrays back that may be written."""
        for address, array in self._arrays:
            if array.flags.writeable:
                ctypes.memmove(array.ctypes.data, address, array.nbytes)


def _dtype_matches(array: np.ndarray, parameter: Parameter) -> bool:
    name = array.dtype.name
    return name == parameter.dtype or (parameter.dtype == "bfloat16" and name == "uint16")


class Emulated:
    """The kernels of one CUDA C source, compiled for the CPU.

    Parameters
    ----------
    source : str
        CUDA C as TVM generates it.

    Raises
    ------
    EmulationError
        If the source cannot be compiled.
    ValueError
        If it holds something that is not emulated.
    """

    _loaded: ClassVar[dict[str, ctypes.CDLL]] = {}

    def __init__(self, source: str) -> None:
        self.source = source
        self.kernels: Mapping[str, Kernel] = MappingProxyType(find_kernels(source))
        name = hashlib.sha256(source.encode()).hexdigest()[:24]
        self._path = _folder() / f"{name}.so"
        if name not in self._loaded:
            machine = _machine()
            text = _folder() / f"{name}.cpp"
            text.write_text("#include <emulator.h>\n#line 1\n" + translate_source(source))
            compiled = self._path.with_suffix(".o")
            flags = [flag for flag in _KERNEL_FLAGS if flag != "-shared"]
            include = f"-I{_HERE / 'include'}"
            _compile([*flags, include, "-c", "-o", str(compiled), str(text)], f"the kernels, see {text}")
            _compile(["-shared", "-o", str(self._path), str(compiled), str(machine._name)], "the kernels")
            self._loaded[name] = ctypes.CDLL(str(self._path))
        self._library = self._loaded[name]
        self._library.emulated_image.restype = ctypes.c_void_p

    def _fail(self, kernel: Kernel) -> None:
        machine = _machine()
        message = machine.emulator_message().decode()
        line = machine.emulator_line() or self._line_of(machine.emulator_site())
        lines = self.source.splitlines()
        place = f", line {line}: {lines[line - 1].strip()[:200]}" if 0 < line <= len(lines) else ""
        raise EmulationError(f"kernel {kernel.name}: {message}{place}")

    def _line_of(self, site: int | None) -> int:
        """Return the line of the source that a code address belongs to, 0 where it is not known."""
        if site is None or shutil.which("addr2line") is None:
            return 0
        offset = site - self._library.emulated_image(0) - 1
        command = ["addr2line", "-i", "-e", str(self._path), hex(offset)]
        found = subprocess.run(command, capture_output=True, text=True).stdout
        # The outermost of what was inlined, but not the entry.
        places = re.findall(r":(\d+)", "\n".join(line for line in found.splitlines() if "emulator.h" not in line))
        return int(places[0]) if places else 0

    def launch_at(
        self, name: str, grid: Sequence[int], block: Sequence[int], values: Sequence[Any], dynamic_shared_bytes: int = 0
    ) -> None:
        """Launch a kernel on arguments that are addresses of device memory, or numbers."""
        kernel = self.kernels[name]
        grid, block = (tuple(extents) + (1,) * (3 - len(extents)) for extents in (grid, block))
        self._check_launch(kernel, grid, block, dynamic_shared_bytes)
        if len(values) != len(kernel.parameters):
            raise ValueError(f"{name} takes {len(kernel.parameters)} arguments, got {len(values)}.")
        machine = _machine()
        pointers, kept = [], []
        for parameter, value in zip(kernel.parameters, values, strict=True):
            if parameter.pointer:
                itemsize = 2 if parameter.dtype == "bfloat16" else np.dtype(parameter.dtype).itemsize
                machine.emulator_name(value, parameter.name.encode(), itemsize)
                pointers.append(value)
            else:
                kept.append(np.array([value], dtype=parameter.dtype))
                pointers.append(kept[-1].ctypes.data)
        failed = machine.emulator_launch(
            ctypes.cast(getattr(self._library, f"emulated_{name}"), ctypes.c_void_p),
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            dynamic_shared_bytes,
            self._library.emulated_image(0),
            self._library.emulated_image(1),
        )
        if failed:
            self._fail(kernel)

    @staticmethod
    def _check_launch(kernel: Kernel, grid: Sequence[int], block: Sequence[int], shared: int) -> None:
        threads = int(np.prod(block, dtype=np.int64))
        limit = kernel.max_threads or _MAX_THREADS
        if not 0 < threads <= limit or min(block) < 1 or block[2] > 64:
            raise EmulationError(f"kernel {kernel.name}: launch with blocks of {tuple(block)}, the limit is {limit}.")
        if min(grid) < 1 or grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
            raise EmulationError(
                f"kernel {kernel.name}: launch with a grid of {tuple(grid)}, outside of CUDA's limits."
            )
        if not 0 <= shared <= _MAX_SHARED:
            raise EmulationError(
                f"kernel {kernel.name}: launch with {shared} bytes of dynamic shared memory, "
                f"the limit is {_MAX_SHARED}."
            )

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        dynamic_shared_bytes: int = 0,
        undefined: Sequence[int] = (),
    ) -> None:
        """Launch a kernel on NumPy arrays and numbers, and wait for it.

        Parameters
        ----------
        name : str
            One of :attr:`kernels`.
        grid, block : sequence of one to three int
            Extents in blocks and in threads; x first.
        arguments : sequence
            By position: contiguous arrays of the parameter's dtype (uint16 for bfloat16) and numbers. Arrays
            that are read-only may only be read; what kernels write to the others is there afterwards.
        dynamic_shared_bytes : int
            The size of dynamic shared memory.
        undefined : sequence of int
            Positions of arrays that hold nothing yet: reading an element before it is written is a fault.

        Raises
        ------
        EmulationError
            If the kernel does something that is a fault, or not certain to work, on a GPU.
        ValueError
            If arguments do not match the kernel's parameters.
        """
        kernel = self.kernels[name]
        if len(arguments) != len(kernel.parameters):
            raise ValueError(f"{name} takes {len(kernel.parameters)} arguments, got {len(arguments)}.")
        with DeviceMemory() as memory:
            values = []
            for index, (parameter, argument) in enumerate(zip(kernel.parameters, arguments, strict=True)):
                if not parameter.pointer:
                    values.append(argument)
                elif not isinstance(argument, np.ndarray) or not _dtype_matches(argument, parameter):
                    raise ValueError(f"argument {parameter.name} of {name} must be an array of {parameter.dtype}.")
                else:
                    values.append(memory.copy_in(argument, defined=index not in undefined))
            self.launch_at(name, grid, block, values, dynamic_shared_bytes)
            memory.copy_out()
