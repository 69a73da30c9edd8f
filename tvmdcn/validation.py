# SPDX-License-Identifier: Apache-2.0
"""Checks of single arguments, each with its message; :mod:`tvmdcn.spec` says which argument needs which.

Every function returns the argument in its normal form (plain ``int``, ``tuple``, ``str``), or raises
:class:`~tvmdcn.errors.SpecTypeError` where the type is wrong and :class:`~tvmdcn.errors.SpecError` where the
value is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from tvmdcn.errors import SpecError, SpecTypeError

DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("NCHW", "NHWC")
# Kernels index with 32-bit integers: no tensor may have more elements, and no size may be larger.
INT32_MAX = 2**31 - 1


def shown(value: Any) -> str:
    """Return the representation of a value, cut to a length that an error message can bear."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(text: str) -> str:
    """Return a word as it is, if it is one that a message can bear, else as :func:`shown` does."""
    return text if text.isprintable() and 0 < len(text) <= 80 else shown(text)


def check_int(name: str, value: Any, minimum: int, within: Any = None) -> int:
    """Return `value` as a plain int in [minimum, 2**31 - 1]; `within` is the argument it is part of."""
    whole = value if within is None else within
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            found = f"{shown(value)} of type {type(value).__name__}"
            raise SpecTypeError(
                f"{name} must be made of ints, got {found}" + (f" in {shown(within)}." if within is not None else ".")
            ) from None
    if value < minimum:
        raise SpecError(f"{name} must be at least {minimum}, got {name}={shown(whole)}.")
    if value > INT32_MAX:
        raise SpecError(
            f"{name} must be at most {INT32_MAX}, as kernels index with 32-bit integers, got {name}={shown(whole)}."
        )
    return value


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def check_pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Return an int, or a sequence of two, as (vertical, horizontal)."""
    if not _is_sequence(value):
        if hasattr(value, "__index__"):
            number = check_int(name, value, minimum)
            return number, number
        raise SpecTypeError(
            f"{name} must be an int or a pair (vertical, horizontal) of ints, "
            f"got {name}={shown(value)} of type {type(value).__name__}."
        )
    if len(value) != 2:
        raise SpecError(
            f"{name} must be an int or a pair (vertical, horizontal), got {len(value)} values: {name}={shown(value)}."
        )
    vertical, horizontal = (check_int(name, item, minimum, value) for item in value)
    return vertical, horizontal


def check_padding(value: Any) -> tuple[int, int, int, int]:
    """Return an int, (vertical, horizontal) or (top, left, bottom, right) as (top, left, bottom, right)."""
    if not _is_sequence(value):
        if hasattr(value, "__index__"):
            number = check_int("padding", value, 0)
            return number, number, number, number
        raise SpecTypeError(
            "padding must be an int, a pair (vertical, horizontal) or (top, left, bottom, right), got "
            f"padding={shown(value)} of type {type(value).__name__}. 'same' and 'valid' are not understood: "
            "for an odd kernel, dilation * (kernel - 1) // 2 keeps the size at stride 1."
        )
    if len(value) not in (2, 4):
        raise SpecError(
            "padding must be an int, a pair (vertical, horizontal) or (top, left, bottom, right), got "
            f"{len(value)} values: padding={shown(value)}."
        )
    sides = tuple(check_int("padding", item, 0, value) for item in value)
    top, left, bottom, right = sides if len(sides) == 4 else sides * 2
    return top, left, bottom, right


def dtype_name(value: Any) -> str:
    """Return the name of a dtype given as str, NumPy dtype, NumPy scalar type or torch dtype."""
    if isinstance(value, type):
        return value.__name__
    return str(value).removeprefix("torch.")


def check_dtype(dtype: Any) -> str:
    """Return the one dtype name of `dtype`, which is a dtype or a mapping from argument names to dtypes."""
    named = dtype if isinstance(dtype, Mapping) else {"input": dtype}
    names = {argument: dtype_name(value) for argument, value in named.items()}
    for argument, name in names.items():
        if name not in DTYPES:
            raise SpecTypeError(
                f"dtype {plain(name)} of {argument} is not supported: use one of {', '.join(DTYPES)}, "
                "for example by converting to float32."
            )
    (first, wanted), *others = names.items()
    for argument, name in others:
        if name != wanted:
            raise SpecTypeError(
                f"all tensors must have one dtype, but {first} is {wanted} and {argument} is {name}. "
                f"Convert {argument} to {wanted}."
            )
    return wanted


def check_layout(layout: Any) -> str:
    """Return `layout` if it is one of the known ones."""
    if layout not in LAYOUTS:
        raise SpecError(f"layout must be one of {', '.join(LAYOUTS)}, got layout={shown(layout)}.")
    return str(layout)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` if it is a bool."""
    if not isinstance(value, bool):
        raise SpecTypeError(f"{name} must be True or False, got {name}={shown(value)} of type {type(value).__name__}.")
    return value


def check_shape(name: str, shape: Any, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Return a shape as a tuple of ints, one for each of `axes`; only the axis N may be 0."""
    order = ", ".join(axes)
    if not _is_sequence(shape):
        raise SpecTypeError(
            f"{name} must be a tensor of shape ({order}), got {shown(shape)} of type {type(shape).__name__}."
        )
    if len(shape) != len(axes):
        hint = " Add the batch axis with input[None]." if name == "input" and len(shape) == 3 else ""
        raise SpecError(
            f"{name} must have the {len(axes)} dimension{'s' if len(axes) > 1 else ''} {order}, "
            f"got {len(shape)}: shape {tuple(shape)}.{hint}"
        )
    sizes = []
    for axis, size in zip(axes, shape, strict=True):
        if type(size) is not int:
            size = check_int(f"size {axis} of {name}", size, 0)
        if size < (0 if axis == "N" else 1):
            least = "at least 0" if axis == "N" else "at least 1 (only the batch may be empty)"
            raise SpecError(f"size {axis} of {name} must be {least}, got shape {tuple(shape)}.")
        sizes.append(size)
    elements = 1
    for size in sizes:
        elements *= size
    if max(elements, *sizes) > INT32_MAX:
        raise SpecError(
            f"{name} has {elements} elements (shape {tuple(shape)}), more than {INT32_MAX}: kernels index "
            "with 32-bit integers. Split the batch or the image."
        )
    return tuple(sizes)
