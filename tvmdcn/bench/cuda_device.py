# SPDX-License-Identifier: Apache-2.0
"""A GPU as a device of a benchmark: its own clock, its second-level cache, torch's account of its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["CudaDevice"]

# The GPU is kept busy for so long before a call that the host has given it all of the call: what is timed is the
# GPU's work, not how fast it is given out. Half a millisecond at 2 GHz: torchvision launches many kernels a call.
_AHEAD_CYCLES = 1_000_000


class CudaDevice:
    """The current GPU of this process, through torch, which must be there."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # Twice the cache and some: lines that are written stay in it for a while.
        self.evicted_bytes = 4 * int(getattr(properties, "L2_cache_size", 0) or 64 << 20)
        self._other: Any = None

    @property
    def resolution(self) -> int | None:
        """By how many bytes the figures of memory can be off: torch gives it out in pieces of 512."""
        return 512

    def time(self, call: Callable[[], Any]) -> float:
        """Call once and return the milliseconds that the GPU worked on it."""
        torch = self._torch
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD_CYCLES)
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def evict(self) -> None:
        """Write other memory than a call's."""
        if self._other is None:
            self._other = self._torch.empty(self.evicted_bytes, dtype=self._torch.int8, device="cuda")
        self._other.fill_(1)

    def release(self) -> None:
        """Wait for the GPU, and give free memory back."""
        self._torch.cuda.synchronize()
        self._torch.cuda.empty_cache()

    def held(self) -> int | None:
        """Return the bytes that tensors take."""
        return int(self._torch.cuda.memory_allocated())

    def reset_peak(self) -> None:
        """Begin a new peak at what is in use."""
        self._torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Return the most bytes that tensors have taken since the last reset."""
        self._torch.cuda.synchronize()
        return int(self._torch.cuda.max_memory_allocated())
