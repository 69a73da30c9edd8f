# SPDX-License-Identifier: Apache-2.0
"""Kernels on the threads that torch runs its own parallel loops on: those of OpenMP.

With a pool of TVM's beside torch's threads, both wait for work by spinning, each on a processor that the other needs: a
training step of the example's DCNv2 network took 2.08 times the plain one's, and takes 1.45 times on torch's threads
(scripts/train_digits.py, 2 threads, Zen 5 server, 2026-11-22 and -23). So in a process that has imported
torch, kernels start their loops by the function that torch's compiler calls for the same purpose, ``GOMP_parallel``,
with their own number of threads. libgomp has it, and on Linux the runtimes of LLVM and Intel.

Whether there is a team is decided when the first kernel is loaded. Kernels that were built without
`tvmdcn.launcher`'s functions run on TVM's pool.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from pathlib import Path

from tvmdcn import env

__all__ = ["Team", "join_team"]

_LIBRARY = re.compile(r"lib(?:gomp|iomp5|omp)(?:-[-\w]+)?\.so[.\d]*")
_START = "__TVMBackendParallelLaunch"
_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


class Team:
    """The threads of OpenMP, as they are started by the functions of one kernel's library.

    Parameters
    ----------
    kernel : ctypes.CDLL
        The library of a kernel with `tvmdcn.launcher`'s functions. It is never unloaded.
    openmp : ctypes.CDLL
    """

    def __init__(self, kernel: ctypes.CDLL, openmp: ctypes.CDLL) -> None:
        pointers = (ctypes.c_void_p * len(_FUNCTIONS)).in_dll(kernel, "tvmdcn_openmp")
        for at, name in enumerate(_FUNCTIONS):
            pointers[at] = ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value
        self._launch = ctypes.cast(kernel.tvmdcn_launch, ctypes.c_void_p).value
        self.use_threads = kernel.tvmdcn_use_threads
        self.use_threads.argtypes, self.use_threads.restype = [ctypes.c_int], None
        self._libraries = kernel, openmp

    def takes(self, kernel: ctypes.CDLL) -> None:
        """Let the loops of a kernel's library be started by this team."""
        ctypes.c_void_p.in_dll(kernel, _START).value = self._launch


def _was_forked() -> bool:
    """Return whether :mod:`multiprocessing` has forked this process: it may have torch's team without its threads."""
    process = sys.modules.get("multiprocessing.process")  # imported in any of its children
    is_child = process is not None and process.parent_process() is not None
    return is_child and "--multiprocessing-fork" not in sys.orig_argv  # which is how it starts fresh ones


_lock = threading.Lock()
_decided: list[Team | None] = []


def _loaded_openmp() -> ctypes.CDLL | None:
    """Return the OpenMP runtime of torch, which the process has loaded; None if that cannot be told."""
    torch = sys.modules.get("torch")
    origin = getattr(torch, "__file__", None)
    if origin is None:
        return None
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return None
    mapped = {line.split(maxsplit=5)[-1] for line in lines}
    found = sorted(path for path in mapped if _LIBRARY.fullmatch(os.path.basename(path)))
    # Where there are several, torch's is the one that comes with it.
    own = [path for path in found if path.startswith(f"{Path(origin).parent}{os.sep}")] or found
    if len(own) != 1:
        return None
    try:
        openmp = ctypes.CDLL(own[0], mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
    return openmp if all(hasattr(openmp, name) for name in _FUNCTIONS) else None


def join_team(path: Path) -> Team | None:
    """Let the loops of a kernel that was just loaded run on torch's threads.

    Parameters
    ----------
    path : Path
        The library.

    Returns
    -------
    Team or None
        Whom to tell how many threads a call uses. None if the kernel stays with TVM's pool.
    """
    with _lock:
        if _decided and _decided[0] is None:
            return None
        kernel = ctypes.CDLL(str(path))
        # The second is missing in a kernel without parallel loops, such as a naive one.
        if not (hasattr(kernel, "tvmdcn_launch") and hasattr(kernel, _START)):
            return None
        if not _decided:
            openmp = None if env.thread_pool() == "tvm" or _was_forked() else _loaded_openmp()
            _decided.append(None if openmp is None else Team(kernel, openmp))
        team = _decided[0]
        if team is not None:
            team.takes(kernel)
        return team
