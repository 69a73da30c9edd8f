# SPDX-License-Identifier: Apache-2.0
"""The log of a tuning: one line per trial, written when it ends, so that a killed tuning has lost nothing.

``<root>/<target tag>/trials/<name>.jsonl``. The first line says what was tuned; a line that was cut by a kill is
dropped by the next run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmdcn.errors import RecordsError
from tvmdcn.report_data import Trial, TuningHistory
from tvmdcn.space import Decisions

__all__ = ["TrialLog", "TrialRow", "drop_torn_line", "histories"]

_SCHEMA = 1


@dataclass(frozen=True)
class TrialRow:
    """One trial as it was logged.

    Parameters
    ----------
    decisions : Decisions
    seconds : float or None
        Median time of a call; None if the trial failed.
    reason : str
        Why it failed; empty otherwise.
    elapsed : float
        Seconds of tuning up to then, earlier runs included.
    """

    decisions: Decisions
    seconds: float | None
    reason: str
    elapsed: float

    def to_json(self) -> dict[str, Any]:
        """Return the row as a dict of JSON types."""
        return {
            "decisions": self.decisions.to_json(),
            "seconds": self.seconds,
            "reason": self.reason,
            "elapsed": round(self.elapsed, 2),
        }


def drop_torn_line(path: Path) -> None:
    """Cut an unfinished last line off a file of lines."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        keep = size
        while keep:
            start = max(0, keep - 65536)
            file.seek(start)
            at = file.read(keep - start).rfind(b"\n")
            if at >= 0:
                keep = start + at + 1
                break
            keep = start
        if keep != size:
            file.truncate(keep)


class TrialLog:
    """The log of one layer's tuning.

    Parameters
    ----------
    path : Path
    header : mapping
        What is tuned; a log with another header is refused.

    Raises
    ------
    RecordsError
        If the file is another layer's, or cannot be read.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: list[TrialRow] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(path)
        expected = {"schema": _SCHEMA, **header}
        if path.is_file() and path.stat().st_size:
            found, rows = _read(path)
            if {k: found.get(k) for k in expected} != expected:
                raise RecordsError(
                    f"{path} is the log of another tuning. Delete it, or name another folder with --output."
                )
            self.rows = rows
        else:
            self._append(expected)

    def add(self, row: TrialRow) -> None:
        """Log one trial; it is on disk when this returns."""
        self.rows.append(row)
        self._append(row.to_json())

    def _append(self, data: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(data, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> tuple[dict[str, Any], list[TrialRow]]:
    try:
        lines = path.read_text().splitlines()
        header = json.loads(lines[0])
        rows = []
        for number, line in enumerate(lines[1:], 2):
            data = json.loads(line)
            seconds = data["seconds"]
            rows.append(
                TrialRow(
                    Decisions.from_json(data["decisions"]),
                    None if seconds is None else float(seconds),
                    str(data["reason"]),
                    float(data["elapsed"]),
                )
            )
        return dict(header), rows
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        where = f", line {number}" if "number" in locals() else ""
        raise RecordsError(f"{path}{where} cannot be read: {error}. Delete it and tune again.") from error


def histories(folder: Path) -> Iterator[TuningHistory]:
    """Iterate over the logs below a folder of records, as a report shows them.

    Raises
    ------
    RecordsError
        If one cannot be read.
    """
    for path in sorted(Path(folder).rglob("trials/*.jsonl")):
        header, rows = _read(path)
        trials = [
            Trial(
                index=index,
                time_ms=None if row.seconds is None else 1e3 * row.seconds,
                reason=row.reason or None,
                elapsed_s=row.elapsed,
                decisions={
                    "variant": row.decisions.variant,
                    **{k: str(v) for k, v in row.decisions.values.items()},
                },
            )
            for index, row in enumerate(rows)
        ]
        yield TuningHistory(str(header.get("name", path.stem)), trials, str(header.get("target", "")))
