# SPDX-License-Identifier: Apache-2.0
"""What calls need of the two kinds of arrays that they take: NumPy's and torch's.

torch is only ever looked up among the imported modules: who passes a torch tensor has imported it.

The order of axes: a NumPy array for an NHWC kernel is indexed N, H, W, C. A torch tensor is always indexed
N, C, H, W; for an NHWC kernel its memory is ``torch.channels_last``.
"""

from __future__ import annotations

import ctypes
import operator
import sys
from collections.abc import Hashable
from typing import Any, Protocol

import numpy as np

from tvmdcn.errors import SpecTypeError
from tvmdcn.validation import shown

__all__ = ["Arrays", "NumpyArrays", "TorchArrays", "arrays_of"]

_c_char, _addressof = ctypes.c_char.from_buffer, ctypes.addressof


class Arrays(Protocol):
    """One kind of arrays."""

    name: str

    def gpu(self, array: Any) -> tuple[int, bool] | None:
        """Return what kernels of a GPU depend on: its number, and whether they may round to tf32. None: the host."""

    def wants_determinism(self) -> bool:
        """Return whether results that would depend on the order of threads have to be computed in another way."""

    def key(self, *arrays: Any) -> tuple[Hashable, ...]:
        """Return what a prepared call depends on; one of `arrays` may be None. Fast, and without checks."""

    def pointer(self, array: Any) -> int:
        """Return the address of an array's first element. Fast, and without checks."""

    def check(self, name: str, array: Any) -> None:
        """Raise SpecTypeError unless `array` is a plain array of this kind in CPU memory."""

    def dtype(self, array: Any) -> str:
        """Return the name of an array's dtype."""

    def channels_first_shape(self, array: Any, layout: str) -> tuple[int, ...]:
        """Return the shape of input, offset, mask or output in the order N, C, H, W."""

    def is_dense(self, array: Any, layout: str) -> bool:
        """Return whether memory is what a kernel of a layout reads, but for its alignment."""

    def dense(self, array: Any, layout: str) -> Any:
        """Return the array with memory as a kernel of a layout reads it; copied where it is not."""

    def empty(self, like: Any, shape: tuple[int, ...], layout: str) -> Any:
        """Return an uninitialised array of the dtype of `like`, of a shape in the order N, C, H, W."""

    def accumulators(self, array: Any, dtype: str) -> Any:
        """Return a dense one-dimensional array converted to `dtype`."""

    def mark_written(self, array: Any) -> None:
        """Note that a kernel writes into an array of the caller's."""


class NumpyArrays:
    """NumPy arrays."""

    name = "numpy.ndarray"

    @staticmethod
    def gpu(array: Any) -> tuple[int, bool] | None:
        """Return None: the memory is the host's."""
        return None

    @staticmethod
    def wants_determinism() -> bool:
        """Return False: no result on the host depends on the order of threads."""
        return False

    @staticmethod
    def key(*arrays: Any) -> tuple[Hashable, ...]:
        """Return types (a masked array is no plain one), shapes, strides and dtypes."""
        return tuple([None if a is None else (type(a), a.shape, a.strides, a.dtype) for a in arrays])

    @staticmethod
    def pointer(array: Any) -> int:
        """Return the address of the first element."""
        try:
            return _addressof(_c_char(array))  # 0.2 us
        except (TypeError, ValueError, BufferError):  # read-only, not contiguous, or of a dtype of ml_dtypes
            return int(array.__array_interface__["data"][0])  # 0.9 us

    @staticmethod
    def check(name: str, array: Any) -> None:
        """Refuse what is no plain array."""
        if not isinstance(array, np.ndarray):
            raise SpecTypeError(
                f"{name} must be a tensor, a numpy.ndarray like input, got {shown(array)} of type "
                f"{type(array).__name__}."
            )
        masked = sys.modules.get("numpy.ma")  # only imported by those who use it; 9 ms
        if masked is not None and isinstance(array, masked.MaskedArray):
            raise SpecTypeError(f"{name} must be a plain array, got a MaskedArray. Fill it first: {name}.filled(0).")

    @staticmethod
    def dtype(array: Any) -> str:
        """Return the dtype's name, whatever its byte order."""
        return str(array.dtype.name)

    @staticmethod
    def channels_first_shape(array: Any, layout: str) -> tuple[int, ...]:
        """Return the shape as N, C, H, W."""
        shape = array.shape
        return (shape[0], shape[3], shape[1], shape[2]) if layout == "NHWC" and len(shape) == 4 else shape

    @staticmethod
    def is_dense(array: Any, layout: str) -> bool:
        """Return whether the array is C-contiguous and of the machine's byte order."""
        return bool(array.flags.c_contiguous and array.dtype.isnative)

    @staticmethod
    def dense(array: Any, layout: str) -> Any:
        """Return a C-contiguous aligned array of the machine's byte order."""
        return np.require(array, array.dtype.newbyteorder("="), ("C", "A"))

    @staticmethod
    def empty(like: Any, shape: tuple[int, ...], layout: str) -> Any:
        """Return a new array."""
        if layout == "NHWC":
            shape = (shape[0], shape[2], shape[3], shape[1])
        return np.empty(shape, like.dtype.newbyteorder("="))

    @staticmethod
    def accumulators(array: Any, dtype: str) -> Any:
        """Return the array converted."""
        return np.require(array, dtype, ("C", "A"))

    @staticmethod
    def mark_written(array: Any) -> None:
        """Do nothing: NumPy does not count changes."""


