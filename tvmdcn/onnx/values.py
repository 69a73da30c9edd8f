# SPDX-License-Identifier: Apache-2.0
"""Types and values between the parts of a model: onnxruntime's names of types, and arrays in bfloat16."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tvmdcn.errors import SpecError

__all__ = ["ValueInfo", "described", "open_session", "proto_of", "run_session"]

# onnxruntime's names of element types, where they are not those of ONNX in small letters.
_ELEMENT_NAMES = {"FLOAT": "float", "DOUBLE": "double"}
_ELEMENTS = {
    _ELEMENT_NAMES.get(name, name.lower()): value for name, value in onnx.TensorProto.DataType.items() if value
}
_NAMES = {value: name for name, value in _ELEMENTS.items()}
_BFLOAT16 = "tensor(bfloat16)"

# Above this a model is handed over as files, weights beside it: a protobuf may have 2 GB at most, and a session keeps
# the bytes it was made from.
_MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class ValueInfo:
    """An input or output of a model: what ``onnxruntime.NodeArg`` says.

    Parameters
    ----------
    name : str
    type : str
        In onnxruntime's words, such as ``tensor(float)``.
    shape : tuple of int, str or None
        A name for a size that varies, None where it is not known; empty also if nothing is known.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...] = ()


def described(value: onnx.ValueInfoProto) -> ValueInfo:
    """Return what a model says of a value."""
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    return ValueInfo(value.name, _type_name(value.type), shape)


def _type_name(kind: onnx.TypeProto) -> str:
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        return f"{which.removesuffix('_type')}({_NAMES[getattr(kind, which).elem_type]})"
    if which == "sequence_type":
        return f"seq({_type_name(kind.sequence_type.elem_type)})"
    if which == "optional_type":
        return f"optional({_type_name(kind.optional_type.elem_type)})"
    if which == "map_type":
        return f"map({_NAMES[kind.map_type.key_type]},{_type_name(kind.map_type.value_type)})"
    return "unknown"


def proto_of(value: ValueInfo) -> onnx.ValueInfoProto:
    """Return a value as a model describes it.

    Raises
    ------
    SpecError
        If it is of a type that cannot be handed from part to part.
    """
    if value.type.startswith("tensor("):
        # A tensor without sizes may be of any rank: onnxruntime says the same of it and of a scalar.
        shape = value.shape or None
        return onnx.helper.make_tensor_value_info(value.name, _element(value), shape)
    found = re.fullmatch(r"(seq|optional)\((.*)\)", value.type)
    if found is None:
        raise SpecError(
            f"the value {value.name!r} is of the type {value.type}, which cannot be handed from one part of the model "
            "to the next. Run the model in onnxruntime."
        )
    inner = proto_of(ValueInfo("", found[2])).type
    make = onnx.helper.make_sequence_type_proto if found[1] == "seq" else onnx.helper.make_optional_type_proto
    return onnx.helper.make_value_info(value.name, make(inner))


def _element(value: ValueInfo) -> int:
    return _ELEMENTS[value.type.removeprefix("tensor(").removesuffix(")")]


def open_session(model: onnx.ModelProto, options: Any, **arguments: Any) -> Any:
    """Return onnxruntime's session of a model."""
    if model.ByteSize() <= _MOST_BYTES:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, **arguments)
    with tempfile.TemporaryDirectory(prefix="tvmdcn-onnx-") as folder:
        path = Path(folder) / "part.onnx"
        onnx.save_model(model, path, save_as_external_data=True, location="weights")
        return onnxruntime.InferenceSession(path, options, **arguments)


def run_session(
    session: Any, inputs: Sequence[ValueInfo], outputs: Sequence[ValueInfo], feeds: Mapping[str, Any], options: Any
) -> list[Any]:
    """Run a part, and return the wanted outputs: arrays, or lists of them.

    onnxruntime hands out arrays without a copy, but none in bfloat16, for which NumPy has no name.
    """
    names = [value.name for value in outputs]
    if not any(value.type == _BFLOAT16 for value in (*inputs, *outputs)):
        found: list[Any] = session.run(names, feeds, options)
        return found
    values = {value.name: _ort_value(feeds[value.name], value) for value in inputs}
    results = session.run_with_ort_values(names, values, options)
    return [_bfloat16(r) if v.type == _BFLOAT16 else r.numpy() for r, v in zip(results, outputs, strict=True)]


def _ort_value(array: Any, value: ValueInfo) -> Any:
    if isinstance(array, onnxruntime.OrtValue):
        return array
    if value.type != _BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    bits = np.ascontiguousarray(array).view(np.uint16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)


class _Memory:
    """A tensor of onnxruntime's in the CPU's memory, as NumPy sees memory; NumPy keeps it while an array lives."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.__array_interface__ = {
            "shape": tuple(value.shape()),
            "typestr": "<u2",
            "data": (value.data_ptr(), False),
            "version": 3,
        }


def _bfloat16(value: Any) -> Any:
    import ml_dtypes

    if 0 in value.shape():
        return np.empty(value.shape(), ml_dtypes.bfloat16)
    return np.asarray(_Memory(value)).view(ml_dtypes.bfloat16)
