# SPDX-License-Identifier: Apache-2.0
"""One measured figure and where it comes from: the rows that benchmarks write and reports read.

A row is one line of JSON. Rows are validated when written and when read, so that a report never rests on
half a row: a broken line is named with its number, and the others are still used.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tvmdcn.errors import TvmdcnError
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents, spec_from_json
from tvmdcn.target import detect_target, host_identity

__all__ = [
    "DIRECTIONS",
    "MEASURES",
    "ROLES",
    "SCHEMA",
    "Measurement",
    "MeasurementError",
    "append_row",
    "direction_of",
    "identify_machine",
    "identify_versions",
    "percentile",
    "read_rows",
]

SCHEMA = 2
# Rows of schema 1 are read too: all are forward, and they do not say so.
_READABLE = (1, SCHEMA)
DIRECTIONS = ("forward", "backward")
# What was timed: one call of a prepared layer; one call of a tiny layer, nearly all of which is overhead, of the
# kernel with arrays of NumPy or of torch, and of what users call, which is the kernel and more; import to first
# result in a new process, with the artifact built before.
MEASURES = (
    "call",
    "overhead_numpy",
    "overhead_torch",
    "overhead_function",
    "overhead_operator",
    "overhead_module",
    "overhead_autograd",
    "first_result",
)
ROLES = ("ours", "peer", "floor")
_STATUSES = ("ok", "failed")
_DISTRIBUTIONS = (
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "onnxruntime",
    "openvino",
    "torch",
    "torchvision",
)


class MeasurementError(TvmdcnError, ValueError):
    """A row of measurements is not what its schema says."""


def direction_of(spec: DeformConv2dSpec) -> str:
    """Return which of :data:`DIRECTIONS` a specification computes: the layer's output, or its gradients."""
    return "backward" if isinstance(spec, DeformConv2dGradSpec) else "forward"


