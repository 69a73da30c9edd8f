# SPDX-License-Identifier: Apache-2.0
"""Specifications in JSON, read as strictly as they are written: they stand in keys, and a key is a promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.validation import plain, shown

if TYPE_CHECKING:
    from tvmdcn.spec import DeformConv2dSpec

    Spec = TypeVar("Spec", bound=DeformConv2dSpec)

__all__ = ["parse", "plain_fields"]

# Fields that were added later, and are written only where they are not False: keys and records of before stay valid.
_LATER = ("tf32", "deterministic")


def plain_fields(spec: DeformConv2dSpec) -> dict[str, Any]:
    """Return the fields of a specification in JSON types."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    values = {name: value for name, value in values.items() if name not in _LATER or value}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def parse(cls: type[Spec], data: Mapping[str, Any]) -> Spec:
    """Return the specification of a class that its `to_json` wrote; the errors are its `from_json`'s."""
    if not isinstance(data, Mapping):
        raise SpecTypeError(f"a specification in JSON must be an object, got {type(data).__name__}.")
    expected = {"operator", *(field.name for field in fields(cls) if field.name not in _LATER or field.name in data)}
    if set(data) != expected:
        missing = ", ".join(sorted(expected - set(data))) or "none"
        unknown = plain(", ".join(sorted(map(str, set(data) - expected))) or "none")
        raise SpecError(f"a specification in JSON has not the keys it should: missing {missing}; unknown {unknown}.")
    if data["operator"] != cls.operator:
        raise SpecError(f"operator must be {cls.operator!r}, got {shown(data['operator'])}.")
    spec = cls(**{name: value for name, value in data.items() if name != "operator"})
    written = spec.to_json()
    for name, value in data.items():
        if name not in written:
            raise SpecError(f"{name} must be left out in JSON where it is {value!r}.")
        if written[name] != value or isinstance(written[name], bool) != isinstance(value, bool):
            raise SpecError(f"{name} must be written as {written[name]!r} in JSON, got {shown(value)}.")
    return spec
