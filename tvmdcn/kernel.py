# SPDX-License-Identifier: Apache-2.0
"""Kernels that can be called: checks of the arguments, and little between them and the compiled code.

The compiled functions are::

    deform_conv2d(x, offset, [mask,] weight, bias, out, height, width, out_width, tasks, tiles, tile_units)
    pack_weight(weight, packed)

with images as [N, channels, pixels] (NCHW) or [N, pixels, channels] (NHWC), ``tasks == N * tiles`` and
``tiles * tile_units * granule >= pixels``.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Hashable
from dataclasses import fields
from typing import Any

import numpy as np

from tvmdcn import env
from tvmdcn import threads as thread_pool
from tvmdcn.arrays import NumpyArrays, TorchArrays, arrays_of
from tvmdcn.artifact import Artifact
from tvmdcn.errors import SpecError
from tvmdcn.native import Frame, Tensor
from tvmdcn.partition import partition
from tvmdcn.prepared import PreparedCall, WidenedCall
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo
from tvmdcn.validation import INT32_MAX, check_dtype, check_int
from tvmdcn.weights import CachedWeight, PackedWeight

__all__ = ["Kernel", "PackedWeight"]

_log = logging.getLogger(__name__)

# Detectors call with ever new sizes: prepared calls (3 KB each) and packed weights are dropped, oldest first.
_MAX_CALLS = 256
_MAX_WEIGHTS = 32


def _aligned(shape: tuple[int, ...], dtype: str, alignment: int) -> np.ndarray:
    """Return an uninitialised array whose data lies at a multiple of `alignment` bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + alignment, np.uint8)
    first = -memory.ctypes.data % alignment
    return memory[first : first + size].view(dtype).reshape(shape)


