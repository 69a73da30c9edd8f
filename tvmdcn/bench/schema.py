# SPDX-License-Identifier: Apache-2.0
"""The published schema of rows, and how rows of its earlier versions become rows of this one."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from tvmdcn.errors import MissingExtra, TvmdcnError
from tvmdcn.validation import plain

__all__ = ["SCHEMA", "MeasurementError", "published_schema", "require_validator", "shortened", "upgrade", "validate"]

SCHEMA = 3
# What later schemas added, as rows of earlier ones were meant: all were layers, called with warm caches on a CPU.
_ADDED_IN_3: dict[str, Any] = {
    "kind": "layer",
    "p25": None,
    "p75": None,
    "spread": None,
    "noisy": None,
    "samples_ms": None,
    "note": None,
    "run": None,
    "device": "cpu",
    "affinity": None,
    "commit": None,
    "cache": "warm",
    "sweep": [],
    "artifact": None,
    "tensors": None,
    "memory_bytes": None,
    "memory_prepare_bytes": None,
    "memory_resolution_bytes": None,
    "protocol": None,
}


class MeasurementError(TvmdcnError, ValueError):
    """A row of measurements is not what its schema says."""


def shortened(value: Any) -> str:
    """Return what a value looks like, in at most 80 characters."""
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


@functools.cache
def published_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a row: ``row.schema.json`` of this package."""
    schema: dict[str, Any] = json.loads(files("tvmdcn.bench").joinpath("row.schema.json").read_text(encoding="utf-8"))
    return schema


@functools.cache
def _validator(kind: str) -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise MissingExtra(
            "rows of measurements are checked with jsonschema, not installed here: pip install 'tvmdcn[bench]'",
            name="jsonschema",
        ) from error
    schema = published_schema()
    return Draft202012Validator({"$ref": f"#/$defs/{_definition(kind)}", "$defs": schema["$defs"]})


def _definition(kind: str) -> str:
    return kind if kind in ("layer", "roof") else "other"


@functools.cache
def _keys(kind: str) -> frozenset[str]:
    """Return the keys that a row of a kind must have, and, if it is a kind of ours, no others."""
    definitions = published_schema()["$defs"]
    found = {*definitions["other"]["required"]}
    if _definition(kind) != "other":
        found |= {*definitions["timed"]["required"], *definitions[kind]["required"]}
    return frozenset(found)


def require_validator() -> None:
    """Check that rows can be checked, before anything is measured.

    Raises
    ------
    MissingExtra
        If the package that validates is not installed.
    """
    _validator("layer")


def upgrade(data: Any) -> dict[str, Any]:
    """Return a row as the present schema has it.

    Raises
    ------
    MeasurementError
        If it is no object, or of a schema that this version cannot read.
    """
    if not isinstance(data, Mapping):
        raise MeasurementError(f"a row must be a JSON object, got {type(data).__name__}.")
    schema = data.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        newer = type(schema) is int and schema > SCHEMA
        step = "update tvmdcn, a later version wrote it" if newer else "measure again with this version"
        raise MeasurementError(f"schema must be 1 to {SCHEMA}, got {shortened(schema)}: {step}.")
    row = dict(data)
    if schema == 1:
        operator = row["spec"].get("operator") if isinstance(row.get("spec"), Mapping) else None
        if operator not in (None, "deform_conv2d"):
            raise MeasurementError(f"a row of schema 1 is of the operator deform_conv2d, got {shortened(operator)}.")
        row = _with(row, {"direction": "forward"})
    if schema < SCHEMA:
        row = _with(row, _ADDED_IN_3)
    if not isinstance(row.get("kind"), str):
        raise MeasurementError(f"kind must be a text, got {shortened(row.get('kind'))}.")
    return {**row, "schema": SCHEMA}


def _with(row: dict[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    early = sorted(set(row) & set(added))
    if early:
        raise MeasurementError(f"a row of schema {row['schema']} has no {', '.join(early)}: they came later.")
    return {**row, **added}


def validate(data: Mapping[str, Any]) -> None:
    """Check a row against the published schema.

    Raises
    ------
    MeasurementError
        With the field, its value, and what it must be.
    MissingExtra
        If the package that validates is not installed.
    """
    kind, keys = data["kind"], _keys(data["kind"])
    missing = sorted(keys - set(data))
    unknown = sorted(map(str, set(data) - keys)) if _definition(kind) != "other" else []
    if missing or unknown:
        texts = (plain(", ".join(names) or "none") for names in (missing, unknown))
        raise MeasurementError("a row has other keys than it should: missing {}; unknown {}.".format(*texts))
    validator = _validator(kind)
    from jsonschema.exceptions import best_match

    # A field that is refused also counts as one that nothing evaluated; that there is no unknown one is known.
    errors = [error for error in validator.iter_errors(data) if error.validator != "unevaluatedProperties"]
    error = best_match(errors)
    if error is not None:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        raise MeasurementError(f"{place.lstrip('.')} is not as the schema says: {error.message[:200]}.")
