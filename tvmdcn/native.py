# SPDX-License-Identifier: Apache-2.0
"""Compiled modules through the C interface of tvm-ffi: load, look up, call.

Only two small libraries are loaded, ``libtvm_ffi`` and ``libtvm_runtime``, never the compiler. The Python
package ``tvm_ffi`` is not imported either: importing it imports torch wherever torch is installed (1.5 s
here, November 2026), and its conversion of arguments refuses read-only and bfloat16 NumPy arrays. The C
interface is the stable part of tvm-ffi; the structures below are those of ``tvm/ffi/c_api.h`` and
``dlpack/dlpack.h``.

Tensors are passed as DLPack's ``DLTensor``. A :class:`Frame` holds one prepared call: all arguments, shapes
and strides, in one block of memory in which a call only fills in the data pointers.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tvmdcn.errors import ArtifactError
from tvmdcn.openmp import Team, join_team

__all__ = ["Frame", "Function", "Module", "Tensor", "load_module"]

# enum TVMFFITypeIndex
_INT, _DLTENSOR, _RAW_STR, _FUNCTION, _MODULE = 1, 7, 8, 68, 73
_OBJECT_HEADER_BYTES = 24  # TVMFFIObject
# struct DLTensor in 64-bit words: data, device, (ndim, dtype), shape, strides, byte_offset
_DLTENSOR_WORDS = 6
_DL_CPU, DL_CUDA = 1, 2
# DLDataType as a 32-bit word: code, bits, lanes (1)
_DL_DTYPES = {
    name: code | bits << 8 | 1 << 16
    for name, (code, bits) in {
        "float16": (2, 16),
        "float32": (2, 32),
        "float64": (2, 64),
        "bfloat16": (4, 16),
        "uint32": (1, 32),
        "int64": (0, 64),
    }.items()
}


class _Any(ctypes.Structure):
    """``TVMFFIAny``: a type index and 8 bytes of value."""

    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int64))


class _Bytes(ctypes.Structure):
    """``TVMFFIByteArray``."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


