# SPDX-License-Identifier: Apache-2.0
"""What the kernels of all operators share on GPUs: packed weights there, which GPU, how tensors lie in its memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tvmdcn import cuda_driver
from tvmdcn.arrays import arrays_of
from tvmdcn.artifact import Artifact
from tvmdcn.compiled import CompiledKernel
from tvmdcn.cuda_arrays import TorchCudaArrays
from tvmdcn.cuda_calls import CachedDeviceWeight, DeviceCall, Resident
from tvmdcn.errors import DeviceError, SpecError, SpecTypeError
from tvmdcn.native import Tensor
from tvmdcn.spec import Extents
from tvmdcn.validation import INT32_MAX, check_dtype
from tvmdcn.weights import PackedWeight

__all__ = ["ALIGNMENT", "CompiledCudaKernel"]

ALIGNMENT = 32
"""Bytes that the data of what is read or written in vectors must be a multiple of: torch's allocations are."""
_MAX_WEIGHTS = 32


class CompiledCudaKernel(CompiledKernel):
    """A kernel of some operator for a GPU, callable on torch CUDA tensors; safe to call from several threads.

    A call puts work on the current stream of the input's device and returns: it neither waits nor allocates other
    than by torch, so that it can be captured in a CUDA graph (after one call outside of it, which loads the code).
    A weight is packed once and again when torch counts a change of it; a change through ``tensor.data`` is not
    counted. While a graph is captured it is packed in the graph; and one of float64 at each call, because
    ``torch.autograd.gradcheck`` changes it so.

    Parameters
    ----------
    artifact : Artifact
        What to load; see :func:`load` for how to get one.
    threads : int, optional
        Of no meaning on a GPU.

    Raises
    ------
    ArtifactError
        If the artifact is refused or cannot be loaded.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        super().__init__(artifact, threads)
        self._cached: dict[int, CachedDeviceWeight] = {}

    # --- weights -------------------------------------------------------------------------------------------

    def pack(self, weight: Any) -> PackedWeight:
        """Bring a weight into the order in which this kernel reads it, once for many calls.

        Parameters
        ----------
        weight : (Cout, Cin / groups, kh, kw)
            torch.Tensor on a GPU, of the spec's dtype. Later changes to it are not seen. It is packed on the
            current stream; a call on another stream has to wait for that one.

        Raises
        ------
        SpecError, SpecTypeError
            If it is not a weight of the spec.
        """
        arrays = self._arrays(weight)
        arrays.check("weight", weight)
        gpu = arrays.place(weight)
        self._check_gpu(gpu)
        with arrays.on(gpu):
            return self._pack_on(arrays, weight, gpu, arrays.stream(gpu))

    def _pack_on(self, arrays: TorchCudaArrays, weight: Any, gpu: int, stream: int) -> PackedWeight:
        arrays.check("weight", weight)
        check_dtype({"input": self.spec.dtype, "weight": arrays.dtype(weight)})
        if tuple(weight.shape) != self.spec.weight_shape:
            raise SpecError(
                f"weight must have the shape {self.spec.weight_shape} (Cout, Cin/groups, kh, kw) for "
                f"{self!r}, got {tuple(weight.shape)}."
            )
        weight = self._aligned(arrays, arrays.dense(weight.detach(), "NCHW"))
        interface = self.artifact.kernel
        packed = arrays.memory(weight, math.prod(interface.packed_shape), interface.packed_dtype)
        rows = (weight.shape[0], math.prod(weight.shape[1:]))  # a matrix
        plan = [Tensor(rows, self.spec.dtype), Tensor(interface.packed_shape, interface.packed_dtype)]
        call = DeviceCall(self._pack_function, plan, gpu)
        call.launch((arrays.pointer(weight), arrays.pointer(packed)), stream)
        return PackedWeight(packed, self._name, arrays.pointer(packed))

    def _weight_for(self, arrays: TorchCudaArrays, weight: Any, input: Any, gpu: int, stream: int) -> PackedWeight:
        """Return a call's weight packed, whichever of the two it was given as."""
        if type(weight) is not PackedWeight:
            return self._packed_on(arrays, weight, gpu, stream)
        if weight.kernel != self._name:
            self._refuse_packed(weight)
        if weight.data.device != input.device:
            raise SpecError(f"weight was packed on {weight.data.device}, and input is on {input.device}.")
        return weight

    def _packed_on(self, arrays: TorchCudaArrays, weight: Any, gpu: int, stream: int) -> PackedWeight:
        """Return the weight packed; from memory for a tensor that has not changed."""
        # A graph that is captured reads what it packs itself, whenever it is replayed: a weight may change, and
        # memory of the graph is not ours to keep.
        if arrays.is_capturing() or self.spec.dtype == "float64":
            return self._pack_on(arrays, weight, gpu, stream)
        identity = id(weight)
        known = self._cached.get(identity)
        if known is not None and known.is_of(weight):
            return known.used_on(arrays, stream)
        arrays.check("weight", weight)
        if arrays.place(weight) != gpu:
            raise SpecTypeError(f"weight is on {weight.device}, and input is on cuda:{gpu}: bring it there.")
        packed = self._pack_on(arrays, weight, gpu, stream)
        # A tensor made in inference mode has no version, and a copy or a view is gone when the call returns.
        if not weight.is_inference() and (arrays.is_dense(weight, "NCHW") or arrays.is_dense(weight, "NHWC")):
            weights = self._cached
            resident = Resident(arrays, packed.data, stream)
            cached = CachedDeviceWeight(weight, packed, resident, lambda _: weights.pop(identity, None))
            with self._lock:
                for oldest in list(weights)[: len(weights) + 1 - _MAX_WEIGHTS]:
                    weights.pop(oldest, None)
                weights[identity] = cached
        return packed

    # --- arguments -----------------------------------------------------------------------------------------

    def _arrays(self, array: Any) -> TorchCudaArrays:
        arrays = arrays_of(array)
        if not isinstance(arrays, TorchCudaArrays):
            place = f"a {type(array).__name__}" if arrays.name == "numpy.ndarray" else f"on {array.device}"
            raise SpecTypeError(
                f"input is {place}, and this kernel was built for {self.target.tag}. Pass a torch tensor on a GPU "
                "(tensor.cuda()), or load a kernel for the CPU: load(spec, 'llvm')."
            )
        return arrays

    def _check_gpu(self, gpu: int) -> None:
        """Raise if a GPU cannot run the kernel."""
        device = cuda_driver.device(gpu)
        if device.arch != self.target.arch:
            raise DeviceError(
                f"cuda:{gpu} is a {device.name} of compute capability {device.arch}, and this kernel was built for "
                f"{self.target.tag}. Load one for it: load(spec, 'cuda:{gpu}')."
            )

    def _check_places(self, arrays: TorchCudaArrays, named: Mapping[str, Any]) -> int:
        """Return the GPU on which all arguments are; raise if they are not, or if it cannot run the kernel."""
        input = named["input"]
        gpu = arrays.place(input)
        for name, array in named.items():
            arrays.check(name, array)
            if arrays.place(array) != gpu:
                raise SpecTypeError(f"{name} is on {array.device}, and input is on {input.device}: bring it there.")
        self._check_gpu(gpu)
        return gpu

    @staticmethod
    def _aligned(arrays: TorchCudaArrays, array: Any) -> Any:
        """Return a dense tensor where it can be read in vectors; copied if it is not there."""
        return array.clone() if arrays.pointer(array) % ALIGNMENT else array

    # --- tensors of the compiled function ------------------------------------------------------------------

    def _image(self, batch: int, channels: int, pixels: int) -> Tensor:
        """Return input or output as the caller has it: of NHWC, the rows of a matrix."""
        shape = (batch, channels, pixels) if self.spec.layout == "NCHW" else (batch * pixels, channels)
        return Tensor(shape, self.spec.dtype)

    def _field(self, batch: int, channels: int, pixels: int) -> Tensor:
        """Return offset or mask as the caller has them."""
        shape = (batch, channels, pixels) if self.spec.layout == "NCHW" else (batch, pixels, channels)
        return Tensor(shape, self.spec.dtype)

    def _check_counts(self, extents: Extents, plan: Iterable[Tensor | int], total: int) -> None:
        """Refuse sizes that each tensor may have, but not what a kernel makes of them: indices are int32."""
        counts = [math.prod(argument.shape) for argument in plan if isinstance(argument, Tensor)]
        if max(*counts, 2 * total) > INT32_MAX:
            raise SpecError(
                f"{self!r} would need indices beyond 32 bits for a batch of {extents.batch} images of "
                f"{extents.height} x {extents.width}. Split the batch or the image."
            )

    # --- for tuning and benchmarks -------------------------------------------------------------------------

    def _on_gpu(self, name: str, array: np.ndarray) -> Any:
        """Return an argument as a tensor on the current GPU; images of NHWC kernels as N, C, H, W."""
        import torch

        # torch knows no bfloat16 of NumPy's; the bits travel.
        bits = array.view(np.int16) if array.dtype.itemsize == 2 else array
        tensor = torch.from_numpy(np.ascontiguousarray(bits)).cuda().view(getattr(torch, self.spec.dtype))
        is_image = self.spec.layout == "NHWC" and tensor.dim() == 4 and name != "weight"
        return tensor.permute(0, 3, 1, 2) if is_image else tensor

    def _as_given(self, name: str, tensor: Any) -> Any:
        """Return a result with its axes in the order of the arrays that were given."""
        is_image = self.spec.layout == "NHWC" and tensor.dim() == 4 and name != "grad_weight"
        return tensor.permute(0, 2, 3, 1) if is_image else tensor
