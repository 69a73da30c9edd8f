# SPDX-License-Identifier: Apache-2.0
"""What a device does for a benchmark: time a call, fill its caches with something else, tell its memory's peak.

A provider names its device (:attr:`tvmdcn.bench.providers.Provider.device`); its process measures with that one. A
device is a class of the shape of :class:`Device`, in :data:`DEVICES`.

Cold caches
    Before each call a buffer of twice the last-level cache is read from end to end by every processor that the
    provider is held to, so that shared and private caches hold none of the layer's tensors. Threads of the provider
    may have gone to sleep meanwhile, which belongs to such a call: it is the first one for a while.

Memory
    The peak of the process's own pages (not of the code of libraries) during a call, above what it held before the
    layer was prepared, less the results and the copies of inputs in an order of its own. Before, the layer has been
    called once with a small image, so that what a library sets up once is not counted, and free memory has been
    given back to the system. So figures are what an image of this size takes beyond a small one, and the weights.
    Linux keeps the peak (``VmHWM``) and lets it be reset (``/proc/self/clear_refs``); elsewhere it is not known. The
    kernel counts pages per processor and adds them up late, see :attr:`CpuDevice.resolution`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tvmdcn.bench.provider import Unsupported
from tvmdcn.target import detect_target

__all__ = ["DEVICES", "CpuDevice", "Device", "last_level_bytes", "open_device"]

_PROCESS = Path("/proc/self")
# Where the system does not tell the size of a cache: as large as desktop processors have.
_UNKNOWN_CACHE = 32 << 20
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


class Device(Protocol):
    """What a process needs of the device that it measures on."""

    evicted_bytes: int
    """How much :meth:`evict` fills the caches with."""

    @property
    def resolution(self) -> int | None:
        """By how many bytes the figures of memory can be off; None where they are not known."""

    def time(self, call: Callable[[], Any]) -> float:
        """Call once and return the milliseconds until its results were there."""

    def evict(self) -> None:
        """Fill the caches with something else."""

    def release(self) -> None:
        """Give memory that is free back, so that using it again counts."""

    def held(self) -> int | None:
        """Return the bytes in use."""

    def reset_peak(self) -> None:
        """Begin a new peak at what is in use."""

    def peak(self) -> int | None:
        """Return the most bytes in use since the last reset."""


def last_level_bytes() -> int:
    """Return the size of the largest cache of the machine's processors."""
    target = detect_target()
    return target.l3_bytes or target.l2_bytes or _UNKNOWN_CACHE


class CpuDevice:
    """The processors of this machine that this process may use."""

    def __init__(self) -> None:
        self.evicted_bytes: int = 2 * last_level_bytes()
        self._buffer: np.ndarray | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def time(self, call: Callable[[], Any]) -> float:
        """Call once and return the milliseconds that it took."""
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    # --- caches --------------------------------------------------------------------------------------------------

    def evict(self) -> None:
        """Read the buffer on each processor."""
        if self._buffer is None:
            self._buffer = np.ones(self.evicted_bytes // 8, np.int64)
            if len(self._processors) > 1:
                self._readers = _one_thread_each(self._processors)
        if self._readers is None:
            self._buffer.sum()
        else:
            barrier = threading.Barrier(len(self._processors))
            for done in [self._readers.submit(self._read, barrier) for _ in self._processors]:
                done.result()

    def _read(self, barrier: threading.Barrier) -> None:
        barrier.wait()  # so that no thread takes another's turn
        assert self._buffer is not None
        self._buffer.sum()

    # --- memory --------------------------------------------------------------------------------------------------

    @property
    def resolution(self) -> int | None:
        """By how many bytes the figures of memory can be off; None where they are not known.

        Linux adds up the pages of a processor when they are 32, or twice the number of processors if that is more; and
        a page may be a huge one.
        """
        if self.peak() is None:
            return None
        batch = max(32, 2 * (os.cpu_count() or 1)) * mmap.PAGESIZE * max(len(self._processors), 1)
        return max(batch, _huge_page())

    def release(self) -> None:
        """Collect garbage, and make the C library give free memory back."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)

    def held(self) -> int | None:
        """Return the bytes of this process's own pages."""
        return _status("RssAnon")

    def reset_peak(self) -> None:
        """Begin a new peak at what is in use."""
        with contextlib.suppress(OSError):  # not Linux, or not allowed; then there is no peak
            (_PROCESS / "clear_refs").write_text("5")

    def peak(self) -> int | None:
        """Return the most bytes of own pages since the last reset.

        The system keeps the peak of all pages; those of files, which are code and its constants, only ever grow.
        """
        peak, *files = (_status(name) for name in ("VmHWM", "RssFile", "RssShmem"))
        if peak is None or None in files or not os.access(_PROCESS / "clear_refs", os.W_OK):
            return None
        return peak - sum(value or 0 for value in files)


def _status(name: str) -> int | None:
    """Return a figure of this process's memory in bytes."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), None)


def _huge_page() -> int:
    """Return the size of a huge page, if the system may give one unasked or asked; else 0."""
    try:
        if "[never]" in (_HUGE_PAGES / "enabled").read_text():
            return 0
        return int((_HUGE_PAGES / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def _one_thread_each(processors: Sequence[int]) -> ThreadPoolExecutor:
    """Return as many threads as processors, each held to one."""
    left = list(processors)
    return ThreadPoolExecutor(len(left), initializer=lambda: os.sched_setaffinity(0, {left.pop()}))


def open_device(name: str) -> Device:
    """Return the device of a name.

    Raises
    ------
    Unsupported
        If there is none.
    """
    if name not in DEVICES:
        raise Unsupported(f"nothing times calls on the device {name!r}; there are {', '.join(DEVICES)}")
    return DEVICES[name]()


def _open_gpu() -> Device:
    from tvmdcn.bench.cuda_device import CudaDevice

    return CudaDevice()


DEVICES: dict[str, Callable[[], Device]] = {"cpu": CpuDevice, "cuda": _open_gpu}
"""By the names that rows give them."""
