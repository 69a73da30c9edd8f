# SPDX-License-Identifier: Apache-2.0
"""What calls need of arrays in a GPU's memory: torch's.

Work is put on the caller's current stream of the array's device, and nothing waits for it. torch is only ever looked
up among the imported modules.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Hashable
from typing import Any

from tvmdcn.arrays import TorchArrays
from tvmdcn.errors import SpecTypeError

__all__ = ["TorchCudaArrays"]


class TorchCudaArrays(TorchArrays):
    """torch tensors on NVIDIA GPUs."""

    device_type = "cuda"
    _is_here = operator.attrgetter("is_cuda")

    def __init__(self, torch: Any) -> None:
        super().__init__(torch)
        self._float32 = torch.float32
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    @staticmethod
    def place(array: Any) -> int:
        """Return the number of the GPU that a tensor is on."""
        return int(array.get_device())

    def gpu(self, array: Any) -> tuple[int, bool] | None:
        """Return the GPU's number, and whether kernels may round float32 to tf32 as torch's own convolutions may."""
        return int(array.get_device()), array.dtype is self._float32 and self.allows_tf32()

    def wants_determinism(self) -> bool:
        """Return whether torch's own operators have to be deterministic."""
        return bool(self._torch.are_deterministic_algorithms_enabled())

    @staticmethod
    def key(*arrays: Any) -> tuple[Hashable, ...]:
        """Return types (of fake tensors), shapes, strides, dtypes, devices, and whether memory means the tensor."""
        return tuple(
            [None if a is None else (type(a), a.shape, a.stride(), a.dtype, a.get_device(), a.is_neg()) for a in arrays]
        )

    def _check_place(self, name: str, array: Any) -> None:
        if array.device.type != "cuda":
            raise SpecTypeError(
                f"{name} is on device {array.device}, and input is on a GPU. Bring all to one device: {name}.cuda()."
            )

    def stream(self, index: int) -> int:
        """Return the handle of the current stream of a GPU."""
        if self._raw_stream is not None:
            return int(self._raw_stream(index))  # 0.2 us
        return int(self._torch.cuda.current_stream(index).cuda_stream)

    def is_capturing(self) -> bool:
        """Return whether the current stream records a CUDA graph."""
        return bool(self._torch.cuda.is_current_stream_capturing())

    def on(self, index: int) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which a GPU is the current one; kernels leave theirs behind as the current one."""
        if self._torch.cuda.current_device() == index:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self._torch.cuda.device(index)
        return context

    def memory(self, like: Any, count: int, dtype: str) -> Any:
        """Return a new flat tensor beside another one; of unsigned integers it has the bits."""
        return like.new_empty(count, dtype=getattr(self._torch, dtype.replace("uint32", "int32")))

    def zeros(self, like: Any, count: int, dtype: str) -> Any:
        """Return a new flat tensor of zeros beside another one."""
        return like.new_zeros(count, dtype=getattr(self._torch, dtype))

    def record_event(self) -> Any:
        """Return an event that comes when all that is on the current stream is done."""
        event = self._torch.cuda.Event()
        event.record()
        return event

    def wait_for(self, event: Any, memory: Any) -> None:
        """Let the current stream wait for an event before it uses memory that another stream has written."""
        stream = self._torch.cuda.current_stream()
        stream.wait_event(event)
        memory.record_stream(stream)

    def allows_tf32(self) -> bool:
        """Return whether torch's own convolutions of float32 may round their operands to tf32."""
        try:
            return bool(self._torch._C._get_cudnn_allow_tf32())
        except RuntimeError:  # torch 2.9 and later, where it was set by its new name, per operator
            return bool(self._torch.backends.cudnn.conv.fp32_precision == "tf32")
