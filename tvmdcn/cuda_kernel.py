# SPDX-License-Identifier: Apache-2.0
"""Kernels of layers on GPUs: on the caller's device and stream, in memory of the caller's framework, never waiting.

The compiled functions are::

    deform_conv2d([x,] image, offset, [mask,] weight, bias, out, height, width, out_width, total, tiles)
    pack_weight(weight, packed)

With the layout NCHW, ``image`` is memory for a channels-last copy of the input ``x``; with NHWC it is the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
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
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.validation import INT32_MAX, check_dtype
from tvmdcn.weights import PackedWeight

__all__ = ["CudaKernel"]

_ALIGNMENT = 32
"""Bytes that the data of image, weight, bias and output must be a multiple of: torch's allocations are."""
_MAX_WEIGHTS = 32


class CudaKernel(CompiledKernel):
    """A layer compiled for a GPU, callable on torch CUDA tensors; safe to call from several threads.

    A call puts work on the current stream of the input's device and returns: it neither waits nor allocates other
    than by torch, so that it can be captured in a CUDA graph (after one call outside of it, which loads the code).
    A weight is packed once and again when torch counts a change of it; a change through ``tensor.data`` is not
    counted. While a graph is captured it is packed in the graph.

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

    operator = DeformConv2dSpec.operator
    public_name = "deform_conv2d"

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        super().__init__(artifact, threads)
        self._no_bias: dict[int, Resident] = {}
        self._cached: dict[int, CachedDeviceWeight] = {}

    def __call__(
        self,
        input: Any,
        offset: Any,
        weight: Any,
        bias: Any = None,
        mask: Any = None,
        out: Any = None,
    ) -> Any:
        """Compute the layer.

        Parameters
        ----------
        input : (N, Cin, H, W)
            torch.Tensor on a GPU of the kernel's compute capability, of the spec's dtype, as are all others on the
            same GPU; in ``torch.channels_last`` for an NHWC kernel.
        offset : (N, offset_groups * 2 * kh * kw, Ho, Wo)
            y before x, taps row by row, offset groups outermost.
        weight : (Cout, Cin / groups, kh, kw) or PackedWeight
        bias : (Cout,), optional
        mask : (N, offset_groups * kh * kw, Ho, Wo)
            Required if the spec has a mask, else None.
        out : (N, Cout, Ho, Wo), optional
            Where to put the result; contiguous, and no part of an input.

        Returns
        -------
        torch.Tensor
            (N, Cout, Ho, Wo); `out` if given. Arguments that are not contiguous are copied.

        Raises
        ------
        SpecError, SpecTypeError
            If an argument does not fit the specification; also if a tensor requires gradients.
        DeviceError
            If the GPU is of another compute capability, or refuses the work.
        """
        arrays = self._arrays(input)
        packed = weight if type(weight) is PackedWeight else None
        key: Hashable = None
        call: DeviceCall | None = None
        try:
            key = arrays.key(input, offset, bias, mask, out)
            call = self._calls.get(key)
        except (AttributeError, TypeError, RuntimeError):
            pass  # not an array, or of another kind: the checks say which
        if call is None:
            call = self._prepare(arrays, input, offset, weight, bias, mask, out)
            self._keep(key, call)
        arrays.refuse_gradients(input, offset, None if packed is not None else weight, bias, mask, out)
        with arrays.on(call.gpu):
            stream = arrays.stream(call.gpu)
            if packed is None:
                packed = self._packed_on(arrays, weight, call.gpu, stream)
            elif packed.kernel != self._name:
                self._refuse_packed(packed)
            elif packed.data.device != input.device:
                raise SpecError(f"weight was packed on {packed.data.device}, and input is on {input.device}.")
            return self._compute(arrays, call, stream, input, offset, packed, bias, mask, out)

    def _compute(
        self,
        arrays: TorchCudaArrays,
        call: DeviceCall,
        stream: int,
        input: Any,
        offset: Any,
        packed: PackedWeight,
        bias: Any,
        mask: Any,
        out: Any,
    ) -> Any:
        """Put a prepared call on a stream."""
        layout = self.spec.layout
        if call.copies:
            input, offset, mask = (None if a is None else arrays.dense(a, layout) for a in (input, offset, mask))
        result = arrays.empty(input, call.out_shape, layout) if out is None else out
        if not call.plan:
            return result
        if bias is None:
            bias = self._zero_bias(arrays, input, call.gpu, stream)
        else:
            bias = arrays.accumulators(bias, self.spec.accumulator_dtype)
        if layout == "NHWC":
            if arrays.pointer(input) % _ALIGNMENT:
                input = input.clone()
            images = [input]
        else:
            images = [input, arrays.memory(input, math.prod(input.shape), self.spec.dtype)]
        if arrays.pointer(bias) % _ALIGNMENT:
            bias = bias.clone()
        fields = [offset] if mask is None else [offset, mask]
        pointers = [arrays.pointer(array) for array in (*images, *fields)]
        pointers += [packed.pointer, arrays.pointer(bias), arrays.pointer(result)]
        if not all(pointers):
            self._check_memory(arrays, input=input, offset=offset, mask=mask, out=out)
        if out is not None:
            if pointers[-1] % _ALIGNMENT:
                raise SpecError(f"out must lie at a multiple of {_ALIGNMENT} bytes, not at {pointers[-1]:#x}.")
            call.refuse_overlap(tuple(pointers))
            arrays.mark_written(out)
        call.launch(tuple(pointers), stream)
        return result

    def bind(self, tensors: Mapping[str, np.ndarray]) -> Callable[[], dict[str, Any]]:
        """Return a function that computes the output of these inputs, on the current GPU.

        See :meth:`CompiledKernel.bind`; the result is a torch tensor in the GPU's memory, and the function returns
        before it is there. Images are (N, H, W, C) there for an NHWC kernel, as the arrays that were given.
        """
        import torch

        def there(name: str) -> Any:
            array = tensors.get(name)
            if array is None:
                return None
            bits = array.view(np.int16) if array.dtype.itemsize == 2 else array
            tensor = torch.from_numpy(np.ascontiguousarray(bits)).cuda()
            tensor = tensor.view(getattr(torch, self.spec.dtype))
            return tensor.permute(0, 3, 1, 2) if self.spec.layout == "NHWC" and tensor.dim() == 4 else tensor

        images = {name: there(name) for name in ("input", "offset", "mask", "bias")}
        weight = tensors["weight"]
        bits = weight.view(np.int16) if weight.dtype.itemsize == 2 else weight
        packed = self.pack(torch.from_numpy(np.ascontiguousarray(bits)).cuda().view(getattr(torch, self.spec.dtype)))
        out = torch.full_like(self(images["input"], images["offset"], packed, images["bias"], images["mask"]), math.nan)
        shown = out.permute(0, 2, 3, 1) if self.spec.layout == "NHWC" else out

        def call() -> dict[str, Any]:
            self(images["input"], images["offset"], packed, images["bias"], images["mask"], out)
            return {"output": shown}

        return call

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
        weight = arrays.dense(weight.detach(), "NCHW")
        if arrays.pointer(weight) % _ALIGNMENT:
            weight = weight.clone()
        interface = self.artifact.kernel
        packed = arrays.memory(weight, math.prod(interface.packed_shape), interface.packed_dtype)
        rows = (weight.shape[0], math.prod(weight.shape[1:]))  # a matrix
        plan = [Tensor(rows, self.spec.dtype), Tensor(interface.packed_shape, interface.packed_dtype)]
        call = DeviceCall(self._pack_function, plan, gpu)
        call.launch((arrays.pointer(weight), arrays.pointer(packed)), stream)
        return PackedWeight(packed, self._name, arrays.pointer(packed))

    def _packed_on(self, arrays: TorchCudaArrays, weight: Any, gpu: int, stream: int) -> PackedWeight:
        """Return the weight packed; from memory for a tensor that has not changed."""
        # A graph that is captured reads what it packs itself, whenever it is replayed: a weight may change, and
        # memory of the graph is not ours to keep.
        if arrays.is_capturing():
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

    def _zero_bias(self, arrays: TorchCudaArrays, like: Any, gpu: int, stream: int) -> Any:
        """Return the bias of a layer without one."""
        known = self._no_bias.get(gpu)
        if known is None or arrays.is_capturing():
            zeros = arrays.zeros(like, self.spec.out_channels, self.spec.accumulator_dtype)
            if arrays.is_capturing():
                return zeros  # the graph's memory
            known = self._no_bias[gpu] = Resident(arrays, zeros, stream)
        return known.used_on(arrays, stream)

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

    def _prepare(
        self, arrays: TorchCudaArrays, input: Any, offset: Any, weight: Any, bias: Any, mask: Any, out: Any
    ) -> DeviceCall:
        """Check a call's arguments, and lay out what stays the same for all calls like it."""
        spec = self.spec
        given = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
        named, extents = self._checked(arrays, spec, given)
        gpu = arrays.place(input)
        for name, array in {**named, **({} if out is None else {"out": out})}.items():
            arrays.check(name, array)
            if arrays.place(array) != gpu:
                raise SpecTypeError(f"{name} is on {array.device}, and input is on {input.device}: bring it there.")
        self._check_gpu(gpu)
        out_size = spec.output_size(extents.height, extents.width)
        empty = not extents.batch or not math.prod(out_size)
        call = DeviceCall(self._function, [] if empty else self._device_plan(extents, out_size), gpu)
        call.out_shape = (extents.batch, spec.out_channels, *out_size)
        if out is not None:
            self._check_out(arrays, out, call.out_shape)
        call.copies = self._needs_copies(arrays, {n: named[n] for n in ("input", "offset", "mask") if n in named})
        return call

    def _device_plan(self, extents: Extents, out_size: tuple[int, int]) -> list[Tensor | int]:
        """Return the compiled function's arguments, tensors without their addresses."""
        spec, interface = self.spec, self.artifact.kernel
        batch, image, pixels = extents.batch, extents.height * extents.width, math.prod(out_size)
        total = batch * pixels

        def plane(channels: int) -> Tensor:
            return Tensor((batch, channels, pixels) if spec.layout == "NCHW" else (batch, pixels, channels), spec.dtype)

        plan: list[Tensor | int] = []
        if spec.layout == "NCHW":
            plan.append(Tensor((batch, spec.in_channels, image), spec.dtype))
        plan.append(Tensor((batch * image, spec.in_channels), spec.dtype))
        plan.append(plane(spec.offset_groups * 2 * spec.taps))
        if spec.mask:
            plan.append(plane(spec.offset_groups * spec.taps))
        plan.append(Tensor(interface.packed_shape, interface.packed_dtype))
        plan.append(Tensor((spec.out_channels,), spec.accumulator_dtype))
        rows = (batch, spec.out_channels, pixels) if spec.layout == "NCHW" else (total, spec.out_channels)
        plan.append(Tensor(rows, spec.dtype))
        counts = [math.prod(argument.shape) for argument in plan if isinstance(argument, Tensor)]
        if max(*counts, 2 * total) > INT32_MAX:
            raise SpecError(
                f"{self!r} would need indices beyond 32 bits for a batch of {batch} images of {extents.height} x "
                f"{extents.width}. Split the batch or the image."
            )
        return [*plan, extents.height, extents.width, out_size[1], total, -(-total // interface.granule)]

    def _check_out(self, arrays: TorchCudaArrays, out: Any, shape: tuple[int, ...]) -> None:
        spec = self.spec
        if tuple(out.shape) != shape or arrays.dtype(out) != spec.dtype:
            raise SpecError(
                f"out must be {spec.dtype} of shape {shape} (N, Cout, Ho, Wo), got {arrays.dtype(out)} of shape "
                f"{tuple(out.shape)}."
            )
        if not arrays.is_dense(out, spec.layout):
            raise SpecError(f"out must be contiguous in the layout {spec.layout}. Leave it out, or make it so.")
