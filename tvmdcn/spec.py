# SPDX-License-Identifier: Apache-2.0
"""What a deformable convolution computes: its specification, and every check of its arguments.

The rules are torchvision's (``torchvision.ops.deform_conv2d``), with asymmetric padding added as ONNX
``DeformConv`` has it. Neither torch nor TVM is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from tvmdcn.errors import SpecError
from tvmdcn.shapes import WEIGHT_AXES, Extents, derive
from tvmdcn.spec_json import parse, plain_fields
from tvmdcn.validation import (
    check_dtype,
    check_flag,
    check_int,
    check_layout,
    check_padding,
    check_pair,
    check_shape,
    shown,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BORDERS", "DeformConv2dGradSpec", "DeformConv2dSpec", "Extents", "spec_from_json"]

BORDERS = ("torchvision", "mmcv")
"""Whose derivative of the offset counts for a sample exactly on -1: one-sided, or 0."""

_SHORT_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class DeformConv2dSpec:
    """One deformable convolution layer (DCNv1 without a mask, DCNv2 with one), for images of any size.

    A kernel always adds a bias, zeros where the layer has none, so a bias is no part of the specification.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of the input and of the output.
    kernel_size, stride, dilation : int or (vertical, horizontal)
        As in a plain convolution.
    padding : int, (vertical, horizontal) or (top, left, bottom, right)
        Zero padding; always held as (top, left, bottom, right).
    groups, offset_groups : int
        Blocks of channels with weights of their own, and with offsets of their own. They are independent of
        each other.
    mask : bool
        Whether samples are modulated (DCNv2).
    dtype : str
        float16, bfloat16, float32 or float64, of all tensors.
    layout : str
        NCHW or NHWC, the memory order of input, offset, mask and output.
    tf32 : bool
        Whether the products of float32 may be made of factors rounded to tf32 (10 bits of mantissa), on a GPU's tensor
        cores. Sums are float32 either way.

    Raises
    ------
    SpecError, SpecTypeError
        If a value, or a type, is not one of the above.
    """

    operator: ClassVar[str] = "deform_conv2d"

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    dtype: str = "float32"
    layout: str = "NCHW"
    tf32: bool = False

    def __post_init__(self) -> None:
        """Bring every field to its normal form and check it."""
        normal: dict[str, Any] = {
            name: check_int(name, getattr(self, name), 1)
            for name in ("in_channels", "out_channels", "groups", "offset_groups")
        }
        for name in ("kernel_size", "stride", "dilation"):
            normal[name] = check_pair(name, getattr(self, name), 1)
        normal["padding"] = check_padding(self.padding)
        normal["mask"] = check_flag("mask", self.mask)
        normal["dtype"] = check_dtype(self.dtype)
        normal["layout"] = check_layout(self.layout)
        normal["tf32"] = check_flag("tf32", self.tf32)
        if normal["tf32"] and normal["dtype"] != "float32":
            raise SpecError(f"tf32 is a way to multiply float32, got tf32=True and dtype={normal['dtype']!r}.")
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        for parts, channels in (("groups", "in"), ("groups", "out"), ("offset_groups", "in")):
            name = f"{channels}_channels"
            if normal[name] % normal[parts]:
                raise SpecError(f"{parts} must divide {name}, got {parts}={normal[parts]} and {name}={normal[name]}.")
        check_shape("weight", self.weight_shape, WEIGHT_AXES)
        for axis in (0, 1):
            check_int("dilation * (kernel - 1) + 1", self._kernel_extent(axis), 1)

    # --- derived -------------------------------------------------------------------------------------------

    @property
    def accumulator_dtype(self) -> str:
        """The dtype of sums, of packed weights and of the bias: float64 for float64, else float32."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def taps(self) -> int:
        """The number of samples per output pixel and offset group: kernel height times kernel width."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def slug(self) -> str:
        """A name for files, unique per specification, of characters [a-z0-9._-] only."""

        def joined(values: Sequence[int], by: str) -> str:
            return by.join(str(value) for value in values)

        return "_".join(
            (
                f"c{self.in_channels}x{self.out_channels}",
                f"k{joined(self.kernel_size, 'x')}",
                f"s{joined(self.stride, 'x')}",
                f"p{joined(self.padding, '.')}",
                f"d{joined(self.dilation, 'x')}",
                f"g{self.groups}",
                f"og{self.offset_groups}",
                "m" if self.mask else "nomask",
                "tf32" if self.tf32 else _SHORT_DTYPES[self.dtype],
                self.layout.lower(),
            )
        )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the output for an image of the given size.

        ``floor((H + pad_before + pad_after - (dilation * (kernel - 1) + 1)) / stride) + 1`` per axis.

        Raises
        ------
        SpecError
            If the padded image is smaller than the dilated kernel.
        """
        return self._output_extent(0, height), self._output_extent(1, width)

    def _kernel_extent(self, axis: int) -> int:
        return self.dilation[axis] * (self.kernel_size[axis] - 1) + 1

    def _output_extent(self, axis: int, size: int) -> int:
        name = ("height", "width")[axis]
        before, after = self.padding[axis], self.padding[axis + 2]
        padded = size + before + after
        kernel = self._kernel_extent(axis)
        if padded < kernel:
            raise SpecError(
                f"the kernel is larger than the padded input: along the {name} it spans {kernel} "
                f"(dilation {self.dilation[axis]} * (kernel {self.kernel_size[axis]} - 1) + 1), the padded "
                f"input {padded} ({size} + padding {before} + {after}). Use a larger input or more padding."
            )
        check_int(f"padded input {name}", padded, 1)
        return (padded - kernel) // self.stride[axis] + 1

    def _image_shape(self, batch: int, channels: int, height: int, width: int) -> tuple[int, int, int, int]:
        if self.layout == "NCHW":
            return batch, channels, height, width
        return batch, height, width, channels

    def input_shape(self, extents: Extents) -> tuple[int, int, int, int]:
        """Return the input's shape, in the order of `layout`."""
        return self._image_shape(extents.batch, self.in_channels, extents.height, extents.width)

    def offset_shape(self, extents: Extents) -> tuple[int, int, int, int]:
        """Return the offset's shape, in the order of `layout`; 2 * taps channels (y, x) per offset group."""
        channels = self.offset_groups * 2 * self.taps
        return self._image_shape(extents.batch, channels, *self.output_size(extents.height, extents.width))

    def mask_shape(self, extents: Extents) -> tuple[int, int, int, int]:
        """Return the shape a mask has, in the order of `layout`; taps channels per offset group."""
        channels = self.offset_groups * self.taps
        return self._image_shape(extents.batch, channels, *self.output_size(extents.height, extents.width))

    def output_shape(self, extents: Extents) -> tuple[int, int, int, int]:
        """Return the output's shape, in the order of `layout`."""
        return self._image_shape(extents.batch, self.out_channels, *self.output_size(extents.height, extents.width))

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """The weight's shape (Cout, Cin / groups, kh, kw), the same for every layout."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that a kernel takes, in order."""
        return ("input", "offset", *(("mask",) if self.mask else ()), "weight", "bias")

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the tensors that a kernel gives, in order."""
        return ("output",)

    def shape_of(self, name: str, extents: Extents) -> tuple[int, ...]:
        """Return the shape of one of `inputs` or `outputs`; a gradient's is that of what it is the gradient of."""
        name = name.removeprefix("grad_")
        if name == "weight":
            return self.weight_shape
        if name == "bias":
            return (self.out_channels,)
        shape: tuple[int, ...] = getattr(self, f"{name}_shape")(extents)
        return shape

    def flops(self, extents: Extents) -> int:
        """Return the operations of the products, two per multiply-add: those of the plain convolution.

        Sampling is not counted, so that figures can be set beside a plain convolution's.
        """
        height, width = self.output_size(extents.height, extents.width)
        columns = self.in_channels // self.groups * self.taps
        return 2 * extents.batch * height * width * self.out_channels * columns * self._products

    @property
    def _products(self) -> int:
        return 1

    def bytes_moved(self, extents: Extents) -> int:
        """Return the bytes of all tensors, each read or written once: the least traffic there can be."""
        elements = sum(prod(self.shape_of(name, extents)) for name in (*self.inputs, *self.outputs))
        return elements * _ITEM_BYTES[self.dtype]

    # --- JSON ----------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return the specification as a dict of JSON types, with the operator's name."""
        return {"operator": self.operator, **plain_fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the specification that :meth:`to_json` wrote.

        Raises
        ------
        SpecError, SpecTypeError
            If a key is missing or unknown, the operator is another, or a value is not what was written.
        """
        return parse(cls, data)

    # --- from the tensors of a call ------------------------------------------------------------------------

    @classmethod
    def from_shapes(
        cls,
        input: Sequence[int],
        offset: Sequence[int],
        weight: Sequence[int],
        mask: Sequence[int] | None = None,
        bias: Sequence[int] | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        *,
        dtype: Any,
        layout: str = "NCHW",
    ) -> tuple[DeformConv2dSpec, Extents]:
        """Derive the specification and the extents from the shapes of a call's tensors, and check them all.

        Parameters
        ----------
        input : (N, Cin, H, W)
            Shapes are in this order whatever the layout.
        offset : (N, offset_groups * 2 * kh * kw, Ho, Wo)
            Its channels give the number of offset groups.
        weight : (Cout, Cin / groups, kh, kw)
            Its second size gives the number of groups.
        mask : (N, offset_groups * kh * kw, Ho, Wo), optional
            None for DCNv1.
        bias : (Cout,), optional
            Checked, and no part of the result.
        stride, padding, dilation
            As of the class.
        dtype : str, dtype, or mapping from argument name to either
            A mapping is checked to hold one dtype only.
        layout : str
            How the tensors lie in memory.

        Raises
        ------
        SpecError, SpecTypeError
            With the argument, its value, the limit, and what to do.
        """
        return derive(cls, input, offset, weight, mask, bias, stride, padding, dilation, dtype, layout)


@dataclass(frozen=True)
class DeformConv2dGradSpec(DeformConv2dSpec):
    """The gradients of a deformable convolution layer, those that are asked for.

    Parameters
    ----------
    grad_input, grad_weight, grad_bias : bool
        Which gradients are computed.
    grad_offset : bool
        Whether the offset's is; for a layer with a mask the mask's goes with it.
    border : str
        "torchvision": the derivative by an offset is that of the four corners ``floor`` and ``floor + 1``
        wherever a sample is at -1 or more and below the extent, so one-sided at exactly -1. "mmcv": 0 at
        exactly -1.
    deterministic : bool
        Whether the input's gradient has to be the same to the last bit at every call on a GPU too, where it otherwise
        depends on the order in which threads add to it. On a CPU, and of the other gradients, it always is.

    Raises
    ------
    SpecError, SpecTypeError
        As of :class:`DeformConv2dSpec`; also if no gradient is asked for.
    """

    operator: ClassVar[str] = "deform_conv2d_grad"

    grad_input: bool = True
    grad_offset: bool = True
    grad_weight: bool = True
    grad_bias: bool = True
    border: str = "torchvision"
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        asked = [check_flag(name, getattr(self, name)) for name in _GRADIENTS]
        if not any(asked):
            raise SpecError(f"no gradient is asked for: set one of {', '.join(_GRADIENTS)}.")
        if self.border not in BORDERS:
            raise SpecError(f"border must be one of {', '.join(BORDERS)}, got border={shown(self.border)}.")
        object.__setattr__(self, "deterministic", check_flag("deterministic", self.deterministic))

    @classmethod
    def of(cls, layer: DeformConv2dSpec, **flags: Any) -> Self:
        """Return the specification of a layer's gradients; `flags` are the fields that the layer has not."""
        return cls(**{field.name: getattr(layer, field.name) for field in fields(DeformConv2dSpec)}, **flags)

    @property
    def layer(self) -> DeformConv2dSpec:
        """The layer whose gradients these are."""
        return DeformConv2dSpec(**{field.name: getattr(self, field.name) for field in fields(DeformConv2dSpec)})

    @property
    def slug(self) -> str:
        """The layer's, the letters of the gradients asked for (i, o, w, b), and what is not as by default."""
        letters = "".join(name.removeprefix("grad_")[0] for name in _GRADIENTS if getattr(self, name))
        border = "" if self.border == BORDERS[0] else f".{self.border}"
        return f"{super().slug}_g{letters}{border}" + (".det" if self.deterministic else "")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that a kernel takes, in order: only what the gradients depend on."""
        sampled = self.grad_input or self.grad_offset or self.grad_weight
        read = {
            "input": self.grad_offset or self.grad_weight,
            "offset": sampled,
            "mask": sampled and self.mask,
            "weight": self.grad_input or self.grad_offset,
        }
        return ("grad_output", *(name for name, needed in read.items() if needed))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the tensors that a kernel gives, in order."""
        given = {
            "grad_input": self.grad_input,
            "grad_offset": self.grad_offset,
            "grad_mask": self.grad_offset and self.mask,
            "grad_weight": self.grad_weight,
            "grad_bias": self.grad_bias,
        }
        return tuple(name for name, asked in given.items() if asked)

    @property
    def _products(self) -> int:
        # Of the output's gradient with the weight, for input and offset; with the columns, for the weight.
        return (self.grad_input or self.grad_offset) + self.grad_weight


_GRADIENTS = ("grad_input", "grad_offset", "grad_weight", "grad_bias")
_SPECS: dict[str, type[DeformConv2dSpec]] = {spec.operator: spec for spec in (DeformConv2dSpec, DeformConv2dGradSpec)}


def spec_from_json(data: Mapping[str, Any]) -> DeformConv2dSpec:
    """Return the specification that `to_json` wrote, of whatever operator.

    Raises
    ------
    SpecError, SpecTypeError
        If there is no such operator, and as :meth:`DeformConv2dSpec.from_json`.
    """
    operator = data.get("operator") if isinstance(data, Mapping) else None
    spec = _SPECS.get(operator) if isinstance(operator, str) else DeformConv2dSpec
    if spec is None:
        raise SpecError(f"operator must be one of {', '.join(_SPECS)}, got {shown(operator)}.")
    return spec.from_json(data)
