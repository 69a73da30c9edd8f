# SPDX-License-Identifier: Apache-2.0
"""Weights in the order in which a kernel reads them, and when a packed weight is out of date."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from tvmdcn.arrays import NumpyArrays, TorchArrays

__all__ = ["CachedWeight", "PackedWeight"]

_SAMPLES = 64


class PackedWeight:
    """A weight in the order in which one kernel reads it, made by :meth:`tvmdcn.Kernel.pack`.

    Parameters
    ----------
    data : numpy.ndarray or torch.Tensor
        The packed values; for a GPU a tensor there, its bits as integers of 32 bits where the kernel reads such.
    kernel : str
        Name of the artifact it was packed for.
    pointer : int, optional
        The address of the values; by default that of a NumPy array.
    """

    __slots__ = ("data", "kernel", "pointer")

    def __init__(self, data: Any, kernel: str, pointer: int | None = None) -> None:
        self.data = data
        self.kernel = kernel
        self.pointer = NumpyArrays.pointer(data) if pointer is None else pointer

    def __repr__(self) -> str:
        """Return a description without the values."""
        return f"PackedWeight({'x'.join(map(str, self.data.shape))} {self.data.dtype}, for {self.kernel})"


class CachedWeight:
    """A packed torch weight, and how to see that the tensor is still the one that was packed.

    Writing through ``tensor.data`` or a NumPy view does not raise a tensor's version (averaged weights are
    updated so), hence a sample of the values is compared too: it notices any update of the whole tensor. In float64
    all values are compared: ``torch.autograd.gradcheck`` changes one at a time, so.
    """

    __slots__ = ("_address", "_reference", "_sample", "_strides", "_values", "_version", "packed")

    def __init__(self, arrays: TorchArrays, weight: Any, packed: PackedWeight, forget: Callable[[Any], object]) -> None:
        self.packed = packed
        self._reference: Callable[[], Any] = weakref.ref(weight, forget)
        self._version = weight._version
        self._address = weight.data_ptr()
        self._strides = weight.stride()
        bits = arrays.bits(weight)
        self._sample = bits if weight.itemsize == 8 else bits[:: max(bits.size // _SAMPLES, 1)]
        self._values = self._sample.tobytes()

    def is_of(self, weight: Any) -> bool:
        """Return whether `weight` is the tensor that was packed, unchanged."""
        return (
            self._reference() is weight
            and weight._version == self._version
            and weight.data_ptr() == self._address
            and weight.stride() == self._strides
            and self._sample.tobytes() == self._values
        )
