# SPDX-License-Identifier: Apache-2.0
"""Calls on GPUs: what is put on a stream, and memory that one stream writes and others read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from tvmdcn import native
from tvmdcn.cuda_arrays import TorchCudaArrays
from tvmdcn.errors import DeviceError
from tvmdcn.native import Frame, Function, Tensor
from tvmdcn.prepared import PreparedCall
from tvmdcn.weights import PackedWeight

__all__ = ["CachedDeviceWeight", "DeviceCall", "Resident"]


class DeviceCall(PreparedCall):
    """A prepared call on a GPU."""

    __slots__ = ("gpu",)

    def __init__(self, function: Function, plan: Sequence[Tensor | int], gpu: int) -> None:
        super().__init__(function, plan, 0)
        self.gpu = gpu

    def launch(self, pointers: tuple[int, ...], stream: int) -> None:
        """Put the call on a stream, on tensors at these addresses in the order of the arguments."""
        try:
            frame = self._spare.pop()
        except IndexError:
            frame = Frame(self._function, self.plan, self.gpu)
        words = frame.words
        for at, pointer in zip(frame.pointers, pointers):  # noqa: B905 - equal by construction; 0.1 us
            words[at] = pointer
        _launch(frame, self.gpu, stream)
        self._spare.append(frame)


def _launch(frame: Frame, gpu: int, stream: int) -> None:
    runtime = native.runtime()
    before = runtime.exchange_stream(gpu, stream)
    try:
        frame.run()
    except RuntimeError as error:
        raise DeviceError(
            f"{error} (on cuda:{gpu}). A GPU may tell here of what went wrong in work that was given to it earlier: "
            "set CUDA_LAUNCH_BLOCKING=1 to find what, or run under compute-sanitizer."
        ) from error
    finally:
        runtime.exchange_stream(gpu, before)


class Resident:
    """Memory that was written on one stream and is kept, to be read on any."""

    __slots__ = ("_event", "_stream", "data")

    def __init__(self, arrays: TorchCudaArrays, data: Any, stream: int) -> None:
        self.data = data
        self._stream, self._event = stream, arrays.record_event()

    def used_on(self, arrays: TorchCudaArrays, stream: int) -> Any:
        """Return the memory for work on the current stream, which then waits until it is written."""
        if stream != self._stream:
            arrays.wait_for(self._event, self.data)
        return self.data


class CachedDeviceWeight:
    """A packed weight, and how to see that the tensor is the one that was packed."""

    __slots__ = ("_reference", "_resident", "_state", "packed")

    def __init__(self, weight: Any, packed: PackedWeight, resident: Resident, forget: Callable[[Any], object]) -> None:
        self.packed = packed
        self._resident = resident
        self._reference: Callable[[], Any] = weakref.ref(weight, forget)
        self._state = self._state_of(weight)

    @staticmethod
    def _state_of(weight: Any) -> Hashable:
        return weight._version, weight.data_ptr(), weight.stride()

    def is_of(self, weight: Any) -> bool:
        """Return whether `weight` is the tensor that was packed, unchanged as far as torch counts changes."""
        return self._reference() is weight and self._state_of(weight) == self._state

    def used_on(self, arrays: TorchCudaArrays, stream: int) -> PackedWeight:
        """Return the packed weight for work on a stream."""
        self._resident.used_on(arrays, stream)
        return self.packed
