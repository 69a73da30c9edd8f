# SPDX-License-Identifier: Apache-2.0
"""A cut model that can be run: the parts as sessions of onnxruntime, the layers by a function of the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import onnx
import onnxruntime

from tvmdcn.errors import SpecError
from tvmdcn.onnx.node import LayerNode
from tvmdcn.onnx.split import Part, Split
from tvmdcn.onnx.values import ValueInfo, described, open_session, proto_of, run_session

__all__ = ["LayerCall", "Runner"]

LayerCall = Callable[[Any, Any, Any, Any, Any], Any]
"""Computes a layer from X, W, offset, B and mask; W and B are None where they are constant, or left out."""


class Runner:
    """A cut model.

    Parameters
    ----------
    split : Split
    layer : callable
        Given a layer, and the values of its weight and bias (None where they are not constant), returns what computes
        it.
    options : onnxruntime.SessionOptions
        Of every part.
    arguments : dict
        Other arguments of ``onnxruntime.InferenceSession``.
    """

    def __init__(
        self, split: Split, layer: Callable[[LayerNode, Any, Any], LayerCall], options: Any, arguments: dict[str, Any]
    ) -> None:
        self.layers = split.layers
        self._inputs = [described(value) for value in split.inputs]
        self._defaults = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in split.defaults.items()}
        constants = _constants(split, options, arguments)
        types = {value.name: value for value in self._inputs}
        types |= {name: _type_of_array(name, array) for name, array in constants.items()}
        self._steps: list[_Step] = []
        for step in split.steps:
            if isinstance(step, LayerNode):
                types[step.output] = _type_of_result(step, types)
                fixed = [constants.get(name) if name else None for name in (step.weight, step.bias)]
                self._steps.append(_LayerStep(step, constants.keys(), layer(step, *fixed)))
            else:
                made = _PartStep(split, step, types, options, arguments)
                types |= made.types
                self._steps.append(made)
        # As the model says; what it leaves open, as onnxruntime has found.
        declared = [described(value) for value in split.model.graph.output]
        self._outputs = [value if any(value.shape) else types.get(value.name, value) for value in declared]
        # Weights are the layers' own.
        kept = {value.name for value in self._outputs}.union(*(step.constants for step in self._steps))
        self._constants = {name: array for name, array in constants.items() if name in kept}
        self._plans: dict[tuple[str, ...], list[tuple[_Step, list[str], list[str]]]] = {}
        self._lock = threading.Lock()

    # --- what onnxruntime's has ----------------------------------------------------------------------------

    def get_inputs(self) -> list[ValueInfo]:
        """Return the model's inputs that have no default."""
        return [value for value in self._inputs if value.name not in self._defaults]

    def get_outputs(self) -> list[ValueInfo]:
        """Return the model's outputs."""
        return list(self._outputs)

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None
    ) -> list[Any]:
        """Compute outputs; only what they depend on is run. Safe to call from several threads.

        Parameters
        ----------
        output_names : sequence of str or None
            All outputs if None or empty.
        input_feed : mapping of str to numpy.ndarray
            Every input by its name; as of onnxruntime.
        run_options : onnxruntime.RunOptions, optional
            Of every part.

        Returns
        -------
        list
            An array for each name (a list for a sequence).

        Raises
        ------
        SpecError, SpecTypeError
            If an input is missing or unknown, there is no such output, or a layer is given what it cannot take.
        """
        names = tuple(output_names or [value.name for value in self._outputs])
        plan = self._plans.get(names)
        if plan is None:
            plan = self._plan(names)
        values = {**self._defaults, **self._fed(input_feed), **self._constants}
        for step, wanted, done in plan:
            values.update(zip(wanted, step.run(values, wanted, run_options), strict=True))
            for name in done:
                del values[name]
        return [values[name] for name in names]

    def _fed(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        known = {value.name for value in self._inputs}
        unknown, missing = feeds.keys() - known, known - feeds.keys() - self._defaults.keys()
        if unknown or missing:
            raise SpecError(
                f"the model's inputs are {', '.join(sorted(known)) or 'none'}; "
                + (f"given but unknown: {', '.join(map(str, unknown))}. " if unknown else "")
                + (f"missing: {', '.join(sorted(missing))}." if missing else "")
            )
        return {name: f.numpy() if isinstance(f, onnxruntime.OrtValue) else f for name, f in feeds.items()}

    def _plan(self, names: tuple[str, ...]) -> list[tuple[_Step, list[str], list[str]]]:
        """Return the steps that some outputs need, what each has to give, and what is of no more use after it."""
        known = {value.name for value in self._outputs}
        if not known.issuperset(names):
            raise SpecError(f"the model's outputs are {', '.join(sorted(known))}; asked for {', '.join(names)}.")
        needed, plan = set(names), []
        for step in reversed(self._steps):
            wanted = [name for name in step.outputs if name in needed]
            if wanted:
                # Nothing before needs what is new here: it is last used here.
                done = [name for name in dict.fromkeys(step.inputs) if name not in needed]
                needed.update(step.inputs)
                plan.append((step, wanted, done))
        plan.reverse()
        with self._lock:
            self._plans[names] = plan
        return plan


def _constants(split: Split, options: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the values of what a layer takes, or the model gives, that depends on no input."""
    found = {}
    for name in split.fixed:
        tensor = split.tensor(name)
        if tensor is not None:
            found[name] = onnx.numpy_helper.to_array(tensor)
    names = [name for name in split.fixed if name not in found]
    if names:
        part = split.folded if set(names) == set(split.folded.outputs) else None
        if part is None:
            raise SpecError(f"a sparse initializer cannot be an input of a layer: one of {', '.join(names)}.")
        session = open_session(split.model_of(part, []), options, **arguments)
        outputs = [ValueInfo(o.name, o.type, tuple(o.shape)) for o in session.get_outputs()]
        found.update(zip(part.outputs, run_session(session, [], outputs, {}, None), strict=True))
    return found


def _type_of_array(name: str, array: Any) -> ValueInfo:
    element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return described(onnx.helper.make_tensor_value_info(name, element, array.shape))


def _type_of_result(node: LayerNode, types: Mapping[str, ValueInfo]) -> ValueInfo:
    """Return the type of a layer's output: as many images as the input, as large as the offset, as far as known."""
    shapes = [types[name].shape or (None,) * 4 for name in (node.input, node.weight, node.offset)]
    for name, shape in zip((node.input, node.weight, node.offset), shapes, strict=True):
        if len(shape) != 4:
            raise SpecError(f"DeformConv node {node.name!r}: {name!r} must have four axes, got the shape {shape}.")
    image, weight, offset = shapes
    return ValueInfo(node.output, types[node.input].type, (image[0], weight[0], offset[2], offset[3]))


class _Step:
    """Something that computes values from values."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    constants: Sequence[str] = ()

    def run(self, values: Mapping[str, Any], wanted: list[str], options: Any) -> list[Any]:
        """Return the wanted ones of the outputs."""
        raise NotImplementedError


class _PartStep(_Step):
    """A part of the model, in a session of onnxruntime."""

    def __init__(
        self, split: Split, part: Part, types: Mapping[str, ValueInfo], options: Any, arguments: dict[str, Any]
    ) -> None:
        self.inputs, self.outputs = part.inputs, part.outputs
        self._given = [types[name] for name in part.inputs]
        # What the model says of its own inputs may be more than the name of a type.
        protos = {value.name: value for value in split.inputs}
        inputs = [protos.get(value.name) or proto_of(value) for value in self._given]
        self._session = open_session(split.model_of(part, inputs), options, **arguments)
        self.types = {o.name: ValueInfo(o.name, o.type, tuple(o.shape)) for o in self._session.get_outputs()}

    def run(self, values: Mapping[str, Any], wanted: list[str], options: Any) -> list[Any]:
        """Run the part."""
        feeds = {name: values[name] for name in self.inputs}
        return run_session(self._session, self._given, [self.types[name] for name in wanted], feeds, options)


class _LayerStep(_Step):
    """A layer; its constant weight and bias are with the function that computes it."""

    def __init__(self, node: LayerNode, constants: Collection[str], call: LayerCall) -> None:
        self._call = call
        weight, bias = (None if name in constants else name for name in (node.weight, node.bias))
        self._names = (node.input, weight, node.offset, bias, node.mask)
        taken = [name for name in self._names if name is not None]
        self.inputs = [name for name in taken if name not in constants]
        self.constants = [name for name in taken if name in constants]
        self.outputs = [node.output]

    def run(self, values: Mapping[str, Any], wanted: list[str], options: Any) -> list[Any]:
        """Call the function."""
        input, weight, offset, bias, mask = (None if name is None else values[name] for name in self._names)
        return [self._call(input, weight, offset, bias, mask)]
