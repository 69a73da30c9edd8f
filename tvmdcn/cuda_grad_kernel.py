# SPDX-License-Identifier: Apache-2.0
"""Kernels of the gradients of a layer on GPUs; see :mod:`tvmdcn.cuda_kernel`.

The compiled functions are::

    deform_conv2d_grad(*spec.inputs, *scratch, *spec.outputs,
                       height, width, out_width, total, tiles, splits, tile_units)
    pack_weight(weight, packed)

with the memory of :mod:`tvmdcn.grad_scratch`, and sums over the `total` output pixels divided into `splits` parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from tvmdcn.cuda_arrays import TorchCudaArrays
from tvmdcn.cuda_calls import DeviceCall
from tvmdcn.cuda_compiled import CompiledCudaKernel
from tvmdcn.grad_kernel import GradientArguments
from tvmdcn.grad_scratch import scratch_tensors, split_of
from tvmdcn.native import Function, Tensor
from tvmdcn.spec import Extents
from tvmdcn.tensors import Gradients

__all__ = ["CudaGradKernel"]

_APART = 256
"""Bytes that the pieces of the memory of a call lie at multiples of."""


class _GradientCall(DeviceCall):
    """A prepared call of gradients.

    Parameters
    ----------
    function, gpu
        As of :class:`DeviceCall`.
    inputs, scratch, outputs : sequence of Tensor
    scalars : sequence of int
    """

    __slots__ = ("places", "scratch_bytes")

    def __init__(
        self,
        function: Function,
        gpu: int,
        inputs: Sequence[Tensor] = (),
        scratch: Sequence[Tensor] = (),
        outputs: Sequence[Tensor] = (),
        scalars: Sequence[int] = (),
    ) -> None:
        super().__init__(function, [*inputs, *scratch, *outputs, *scalars], gpu)
        # All in one piece of memory: asking torch for it takes longer than for its parts would pay.
        self.places: list[int] = []
        self.scratch_bytes = 0
        for tensor in scratch:
            self.places.append(self.scratch_bytes)
            self.scratch_bytes += -(-tensor.bytes // _APART) * _APART


class CudaGradKernel(CompiledCudaKernel, GradientArguments):
    """The gradients of a layer compiled for a GPU, callable on torch CUDA tensors; see :class:`CompiledCudaKernel`.

    The input's gradient depends, in its last bits, on the order in which threads add to it, unless the spec is
    `deterministic`. All others are the same at every call.
    """

    def __call__(self, grad_output: Any, input: Any, offset: Any, weight: Any, mask: Any = None) -> Gradients:
        """Compute the gradients.

        Parameters
        ----------
        grad_output : (N, Cout, Ho, Wo)
            The gradient of the output. torch.Tensor on a GPU of the kernel's compute capability, of the spec's dtype,
            as are all others on the same GPU; in ``torch.channels_last`` for an NHWC kernel.
        input : (N, Cin, H, W)
            Also where the gradients do not depend on its values; so `offset`, and `mask` of a layer with one.
        offset : (N, offset_groups * 2 * kh * kw, Ho, Wo)
        weight : (Cout, Cin / groups, kh, kw) or PackedWeight
        mask : (N, offset_groups * kh * kw, Ho, Wo)
            Required if the spec has a mask, else None.

        Returns
        -------
        Gradients
            Tensors of the shapes of what they are the gradients of, images in the memory format of the spec's
            layout; None if the spec does not ask for it. Arguments that are not contiguous are copied.

        Raises
        ------
        SpecError, SpecTypeError
            If an argument does not fit the specification; also if a tensor requires gradients: there is no second
            derivative.
        DeviceError
            If the GPU is of another compute capability, or refuses the work.
        """
        return self._gradients(grad_output, input, offset, weight, mask, None)

    def _gradients(
        self, grad_output: Any, input: Any, offset: Any, weight: Any, mask: Any, results: list[Any] | None
    ) -> Gradients:
        """Compute the gradients into `results`, new ones by default, in the order of the spec's outputs."""
        arrays = self._arrays(input)
        key: Hashable = None
        call: _GradientCall | None = None
        try:
            key = arrays.key(grad_output, input, offset, mask)
            call = self._calls.get(key)
        except (AttributeError, TypeError, RuntimeError):
            pass  # not an array, or of another kind: the checks say which
        if call is None:
            call = self._prepare(arrays, grad_output, input, offset, weight, mask)
            self._keep(key, call)
        self._refuse_second_derivatives(arrays, (grad_output, input, offset, mask), weight)
        with arrays.on(call.gpu):
            stream = arrays.stream(call.gpu)
            if results is None:
                results = [arrays.empty(input, shape, layout) for shape, layout in call.out_shapes]
            packed = 0
            if self._reads_weight:
                # Kept until the call is given out: what is packed in a graph belongs to nobody else.
                weight = self._weight_for(arrays, weight, input, call.gpu, stream)
                packed = weight.pointer
            else:
                self._check_weight(arrays, weight)
            if call.plan:
                given = {"grad_output": grad_output, "input": input, "offset": offset, "mask": mask}
                self._compute(arrays, call, stream, given, packed, results)
            else:
                for result in results:
                    result.zero_()  # of no images; only the gradients of weight and bias have elements
        return self._named_results(results)

    def _compute(
        self,
        arrays: TorchCudaArrays,
        call: _GradientCall,
        stream: int,
        given: dict[str, Any],
        packed: int,
        results: Sequence[Any],
    ) -> None:
        """Put a prepared call on a stream."""
        layout = self.spec.layout
        read = {name: given[name] for name in self.spec.inputs if name != "weight"}
        if call.copies:
            read = {name: arrays.dense(array, layout) for name, array in read.items()}
        if layout == "NHWC":  # else they are read element by element, to be copied in that order
            for name in ("grad_output", "input"):
                if name in read:
                    read[name] = self._aligned(arrays, read[name])
        pointers = [arrays.pointer(read[name]) if name in read else packed for name in self.spec.inputs]
        if not all(pointers):
            self._check_memory(arrays, **given)
        if call.scratch_bytes:
            scratch = arrays.memory(given["input"], call.scratch_bytes, "uint8")
            first = arrays.pointer(scratch)
            pointers += [first + place for place in call.places]
        pointers += [arrays.pointer(result) for result in results]
        call.launch(tuple(pointers), stream)

    def bind(self, tensors: Mapping[str, np.ndarray]) -> Callable[[], dict[str, Any]]:
        """Return a function that computes the gradients of these inputs, on the current GPU.

        See :meth:`CompiledKernel.bind`; the results are torch tensors in the GPU's memory, and the function returns
        before they are there. Images are (N, H, W, C) there for an NHWC kernel, as the arrays that were given.
        """
        there = {name: self._on_gpu(name, array) for name, array in tensors.items() if array is not None}
        weight = self.pack(there["weight"]) if self._reads_weight else there["weight"]
        arguments = there["grad_output"], there["input"], there["offset"], weight, there.get("mask")
        found = self(*arguments)._asdict()
        results = [found[name.removeprefix("grad_")].fill_(math.nan) for name in self.spec.outputs]
        shown = {name: self._as_given(name, result) for name, result in zip(self.spec.outputs, results, strict=True)}

        def call() -> dict[str, Any]:
            self._gradients(*arguments, results)
            return shown

        return call

    # --- arguments -----------------------------------------------------------------------------------------

    def _prepare(
        self, arrays: TorchCudaArrays, grad_output: Any, input: Any, offset: Any, weight: Any, mask: Any
    ) -> _GradientCall:
        """Check a call's arguments, and lay out what stays the same for all calls like it."""
        given = {"input": input, "offset": offset, "weight": weight, "mask": mask}
        named, extents = self._checked_gradients(arrays, grad_output, given)
        gpu = self._check_places(arrays, named)
        if extents.batch:
            call = _GradientCall(self._function, gpu, *self._device_plan(extents))
        else:
            call = _GradientCall(self._function, gpu)
        self._fill_in(arrays, call, named)
        return call

    def _device_plan(self, extents: Extents) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
        """Return the compiled function's arguments, tensors without addresses: inputs, scratch, outputs, scalars."""
        spec, interface = self.spec, self.artifact.kernel
        batch, image = extents.batch, extents.height * extents.width
        size = spec.output_size(extents.height, extents.width)
        pixels = math.prod(size)
        total = batch * pixels
        tiles = -(-total // interface.granule)
        splits, tile_units = split_of(spec, tiles, interface.max_tile_units)
        shapes = scratch_tensors(spec, batch * image, total, splits)
        scratch = [Tensor(shape, dtype) for shape, dtype in shapes.values()]

        def tensor(name: str) -> Tensor:
            if name == "weight":
                return Tensor(interface.packed_shape, interface.packed_dtype)
            what = name.removeprefix("grad_")
            if what in ("weight", "bias"):
                rows = (spec.out_channels, math.prod(spec.weight_shape[1:]))
                return Tensor(rows if what == "weight" else rows[:1], spec.dtype)
            if what in ("input", "output"):
                channels, extent = (spec.in_channels, image) if what == "input" else (spec.out_channels, pixels)
                return self._image(batch, channels, extent)
            return self._field(batch, spec.offset_groups * spec.taps * (2 if what == "offset" else 1), pixels)

        inputs, outputs = ([tensor(name) for name in names] for names in (spec.inputs, spec.outputs))
        self._check_counts(extents, (*inputs, *scratch, *outputs), total)
        scalars = [extents.height, extents.width, size[1], total, tiles, splits, tile_units]
        return inputs, scratch, outputs, scalars