class TorchArrays:
    """torch tensors on the CPU; :class:`tvmdcn.cuda_arrays.TorchCudaArrays` are those on GPUs."""

    name = "torch.Tensor"
    device_type = "cpu"
    _is_here = operator.attrgetter("is_cpu")

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._channels_last = torch.channels_last
        self._plain = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
        self._forward_mode = torch.autograd.forward_ad

    def gpu(self, array: Any) -> tuple[int, bool] | None:
        """Return None: the memory is the host's."""
        return None

    def wants_determinism(self) -> bool:
        """Return False: no result on the host depends on the order of threads."""
        return False

    @staticmethod
    def key(*arrays: Any) -> tuple[Hashable, ...]:
        """Return types (of fake tensors), shapes, strides, dtypes, and whether memory means the tensor."""
        return tuple(
            [None if a is None else (type(a), a.shape, a.stride(), a.dtype, a.is_cpu, a.is_neg()) for a in arrays]
        )

    @staticmethod
    def pointer(array: Any) -> int:
        """Return the address of the first element."""
        return int(array.data_ptr())

    def check_kind(self, name: str, array: Any) -> None:
        """Refuse what is not a tensor, with or without memory."""
        if not isinstance(array, self._torch.Tensor):
            raise SpecTypeError(
                f"{name} must be a tensor, a torch.Tensor like input, got {shown(array)} of type "
                f"{type(array).__name__}."
            )

    def check(self, name: str, array: Any) -> None:
        """Refuse what is not a dense tensor with memory on the CPU."""
        torch = self._torch
        self.check_kind(name, array)
        self._check_place(name, array)
        if array.layout is not torch.strided:
            raise SpecTypeError(f"{name} has layout {array.layout}; pass {name}.to_dense().")
        if array.is_quantized:
            raise SpecTypeError(f"{name} is quantized ({array.dtype}); pass {name}.dequantize().")
        # Fake tensors and other wrappers dispatch in Python; asking some of them for an address only warns.
        absent = type(array).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        try:
            absent = absent or (array.numel() > 0 and array.data_ptr() == 0)
        except RuntimeError:
            absent = True
        if absent:
            raise SpecTypeError(
                f"{name} has no memory of its own (a fake tensor, or one inside torch.func or torch.vmap): "
                "kernels cannot be called with it."
            )

    def _check_place(self, name: str, array: Any) -> None:
        """Refuse tensors of other devices."""
        if array.device.type == "cuda":
            raise SpecTypeError(f"{name} is on device {array.device}, and others are on the CPU. Pass {name}.cpu().")
        if array.device.type != "cpu":
            raise SpecTypeError(
                f"{name} is on device {array.device}; kernels run on CPUs and NVIDIA GPUs. Pass {name}.cpu()."
            )

    @staticmethod
    def dtype(array: Any) -> str:
        """Return the dtype's name."""
        return str(array.dtype).removeprefix("torch.")

    @staticmethod
    def channels_first_shape(array: Any, layout: str) -> tuple[int, ...]:
        """Return the shape, which is N, C, H, W."""
        return tuple(array.shape)

    def is_dense(self, array: Any, layout: str) -> bool:
        """Return whether the tensor is contiguous in the memory format of the layout."""
        if array.is_neg():
            return False
        if layout == "NHWC" and array.dim() == 4:
            return bool(array.is_contiguous(memory_format=self._channels_last))
        return bool(array.is_contiguous())

    def dense(self, array: Any, layout: str) -> Any:
        """Return a tensor that is contiguous in the memory format of the layout, and aligned."""
        array = array.resolve_neg()
        if layout == "NHWC" and array.dim() == 4:
            array = array.contiguous(memory_format=self._channels_last)
        else:
            array = array.contiguous()
        return array.clone() if array.data_ptr() % array.element_size() else array

    def empty(self, like: Any, shape: tuple[int, ...], layout: str) -> Any:
        """Return a new tensor."""
        if layout == "NHWC":
            _, channels, height, width = shape
            strides = (height * width * channels, 1, width * channels, channels)
            return like.new_empty_strided(shape, strides)
        return like.new_empty(shape)

    def accumulators(self, array: Any, dtype: str) -> Any:
        """Return the tensor converted."""
        return array.detach().to(getattr(self._torch, dtype)).contiguous()

    def bits(self, array: Any) -> np.ndarray:
        """Return the memory of a tensor dense in either layout as a flat NumPy array of integers, not copied."""
        integer = {2: "int16", 4: "int32", 8: "int64"}[array.itemsize]
        array = array.detach().view(getattr(self._torch, integer))
        if not array.is_contiguous():
            array = array.permute(0, 2, 3, 1)
        flat: np.ndarray = array.view(-1).numpy()
        return flat

    def is_plain_call(self, *arrays: Any) -> bool:
        """Return whether a call computes with these tensors and does nothing else, but perhaps record gradients.

        Otherwise torch has to see it as one of its operators: it may be compiled, exported, transformed or
        watched, cast to another dtype, or differentiated in forward mode. One of `arrays` may be None, or no
        tensor at all. 1 us.
        """
        torch = self._torch
        internals = torch._C
        if (
            torch.compiler.is_compiling()
            or internals._are_functorch_transforms_active()
            or internals._len_torch_dispatch_stack()
            or torch.is_autocast_enabled(self.device_type)
            or self._forward_mode._current_level >= 0
            or internals._get_tracing_state() is not None
        ):
            return False
        plain = self._plain
        is_here = self._is_here
        for array in arrays:  # noqa: SIM110 - all() would take 0.5 us more
            if type(array) not in plain or (array is not None and not is_here(array)):
                return False
        return True

    def needs_gradients(self, *arrays: Any) -> bool:
        """Return whether autograd has to record a call; one of `arrays` may be None."""
        if self._torch.is_grad_enabled():
            for array in arrays:
                if array is not None and array.requires_grad:
                    return True
        return False

    def refuse_gradients(self, *arrays: Any) -> None:
        """Raise if autograd would have to record the call.

        Raises
        ------
        SpecTypeError
            If gradients are enabled and a tensor asks for them.
        """
        if self.needs_gradients(*arrays):
            raise SpecTypeError(
                "a tensor requires gradients, and a kernel has no backward operators of its own: call "
                "tvmdcn.deform_conv2d, which has, or call inside torch.no_grad() or torch.inference_mode(), or "
                "detach the tensors."
            )

    def mark_written(self, array: Any) -> None:
        """Tell autograd that the values of a tensor have changed."""
        self._torch.autograd.graph.increment_version(array)


_numpy = NumpyArrays()
_torch: TorchArrays | None = None
_torch_cuda: TorchArrays | None = None


def arrays_of(array: Any) -> NumpyArrays | TorchArrays:
    """Return the kind of arrays that an input belongs to.

    Raises
    ------
    SpecTypeError
        If it belongs to none.
    """
    global _torch, _torch_cuda
    if isinstance(array, np.ndarray):
        return _numpy
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.is_cuda:
            if _torch_cuda is None:
                from tvmdcn.cuda_arrays import TorchCudaArrays

                _torch_cuda = TorchCudaArrays(torch)
            return _torch_cuda
        if _torch is None:
            _torch = TorchArrays(torch)
        return _torch
    raise SpecTypeError(
        f"input must be a tensor, of torch or numpy.ndarray, got {shown(array)} of type "
        f"{type(array).__name__}. Convert it, for example with numpy.asarray."
    )
