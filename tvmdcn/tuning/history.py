# SPDX-License-Identifier: Apache-2.0
"""The log of a tuning: one line per trial, on disk when it ends, so that a killed tuning has lost nothing.

``<root>/<target tag>/trials/<name>-t<threads>.jsonl``. The first line says what was tuned; a line that was
cut by a kill is dropped by the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmdcn.errors import BuildError, RecordsError
from tvmdcn.report.data import Trial, TuningHistory
from tvmdcn.space import Decisions

__all__ = ["TrialLog", "TrialRow", "histories", "parse_log", "read_log"]

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
    round : int, optional
        Between which two looks at the cost model it was tried, counted from 0 over all runs; None in old logs.
    predicted : float, optional
        The cost model's score before the trial, see :meth:`tvmdcn.tuning.search.Search.predict`; None in old logs,
        and while the model had not seen enough.
    """

    decisions: Decisions
    seconds: float | None
    reason: str
    elapsed: float
    round: int | None = None
    predicted: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as a dict of JSON types."""
        return {
            "decisions": self.decisions.to_json(),
            "seconds": self.seconds,
            "reason": self.reason,
            "elapsed": round(self.elapsed, 2),
            "round": self.round,
            "predicted": self.predicted,
        }

    @classmethod
    def from_json(cls, data: Any) -> TrialRow:
        """Return the row that :meth:`to_json` wrote.

        Raises
        ------
        RecordsError
            If a field is missing or has an impossible value.
        """
        try:
            seconds, reason, elapsed = data["seconds"], data["reason"], data["elapsed"]
            decisions = Decisions.from_json(data["decisions"])
        except (KeyError, TypeError, BuildError) as error:
            raise RecordsError(f"not a trial: {type(error).__name__}: {error}") from error
        if not isinstance(reason, str) or bool(reason) is not (seconds is None):
            raise RecordsError("a trial must have either a time or a reason why it has none.")
        if (seconds is not None and not _is_time(seconds)) or not _is_time(elapsed, zero=True):
            raise RecordsError("a time is not a positive number.")
        number, predicted = data.get("round"), data.get("predicted")
        if number is not None and (type(number) is not int or number < 0):
            raise RecordsError("round is not a number counted from 0.")
        if predicted is not None and (type(predicted) not in (int, float) or not abs(predicted) < 1e300):
            raise RecordsError("predicted is not a finite number.")
        return cls(decisions, None if seconds is None else float(seconds), reason, float(elapsed), number, predicted)


def _is_time(value: Any, zero: bool = False) -> bool:
    # Compared, not asked whether it is finite: an integer may be too large to be made a float of.
    return type(value) in (int, float) and (0 < value < 1e9 or (zero and value == 0))


def _drop_torn_line(path: Path) -> None:
    """Cut an unfinished last line off a file of lines."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)


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
        If the file is another layer's, or cannot be read or written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: list[TrialRow] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        expected = json.loads(json.dumps({"schema": _SCHEMA, **header}))
        if path.is_file() and path.stat().st_size:
            found, self.rows = read_log(path)
            if {k: found.get(k) for k in expected} != expected:
                differ = ", ".join(sorted(k for k in expected if found.get(k) != expected[k]))
                raise RecordsError(
                    f"{path} is the log of another tuning: {differ} differ. Delete it, tune under another "
                    "name, or into another folder."
                )
        else:
            self._append(expected)

    def add(self, row: TrialRow) -> None:
        """Log one trial; it is on disk when this returns.

        Raises
        ------
        RecordsError
            If it cannot be written; those before it are kept.
        """
        self._append(row.to_json())
        self.rows.append(row)

    def _append(self, data: Any) -> None:
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(data, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                _drop_torn_line(self.path)
            raise _unwritable(self.path, error) from error


def _unwritable(path: Path, error: OSError) -> RecordsError:
    return RecordsError(
        f"{path} cannot be written: {error.strerror or error}. What was logged before is kept: make room or name "
        "another directory, and run the same command again."
    )


def read_log(path: Path) -> tuple[dict[str, Any], list[TrialRow]]:
    """Return the header and the trials of a log; a last line that is being written is passed over.

    Raises
    ------
    RecordsError
        If it cannot be read, or a line is none of a log; the message names the line.
    """
    try:
        return parse_log(path.read_bytes())
    except OSError as error:
        raise RecordsError(f"{path} cannot be read: {error.strerror}. Delete it and tune again.") from error
    except RecordsError as error:
        raise RecordsError(f"{path}, {error} Delete it and tune again.") from error


def parse_log(content: bytes) -> tuple[dict[str, Any], list[TrialRow]]:
    """Return the header and the trials of a log's content; what follows the last end of a line is passed over.

    Raises
    ------
    RecordsError
        If a line is none of a log; the message names the line.
    """
    number = 0
    try:
        rows: list[TrialRow] = []
        header: Any = {}
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            data = json.loads(line)
            if number == 1:
                header = data
                if not isinstance(header, dict) or header.get("schema") != _SCHEMA:
                    raise RecordsError(f"its schema is not {_SCHEMA}.")
            else:
                rows.append(TrialRow.from_json(data))
        return header, rows
    except (ValueError, RecursionError, RecordsError) as error:
        raise RecordsError(f"line {number} cannot be read: {error}") from error


def histories(folder: Path) -> Iterator[TuningHistory]:
    """Iterate over the logs below a folder of records, as a report shows them.

    Raises
    ------
    RecordsError
        If one cannot be read.
    """
    for path in sorted(Path(folder).rglob("trials/*.jsonl")):
        header, rows = read_log(path)
        trials = [
            Trial(
                index=index,
                time_ms=None if row.seconds is None else 1e3 * row.seconds,
                reason=row.reason.partition(":")[0] or None,  # the details would make each its own kind
                elapsed_s=row.elapsed,
                round=row.round,
                predicted=row.predicted,
                decisions={
                    "variant": row.decisions.variant,
                    **{k: str(v) for k, v in row.decisions.values.items()},
                },
            )
            for index, row in enumerate(rows)
        ]
        threads = header.get("threads")
        yield TuningHistory(
            str(header.get("name", path.stem)),
            trials,
            str(header.get("target", "")),
            threads if isinstance(threads, int) else None,
        )
