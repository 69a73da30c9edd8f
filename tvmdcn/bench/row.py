# SPDX-License-Identifier: Apache-2.0
"""What every row says, whatever was timed: by which run, on what, when, how long, and whether it succeeded."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from tvmdcn.bench.schema import SCHEMA, MeasurementError, shortened
from tvmdcn.bench.statistics import noise

__all__ = ["STATUSES", "TIMES", "Row", "check", "check_number"]

STATUSES = ("ok", "failed")
# In ascending order; the quartiles are not in rows of schema 1 and 2.
TIMES = ("min_ms", "p10", "p25", "median_ms", "p75", "p90")
_QUARTILES = ("p25", "p75")


def check(name: str, value: Any, valid: bool, expected: str) -> None:
    """Raise MeasurementError unless `valid`; the message names the field, what it must be, and what it is."""
    if not valid:
        raise MeasurementError(f"{name} must be {expected}, got {shortened(value)}.")


def check_number(name: str, value: Any) -> None:
    """Check that a field is a finite number of at least 0, or None."""
    number = type(value) in (int, float) and math.isfinite(value) and value >= 0
    check(name, value, value is None or number, "a finite number of at least 0, or null")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Something timed, and where the times come from.

    Parameters
    ----------
    provider : str
        Who computed, such as ``ours-tuned`` or ``onnxruntime``.
    threads : int
        Number of threads it was given.
    machine, versions : dict
        See :mod:`tvmdcn.bench.machine`.
    date : str
        ISO 8601 with the offset from UTC.
    command : str
        The command that measured.
    status : str
        ``ok`` or ``failed``; a failed row has a `reason` and no times.
    median_ms, min_ms, p10, p25, p75, p90 : float, optional
        Milliseconds per call: the median, the fastest, and the percentiles.
    runs : int
        Number of timed calls.
    samples_ms : tuple of tuple of float, optional
        Of each turn up to 16 quantiles in ascending order, see :func:`tvmdcn.bench.statistics.summarize`.
    note : str, optional
        What a reader of a successful row should know.
    run : str, optional
        What the rows of one run of a command have in common.
    device : str
        What computed: ``cpu``.
    affinity : tuple of int, optional
        The processors that the threads were held to; None if they were not.
    commit : str, optional
        Of the checkout that measured, with a ``+`` if it had changes.

    In rows of earlier schemas `p25`, `p75`, `samples_ms`, `run`, `affinity` and `commit` are None.

    Raises
    ------
    MeasurementError
        If a field is not of its type, or the fields contradict each other.
    """

    kind: ClassVar[str]

    provider: str
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    command: str
    status: str = "ok"
    reason: str | None = None
    median_ms: float | None = None
    min_ms: float | None = None
    p10: float | None = None
    p25: float | None = None
    p75: float | None = None
    p90: float | None = None
    runs: int = 0
    samples_ms: tuple[tuple[float, ...], ...] | None = None
    note: str | None = None
    run: str | None = None
    device: str = "cpu"
    affinity: tuple[int, ...] | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        """Check the fields, each and together."""
        for name in ("provider", "date", "command", "device"):
            check(name, getattr(self, name), isinstance(getattr(self, name), str), "a text")
        for name in ("provider", "device"):
            check(name, getattr(self, name), bool(getattr(self, name)), "a text that is not empty")
        check("status", self.status, self.status in STATUSES, f"one of {', '.join(STATUSES)}")
        for name, least in (("threads", 1), ("runs", 0)):
            value = getattr(self, name)
            check(name, value, type(value) is int and value >= least, f"an int of at least {least}")
        for name in ("reason", "note", "run", "commit"):
            value = getattr(self, name)
            check(name, value, value is None or isinstance(value, str), "a text or null")
        check("machine", self.machine, isinstance(self.machine, dict), "an object")
        whole = isinstance(self.versions, dict) and all(isinstance(v, str) for v in self.versions.values())
        check("versions", self.versions, whole, "an object of texts")
        try:
            datetime.datetime.fromisoformat(self.date)
        except ValueError:
            check("date", self.date, False, "a date and time in ISO 8601")
        self._check_times()

    def _check_times(self) -> None:
        times = {name: getattr(self, name) for name in TIMES}
        for name, value in times.items():
            check_number(name, value)
        known = {name: value for name, value in times.items() if value is not None}
        if self.status == "failed":
            check("reason", self.reason, bool(self.reason), "given where status is failed")
            check("median_ms", self.median_ms, not known, "null where status is failed, as all times")
            check("samples_ms", self.samples_ms, self.samples_ms is None, "null where status is failed")
            return
        check("reason", self.reason, self.reason is None, "null where status is ok")
        check("runs", self.runs, self.runs > 0, "at least 1 where status is ok")
        missing = set(times) - set(known)
        check("the times", times, not missing or missing == set(_QUARTILES), "numbers where status is ok")
        values = list(known.values())
        check(", ".join(known), values, values == sorted(values) and values[0] > 0, "positive and in ascending order")
        for turn in self.samples_ms or ():
            for value in turn:
                check_number("samples_ms", value)
            check("samples_ms", turn, bool(turn) and list(turn) == sorted(turn), "turns of ascending times")

    @property
    def spread(self) -> float | None:
        """Distance of the quartiles of all calls in units of the median."""
        if self.p25 is None or self.p75 is None or not self.median_ms:
            return None
        return (self.p75 - self.p25) / self.median_ms

    @property
    def noise(self) -> str | None:
        """Why the times are not to be trusted, see :func:`tvmdcn.bench.statistics.noise`; None if they are."""
        if self.median_ms is None or self.p90 is None:
            return None
        return noise(self.median_ms, self.p90, self.spread, self.samples_ms)

    @property
    def noisy(self) -> bool | None:
        """Whether the calls were too unlike each other; None of a failed row."""
        return None if self.median_ms is None else self.noise is not None

    @property
    def title(self) -> str:
        """What was timed, in a word or two."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return the row as a dict of JSON types."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"schema": SCHEMA, "kind": self.kind, **values, "spread": self.spread, "noisy": self.noisy}

    @classmethod
    def _fields_of(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the fields in what :meth:`to_json` wrote; what follows from others is left out."""
        values = {field.name: data[field.name] for field in fields(cls)}
        turns = values["samples_ms"]
        values["samples_ms"] = None if turns is None else tuple(map(tuple, turns))
        values["affinity"] = None if values["affinity"] is None else tuple(values["affinity"])
        return values


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
