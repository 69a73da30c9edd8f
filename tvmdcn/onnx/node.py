# SPDX-License-Identifier: Apache-2.0
"""One ``DeformConv`` node: what its attributes and inputs say about the layer (ONNX opsets 19 and 22)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.validation import check_dtype

__all__ = ["DOMAINS", "OPERATOR", "LayerNode", "is_layer"]

OPERATOR = "DeformConv"
DOMAINS = ("", "ai.onnx")
"""The two names of ONNX's own operators."""
_ATTRIBUTES = ("dilations", "group", "kernel_shape", "offset_group", "pads", "strides")


def is_layer(node: onnx.NodeProto) -> bool:
    """Return whether a node is ONNX's ``DeformConv``."""
    return node.op_type == OPERATOR and node.domain in DOMAINS


@dataclass(frozen=True)
class LayerNode:
    """A ``DeformConv`` node.

    Parameters
    ----------
    name : str
        The node's; its output's if it has none.
    input, weight, offset : str
        Names of the tensors.
    bias, mask : str or None
        Of those that may be left out.
    output : str
    stride, padding, dilation : tuple of int
        Padding is (top, left, bottom, right).
    groups, offset_groups : int
    kernel_size : tuple of int or None
        None where only the weight says it.
    """

    name: str
    input: str
    weight: str
    offset: str
    bias: str | None
    mask: str | None
    output: str
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    offset_groups: int
    kernel_size: tuple[int, ...] | None

    @classmethod
    def of(cls, node: onnx.NodeProto) -> LayerNode:
        """Return what a node says.

        Raises
        ------
        SpecError
            If inputs or attributes are not those of ONNX's definition, or not of an image (two axes).
        """
        name = node.name or (node.output[0] if node.output else "")
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        unknown = sorted(given.keys() - set(_ATTRIBUTES))
        inputs = [*node.input, *[""] * (5 - len(node.input))]
        if unknown or len(inputs) > 5 or not all(inputs[:3]) or len(node.output) != 1 or not node.output[0]:
            raise SpecError(
                f"node {name!r} is no {OPERATOR} of ONNX, which takes X, W, offset, B and mask, gives one output and "
                f"has the attributes {', '.join(_ATTRIBUTES)}; it has the inputs {list(node.input)}, the outputs "
                f"{list(node.output)} and the attributes {sorted(given)}. Check the model with onnx.checker."
            )
        defaults: dict[str, Any] = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "kernel_shape": None}
        geometry = {key: given.get(key, default) for key, default in defaults.items()}
        for key, values in geometry.items():
            axes = 4 if key == "pads" else 2
            if values is not None and len(values) != axes:
                raise SpecError(
                    f"node {name!r}: {key} must be {axes} integers, got {list(values)}. Kernels are for images, of two "
                    "axes; run a model with another number of them in onnxruntime."
                )
        return cls(
            name=name,
            input=inputs[0],
            weight=inputs[1],
            offset=inputs[2],
            bias=inputs[3] or None,
            mask=inputs[4] or None,
            output=node.output[0],
            stride=tuple(geometry["strides"]),
            padding=tuple(geometry["pads"]),
            dilation=tuple(geometry["dilations"]),
            groups=given.get("group", 1),
            offset_groups=given.get("offset_group", 1),
            kernel_size=tuple(given["kernel_shape"]) if "kernel_shape" in given else None,
        )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that are there."""
        named = (self.input, self.weight, self.offset, self.bias, self.mask)
        return tuple(name for name in named if name is not None)

    def spec(self, weight: Sequence[int], dtype: Any) -> DeformConv2dSpec:
        """Return the layer, for a weight of this shape and dtype.

        Raises
        ------
        SpecError, SpecTypeError
            If weight and attributes do not fit, or it is no layer that there are kernels for.
        """
        with self.named():
            if len(weight) != 4:
                raise SpecError(f"the weight must have the shape (Cout, Cin / group, kh, kw), got {tuple(weight)}.")
            if self.kernel_size not in (None, tuple(weight[2:])):
                raise SpecError(f"kernel_shape is {self.kernel_size}, the weight's shape {tuple(weight)}.")
            return DeformConv2dSpec(
                in_channels=weight[1] * self.groups,
                out_channels=weight[0],
                kernel_size=(weight[2], weight[3]),
                stride=(self.stride[0], self.stride[1]),
                padding=(self.padding[0], self.padding[1], self.padding[2], self.padding[3]),
                dilation=(self.dilation[0], self.dilation[1]),
                groups=self.groups,
                offset_groups=self.offset_groups,
                mask=self.mask is not None,
                dtype=check_dtype({"weight": dtype}),
            )

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Let errors say which node they are of."""
        try:
            yield
        except (SpecError, SpecTypeError) as error:
            raise type(error)(f"{OPERATOR} node {self.name!r}: {error}") from error
