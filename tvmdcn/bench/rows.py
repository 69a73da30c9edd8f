# SPDX-License-Identifier: Apache-2.0
"""Files of rows: one line of JSON each, checked when written and when read.

A report never rests on half a row: a broken line is named with its number, and the others are still used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.roof import Roof
from tvmdcn.bench.row import Row
from tvmdcn.bench.schema import SCHEMA, MeasurementError, upgrade, validate

__all__ = ["Entry", "RowFile", "append_row", "parse_row", "read_row_file", "read_rows"]

_KINDS: dict[str, type[Measurement] | type[Roof]] = {Measurement.kind: Measurement, Roof.kind: Roof}


@dataclass(frozen=True)
class Entry:
    """A sound line of a file: its number from 1, the schema that it was written in, and its row."""

    line: int
    schema: int
    row: Measurement | Roof | dict[str, Any]


@dataclass(frozen=True)
class RowFile:
    """What a file of rows holds.

    Parameters
    ----------
    path : Path
        The file.
    entries : sequence of Entry
        The sound lines, in their order.
    complaints : sequence of str
        One per line that is left out: the file, the line's number, what is wrong, what to do.
    """

    path: Path
    entries: Sequence[Entry]
    complaints: Sequence[str]

    @property
    def measurements(self) -> list[Measurement]:
        """The rows of layers."""
        return [entry.row for entry in self.entries if isinstance(entry.row, Measurement)]

    @property
    def roofs(self) -> list[Roof]:
        """The rows of roofs."""
        return [entry.row for entry in self.entries if isinstance(entry.row, Roof)]

    @property
    def others(self) -> list[dict[str, Any]]:
        """The rows of kinds that are known to those only who wrote them."""
        return [entry.row for entry in self.entries if isinstance(entry.row, dict)]

    @property
    def warnings(self) -> list[str]:
        """What to know of lines that are used: earlier schemas, other machines, unsteady times; each with the lines."""
        return [*self._earlier(), *self._mixed(), *self._unsteady()]

    def _earlier(self) -> list[str]:
        found = []
        for schema in range(1, SCHEMA):
            lines = [entry.line for entry in self.entries if entry.schema == schema]
            if lines:
                found.append(
                    f"{self.path}, {_lines(lines)}: of schema {schema}, without samples, memory and affinity; "
                    "measure again to have them."
                )
        return found

    def _mixed(self) -> list[str]:
        machines: dict[str, tuple[Mapping[str, Any], list[int]]] = {}
        for entry in self.entries:
            machine = entry.row["machine"] if isinstance(entry.row, dict) else entry.row.machine
            machines.setdefault(json.dumps(machine, sort_keys=True), (machine, []))[1].append(entry.line)
        (first, _), *others = list(machines.values()) or [({}, [])]
        return [
            f"{self.path}, {_lines(lines)}: of another machine than the first ({_difference(machine, first)}); "
            "rows of different machines are not set beside each other."
            for machine, lines in others
        ]

    def _unsteady(self) -> list[str]:
        lines = [entry.line for entry in self.entries if isinstance(entry.row, Row) and entry.row.noisy]
        if not lines:
            return []
        return [f"{self.path}, {_lines(lines)}: unsteady times; measure again on an idle machine."]


def _lines(numbers: Sequence[int]) -> str:
    """Return numbers of lines in words, runs of them shortened."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = ", ".join("\u2013".join(map(str, run)) for run in runs[:8])
    more = f" and {sum(run[-1] - run[0] + 1 for run in runs[8:])} more" if runs[8:] else ""
    return f"line{'s' * (len(numbers) > 1)} {shown}{more}"


def _difference(machine: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    names = [name for name in {**first, **machine} if machine.get(name) != first.get(name)]
    return ", ".join(f"{name} {machine.get(name)} instead of {first.get(name)}" for name in names)


def parse_row(data: Any) -> Measurement | Roof | dict[str, Any]:
    """Return the row of a line's JSON, of this schema or an earlier one; of an unknown kind the object itself.

    Raises
    ------
    MeasurementError
        If the schema is another, a key is missing or unknown, or a value is not what was written.
    MissingExtra
        If the package that validates rows is not installed.
    """
    row = upgrade(data)
    validate(row)
    kind = _KINDS.get(row["kind"])
    return row if kind is None else kind.from_valid(row)


def append_row(path: str | Path, row: Row | Mapping[str, Any]) -> None:
    """Append a row to a file of JSON lines, in one write, creating the file if need be.

    Parameters
    ----------
    path : str or Path
        The file.
    row : Row or mapping
        A row of ours, or of another kind as a JSON object.

    Raises
    ------
    MeasurementError
        If it is not as the schema says; nothing is written.
    MissingExtra
        If the package that validates rows is not installed.
    OSError
        If the file cannot be written.
    """
    data = row.to_json() if isinstance(row, Row) else dict(row)
    parse_row(data)
    try:
        line = json.dumps(data, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:  # what JSON has not; a number that is not finite
        raise MeasurementError(f"the row is no JSON: {error}.") from error
    with open(path, "ab") as file:
        # A line cut short by a kill must not swallow this one.
        if file.tell() and not _ends_with_newline(path):
            line = "\n" + line
        file.write(line.encode())


def _ends_with_newline(path: str | Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_row_file(path: str | Path) -> RowFile:
    """Read a file of rows, leaving out lines that are broken.

    Parameters
    ----------
    path : str or Path
        A file of JSON lines; empty lines are allowed.

    Raises
    ------
    MissingExtra
        If the package that validates rows is not installed.
    OSError
        If the file cannot be read.
    """
    entries, complaints = [], []
    content = Path(path).read_bytes()
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
            entries.append(Entry(number, data.get("schema", 0) if isinstance(data, dict) else 0, parse_row(data)))
        except MeasurementError as error:
            complaints.append(f"{path}, line {number}: {error}")
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; hostile nesting
            cut = number == len(lines)  # the last line of a whole file ends, and is followed by nothing
            step = "it was cut short; measure with --resume to have it again" if cut else "delete it, or measure again"
            complaints.append(f"{path}, line {number}: not a line of JSON ({error}): {step}.")
    return RowFile(Path(path), entries, complaints)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> float:
    raise MeasurementError(f"numbers must be finite, got {text}: measure again with this version.")


def read_rows(path: str | Path) -> tuple[list[Measurement], list[str]]:
    """Read the layers of a file of rows, leaving out lines that are broken.

    Returns
    -------
    list of Measurement
        The rows that are sound, in their order.
    list of str
        One message per broken line, with the file, the line's number and what is wrong.

    Raises
    ------
    MissingExtra
        If the package that validates rows is not installed.
    OSError
        If the file cannot be read.
    """
    found = read_row_file(path)
    return found.measurements, list(found.complaints)
