# SPDX-License-Identifier: Apache-2.0
"""What the kernels of all operators share: packed weights, checks of a layer's arguments, the compiled call.

The compiled functions are::

    <operator>(*inputs, *outputs, height, width, out_width, tasks, tiles, tile_units)
    pack_weight(weight, packed)

with the inputs and outputs that the specification names, images as [N, channels, pixels] (NCHW) or [N, pixels,
channels] (NHWC), the weight packed, ``tasks == N * tiles`` and ``tiles * tile_units * granule >= pixels``.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import numpy as np

from tvmdcn import env
from tvmdcn import threads as thread_pool
from tvmdcn.arrays import NumpyArrays, TorchArrays, arrays_of
from tvmdcn.artifact import Artifact
from tvmdcn.errors import ArtifactError, SpecError
from tvmdcn.native import Frame, Tensor
from tvmdcn.partition import partition
from tvmdcn.prepared import PreparedCall, WidenedCall
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo
from tvmdcn.validation import INT32_MAX, check_dtype, check_int
from tvmdcn.weights import CachedWeight, PackedWeight

__all__ = ["IMAGES", "CompiledKernel"]

_log = logging.getLogger(__name__)

IMAGES = ("input", "offset", "mask", "output")
"""The tensors that lie in memory as the layout says; and so do their gradients."""

# Detectors call with ever new sizes: prepared calls (3 KB each) and packed weights are dropped, oldest first.
_MAX_CALLS = 256
_MAX_WEIGHTS = 32


def _aligned(shape: tuple[int, ...], dtype: str, alignment: int) -> np.ndarray:
    """Return an uninitialised array whose data lies at a multiple of `alignment` bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + alignment, np.uint8)
    first = -memory.ctypes.data % alignment
    return memory[first : first + size].view(dtype).reshape(shape)


