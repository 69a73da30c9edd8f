# SPDX-License-Identifier: Apache-2.0
"""Calls that must be refused, and in which words: for the specification and for every way of calling.

A row changes one thing of a call that is right. Tensors are written as their shapes; `dtypes` gives the dtype
of those that are not float32. `shape_arguments` turns a row into arguments of
`DeformConv2dSpec.from_shapes`, `tensor_arguments` into arguments of `deform_conv2d`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.tensors import numpy_dtype

TENSORS = ("input", "offset", "weight", "mask", "bias")

# torchvision's asymmetric test problem: groups 2, offset groups 3, output 2 x 3.
GOOD_CALL: dict[str, Any] = {
    "input": (2, 6, 5, 4),
    "offset": (2, 36, 2, 3),
    "weight": (2, 3, 3, 2),
    "mask": (2, 18, 2, 3),
    "bias": (2,),
    "stride": (2, 1),
    "padding": (1, 0),
    "dilation": (2, 1),
    "dtypes": {},
}


@dataclass(frozen=True)
class BadCall:
    """What is wrong, the whole call, the exception, and a regular expression its message must contain."""

    name: str
    arguments: dict[str, Any]
    exception: type[Exception]
    match: str
    as_tensors: bool = True  # False where no tensor can have such a shape


def _value(name: str, match: str, *, as_tensors: bool = True, **changes: Any) -> BadCall:
    return BadCall(name, {**GOOD_CALL, **changes}, SpecError, match, as_tensors)


def _type(name: str, match: str, *, as_tensors: bool = True, **changes: Any) -> BadCall:
    return BadCall(name, {**GOOD_CALL, **changes}, SpecTypeError, match, as_tensors)


BAD_CALLS = (
    # stride, padding, dilation
    _value("stride_zero", r"stride must be at least 1, got stride=0", stride=0),
    _value("stride_zero_horizontal", r"stride must be at least 1, got stride=\(2, 0\)", stride=(2, 0)),
    _value("stride_negative", r"stride must be at least 1, got stride=-1", stride=-1),
    _type("stride_float", r"stride must be an int or a pair .* got stride=1\.5 of type float", stride=1.5),
    _type("stride_float_in_pair", r"stride must be made of ints, got 1\.0 .* in \(2, 1\.0\)", stride=(2, 1.0)),
    _type("stride_bool", r"stride must be made of ints, got True of type bool", stride=True),
    _type("stride_text", r"stride must be an int or a pair .* stride='2' of type str", stride="2"),
    _type("stride_none", r"stride must be an int or a pair .* of type NoneType", stride=None),
    _value("stride_three", r"stride must be an int or a pair .* got 3 values", stride=(1, 1, 1)),
    _value("stride_empty", r"stride must be an int or a pair .* got 0 values", stride=()),
    _value("stride_huge", r"stride must be at most 2147483647", stride=2**31),
    _value("padding_negative", r"padding must be at least 0, got padding=\(-1, 0\)", padding=(-1, 0)),
    _value("padding_three", r"padding must be .*\(top, left, bottom, right\), got 3 values", padding=(1, 1, 1)),
    _type("padding_float", r"padding must be an int, .* of type float", padding=0.5),
    _type("padding_same", r"padding='same' .*'same' and 'valid' are not understood", padding="same"),
    _value("padding_huge", r"padding must be at most 2147483647", padding=2**40),
    _value("dilation_zero", r"dilation must be at least 1, got dilation=\(0, 1\)", dilation=(0, 1)),
    _value("dilation_negative", r"dilation must be at least 1, got dilation=-2", dilation=-2),
    _type("dilation_float", r"dilation must be made of ints, got 2\.0", dilation=(2.0, 1)),
    _value("dilation_overflow", r"dilation \* \(kernel - 1\) \+ 1 must be at most 2147483647", dilation=2**31 - 1),
    # what is no tensor
    _type("input_none", r"input must be a tensor.*NoneType", input=None),
    _type("offset_none", r"offset must be a tensor.*NoneType", offset=None),
    _type("weight_number", r"weight must be a tensor.*float", weight=1.0),
    _type("mask_text", r"mask must be a tensor.*str", mask="mask"),
    _type("bias_bool", r"bias must be a tensor.*bool", bias=True),
    # ranks
    _value(
        "input_unbatched",
        r"input must have the 4 dimensions N, Cin, H, W, got 3.*input\[None\]",
        input=(6, 5, 4),
    ),
    _value("input_five_axes", r"input must have the 4 dimensions .* got 5", input=(1, 2, 6, 5, 4)),
    _value("offset_three_axes", r"offset must have the 4 dimensions .* got 3", offset=(36, 2, 3)),
    _value("weight_matrix", r"weight must have the 4 dimensions .* got 2", weight=(2, 18)),
    _value("mask_five_axes", r"mask must have the 4 dimensions .* got 5", mask=(2, 3, 6, 2, 3)),
    _value("bias_four_axes", r"bias must have the 1 dimension Cout, got 4", bias=(1, 2, 1, 1)),
    _value("bias_scalar", r"bias must have the 1 dimension Cout, got 0", bias=()),
    # sizes
    _value("batch_negative", r"size N of input must be at least 0", input=(-1, 6, 5, 4), as_tensors=False),
    _value("height_negative", r"size H of input must be at least 1", input=(2, 6, -5, 4), as_tensors=False),
    _type("size_float", r"size W of input must be made of ints", input=(2, 6, 5, 4.0), as_tensors=False),
    _value("height_zero", r"size H of input must be at least 1", input=(2, 6, 0, 4)),
    _value("channels_zero", r"size Cin of input must be at least 1", input=(2, 0, 5, 4)),
    _value("output_channels_zero", r"size Cout of weight must be at least 1", weight=(0, 3, 3, 2)),
    _value("kernel_zero", r"size kh of weight must be at least 1", weight=(2, 3, 0, 2)),
    _value(
        "offset_channels_zero",
        r"size offset_groups\*2\*kh\*kw of offset must be at least 1",
        offset=(2, 0, 2, 3),
    ),
    _value("input_too_large", r"input has 2147483648 elements", input=(2**29, 4, 1, 1)),
    _value(
        "output_too_large",
        r"output has 2415919104 elements",
        input=(1, 1, 2**13, 2**12),
        weight=(72, 1, 1, 1),
        offset=(1, 2, 2**13, 2**12),
        mask=None,
        bias=None,
        stride=1,
        padding=0,
        dilation=1,
    ),
    _value(
        "kernel_larger_than_input",
        r"along the height it spans 5 .* padded input 4 \(2 \+ padding 1 \+ 1\)",
        input=(2, 6, 2, 4),
    ),
    # channels and groups
    _value("channels_not_of_weight", r"input has 7 channels, not a multiple of the 3", input=(2, 7, 5, 4)),
    _value("channels_last_shape", r"input has 5 channels, .* is read as N, Cin, H, W", input=(2, 5, 4, 6)),
    _value(
        "outputs_not_of_groups",
        r"weight has 3 output channels, not a multiple of groups=2",
        weight=(3, 3, 3, 2),
        bias=(3,),
    ),
    _value("weight_of_more_channels", r"input has 6 channels, not a multiple of the 12", weight=(2, 12, 3, 2)),
    _value(
        "offset_channels",
        r"offset must have a multiple of 2 \* kh \* kw = 12 channels .* got 35",
        offset=(2, 35, 2, 3),
    ),
    _value(
        "offset_with_mask_in_it",
        r"got 54 .*offset and mask may still be in one tensor.* first 36 ",
        offset=(2, 54, 2, 3),
    ),
    _value("offset_and_mask_exchanged", r"got 6 .*may be exchanged", offset=(2, 6, 2, 3), mask=(2, 12, 2, 3)),
    _value("offset_groups", r"offset_groups=4.* must divide the 6 channels", offset=(2, 48, 2, 3)),
    _value("mask_channels", r"mask must have offset_groups \* kh \* kw = 18 channels .* got 6", mask=(2, 6, 2, 3)),
    # batches and image sizes
    _value("offset_batch", r"offset must have the batch size of input, 2, got 3", offset=(3, 36, 2, 3)),
    _value("mask_batch", r"mask must have the batch size of input, 2, got 1", mask=(1, 18, 2, 3)),
    _value(
        "offset_size",
        r"offset must be of the output's size \(2, 3\), got \(5, 4\).*Ho, Wo = 2, 3 follow from",
        offset=(2, 36, 5, 4),
    ),
    _value("mask_size", r"mask must be of the output's size \(2, 3\), got \(3, 2\)", mask=(2, 18, 3, 2)),
    _value("bias_size", r"bias must have one value per output channel, 2, got 6", bias=(6,)),
    # dtypes
    _type("all_integers", r"dtype int32 of input is not supported", dtypes=dict.fromkeys(TENSORS, "int32")),
    _type("complex_input", r"dtype complex64 of input is not supported", dtypes={"input": "complex64"}),
    _type("integer_weight", r"dtype int8 of weight is not supported", dtypes={"weight": "int8"}),
    _type("half_input", r"input is float16 and .* is float32", dtypes={"input": "float16"}),
    _type("double_offset", r"input is float32 and offset is float64", dtypes={"offset": "float64"}),
    _type("bfloat16_mask", r"input is float32 and mask is bfloat16", dtypes={"mask": "bfloat16"}),
    _type("double_bias", r"input is float32 and bias is float64.*Convert bias", dtypes={"bias": "float64"}),
)


def shape_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments as `DeformConv2dSpec.from_shapes` takes them."""
    dtypes = arguments["dtypes"]
    given = {name: value for name, value in arguments.items() if name != "dtypes"}
    present = [name for name in TENSORS if given[name] is not None]
    return {**given, "dtype": {name: dtypes.get(name, "float32") for name in present}}


def tensor_arguments(arguments: dict[str, Any], make: Callable[[tuple[int, ...], str], Any]) -> dict[str, Any]:
    """Return a call's arguments with tensors made by `make` of a shape and the name of a dtype.

    What is no shape, None or a text, stays as it is.
    """
    dtypes = arguments["dtypes"]
    given = {name: value for name, value in arguments.items() if name != "dtypes"}
    for name in TENSORS:
        if isinstance(given[name], tuple):
            given[name] = make(given[name], dtypes.get(name, "float32"))
    return given


def numpy_tensor(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return zeros; a single one in memory, so that too large a tensor can be made."""
    return np.broadcast_to(np.zeros((), numpy_dtype(dtype)), shape)


def torch_tensor(shape: tuple[int, ...], dtype: str) -> Any:
    """Return zeros; a single one in memory, so that too large a tensor can be made."""
    import torch

    return torch.zeros((), dtype=getattr(torch, dtype)).expand(shape)
