# SPDX-License-Identifier: Apache-2.0
"""Kernels of layers on GPUs: on the caller's device and stream, in memory of the caller's framework, never waiting.

The compiled functions are::

    deform_conv2d([x,] [image,] offset, [mask,] weight, bias, [parts,] out, height, width, out_width, total, tiles)
    pack_weight(weight, packed)

With the layout NCHW, ``image`` is memory for a channels-last copy of the input ``x``, of kernels that make one
(not `KernelInterface.planes`); with NHWC it is the input.
``parts`` is memory for the parts of sums, of kernels that divide them (`KernelInterface.splits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from tvmdcn.artifact import Artifact
from tvmdcn.cuda_arrays import TorchCudaArrays
from tvmdcn.cuda_calls import DeviceCall, Resident
from tvmdcn.cuda_compiled import ALIGNMENT, CompiledCudaKernel
from tvmdcn.errors import SpecError
from tvmdcn.native import Tensor
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.weights import PackedWeight

__all__ = ["CudaKernel"]


class CudaKernel(CompiledCudaKernel):
    """A layer compiled for a GPU, callable on torch CUDA tensors; see :class:`CompiledCudaKernel`."""

    operator = DeformConv2dSpec.operator
    public_name = "deform_conv2d"

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        super().__init__(artifact, threads)
        self._no_bias: dict[int, Resident] = {}

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
        arrays.refuse_gradients(input, offset, None if type(weight) is PackedWeight else weight, bias, mask, out)
        with arrays.on(call.gpu):
            stream = arrays.stream(call.gpu)
            packed = self._weight_for(arrays, weight, input, call.gpu, stream)
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
            images = [self._aligned(arrays, input)]
        elif self.artifact.kernel.planes:
            images = [input]
        else:
            images = [input, arrays.memory(input, math.prod(input.shape), self.spec.dtype)]
        bias = self._aligned(arrays, bias)
        fields = [offset] if mask is None else [offset, mask]
        pointers = [arrays.pointer(array) for array in (*images, *fields)]
        pointers += [packed.pointer, arrays.pointer(bias)]
        splits = self.artifact.kernel.splits
        if splits > 1:
            parts = arrays.memory(input, splits * math.prod(call.out_shape), self.spec.accumulator_dtype)
            pointers.append(arrays.pointer(parts))
        pointers.append(arrays.pointer(result))
        if not all(pointers):
            self._check_memory(arrays, input=input, offset=offset, mask=mask, out=out)
        if out is not None:
            if pointers[-1] % ALIGNMENT:
                raise SpecError(f"out must lie at a multiple of {ALIGNMENT} bytes, not at {pointers[-1]:#x}.")
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

        there = {name: self._on_gpu(name, array) for name, array in tensors.items() if array is not None}
        packed, bias, mask = self.pack(there["weight"]), there.get("bias"), there.get("mask")
        input, offset = there["input"], there["offset"]
        out = torch.full_like(self(input, offset, packed, bias, mask), math.nan)
        shown = self._as_given("output", out)

        def call() -> dict[str, Any]:
            self(input, offset, packed, bias, mask, out)
            return {"output": shown}

        return call

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

    def _prepare(
        self, arrays: TorchCudaArrays, input: Any, offset: Any, weight: Any, bias: Any, mask: Any, out: Any
    ) -> DeviceCall:
        """Check a call's arguments, and lay out what stays the same for all calls like it."""
        spec = self.spec
        given = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
        named, extents = self._checked(arrays, spec, given)
        gpu = self._check_places(arrays, named if out is None else {**named, "out": out})
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
        plan: list[Tensor | int] = []
        if spec.layout == "NCHW":
            plan.append(self._image(batch, spec.in_channels, image))
        if not interface.planes:
            plan.append(Tensor((batch * image, spec.in_channels), spec.dtype))
        plan.append(self._field(batch, spec.offset_groups * 2 * spec.taps, pixels))
        if spec.mask:
            plan.append(self._field(batch, spec.offset_groups * spec.taps, pixels))
        plan.append(Tensor(interface.packed_shape, interface.packed_dtype))
        plan.append(Tensor((spec.out_channels,), spec.accumulator_dtype))
        out = self._image(batch, spec.out_channels, pixels)
        if interface.splits > 1:
            plan.append(Tensor((interface.splits, *out.shape), spec.accumulator_dtype))
        plan.append(out)
        self._check_counts(extents, plan, total)
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