@dataclass(frozen=True)
class Measurement:
    """What one provider needed for one problem at one number of threads.

    Parameters
    ----------
    problem : str
        Name of the layer; `spec` and `extents` say what it is.
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        What was computed; its kind is the row's direction.
    extents : Extents
        The sizes.
    provider : str
        Who computed it, such as ``ours-tuned`` or ``onnxruntime``.
    role : str
        ``ours``; ``peer`` computes the same; ``floor`` is a plain convolution of the same shape.
    threads : int
        Number of threads it was given.
    machine, versions : dict
        See :func:`identify_machine` and :func:`identify_versions`.
    date : str
        ISO 8601 with the offset from UTC.
    command : str
        The command that measured.
    schedule : str, optional
        Which schedule of ours: ``naive``, ``default`` or ``tuned``.
    status : str
        ``ok`` or ``failed``; a failed row has a `reason` and no times.
    median_ms, min_ms, p10, p90 : float, optional
        Milliseconds per call: the median, the fastest, and the 10th and 90th percentiles.
    runs : int
        Number of timed calls.
    max_rel_error : float, optional
        Largest absolute difference from the float64 reference over the largest absolute value of the
        reference, of gradients the worst of these; None where there is nothing to compare with, as for a plain
        convolution.
    measure : str
        One of :data:`MEASURES`.

    Raises
    ------
    MeasurementError
        If a field is not of its type, or the fields contradict each other.
    """

    problem: str
    spec: DeformConv2dSpec
    extents: Extents
    provider: str
    role: str
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    command: str
    schedule: str | None = None
    status: str = "ok"
    reason: str | None = None
    median_ms: float | None = None
    min_ms: float | None = None
    p10: float | None = None
    p90: float | None = None
    runs: int = 0
    max_rel_error: float | None = None
    measure: str = "call"

    def __post_init__(self) -> None:
        """Check the fields, each and together."""
        for name in ("problem", "provider", "date", "command"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), str), "a text")
        for name in ("problem", "provider"):
            _check(name, getattr(self, name), bool(getattr(self, name)), "a text that is not empty")
        for name, allowed in (("role", ROLES), ("status", _STATUSES), ("measure", MEASURES)):
            _check(name, getattr(self, name), getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name, least in (("threads", 1), ("runs", 0)):
            value = getattr(self, name)
            _check(name, value, type(value) is int and value >= least, f"an int of at least {least}")
        for name in ("schedule", "reason"):
            value = getattr(self, name)
            _check(name, value, value is None or isinstance(value, str), "a text or null")
        _check("machine", self.machine, isinstance(self.machine, dict), "an object")
        whole = isinstance(self.versions, dict) and all(isinstance(v, str) for v in self.versions.values())
        _check("versions", self.versions, whole, "an object of texts")
        try:
            datetime.datetime.fromisoformat(self.date)
        except ValueError:
            _check("date", self.date, False, "a date and time in ISO 8601")
        self._check_times()

    def _check_times(self) -> None:
        for name in ("median_ms", "min_ms", "p10", "p90", "max_rel_error"):
            value = getattr(self, name)
            number = type(value) in (int, float) and math.isfinite(value) and value >= 0
            _check(name, value, value is None or number, "a finite number of at least 0, or null")
        times = (self.min_ms, self.p10, self.median_ms, self.p90)
        if self.status == "failed":
            _check("reason", self.reason, bool(self.reason), "given where status is failed")
            _check("median_ms", self.median_ms, times == (None,) * 4, "null where status is failed")
            return
        _check("reason", self.reason, self.reason is None, "null where status is ok")
        _check("runs", self.runs, self.runs > 0, "at least 1 where status is ok")
        known = [value for value in times if value is not None]
        _check("median_ms", times, len(known) == 4, "four times where status is ok")
        ordered = known == sorted(known) and known[0] > 0
        _check("min_ms, p10, median_ms, p90", known, ordered, "positive and in ascending order")

    @property
    def direction(self) -> str:
        """Whether the layer's output was computed or its gradients; one of :data:`DIRECTIONS`."""
        return direction_of(self.spec)

    @property
    def layer(self) -> DeformConv2dSpec:
        """The layer, of its gradients too."""
        return self.spec.layer if isinstance(self.spec, DeformConv2dGradSpec) else self.spec

    @property
    def title(self) -> str:
        """The name of the layer, with the direction if it is backward."""
        return self.problem if self.direction == DIRECTIONS[0] else f"{self.problem} {self.direction}"

    @property
    def operations(self) -> int:
        """Operations of one call, two per multiply-add, sampling not counted.

        All gradients take twice the layer's: one product for those of input, offset and mask, one for the weight's.
        """
        return self.spec.flops(self.extents)

    def to_json(self) -> dict[str, Any]:
        """Return the row as a dict of JSON types."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"spec": self.spec.to_json(), "extents": asdict(self.extents)}
        return {"schema": SCHEMA, "direction": self.direction, **values}

    @classmethod
    def from_json(cls, data: Any) -> Measurement:
        """Return the row that :meth:`to_json` wrote, of this version or an earlier one.

        Raises
        ------
        MeasurementError
            If the schema is another, a key is missing or unknown, or a value is not what was written.
        """
        if not isinstance(data, Mapping):
            raise MeasurementError(f"a row must be a JSON object, got {type(data).__name__}.")
        schema = data.get("schema")
        if type(schema) is not int or schema not in _READABLE:
            allowed = " or ".join(map(str, _READABLE))
            raise MeasurementError(f"schema must be {allowed}, got {schema!r}: measure again with this version.")
        written = {"schema"} if schema == 1 else {"schema", "direction"}
        expected = {*written, *(field.name for field in fields(cls))}
        if set(data) != expected:
            missing = ", ".join(sorted(expected - set(data))) or "none"
            unknown = ", ".join(sorted(map(str, set(data) - expected))) or "none"
            raise MeasurementError(f"a row has other keys than it should: missing {missing}; unknown {unknown}.")
        values = {name: value for name, value in data.items() if name not in written}
        try:
            values["spec"] = (DeformConv2dSpec.from_json if schema == 1 else spec_from_json)(values["spec"])
            values["extents"] = Extents(**values["extents"])
            values["spec"].output_size(values["extents"].height, values["extents"].width)
        except (TvmdcnError, TypeError) as error:
            raise MeasurementError(f"the row describes no layer: {error}") from error
        row = cls(**values)
        direction = data.get("direction", row.direction)
        _check("direction", direction, direction == row.direction, f"{row.direction}, as the operator in spec says")
        return row


def _check(name: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        text = repr(value)
        raise MeasurementError(f"{name} must be {expected}, got {text if len(text) < 80 else text[:77] + '...'}.")


def append_row(path: str | Path, row: Measurement) -> None:
    """Append a row to a file of JSON lines, in one write, creating the file if need be.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    line = json.dumps(row.to_json(), allow_nan=False) + "\n"
    with open(path, "ab") as file:
        # A line cut short by a kill must not swallow this one.
        if file.tell() and not _ends_with_newline(path):
            line = "\n" + line
        file.write(line.encode())


def _ends_with_newline(path: str | Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_rows(path: str | Path) -> tuple[list[Measurement], list[str]]:
    """Read a file of rows, leaving out lines that are broken.

    Parameters
    ----------
    path : str or Path
        A file of JSON lines; empty lines are allowed.

    Returns
    -------
    list of Measurement
        The rows that are sound, in their order.
    list of str
        One message per broken line, with the file, the line's number and what is wrong.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    rows, complaints = [], []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(Measurement.from_json(json.loads(line.decode("utf-8"))))
        except MeasurementError as error:
            complaints.append(f"{path}, line {number}: {error}")
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; hostile nesting
            complaints.append(f"{path}, line {number}: not a line of JSON ({error}).")
    return rows, complaints


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share (0 to 1) of the values lie, interpolated between neighbours.

    Raises
    ------
    ValueError
        If there are no values, or the share is outside 0 to 1.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"percentile needs values and a share from 0 to 1, got {len(values)} and {share}.")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    # This form keeps equal neighbours exactly equal, so that percentiles stay in order.
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def identify_machine() -> dict[str, Any]:
    """Return what tells this machine from others as far as speed goes, and stays the same from run to run."""
    host, target = host_identity(), detect_target()
    return {
        "cpu": host["cpu"],
        "target": target.tag,
        "cores": target.cores,
        "l1d_bytes": target.l1d_bytes,
        "l2_bytes": target.l2_bytes,
        "l3_bytes": target.l3_bytes,
        "hypervisor": host["hypervisor"],
        "system": host["system"],
    }


def identify_versions() -> dict[str, str]:
    """Return the versions of Python, of this package (in a checkout with the commit) and of its peers."""
    versions = {"python": platform.python_version()}
    for name in ("tvmdcn", *_DISTRIBUTIONS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _commit(Path(__file__).resolve().parent.parent.parent)
    if commit:
        versions["tvmdcn"] = f"{versions.get('tvmdcn', 'uninstalled')} ({commit})"
    return versions


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=10)
        # Only what can change a kernel's speed: a benchmark must not call itself changed by the rows it
        # writes.
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "tvmdcn", "schedules", "tuning_logs"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode or changed.returncode:
        return None
    return f"commit {head.stdout.strip()}" + (", changed" if changed.stdout.strip() else "")
