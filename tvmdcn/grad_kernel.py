# SPDX-License-Identifier: Apache-2.0
"""Kernels of the gradients of a layer that can be called."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from tvmdcn import threads as thread_pool
from tvmdcn.arrays import NumpyArrays, TorchArrays, arrays_of
from tvmdcn.artifact import Artifact
from tvmdcn.compiled import IMAGES, CompiledKernel
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.prepared import PreparedCall
from tvmdcn.shapes import OUTPUT_AXES
from tvmdcn.spec import DeformConv2dGradSpec, Extents
from tvmdcn.tensors import Gradients, numpy_dtype
from tvmdcn.validation import check_dtype, check_shape
from tvmdcn.weights import PackedWeight

__all__ = ["GradKernel", "GradientArguments", "refuse_second_derivatives"]

_ARGUMENTS = ("grad_output", "input", "offset", "weight", "mask")


def refuse_second_derivatives() -> NoReturn:
    """Raise SpecTypeError for a call that autograd would have to record."""
    raise SpecTypeError(
        "a tensor requires gradients, and the gradients of a deformable convolution have no derivatives of "
        "their own: call inside torch.no_grad(), or detach the tensors."
    )


class GradientArguments(CompiledKernel):
    """What kernels of a layer's gradients share, whatever they run on: how they are called, and the checks of that."""

    operator = DeformConv2dGradSpec.operator
    public_name = "deform_conv2d_backward"
    spec: DeformConv2dGradSpec

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        super().__init__(artifact, threads)
        spec = self.spec
        self._layer = spec.layer
        # Where the compiled function's inputs are among the arguments, and where a result is among its outputs.
        self._reads = [_ARGUMENTS.index(name) for name in spec.inputs]
        names = [f"grad_{name}" for name in Gradients._fields]
        self._gives = [spec.outputs.index(name) if name in spec.outputs else None for name in names]
        self._reads_weight = "weight" in spec.inputs

    def _checked_gradients(
        self, arrays: NumpyArrays | TorchArrays, grad_output: Any, named: dict[str, Any]
    ) -> tuple[dict[str, Any], Extents]:
        """Check the arguments of a call; return those that are there, and the extents."""
        spec = self.spec
        named, extents = self._checked(arrays, self._layer, named)
        arrays.check("grad_output", grad_output)
        check_dtype({"input": spec.dtype, "grad_output": arrays.dtype(grad_output)})
        expected = (extents.batch, spec.out_channels, *spec.output_size(extents.height, extents.width))
        found = check_shape("grad_output", arrays.channels_first_shape(grad_output, spec.layout), OUTPUT_AXES)
        if found != expected:
            raise SpecError(f"grad_output must be of the output's shape {expected}, got {found}.")
        return {"grad_output": grad_output, **named}, extents

    def _fill_in(self, arrays: NumpyArrays | TorchArrays, call: PreparedCall, named: Mapping[str, Any]) -> None:
        """Note in a prepared call what its arguments are: whether they are copied, and what its results are like."""
        images = {name: array for name, array in named.items() if name in ("grad_output", *IMAGES)}
        call.copies = self._needs_copies(arrays, images)
        call.out_shapes = [self._result(arrays, name, named) for name in self.spec.outputs]

    def _result(
        self, arrays: NumpyArrays | TorchArrays, name: str, named: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], str]:
        """Return the shape, N, C, H, W, and the layout of one of the outputs."""
        name = name.removeprefix("grad_")
        if name in IMAGES:
            return tuple(arrays.channels_first_shape(named[name], self.spec.layout)), self.spec.layout
        return (self.spec.weight_shape if name == "weight" else (self.spec.out_channels,)), "NCHW"

    def _check_weight(self, arrays: NumpyArrays | TorchArrays, weight: Any) -> None:
        """Check a weight that is not read."""
        if type(weight) is PackedWeight or getattr(weight, "shape", None) == self.spec.weight_shape:
            return
        arrays.check("weight", weight)
        raise SpecError(
            f"weight must have the shape {self.spec.weight_shape} (Cout, Cin/groups, kh, kw) for "
            f"{self!r}, got {tuple(weight.shape)}."
        )

    def _refuse_second_derivatives(self, arrays: TorchArrays, given: Sequence[Any], weight: Any) -> None:
        """Raise SpecTypeError if autograd would have to record the call."""
        read = weight if self._reads_weight and type(weight) is not PackedWeight else None
        if arrays.needs_gradients(*given, read):
            refuse_second_derivatives()

    def _named_results(self, results: Sequence[Any]) -> Gradients:
        """Return the compiled function's outputs as what they are the gradients of."""
        return Gradients(*[None if place is None else results[place] for place in self._gives])


