# SPDX-License-Identifier: Apache-2.0
"""The deformable layers of an ONNX model: what to tune or build so that it runs fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tvmdcn.errors import SpecError, TvmdcnError
from tvmdcn.onnx.node import LayerNode
from tvmdcn.onnx.runner import LayerCall, Runner
from tvmdcn.onnx.session import load_model
from tvmdcn.onnx.split import Split
from tvmdcn.onnx.values import ValueInfo
from tvmdcn.problems import Problem, problem_text
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tensors import numpy_dtype

__all__ = ["example_inputs", "find_layers"]


def find_layers(model: Any, inputs: Sequence[Sequence[int]] | Mapping[str, np.ndarray] | None = None) -> list[Problem]:
    """Run a model once and return its deformable convolutions, each signature and size once, with how often it occurs.

    Layers are answered with zeros, so nothing is built for this, and onnxruntime need not know ``DeformConv``.

    Parameters
    ----------
    model : str, Path, bytes or onnx.ModelProto
    inputs : sequence of shapes, or mapping of str to ndarray, optional
        Shapes of the inputs, in their order, which are given normal random numbers (zeros where they are integers);
        or the inputs themselves. May be left out if the model's own shapes are fixed.

    Returns
    -------
    list of Problem
        A problem's name is its description, which ``tvmdcn tune --problem`` and others understand.

    Raises
    ------
    SpecError, SpecTypeError
        If the model has no deformable layer, or one that there are no kernels for, or does not run on such inputs.
    """
    split = Split(load_model(model))
    found: dict[tuple[DeformConv2dSpec, Extents], Problem] = {}

    def record(node: LayerNode, input: Any, weight: Any, offset: Any, bias: Any, mask: Any) -> np.ndarray:
        spec = node.spec(weight.shape, weight.dtype)
        with node.named():
            named = {"input": input, "weight": weight, "offset": offset, "bias": bias, "mask": mask}
            named = {name: array for name, array in named.items() if array is not None}
            of_shapes, extents = DeformConv2dSpec.from_shapes(
                **{name: array.shape for name, array in named.items()},
                stride=spec.stride,
                padding=spec.padding,
                dilation=spec.dilation,
                dtype={name: array.dtype for name, array in named.items()},
            )
            if of_shapes != spec:
                raise SpecError(
                    f"its tensors are of {of_shapes.groups} groups and {of_shapes.offset_groups} offset groups, its "
                    f"attributes say {spec.groups} and {spec.offset_groups}."
                )
        source = f"node {node.name} of {split.model.graph.name or 'an ONNX model'}"
        known = found.setdefault((spec, extents), Problem(problem_text(spec, extents), spec, extents, source, 0))
        found[spec, extents] = replace(known, count=known.count + 1)
        return np.zeros(spec.output_shape(extents), numpy_dtype(spec.dtype))

    def layer(node: LayerNode, weight: Any, bias: Any) -> LayerCall:
        def call(input: Any, own_weight: Any, offset: Any, own_bias: Any, mask: Any) -> np.ndarray:
            weights = weight if own_weight is None else own_weight
            return record(node, input, weights, offset, bias if own_bias is None else own_bias, mask)

        return call

    if not split.layers:
        raise SpecError("the model has no DeformConv node.")
    session = Runner(split, layer, onnxruntime.SessionOptions(), {"providers": ["CPUExecutionProvider"]})
    feeds = inputs if isinstance(inputs, Mapping) else example_inputs(session.get_inputs(), inputs)
    try:
        session.run(None, feeds)
    except TvmdcnError:
        raise
    except Exception as error:  # whatever onnxruntime refuses; its exceptions have no base of their own
        shapes = ", ".join(f"{name} {np.shape(array)}" for name, array in feeds.items())
        raise SpecError(
            f"the model does not run on inputs of the shapes {shapes}: {str(error).strip()[:300]} Give a shape for "
            "each input (--input), in their order."
        ) from error
    return list(found.values())


def example_inputs(values: Sequence[ValueInfo], shapes: Sequence[Sequence[int]] | None = None) -> dict[str, np.ndarray]:
    """Return random inputs for a model.

    Parameters
    ----------
    values : sequence of ValueInfo
        The model's inputs.
    shapes : sequence of shapes, optional
        One for each; the model's own by default.

    Raises
    ------
    SpecError
        If the shapes do not fit the model's, or are needed and left out.
    """
    listed = ", ".join(f"{value.name} ({', '.join(map(str, value.shape))}) {value.type}" for value in values)
    if shapes is None:
        if not all(isinstance(size, int) and size > 0 for value in values for size in value.shape):
            raise SpecError(
                f"the model's inputs vary in size: {listed}. Give a shape for each (--input), in this order."
            )
        shapes = [tuple(size for size in value.shape if isinstance(size, int)) for value in values]
    if len(shapes) != len(values):
        raise SpecError(
            f"the model's inputs are {listed}: --input must be given {len(values)} times, not {len(shapes)}."
        )
    rng = np.random.default_rng(0)
    feeds = {}
    for value, shape in zip(values, shapes, strict=True):
        fits = len(shape) == len(value.shape) and all(
            not isinstance(own, int) or own == size for own, size in zip(value.shape, shape, strict=True)
        )
        if value.shape and not fits:
            raise SpecError(f"input {value.name} of the shape {tuple(shape)} does not fit the model's: {listed}.")
        dtype = _dtype(value)
        if dtype.kind in "iub":
            feeds[value.name] = np.zeros(shape, dtype)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def _dtype(value: ValueInfo) -> np.dtype[Any]:
    element = value.type.removeprefix("tensor(").removesuffix(")")
    kinds = {"float": "FLOAT", "double": "DOUBLE"}
    try:
        return np.dtype(
            onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(kinds.get(element, element.upper())))
        )
    except (ValueError, KeyError):
        raise SpecError(
            f"input {value.name} is of the type {value.type}, for which no random values can be made. Call "
            "tvmdcn.onnx.find_layers with the inputs themselves."
        ) from None
