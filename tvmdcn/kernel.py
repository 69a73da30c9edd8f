# SPDX-License-Identifier: Apache-2.0
"""Kernels of layers that can be called: checks of the arguments, and little between them and the compiled code."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from tvmdcn import threads as thread_pool
from tvmdcn.arrays import NumpyArrays, TorchArrays, arrays_of
from tvmdcn.artifact import Artifact
from tvmdcn.compiled import CompiledKernel
from tvmdcn.errors import SpecError
from tvmdcn.native import Tensor
from tvmdcn.prepared import PreparedCall
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tensors import numpy_dtype
from tvmdcn.weights import PackedWeight

__all__ = ["Kernel", "PackedWeight"]


class Kernel(CompiledKernel):
    """A compiled layer, callable on NumPy arrays and on torch CPU tensors; safe to call from several threads.

    Parameters
    ----------
    artifact : Artifact
        What to load; see :func:`load` for how to get one.
    threads : int, optional
        Threads of each call; by default TVMDCN_NUM_THREADS as it is now, else what
        :func:`tvmdcn.threads.thread_count` says at each call.

    Raises
    ------
    ArtifactError
        If the artifact is refused or cannot be loaded.
    """

    operator = DeformConv2dSpec.operator
    public_name = "deform_conv2d"

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        super().__init__(artifact, threads)
        self._bias = np.zeros(self.spec.out_channels, self.spec.accumulator_dtype)
        self._no_bias = NumpyArrays.pointer(self._bias)

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
            torch.Tensor on the CPU or numpy.ndarray, of the spec's dtype, as are all others. For an NHWC
            kernel a NumPy array is (N, H, W, C), as are offset, mask and output, and a torch tensor is (N, C,
            H, W) in ``torch.channels_last``.
        offset : (N, offset_groups * 2 * kh * kw, Ho, Wo)
            y before x, taps row by row, offset groups outermost.
        weight : (Cout, Cin / groups, kh, kw) or PackedWeight
            A torch weight is packed once and again when it changes; a NumPy weight at every call.
        bias : (Cout,), optional
        mask : (N, offset_groups * kh * kw, Ho, Wo)
            Required if the spec has a mask, else None.
        out : (N, Cout, Ho, Wo), optional
            Where to put the result; contiguous, and no part of an input.

        Returns
        -------
        torch.Tensor or numpy.ndarray
            (N, Cout, Ho, Wo) of the input's kind; `out` if given. Arguments that are not contiguous are
            copied.

        Raises
        ------
        SpecError, SpecTypeError
            If an argument does not fit the specification; also if a torch tensor requires gradients.
        """
        arrays = arrays_of(input)
        packed = weight if type(weight) is PackedWeight else None
        count = self.threads or thread_pool.current_count()
        key: Hashable = None
        call = None
        try:
            key = (count, *arrays.key(input, offset, bias, mask, out))
            call = self._calls.get(key)
        except (AttributeError, TypeError, RuntimeError):
            pass  # not an array, or of another kind: the checks say which
        if call is None:
            call = self._keep(key, self._prepare(arrays, input, offset, weight, bias, mask, out, count))
        if packed is None:
            packed = self._packed(arrays, weight)
        elif packed.kernel != self._name:
            self._refuse_packed(packed)
        if isinstance(arrays, TorchArrays):
            arrays.refuse_gradients(input, offset, None if weight is packed else weight, bias, mask, out)
        if call.copies:
            input, offset, mask = (
                None if a is None else arrays.dense(a, self.spec.layout) for a in (input, offset, mask)
            )
        if bias is None:
            bias_pointer = self._no_bias
        else:
            if call.bias_dtype is not None:
                bias = arrays.accumulators(bias, call.bias_dtype)
            bias_pointer = arrays.pointer(bias)
        result = arrays.empty(input, call.out_shape, self.spec.layout) if out is None else out
        if not call.plan:
            return result
        try:
            image, field, target = arrays.pointer(input), arrays.pointer(offset), arrays.pointer(result)
            modulation = 0 if mask is None else arrays.pointer(mask)
        except RuntimeError:
            self._check_memory(arrays, input=input, offset=offset, mask=mask, out=out)
            raise
        if not (image and field and target):
            self._check_memory(arrays, input=input, offset=offset, mask=mask, out=out)
        if (image | field | modulation | bias_pointer | target) & call.item_mask:
            return self._call_aligned(arrays, input, offset, packed, bias, mask, out)
        middle = (packed.pointer, bias_pointer, target)
        pointers = (image, field, *middle) if mask is None else (image, field, modulation, *middle)
        if out is not None:
            call.refuse_overlap(pointers)
            arrays.mark_written(out)
        call.run(pointers)
        return result

    def _call_aligned(
        self, arrays: Any, input: Any, offset: Any, packed: PackedWeight, bias: Any, mask: Any, out: Any
    ) -> Any:
        """Call again with copies of what does not lie at a multiple of its items' size."""
        if out is not None and arrays.pointer(out) % out.itemsize:
            raise SpecError(
                f"out must lie at a multiple of its items' {out.itemsize} bytes, not at {arrays.pointer(out):#x}."
            )
        input, offset, mask = (None if a is None else arrays.dense(a, self.spec.layout) for a in (input, offset, mask))
        if bias is not None:
            bias = arrays.dense(bias, self.spec.layout)
        return self(input, offset, packed, bias, mask, out)

    def bind(self, tensors: Mapping[str, np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
        """Return a function that computes the output of these inputs; see :meth:`CompiledKernel.bind`."""
        input, offset = tensors["input"], tensors["offset"]
        bias, mask, weight = tensors.get("bias"), tensors.get("mask"), self.pack(tensors["weight"])
        shape = list(offset.shape)
        shape[3 if self.spec.layout == "NHWC" else 1] = self.spec.out_channels
        out = np.full(shape, np.nan).astype(numpy_dtype(self.spec.dtype))
        return lambda: {"output": self(input, offset, weight, bias, mask, out)}

    def _prepare(
        self,
        arrays: NumpyArrays | TorchArrays,
        input: Any,
        offset: Any,
        weight: Any,
        bias: Any,
        mask: Any,
        out: Any,
        count: int,
    ) -> PreparedCall:
        """Check a call's arguments, and lay out what stays the same for all calls like it."""
        spec = self.spec
        given = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
        named, extents = self._checked(arrays, spec, given)
        call = self._lay_out(extents, count, parts=count)
        call.out_shape = (extents.batch, spec.out_channels, *spec.output_size(extents.height, extents.width))
        if out is not None:
            self._check_out(arrays, out, call.out_shape)
        call.copies = self._needs_copies(arrays, {n: named[n] for n in ("input", "offset", "mask") if n in named})
        if bias is not None and (spec.dtype != spec.accumulator_dtype or not arrays.is_dense(bias, "NCHW")):
            call.bias_dtype = spec.accumulator_dtype
        call.item_mask = input.itemsize - 1
        return call

    def _check_out(self, arrays: NumpyArrays | TorchArrays, out: Any, shape: tuple[int, ...]) -> None:
        spec = self.spec
        arrays.check("out", out)
        found = tuple(arrays.channels_first_shape(out, spec.layout))
        if found != shape or arrays.dtype(out) != spec.dtype:
            raise SpecError(
                f"out must be {spec.dtype} of shape {shape} (N, Cout, Ho, Wo), got {arrays.dtype(out)} of "
                f"shape {found}"
                f"{' in this order' if spec.layout == 'NHWC' else ''}."
            )
        if not arrays.is_dense(out, spec.layout):
            raise SpecError(f"out must be contiguous in the layout {spec.layout}. Leave it out, or make it so.")
        if isinstance(out, np.ndarray) and not out.flags.writeable:
            raise SpecError("out is read-only.")

    def _tensor(self, name: str, extents: Extents, pixels: int) -> Tensor:
        if name == "input" and self.spec.layout == "NHWC":
            # The kernel gathers from a channels-last image as from one row of numbers.
            extent = extents.height * extents.width * self.spec.in_channels
            return Tensor((extents.batch, extent), self.spec.dtype)
        return super()._tensor(name, extents, pixels)