DISTRIBUTIONS = {"tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
"""The packages with the libraries, and what installs them."""


class Provided(NamedTuple):
    """A library that is used where its package is not installed: path, version, and a check before it is loaded."""

    path: Path
    version: str
    check: Callable[[], object]


_provided: dict[str, Provided] = {}


def provide(libraries: Mapping[str, Provided]) -> None:
    """Use these libraries, by name ("tvm_runtime", ...), where their packages are not installed.

    Raises
    ------
    ArtifactError
        If this process runs kernels with another version already.
    """
    with _runtime_lock:
        for name, given in libraries.items():
            known = _provided.get(name)
            if known is not None and known.version != given.version:
                raise ArtifactError(
                    f"this process runs kernels with {known.path} of version {known.version}, and {given.path} is of "
                    f"version {given.version}. Use packs of one version in a process."
                )
            if known is None or _runtime is None:
                _provided[name] = given


def is_provided(name: str) -> bool:
    """Return whether somebody has provided a library."""
    return name in _provided


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed, "unknown" if it does not say."""
    if importlib.util.find_spec(package) is None:
        return None
    from importlib import metadata  # 30 ms

    try:
        return metadata.version(DISTRIBUTIONS[package])
    except metadata.PackageNotFoundError:
        return "unknown"


def library(package: str, name: str) -> Path:
    """Return the path of a library in the `lib` directory of an installed package, without importing that."""
    prefix, suffix = (
        ("", ".dll") if sys.platform == "win32" else ("lib", ".dylib" if sys.platform == "darwin" else ".so")
    )
    spec = importlib.util.find_spec(package)
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(directory, "lib", f"{prefix}{name}{suffix}")
        if path.is_file():
            return path
    if spec is None and name in _provided:
        _provided[name].check()
        return _provided[name].path
    raise ArtifactError(
        f"{prefix}{name}{suffix} was not found in the package {package}, and kernels cannot run without it. "
        f"Install {DISTRIBUTIONS[package]} in the version that tvmdcn pins (pip install tvmdcn does)."
    )


class _Runtime:
    """The two libraries and the few functions of them that are used."""

    def __init__(self) -> None:
        # Global symbols: a kernel finds TVMBackendParallelLaunch and its like in the process, or crashes when
        # called.
        self.ffi = ctypes.CDLL(str(library("tvm_ffi", "tvm_ffi")), mode=ctypes.RTLD_GLOBAL)
        self.runtime = ctypes.CDLL(str(library("tvm", "tvm_runtime")), mode=ctypes.RTLD_GLOBAL)
        pointer, integer = ctypes.c_void_p, ctypes.c_int32
        self.call = self.ffi.TVMFFIFunctionCall
        self.call.argtypes, self.call.restype = (pointer, pointer, integer, pointer), ctypes.c_int
        self._get_global = self.ffi.TVMFFIFunctionGetGlobal
        self._get_global.argtypes, self._get_global.restype = (pointer, pointer), ctypes.c_int
        self._take_error = self.ffi.TVMFFIErrorMoveFromRaised
        self._take_error.argtypes, self._take_error.restype = (pointer,), None
        self._set_stream = self.ffi.TVMFFIEnvSetStream
        self._set_stream.argtypes = (integer, integer, pointer, pointer)
        self._set_stream.restype = ctypes.c_int
        self.release = self.ffi.TVMFFIObjectDecRef
        self.release.argtypes, self.release.restype = (pointer,), ctypes.c_int

    def error(self) -> str:
        """Return the text of the error that the last call raised, and clear it."""
        handle = ctypes.c_void_p()
        self._take_error(ctypes.byref(handle))
        if not handle.value:
            return "an error without a message"
        # TVMFFIErrorCell begins with the byte arrays kind and message.
        kind, message = (_Bytes * 2).from_address(handle.value + _OBJECT_HEADER_BYTES)
        text = ": ".join(
            ctypes.string_at(part.data, part.size).decode(errors="replace") for part in (kind, message) if part.size
        )
        self.release(handle)
        return text

    def invoke(self, handle: int, *arguments: Any) -> tuple[int, int]:
        """Call a function with ints, bytes (as strings) and (index, handle) pairs; return index and value."""
        values = (_Any * len(arguments))()
        for value, argument in zip(values, arguments, strict=True):
            if isinstance(argument, bytes):
                pointer = ctypes.cast(ctypes.c_char_p(argument), ctypes.c_void_p).value or 0
                value.type_index, value.value = _RAW_STR, pointer
            elif isinstance(argument, tuple):
                value.type_index, value.value = argument
            else:
                value.type_index, value.value = _INT, argument
        result = _Any()
        if self.call(handle, ctypes.byref(values), len(arguments), ctypes.byref(result)):
            raise RuntimeError(self.error())
        return result.type_index, result.value

    def global_function(self, name: str) -> int:
        """Return the handle of a registered function; it is valid for the life of the process."""
        data = name.encode()
        view = _Bytes(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data))
        handle = ctypes.c_void_p()
        if self._get_global(ctypes.byref(view), ctypes.byref(handle)):
            raise RuntimeError(self.error())
        if not handle.value:
            raise ArtifactError(
                f"the installed TVM runtime has no function {name}: it is another version than tvmdcn pins. "
                "Reinstall tvmdcn together with the apache-tvm and apache-tvm-ffi that it asks for."
            )
        return handle.value

    def exchange_stream(self, gpu: int, stream: int) -> int:
        """Let this thread's next kernels on a GPU go to a stream; return the handle of the one before."""
        before = ctypes.c_void_p()
        if self._set_stream(DL_CUDA, gpu, stream, ctypes.byref(before)):
            raise RuntimeError(self.error())
        return before.value or 0

    def config_threadpool(self, mode: int, count: int, processors: Sequence[int]) -> None:
        """Call ``runtime.config_threadpool`` for the pool of the current thread."""
        numbers = [str(number).encode() for number in processors]
        kind, array = self.invoke(self.global_function("ffi.Array"), *numbers)
        try:
            self.invoke(self.global_function("runtime.config_threadpool"), mode, count, (kind, array))
        finally:
            self.release(array)


_runtime: _Runtime | None = None
_runtime_lock = threading.Lock()


def runtime() -> _Runtime:
    """Return the loaded runtime libraries, loading them at the first call.

    Raises
    ------
    ArtifactError
        If a library is missing or cannot be loaded.
    """
    global _runtime
    if _runtime is None:
        with _runtime_lock:
            if _runtime is None:
                try:
                    _runtime = _Runtime()
                except (OSError, AttributeError) as error:
                    raise ArtifactError(f"the TVM runtime cannot be loaded: {error}") from error
    return _runtime


class Function:
    """A function of a module, by its handle.

    `team` are the threads that its parallel loops run on; None for TVM's pool.
    """

    __slots__ = ("handle", "name", "team")

    def __init__(self, handle: int, name: str, team: Team | None = None) -> None:
        self.handle = handle
        self.name = name
        self.team = team


class Module:
    """A loaded module. It is never unloaded: a call in another thread may still be inside it."""

    def __init__(self, handle: int, path: Path) -> None:
        self._handle = handle
        self._team = join_team(path)
        self._functions: dict[str, Function] = {}
        self.path = path

    def function(self, name: str) -> Function:
        """Return a function of the module.

        Raises
        ------
        ArtifactError
            If the module has no such function.
        """
        known = self._functions.get(name)
        if known is not None:
            return known
        native = runtime()
        lookup = native.global_function("ffi.ModuleGetFunction")
        kind, handle = native.invoke(lookup, (_MODULE, self._handle), name.encode(), 0)
        if kind != _FUNCTION:
            raise ArtifactError(f"{self.path} has no function {name}: it was not built by this version. Delete it.")
        return self._functions.setdefault(name, Function(handle, name, self._team))


# By file. Each would take half a kilobyte for ever again: who drops kernels and loads them anew loads the same modules.
_modules: dict[tuple[Path, tuple[int, ...]], Module] = {}


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what tells a file from others and from itself after a change; a number that is in use is not reused."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def load_module(path: Path) -> Module:
    """Load a compiled module, once; `path` must be absolute. Loading is running code: check who wrote it first.

    Raises
    ------
    ArtifactError
        If the file is no module that this process can load.
    """
    before = _identity(path)
    known = None if before is None else _modules.get((path, before))
    if known is not None:
        return known
    native = runtime()
    try:
        kind, handle = native.invoke(native.global_function("ffi.ModuleLoadFromFile"), os.fsencode(path))
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    if kind != _MODULE:
        raise ArtifactError(f"{path} is not a module of tvm-ffi (got an object of kind {kind}).")
    module = Module(handle, path)
    if before is None or _identity(path) != before:
        return module  # another file has taken its place: nobody knows which one was loaded
    return _modules.setdefault((path, before), module)


class Tensor:
    """The description of one tensor argument: shape and dtype of C-contiguous memory, no data."""

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype

    @property
    def bytes(self) -> int:
        """The size of the memory described."""
        return math.prod(self.shape) * (_DL_DTYPES[self.dtype] >> 8 & 0xFF) // 8

    def words(self, address: int, device: int = _DL_CPU) -> list[int]:
        """Return the DLTensor for its sizes at `address`, followed there by its strides, without the data.

        `device` is DLPack's type of the device, and in the upper half its number.
        """
        axes = len(self.shape)
        return [0, device, axes | _DL_DTYPES[self.dtype] << 32, address, address + 8 * axes, 0]

    def sizes(self) -> list[int]:
        """Return shape and strides (in elements)."""
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= size
        return [*self.shape, *reversed(strides)]


class Frame:
    """One prepared call: a function and its arguments, of which only the data pointers change between calls.

    A frame belongs to one call at a time. `pointers` says at which indices of `words` the data pointers of
    the tensors go, in the order of the arguments; set them, then :meth:`run`. All tensors are in the memory of one
    device: the host's, or the GPU's of a number.
    """

    __slots__ = ("_arguments", "_call", "_count", "_function", "_name", "_result", "pointers", "words")

    def __init__(self, function: Function, arguments: Sequence[Tensor | int], gpu: int | None = None) -> None:
        device = _DL_CPU if gpu is None else DL_CUDA | gpu << 32
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        count = len(arguments)
        # arguments (2 words each) | result (2) | DLTensors (6 each) | shapes and strides
        first_tensor = 2 * count + 2
        first_size = first_tensor + _DLTENSOR_WORDS * len(tensors)
        total = first_size + sum(2 * len(tensor.shape) for tensor in tensors)
        self.words = (ctypes.c_uint64 * total)()
        base = ctypes.addressof(self.words)
        self.pointers = [first_tensor + _DLTENSOR_WORDS * index for index in range(len(tensors))]
        following = iter(self.pointers)
        for position, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                at = next(following)
                self._put(2 * position, [_DLTENSOR, base + 8 * at])
                self._put(at, argument.words(base + 8 * first_size, device))
                sizes = argument.sizes()
                self._put(first_size, sizes)
                first_size += len(sizes)
            else:
                self._put(2 * position, [_INT, argument & (1 << 64) - 1])
        self._function, self._name = function.handle, function.name
        self._arguments, self._count, self._result = base, count, base + 16 * count
        self._call = runtime().call

    def _put(self, first: int, values: Sequence[int]) -> None:
        for index, value in enumerate(values, first):
            self.words[index] = value

    def run(self) -> None:
        """Call the function; other Python threads run meanwhile.

        Raises
        ------
        RuntimeError
            With TVM's message, if the function refuses its arguments: the caller described them wrongly.
        """
        if self._call(self._function, self._arguments, self._count, self._result):
            raise RuntimeError(f"{self._name} failed: {runtime().error()}")
