# SPDX-License-Identifier: Apache-2.0
"""CUDA's compiler as a library, for machines without nvcc: ``pip install nvidia-cuda-nvrtc`` brings it."""

from __future__ import annotations

import ctypes
import functools
import re

from tvmdcn.cuda_libraries import CUDA_MAJOR, find_library, include_directories
from tvmdcn.errors import BuildError

__all__ = ["compile_source"]

_NAME = f"libnvrtc.so.{CUDA_MAJOR}"
_INSTALL = (
    f"pip install 'nvidia-cuda-nvrtc>={CUDA_MAJOR},<{CUDA_MAJOR + 1}' "
    f"'nvidia-cuda-runtime>={CUDA_MAJOR},<{CUDA_MAJOR + 1}' 'nvidia-cuda-cccl>={CUDA_MAJOR},<{CUDA_MAJOR + 1}'"
)


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    for place in (_NAME, find_library(_NAME)):
        if place is not None:
            try:
                library = ctypes.CDLL(str(place))
            except OSError:
                continue
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            return library
    raise BuildError(
        f"building for a GPU needs nvcc, or {_NAME}, and neither was found. Install the CUDA toolkit {CUDA_MAJOR}, or "
        f"{_INSTALL}. Without a compiler, kernels that were built elsewhere can be run: see tvmdcn pack."
    )


def _check(status: int, what: str) -> None:
    if status:
        raise BuildError(f"NVRTC: {what}: {_library().nvrtcGetErrorString(status).decode()}")


def _text(ask_size: object, ask: object, program: ctypes.c_void_p) -> bytes:
    """Return what NVRTC gives as a size and a buffer."""
    assert callable(ask_size)
    assert callable(ask)
    size = ctypes.c_size_t()
    _check(ask_size(program, ctypes.byref(size)), "reading a size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(ask(program, buffer), "reading a result")
    return buffer.raw


def compile_source(source: str, arch: str) -> tuple[bytes, str, str]:
    """Compile CUDA C with NVRTC.

    Parameters
    ----------
    source : str
        CUDA C.
    arch : str
        For example "sm_90".

    Returns
    -------
    bytes
        Machine code (a cubin).
    str
        What the compiler and ptxas say.
    str
        The compiler's name and version.

    Raises
    ------
    BuildError
        If there is no NVRTC, no headers, or it refuses.
    """
    library = _library()
    includes = include_directories()
    if not includes:
        raise BuildError(f"CUDA's headers were not found, and NVRTC needs them: {_INSTALL}.")
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", "--ptxas-options=-v"]
    options += ["--device-as-default-execution-space", "--diag-suppress=177"]
    for include in includes:
        options += [f"--include-path={include}", f"--include-path={include / 'cccl'}"]
    version = (ctypes.c_int(), ctypes.c_int())
    _check(library.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1])), "asking for the version")
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None),
        "taking the source",
    )
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), words)
        log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if status:
            errors = [line for line in log.splitlines() if re.search(r"\berror\b", line)]
            raise BuildError(f"NVRTC does not compile for {arch}: {(errors or [log])[0][:600]}")
        binary = _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return binary, log, f"NVRTC {version[0].value}.{version[1].value}"