class CompiledKernel:
    """A kernel of some operator, ready to be called; what each operator's arguments are, its own class knows.

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
        If the artifact is refused, is another operator's, or cannot be loaded.
    """

    operator: ClassVar[str]
    """Name of the operator whose artifacts these are."""
    public_name: ClassVar[str]
    """Name of the function that finds a kernel for its arguments."""
    tile_cost: ClassVar[float] = 0.0
    """What a tile costs besides its units, in units; see :func:`tvmdcn.partition.partition`."""

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        if artifact.spec.operator != self.operator:
            raise ArtifactError(
                f"{artifact.path} computes {artifact.spec.operator}, and {type(self).__name__} calls "
                f"{self.operator}. Use tvmdcn.load, which returns the right kind of kernel."
            )
        self.artifact = artifact
        self.spec = artifact.spec
        self.threads = env.num_threads() if threads is None else check_int("threads", threads, 1)
        module = artifact.load()
        self._function = module.function(artifact.kernel.entry)
        self._pack_function = module.function(artifact.kernel.pack)
        # What a kernel packs is the same for every kernel of the same interface and name.
        self._name = artifact.path.name
        self._calls: dict[Hashable, Any] = {}
        self._weights: dict[int, CachedWeight] = {}
        self._lock = threading.Lock()  # for changes of the two; looking up needs none

    @property
    def target(self) -> TargetInfo:
        """What the kernel was built for."""
        return self.artifact.target

    def __repr__(self) -> str:
        """Return the artifact's name, schedule and target."""
        return f"{type(self).__name__}({self._name}, {self.artifact.key.schedule}, {self.target.tag})"

    def bind(self, tensors: Mapping[str, np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
        """Return a function that computes the outputs of these inputs, always into the same memory.

        What tuning and benchmarks call: the weight is packed, and every call costs the same. Before the first
        one the outputs are NaN, so that what a kernel does not write shows.

        Parameters
        ----------
        tensors : mapping of str to ndarray
            All arguments by name, contiguous in the kernel's layout.
        """
        raise NotImplementedError

    # --- weights -------------------------------------------------------------------------------------------

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
        rows = (weight.shape[0], math.prod(weight.shape[1:]))  # a matrix
        arguments = Tensor(rows, self.spec.dtype), Tensor(packed.shape, interface.packed_dtype)
        frame = Frame(self._pack_function, arguments)
        pointers = arrays.pointer(weight), NumpyArrays.pointer(packed)
        for at, pointer in zip(frame.pointers, pointers, strict=True):
            frame.words[at] = pointer
        thread_pool.use_threads(self.threads or thread_pool.current_count(), self._pack_function.team)
        frame.run()
        return PackedWeight(packed, self._name)

    def _packed(self, arrays: NumpyArrays | TorchArrays, weight: Any) -> PackedWeight:
        """Return the weight packed; from memory for a torch tensor that has not changed."""
        if not isinstance(arrays, TorchArrays):
            arrays.check("weight", weight)
            return self.pack(weight)
        identity = id(weight)
        known = self._weights.get(identity)
        if known is not None and known.is_of(weight):
            return known.packed
        arrays.check("weight", weight)
        packed = self.pack(weight)
        # A tensor made in inference mode has no version, and a copy or a view is gone when the call returns.
        dense = arrays.is_dense(weight, "NCHW") or arrays.is_dense(weight, "NHWC")
        if not weight.is_inference() and dense:
            weights = self._weights
            cached = CachedWeight(arrays, weight, packed, lambda _: weights.pop(identity, None))
            with self._lock:
                for oldest in list(weights)[: len(weights) + 1 - _MAX_WEIGHTS]:
                    weights.pop(oldest, None)
                weights[identity] = cached
        return packed

    def _refuse_packed(self, packed: PackedWeight) -> None:
        """Raise for a weight that another kernel packed."""
        raise SpecError(
            f"weight was packed for {packed.kernel}, this kernel is {self._name}, which may read it in "
            "another order. Pack it with this kernel's pack()."
        )

    # --- arguments -----------------------------------------------------------------------------------------

    @staticmethod
    def _check_memory(arrays: Any, **named: Any) -> None:
        """Check arrays that a prepared call was found for again: some kinds of tensors show only in use."""
        for name, array in named.items():
            if array is not None:
                arrays.check(name, array)

    def _checked(
        self, arrays: NumpyArrays | TorchArrays, layer: DeformConv2dSpec, named: dict[str, Any]
    ) -> tuple[dict[str, Any], Extents]:
        """Check the arguments of a layer's forward; return those that are there, and the extents."""
        named = {name: array for name, array in named.items() if array is not None or name in ("offset", "weight")}
        if type(named["weight"]) is PackedWeight:
            del named["weight"]
        for name, array in named.items():
            arrays.check(name, array)
        if "mask" not in named and layer.mask:
            raise SpecError(f"mask is missing: {self!r} computes a layer with one (DCNv2).")
        shapes = {
            name: arrays.channels_first_shape(array, layer.layout if name in IMAGES else "NCHW")
            for name, array in named.items()
        }
        shapes.setdefault("weight", layer.weight_shape)
        found, extents = DeformConv2dSpec.from_shapes(
            **shapes,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            dtype={name: arrays.dtype(array) for name, array in named.items()},
            layout=layer.layout,
        )
        # The arguments don't tell how their products are made.
        found = replace(found, tf32=layer.tf32) if found.dtype == layer.dtype else found
        if found != layer:
            raise SpecError(
                f"the arguments are those of another layer than {self!r}: "
                + "; ".join(
                    f"{field.name} {getattr(found, field.name)!r}, not {getattr(layer, field.name)!r}"
                    for field in fields(layer)
                    if getattr(found, field.name) != getattr(layer, field.name)
                )
                + f". Load a kernel for them, or call tvmdcn.{self.public_name}."
            )
        return named, extents

    def _needs_copies(self, arrays: NumpyArrays | TorchArrays, images: Mapping[str, Any]) -> bool:
        """Return whether one of `images` does not lie in memory as the kernel reads it."""
        layout = self.spec.layout
        strided = [name for name, array in images.items() if not arrays.is_dense(array, layout)]
        if strided:
            _log.debug("%s: %s not contiguous in %s: copied at each call", self, ", ".join(strided), layout)
        return bool(strided)

    # --- the compiled call ---------------------------------------------------------------------------------

    def _keep(self, key: Hashable, call: PreparedCall) -> PreparedCall:
        """Remember a prepared call, instead of the oldest if there are many, and return it."""
        with self._lock:
            if len(self._calls) >= _MAX_CALLS:
                del self._calls[next(iter(self._calls))]
            self._calls[key] = call
        return call

    def _lay_out(self, extents: Extents, count: int, parts: int) -> PreparedCall:
        """Return the call of the compiled function for these sizes.

        Parameters
        ----------
        extents : Extents
        count : int
            Threads of the call.
        parts : int
            Threads to divide the pixels for; 1 where results must not depend on their number.
        """
        if not extents.batch:
            return PreparedCall(self._function, [], count)
        height, width = self.spec.output_size(extents.height, extents.width)
        pixels, least = height * width, self.artifact.kernel.granule
        plan = self._plan(extents, pixels, width, parts)
        if pixels >= least:
            self._check_indices(extents, plan)
            return PreparedCall(self._function, plan, count)
        wide = self._plan(extents, least, width, parts)
        self._check_indices(extents, wide)
        return WidenedCall(self._function, plan, count, wide, len(self.spec.outputs), self.spec.inputs)

    def _check_indices(self, extents: Extents, plan: list[Tensor | int]) -> None:
        """Refuse sizes that each tensor may have, but not what a kernel makes of them: indices are int32."""
        spec, image = self.spec, extents.height * extents.width
        framed = (extents.height + 2) * (extents.width + 1) + 2  # see Frame in te/sampling.py
        counts = [math.prod(argument.shape) for argument in plan if isinstance(argument, Tensor)]
        channels = self._image_channels
        counts.append(extents.batch * framed * channels)
        if self.artifact.key.schedule == "naive":
            tasks, _, units = (argument for argument in plan[-3:] if isinstance(argument, int))
            counts.append(tasks * units * self.artifact.kernel.granule * spec.taps * channels)
        # A place outside is marked by a number that has to outweigh a pixel's (te/sampling.py).
        if max(counts) > INT32_MAX or image >= 1 << 30:
            raise SpecError(
                f"{self!r} would need indices beyond 32 bits for a batch of {extents.batch} images of "
                f"{extents.height} x {extents.width}. Split the batch or the image."
            )

    @property
    def _image_channels(self) -> int:
        """The channels of the kernel's own copy of the image, those that fill up vectors included."""
        return self.spec.in_channels

    def _plan(self, extents: Extents, pixels: int, out_width: int, parts: int) -> list[Tensor | int]:
        """Return the compiled function's arguments, tensors without their addresses."""
        spec, interface, batch = self.spec, self.artifact.kernel, extents.batch
        tiles, units = partition(pixels, interface.granule, interface.max_tile_units, batch, parts, self.tile_cost)
        tensors = [self._tensor(name, extents, pixels) for name in (*spec.inputs, *spec.outputs)]
        return [*tensors, extents.height, extents.width, out_width, batch * tiles, tiles, units]

    def _tensor(self, name: str, extents: Extents, pixels: int) -> Tensor:
        """Return one of the arguments, of as many output pixels as given."""
        spec, interface, image = self.spec, self.artifact.kernel, extents.height * extents.width
        shape: tuple[int, ...]
        if name == "weight":
            return Tensor(interface.packed_shape, interface.packed_dtype)
        if name == "bias":
            return Tensor((spec.out_channels,), spec.accumulator_dtype)
        if name == "grad_bias":
            shape = (spec.out_channels,)
        elif name == "grad_weight":  # the rows of a matrix
            shape = (spec.out_channels, math.prod(spec.weight_shape[1:]))
        else:
            batch, *sizes = spec.shape_of(name, extents)
            extent = image if name in ("input", "grad_input") else pixels
            shape = (batch, sizes[0], extent) if spec.layout == "NCHW" else (batch, extent, sizes[-1])
        return Tensor(shape, spec.dtype)
