# SPDX-License-Identifier: Apache-2.0
"""Specifications in JSON, read as strictly as they are written: they stand in keys, and a key is a promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from tvmdcn.errors import SpecError, SpecTypeError

if TYPE_CHECKING:
    from tvmdcn.spec import DeformConv2dSpec

    Spec = TypeVar("Spec", bound=DeformConv2dSpec)

__all__ = ["parse", "plain_fields"]


def plain_fields(spec: DeformConv2dSpec) -> dict[str, Any]:
    """Return the fields of a specification in JSON types."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def parse(cls: type[Spec], data: Mapping[str, Any]) -> Spec:
    """Return the specification of a class that its `to_json` wrote; the errors are its `from_json`'s."""
    if not isinstance(data, Mapping):
        raise SpecTypeError(f"a specification in JSON must be an object, got {type(data).__name__}.")
    expected = {"operator", *(field.name for field in fields(cls))}
    if set(data) != expected:
        missing = ", ".join(sorted(expected - set(data))) or "none"
        unknown = ", ".join(sorted(map(str, set(data) - expected))) or "none"
        raise SpecError(f"a specification in JSON has not the keys it should: missing {missing}; unknown {unknown}.")
    if data["operator"] != cls.operator:
        raise SpecError(f"operator must be {cls.operator!r}, got {data['operator']!r}.")
    spec = cls(**{name: value for name, value in data.items() if name != "operator"})
    for name, value in spec.to_json().items():
        if value != data[name] or isinstance(value, bool) != isinstance(data[name], bool):
            raise SpecError(f"{name} must be written as {value!r} in JSON, got {data[name]!r}.")
    return spec
