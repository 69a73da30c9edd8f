# SPDX-License-Identifier: Apache-2.0
"""CUDA's libraries and tools: where they are, and TVM's CUDA runtime on top of them.

They come with a CUDA toolkit, with packages from PyPI (``nvidia-cuda-runtime`` and its like, which torch for CUDA
brings), or with the driver.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tvmdcn import native
from tvmdcn.errors import ArtifactError, BuildError

__all__ = ["CUDA_MAJOR", "find_tool", "include_directories", "load_runtime", "load_runtime_to_build"]

CUDA_MAJOR = 13
"""The CUDA version that the pinned TVM's runtime is made for."""

_RUNTIME = f"libcudart.so.{CUDA_MAJOR}"
_DRIVER = "libcuda.so.1"
_TOOLKITS = (Path(f"/usr/local/cuda-{CUDA_MAJOR}"), Path("/usr/local/cuda"), Path("/opt/cuda"))
# What libtvm_runtime_cuda.so takes from the driver; each function says that there is no device (100). With it TVM can
# write CUDA modules on a machine that has no driver, and no more than that.
_STAND_IN = "\n".join(
    f"int {name}(void) {{ return 100; }}"
    for name in (
        "cuDeviceGetName",
        "cuDriverGetVersion",
        "cuFuncSetAttribute",
        "cuGetErrorName",
        "cuGetErrorString",
        "cuGetProcAddress",
        "cuGetProcAddress_v2",
        "cuInit",
        "cuLaunchKernelEx",
        "cuModuleGetFunction",
        "cuModuleLoadData",
        "cuModuleUnload",
        "cuTensorMapEncodeTiled",
    )
)
_lock = threading.Lock()
_loaded: list[ctypes.CDLL] = []


def _package_directories() -> Iterator[Path]:
    """Yield the directories of NVIDIA's packages from PyPI, those of the right version first."""
    spec = importlib.util.find_spec("nvidia")
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(directory, f"cu{CUDA_MAJOR}")
        yield from sorted(path for path in Path(directory).glob("cuda_*") if path.is_dir())


def find_tool(name: str) -> Path | None:
    """Return the path of a program of CUDA's, such as nvcc or cuobjdump; None where there is none."""
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    places = [*_package_directories(), *_TOOLKITS]
    return next((path for place in places if (path := place / "bin" / name).is_file()), None)


def include_directories() -> list[Path]:
    """Return where CUDA's headers (cuda_fp16.h and its like) are; empty where there are none."""
    nvcc = find_tool("nvcc")
    toolkit = [nvcc.resolve().parent.parent] if nvcc else []
    places = [place / "include" for place in (*_package_directories(), *toolkit, *_TOOLKITS)]
    return [place for place in places if (place / "cuda_fp16.h").is_file() or (place / "cccl").is_dir()]


def find_library(name: str) -> Path | None:
    """Return the path of a library outside of the linker's own directories; None where there is none."""
    places = [directory / part for directory in (*_package_directories(), *_TOOLKITS) for part in ("lib", "lib64")]
    return next((path for place in places if (path := place / name).is_file()), None)


def _open(name: str) -> ctypes.CDLL | None:
    """Load a library where the linker finds it, or where CUDA's packages put it."""
    for place in (name, find_library(name)):
        if place is not None:
            try:
                return ctypes.CDLL(str(place), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
    return None


def load_runtime() -> None:
    """Load TVM's CUDA runtime, which launches kernels. Once per process.

    Raises
    ------
    ArtifactError
        If there is no driver, no CUDA runtime, or TVM's own part is missing.
    """
    _load(_driver_library)


def load_runtime_to_build() -> None:
    """Load TVM's CUDA runtime to write modules; on a machine without a driver with a stand-in for it.

    Raises
    ------
    BuildError
        If there is no CUDA runtime, or no C compiler for the stand-in.
    """
    try:
        _load(_driver_or_stand_in)
    except ArtifactError as error:
        raise BuildError(str(error)) from error


def _load(driver: object) -> None:
    with _lock:
        if _loaded:
            return
        if sys.platform != "linux":
            raise ArtifactError(f"kernels for GPUs run on Linux only, this is {sys.platform}.")
        native.runtime()
        assert callable(driver)
        libraries = [driver()]
        runtime = _open(_RUNTIME)
        if runtime is None:
            raise ArtifactError(
                f"{_RUNTIME} was not found, and TVM's CUDA runtime needs it. Install CUDA's runtime: "
                f"pip install 'nvidia-cuda-runtime>={CUDA_MAJOR},<{CUDA_MAJOR + 1}' (torch for CUDA brings it)."
            )
        try:
            part = ctypes.CDLL(str(native.library("tvm", "tvm_runtime_cuda")), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ArtifactError(f"TVM's CUDA runtime cannot be loaded: {error}") from error
        _loaded.extend([*libraries, runtime, part])


def _driver_library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(_DRIVER, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(
            f"kernels for GPUs need NVIDIA's driver, and this machine has none ({error}). Run on a machine with a GPU."
        ) from error


def _driver_or_stand_in() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(_DRIVER, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return _stand_in()


def _stand_in() -> ctypes.CDLL:
    """Compile and load a library of the driver's name that finds no device."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ArtifactError(
            "building for a GPU on a machine without NVIDIA's driver needs a C compiler. Install one (cc, gcc, clang)."
        )
    with tempfile.TemporaryDirectory(prefix="tvmdcn-") as directory:
        source, library = Path(directory, "libcuda.c"), Path(directory, _DRIVER)
        source.write_text(_STAND_IN)
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{_DRIVER}", "-o", str(library), str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            raise ArtifactError(f"{compiler} did not compile a stand-in for NVIDIA's driver: {error}") from error
        if done.returncode:
            raise ArtifactError(f"{compiler} could not compile a stand-in for NVIDIA's driver: {done.stderr[-300:]}")
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