class GradKernel(GradientArguments):
    """The compiled gradients of a layer, callable on NumPy arrays and on torch CPU tensors, from several threads.

    Results are the same to the last bit whatever the number of threads.

    Parameters
    ----------
    artifact : Artifact
        What to load; see :func:`load` for how to get one.
    threads : int, optional
        Threads of each call; see :class:`Kernel`.

    Raises
    ------
    ArtifactError
        If the artifact is refused, is another operator's, or cannot be loaded.
    """

    # A tile's part of the weight's gradient is read, added to and written once more.
    tile_cost = 0.15

    def __call__(self, grad_output: Any, input: Any, offset: Any, weight: Any, mask: Any = None) -> Gradients:
        """Compute the gradients.

        Parameters
        ----------
        grad_output : (N, Cout, Ho, Wo)
            The gradient of the output. torch.Tensor on the CPU or numpy.ndarray, of the spec's dtype and in the
            order of its layout (see :class:`Kernel`), as are all others.
        input : (N, Cin, H, W)
            Also where the gradients do not depend on its values; so `offset`, and `mask` of a layer with one.
        offset : (N, offset_groups * 2 * kh * kw, Ho, Wo)
        weight : (Cout, Cin / groups, kh, kw) or PackedWeight
            A torch weight is packed once and again when it changes; a NumPy weight at every call.
        mask : (N, offset_groups * kh * kw, Ho, Wo)
            Required if the spec has a mask, else None.

        Returns
        -------
        Gradients
            Each of the kind and shape of what it is the gradient of, images in the spec's layout; None if the
            spec does not ask for it.

        Raises
        ------
        SpecError, SpecTypeError
            If an argument does not fit the specification; also if a torch tensor requires gradients: there is no
            second derivative.
        """
        return self._gradients(grad_output, input, offset, weight, mask, None)

    def _gradients(
        self, grad_output: Any, input: Any, offset: Any, weight: Any, mask: Any, results: list[Any] | None
    ) -> Gradients:
        """Compute the gradients into `results`, new ones by default, in the order of the spec's outputs."""
        arrays = arrays_of(input)
        packed = weight if type(weight) is PackedWeight else None
        count = self.threads or thread_pool.current_count()
        key: Hashable = None
        call = None
        try:
            key = (count, *arrays.key(grad_output, input, offset, mask))
            call = self._calls.get(key)
        except (AttributeError, TypeError, RuntimeError):
            pass  # not an array, or of another kind: the checks say which
        if call is None:
            call = self._keep(key, self._prepare(arrays, grad_output, input, offset, weight, mask, count))
        if not self._reads_weight:
            self._check_weight(arrays, weight)
        elif packed is None:
            packed = self._packed(arrays, weight)
        elif packed.kernel != self._name:
            self._refuse_packed(packed)
        if isinstance(arrays, TorchArrays):
            self._refuse_second_derivatives(arrays, (grad_output, input, offset, mask), weight)
        given = [grad_output, input, offset, None, mask]
        if call.copies:
            given = [None if array is None else arrays.dense(array, self.spec.layout) for array in given]
        if results is None:
            results = [arrays.empty(input, shape, layout) for shape, layout in call.out_shapes]
        if call.plan:
            self._run(arrays, call, given, packed, results)
        else:
            for result in results:
                result[...] = 0  # of no images; only the gradients of weight and bias have elements
        return self._named_results(results)

    def _run(
        self,
        arrays: NumpyArrays | TorchArrays,
        call: PreparedCall,
        given: list[Any],
        packed: PackedWeight | None,
        results: list[Any],
    ) -> None:
        """Call the compiled function."""
        pointers = []
        together = 0
        pointer = arrays.pointer
        try:
            for place in self._reads:
                array = given[place]
                at = pointer(array) if array is not None else packed.pointer if packed is not None else 0
                if not at:
                    self._check_memory(arrays, **dict(zip(_ARGUMENTS, given, strict=True)))
                pointers.append(at)
                together |= at
            if together & call.item_mask:  # what does not lie at a multiple of its items' size is copied
                aligned = [None if array is None else arrays.dense(array, self.spec.layout) for array in given]
                return self._run(arrays, call, aligned, packed, results)
            for result in results:
                pointers.append(pointer(result))
        except RuntimeError:
            self._check_memory(arrays, **dict(zip(_ARGUMENTS, given, strict=True)))
            raise
        call.run(tuple(pointers))
        return None

    def bind(self, tensors: Mapping[str, np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
        """Return a function that computes the gradients of these inputs; see :meth:`CompiledKernel.bind`."""
        spec = self.spec
        grad_output, input, offset, mask = (tensors.get(n) for n in ("grad_output", "input", "offset", "mask"))
        weight = self.pack(tensors["weight"]) if self._reads_weight else tensors["weight"]
        dtype = numpy_dtype(spec.dtype)
        shapes = [tensors[name.removeprefix("grad_")].shape if name != "grad_bias" else None for name in spec.outputs]
        results = [np.full(spec.out_channels if s is None else s, np.nan).astype(dtype) for s in shapes]

        def call() -> dict[str, np.ndarray]:
            self._gradients(grad_output, input, offset, weight, mask, results)
            return dict(zip(spec.outputs, results, strict=True))

        return call

    def _prepare(
        self,
        arrays: NumpyArrays | TorchArrays,
        grad_output: Any,
        input: Any,
        offset: Any,
        weight: Any,
        mask: Any,
        count: int,
    ) -> PreparedCall:
        """Check a call's arguments, and lay out what stays the same for all calls like it."""
        arguments = {"input": input, "offset": offset, "weight": weight, "mask": mask}
        named, extents = self._checked_gradients(arrays, grad_output, arguments)
        # Divided as for one thread: sums over pixels must not depend on how many there are.
        call = self._lay_out(extents, count, parts=1)
        self._fill_in(arrays, call, named)
        call.item_mask = input.itemsize - 1
        return call

    @property
    def _image_channels(self) -> int:
        # The packed weight is in blocks of channels: [blocks, taps, vectors, Cout / groups, lanes].
        blocks, _, vectors, _, lanes = self.artifact.kernel.packed_shape
        return max(self.spec.in_channels, blocks * vectors * lanes)