class Kernel:
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

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        self.artifact = artifact
        self.spec = artifact.spec
        self.threads = env.num_threads() if threads is None else check_int("threads", threads, 1)
        module = artifact.load()
        self._function = module.function(artifact.kernel.entry)
        self._pack_function = module.function(artifact.kernel.pack)
        # What a kernel packs is the same for every kernel of the same interface and name.
        self._name = artifact.path.name
        self._bias = np.zeros(self.spec.out_channels, self.spec.accumulator_dtype)
        self._no_bias = NumpyArrays.pointer(self._bias)
        self._calls: dict[Hashable, PreparedCall] = {}
        self._weights: dict[int, CachedWeight] = {}
        self._lock = threading.Lock()  # for changes of the two; looking up needs none

    @property
    def target(self) -> TargetInfo:
        """What the kernel was built for."""
        return self.artifact.target

    def __repr__(self) -> str:
        """Return the artifact's name, schedule and target."""
        return f"Kernel({self._name}, {self.artifact.key.schedule}, {self.target.tag})"

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
            call = self._prepare(arrays, input, offset, weight, bias, mask, out, count)
            with self._lock:
                if len(self._calls) >= _MAX_CALLS:
                    del self._calls[next(iter(self._calls))]
                self._calls[key] = call
        if isinstance(arrays, TorchArrays):
            arrays.refuse_gradients(input, offset, weight if packed is None else None, bias, mask, out)
        if packed is None:
            packed = self._packed(arrays, weight)
        elif packed.kernel != self._name:
            raise SpecError(
                f"weight was packed for {packed.kernel}, this kernel is {self._name}, which may read it in "
                "another order. Pack it with this kernel's pack()."
            )
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

    @staticmethod
    def _check_memory(arrays: Any, **named: Any) -> None:
        """Check arrays that a prepared call was found for again: some kinds of tensors show only in use."""
        for name, array in named.items():
            if array is not None:
                arrays.check(name, array)

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

    def pack(self, weight: Any) -> PackedWeight:
        """Bring a weight into the order in which this kernel reads it, once for many calls.

        Parameters
        ----------
        weight : (Cout, Cin / groups, kh, kw)
            torch.Tensor on the CPU or numpy.ndarray, of the spec's dtype. Later changes to it are not seen.

        Raises
        ------
        SpecError, SpecTypeError
            If it is not a weight of the spec.
        """
        arrays = arrays_of(weight)
        arrays.check("weight", weight)
        check_dtype({"input": self.spec.dtype, "weight": arrays.dtype(weight)})
        if tuple(weight.shape) != self.spec.weight_shape:
            raise SpecError(
                f"weight must have the shape {self.spec.weight_shape} (Cout, Cin/groups, kh, kw) for "
                f"{self!r}, got {tuple(weight.shape)}."
            )
        weight = arrays.dense(weight, "NCHW")
        interface = self.artifact.kernel
        packed = _aligned(interface.packed_shape, interface.packed_dtype, interface.alignment)
        arguments = Tensor(weight.shape, self.spec.dtype), Tensor(packed.shape, interface.packed_dtype)
        frame = Frame(self._pack_function, arguments)
        pointers = arrays.pointer(weight), NumpyArrays.pointer(packed)
        for at, pointer in zip(frame.pointers, pointers, strict=True):
            frame.words[at] = pointer
        thread_pool.use_threads(self.threads or thread_pool.current_count())
        frame.run()
        return PackedWeight(packed, self._name)

    def _packed(self, arrays: NumpyArrays | TorchArrays, weight: Any) -> PackedWeight:
        """Return the weight packed; from memory for a torch tensor that has not changed."""
        if not isinstance(arrays, TorchArrays):
            return self.pack(weight)
        identity = id(weight)
        known = self._weights.get(identity)
        if known is not None and known.is_of(weight):
            return known.packed
        packed = self.pack(weight)
        # A tensor made in inference mode has no version, and a copy or a view is gone when the call returns.
        if not weight.is_inference() and weight.is_contiguous() and not weight.is_neg():
            weights = self._weights
            cached = CachedWeight(arrays, weight, packed, lambda _: weights.pop(identity, None))
            with self._lock:
                for oldest in list(weights)[: len(weights) + 1 - _MAX_WEIGHTS]:
                    weights.pop(oldest, None)
                weights[identity] = cached
        return packed

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
        named = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
        if type(weight) is PackedWeight:
            del named["weight"]
        named = {name: array for name, array in named.items() if array is not None or name in ("offset", "weight")}
        for name, array in named.items():
            arrays.check(name, array)
        if mask is None and spec.mask:
            raise SpecError(f"mask is missing: {self!r} computes a layer with one (DCNv2).")
        shapes = {
            name: arrays.channels_first_shape(array, spec.layout if name in ("input", "offset", "mask") else "NCHW")
            for name, array in named.items()
        }
        shapes.setdefault("weight", spec.weight_shape)
        dtypes = {name: arrays.dtype(array) for name, array in named.items()}
        found, extents = DeformConv2dSpec.from_shapes(
            **shapes,
            stride=spec.stride,
            padding=spec.padding,
            dilation=spec.dilation,
            dtype=dtypes,
            layout=spec.layout,
        )
        if found != spec:
            raise SpecError(
                f"the arguments are those of another layer than {self!r}: "
                + "; ".join(
                    f"{field.name} {getattr(found, field.name)!r}, not {getattr(spec, field.name)!r}"
                    for field in fields(spec)
                    if getattr(found, field.name) != getattr(spec, field.name)
                )
                + ". Load a kernel for them, or call tvmdcn.deform_conv2d."
            )
        size = spec.output_size(extents.height, extents.width)
        call = self._lay_out(extents, size, count)
        call.out_shape = (extents.batch, spec.out_channels, *size)
        if out is not None:
            self._check_out(arrays, out, call.out_shape)
        strided = [
            name
            for name in ("input", "offset", "mask")
            if name in named and not arrays.is_dense(named[name], spec.layout)
        ]
        if strided:
            _log.debug("%s: %s not contiguous in %s: copied at each call", self, ", ".join(strided), spec.layout)
        call.copies = bool(strided)
        if bias is not None and (spec.dtype != spec.accumulator_dtype or not arrays.is_dense(bias, "NCHW")):
            call.bias_dtype = spec.accumulator_dtype
        call.item_mask = input.itemsize - 1
        return call

    def _lay_out(self, extents: Extents, size: tuple[int, int], count: int) -> PreparedCall:
        """Return the call of the compiled function for these sizes."""
        if not extents.batch:
            return PreparedCall(self._function, [], count)
        pixels, least = size[0] * size[1], self.artifact.kernel.granule
        plan = self._plan(extents, pixels, size[1], count)
        if pixels >= least:
            self._check_indices(extents, plan)
            return PreparedCall(self._function, plan, count)
        wide = self._plan(extents, least, size[1], count)
        self._check_indices(extents, wide)
        return WidenedCall(self._function, plan, count, wide)

    def _check_indices(self, extents: Extents, plan: list[Tensor | int]) -> None:
        """Refuse sizes that each tensor may have, but not what a kernel makes of them: indices are int32."""
        spec, image = self.spec, extents.height * extents.width
        counts = [math.prod(argument.shape) for argument in plan if isinstance(argument, Tensor)]
        counts.append(extents.batch * (image + 1) * spec.in_channels)  # channels last, with a pixel of zeros
        if self.artifact.key.schedule == "naive":
            tasks, _, units = (argument for argument in plan[-3:] if isinstance(argument, int))
            counts.append(tasks * units * self.artifact.kernel.granule * spec.taps * spec.in_channels)
        # A place outside is marked by a number that has to outweigh a pixel's (te/sampling.py).
        if max(counts) > INT32_MAX or image >= 1 << 30:
            raise SpecError(
                f"{self!r} would need indices beyond 32 bits for a batch of {extents.batch} images of "
                f"{extents.height} x {extents.width}. Split the batch or the image."
            )

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

    def _plan(self, extents: Extents, pixels: int, out_width: int, count: int) -> list[Tensor | int]:
        """Return the kernel's arguments."""
        spec, interface = self.spec, self.artifact.kernel
        batch, height, width = extents.batch, extents.height, extents.width
        tiles, units = partition(pixels, interface.granule, interface.max_tile_units, batch, count)

        def image(channels: int, extent: int) -> Tensor:
            shape = (batch, channels, extent) if spec.layout == "NCHW" else (batch, extent, channels)
            return Tensor(shape, spec.dtype)

        fields_of_taps = [2, 1] if spec.mask else [2]
        # The kernel gathers from a channels-last image as from one row of numbers.
        flat = Tensor((batch, height * width * spec.in_channels), spec.dtype)
        return [
            image(spec.in_channels, height * width) if spec.layout == "NCHW" else flat,
            *(image(spec.offset_groups * spec.taps * each, pixels) for each in fields_of_taps),
            Tensor(interface.packed_shape, interface.packed_dtype),
            Tensor((spec.out_channels,), spec.accumulator_dtype),
            image(spec.out_channels, pixels),
            *(height, width, out_width, batch * tiles, tiles, units),
        ]
