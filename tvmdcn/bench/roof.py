# SPDX-License-Identifier: Apache-2.0
"""One measured roof: how fast this machine copies memory, or multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from tvmdcn.bench.provider import Provider
from tvmdcn.bench.row import Row, check

__all__ = ["LEVELS", "ROOFS", "Asked", "Ready", "Roof"]

ROOFS = {"copy": "GB/s", "matmul": "GFLOP/s"}
"""The units of the rates: bytes read plus bytes written, and two operations per multiply-add."""
LEVELS = ("memory", "cache")


@dataclass(frozen=True)
class Ready:
    """Something to time, what a call of it does, and how."""

    call: Callable[[], Any]
    work: int
    size: str
    method: str


class Asked(NamedTuple):
    """A roof to measure."""

    roof: str
    level: str | None
    dtype: str | None
    provider: Provider


@dataclass(frozen=True, kw_only=True)
class Roof(Row):
    """What one library reached at one number of threads; further fields are :class:`Row`'s.

    Several libraries are measured: the highest rate is the roof.

    Parameters
    ----------
    roof : str
        ``copy`` or ``matmul``.
    level : str, optional
        Where the bytes of a copy lie: ``memory``, or the last-level ``cache``. None for a product.
    dtype : str, optional
        Of the matrices; None for a copy.
    work : int, optional
        Bytes read plus bytes written, or operations, of one call; None where it failed.
    size : str
        What was copied or multiplied.
    method : str
        How.
    """

    kind: ClassVar[str] = "roof"

    roof: str
    level: str | None
    dtype: str | None
    work: int | None
    size: str
    method: str

    def __post_init__(self) -> None:
        """Check the fields, each and together."""
        check("roof", self.roof, self.roof in ROOFS, f"one of {', '.join(ROOFS)}")
        allowed = LEVELS if self.roof == "copy" else (None,)
        check("level", self.level, self.level in allowed, f"one of {', '.join(LEVELS)} for a copy, else null")
        whole = (self.dtype is None) == (self.roof == "copy") and isinstance(self.dtype, (str, type(None)))
        check("dtype", self.dtype, whole, "the dtype of the matrices, null for a copy")
        known = type(self.work) is int and self.work > 0
        check("work", self.work, known or (self.work is None and self.status == "failed"), "a positive int")
        for name in ("size", "method"):
            check(name, getattr(self, name), isinstance(getattr(self, name), str), "a text")
        super().__post_init__()

    @property
    def unit(self) -> str:
        """The unit of the rates."""
        return ROOFS[self.roof]

    @property
    def rate(self) -> float | None:
        """What the median call reached, in billions per second."""
        return self.work / self.median_ms / 1e6 if self.work and self.median_ms else None

    @property
    def best_rate(self) -> float | None:
        """What the fastest call reached, in billions per second."""
        return self.work / self.min_ms / 1e6 if self.work and self.min_ms else None

    @property
    def title(self) -> str:
        """What was timed, in a word or two."""
        return f"{self.roof} {self.dtype or self.level}"

    def to_json(self) -> dict[str, Any]:
        """Return the row as a dict of JSON types."""
        return {**super().to_json(), "unit": self.unit, "rate": self.rate, "best_rate": self.best_rate}

    @classmethod
    def from_valid(cls, data: Mapping[str, Any]) -> Roof:
        """Return the row of data that the schema has been checked of; raises MeasurementError."""
        row = cls(**cls._fields_of(data))
        check("unit", data["unit"], data["unit"] == row.unit, f"{row.unit}, as roof says")
        return row
