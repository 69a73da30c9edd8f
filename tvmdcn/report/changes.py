# SPDX-License-Identifier: Apache-2.0
"""Two runs beside each other: what got faster or slower beyond noise.

Of each row that both runs have, the statistic is the ratio of medians, B over A. Three things make it differ from 1
where nothing changed; all are in its error or taken out of it:

- calls and turns differ: the samples of each row say how far (:func:`tvmdcn.report.significance.estimate`);
- the machine as a whole may be faster or slower, by its clock or its neighbours: rows whose code cannot have changed,
  other libraries of equal versions on the same machine, are controls, and their median ratio is divided out;
- a run differs from the next by more than its samples show: the spread of the controls, beyond what their samples
  explain, is added to every row's variance.

A row has changed if its p-value is below the level after Holm's correction for all rows tested, and the change is
larger than the threshold.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

import numpy as np

from tvmdcn.bench.measurement import Measurement
from tvmdcn.errors import TvmdcnError
from tvmdcn.report.places import describe_machine
from tvmdcn.report.rendering import plural
from tvmdcn.report.significance import Drift, Estimate, difference, drift_of, estimate, holm, interval

__all__ = ["Change", "ChangeError", "Changes", "ExitCode", "Kind", "compare_runs"]

# Of these, other versions are what is compared; a row of another library rests on none of them.
_OURS = {"tvmdcn", "apache-tvm", "apache-tvm-ffi"}


class ChangeError(TvmdcnError, ValueError):
    """Two runs cannot be compared."""


class ExitCode(IntEnum):
    """What ``report --compare`` exits with."""

    SAME = 0
    SLOWER = 1
    INCOMPARABLE = 2


class Kind(str, Enum):
    """What became of a row from A to B."""

    SLOWER = "slower"
    FASTER = "faster"
    BROKEN = "fails now"
    REPAIRED = "works now"
    SAME = "no change beyond noise"
    FAILED = "fails in both"
    CONTROL = "cannot have changed"
    ONLY_A = "only in A"
    ONLY_B = "only in B"


@dataclass(frozen=True)
class Change:
    """One row of both runs, or of one of them.

    Parameters
    ----------
    a, b : Measurement or None
        The rows.
    kind : Kind
        The finding.
    ratio, low, high : float, optional
        Median of B over median of A, without the drift, and the interval of this row by itself.
    p : float, optional
        After Holm's correction; None where nothing was tested.
    rough : bool
        Whether a row had no samples, so that the spread of its calls stands for the noise.
    """

    a: Measurement | None
    b: Measurement | None
    kind: Kind
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    rough: bool = False

    @property
    def row(self) -> Measurement:
        """The row, of B if it has it."""
        row = self.b or self.a
        assert row is not None
        return row


@dataclass(frozen=True)
class Changes:
    """What two runs say beside each other.

    Parameters
    ----------
    rows : sequence of Change
        Every row, in the order of A, then what is only in B.
    level : float
        The chance of a false finding, for all rows together.
    threshold : float
        Changes up to this part of the time are no findings.
    drift : Drift, optional
        What the controls say; None if there were too few.
    controls : int
        How many there were.
    notes : sequence of str
        What a reader must know.
    """

    rows: Sequence[Change]
    level: float
    threshold: float
    drift: Drift | None
    controls: int
    notes: Sequence[str] = field(default=())

    def of(self, *kinds: Kind, role: str | None = None) -> list[Change]:
        """Return the rows of some findings, the largest change first; of all roles, or of one."""
        found = [change for change in self.rows if change.kind in kinds and role in (None, change.row.role)]
        return sorted(found, key=lambda change: -abs(math.log(change.ratio)) if change.ratio else 0.0)

    def count(self, *kinds: Kind) -> int:
        """Return how many rows of ours there are of some findings."""
        return len(self.of(*kinds, role="ours"))

    @property
    def exit_code(self) -> ExitCode:
        """SLOWER if a row of ours is slower beyond noise or fails now, else SAME."""
        return ExitCode.SLOWER if self.count(Kind.SLOWER, Kind.BROKEN) else ExitCode.SAME

    @property
    def verdict(self) -> str:
        """The findings about our rows."""
        parts = [
            f"{self.count(kind)} {word}"
            for kind, word in (
                (Kind.SLOWER, "slower"),
                (Kind.FASTER, "faster"),
                (Kind.SAME, "unchanged beyond noise"),
                (Kind.BROKEN, "failing now"),
                (Kind.REPAIRED, "working now"),
            )
            if self.count(kind) or kind in (Kind.SLOWER, Kind.FASTER, Kind.SAME)
        ]
        return f"Of {plural(sum(c.row.role == 'ours' for c in self.rows), 'row')} of ours: {', '.join(parts)}."

    @property
    def basis(self) -> str:
        """What the findings rest on."""
        tested = sum(change.p is not None for change in self.rows)
        text = (
            f"A finding is beyond noise at level {self.level:g} for all {plural(tested, 'tested row')} together "
            f"(Student's t on bootstrapped errors, Holm's correction), and larger than {self.threshold:.0%}. "
        )
        controls = plural(self.controls, "row")
        if self.drift is None:
            return text + (
                f"{controls} cannot have changed, too few to tell a faster machine from faster code: only the samples "
                "of each row stand for the noise."
            )
        return text + (
            f"{controls} of other libraries, equal in both runs, took {math.exp(self.drift.value):.3f} times as long "
            f"in B: that is divided out. Beyond their samples they scatter by {self.drift.spread:.1%}, which is in "
            "every error."
        )


def compare_runs(
    a: Iterable[Measurement],
    b: Iterable[Measurement],
    *,
    level: float = 0.05,
    threshold: float = 0.03,
    seed: int = 0,
) -> Changes:
    """Set the rows of two runs beside each other.

    Parameters
    ----------
    a, b : iterable of Measurement
        The runs: before and after a change, or two machines. Where one has a row twice, the later one counts.
    level : float
        The accepted chance of calling anything changed by mistake, above 0 and below 1.
    threshold : float
        Changes up to this part of the time, at least 0, are no findings.
    seed : int
        Of the bootstrap.

    Raises
    ------
    ChangeError
        If the runs share no row, or their machines cannot be matched.
    """
    rows_a, rows_b = list(a), list(b)
    same_machine, notes = _match_machines(rows_a, rows_b)
    left, right = _latest(rows_a, same_machine), _latest(rows_b, same_machine)
    if not left.keys() & right.keys():
        raise ChangeError(
            f"the two runs have no row in common: A holds {_contents(rows_a)}, B holds {_contents(rows_b)}. "
            "Measure the same layers, threads and directions."
        )
    generator = np.random.default_rng(seed)
    pairs = [(left.get(key), right.get(key)) for key in dict.fromkeys([*left, *right])]
    estimates: dict[int, Estimate] = {}
    for index, (row_a, row_b) in enumerate(pairs):
        if row_a is not None and row_b is not None and row_a.status == row_b.status == "ok":
            estimates[index] = difference(estimate(row_b, generator), estimate(row_a, generator))
    controls = [index for index in estimates if _unchanged(*pairs[index])]
    drift = drift_of([estimates[index] for index in controls])
    found = {index: interval(estimates[index], drift, level) for index in estimates}
    tested = [index for index in estimates if index not in controls]
    corrected = dict(zip(tested, holm([found[index].p for index in tested]), strict=True))
    changes = []
    for index, (row_a, row_b) in enumerate(pairs):
        if index not in estimates:
            changes.append(Change(row_a, row_b, _one_sided(row_a, row_b)))
            continue
        ratio = math.exp(estimates[index].value - (drift.value if drift is not None else 0.0))
        p = corrected.get(index)
        ends = math.exp(found[index].low), math.exp(found[index].high)
        kind = Kind.CONTROL if p is None else _finding(ratio, p, level, threshold)
        changes.append(Change(row_a, row_b, kind, ratio, *ends, p, estimates[index].rough))
    rough = sum(change.rough for change in changes)
    if rough:
        notes.append(
            f"{plural(rough, 'row')} without samples, of an earlier schema: the spread of single calls stands for the "
            "noise, so that only large changes can be told. Measure again with this version."
        )
    other = sum(a.tensors != b.tensors for a, b in pairs if a is not None and b is not None and a.tensors and b.tensors)
    if other:
        notes.append(f"{plural(other, 'row')} measured on made-up tensors in one run and on real ones in the other.")
    return Changes(changes, level, threshold, drift, len(controls), notes)


def _finding(ratio: float, p: float, level: float, threshold: float) -> Kind:
    if p >= level or abs(math.log(ratio)) <= math.log1p(threshold):
        return Kind.SAME
    return Kind.SLOWER if ratio > 1 else Kind.FASTER


def _one_sided(a: Measurement | None, b: Measurement | None) -> Kind:
    """Return the finding for rows of which at least one has no time."""
    if a is None:
        return Kind.ONLY_B
    if b is None:
        return Kind.ONLY_A
    if a.status == b.status:
        return Kind.FAILED
    return Kind.BROKEN if b.status == "failed" else Kind.REPAIRED


# --- pairing -----------------------------------------------------------------------------------------------


def _machine(row: Measurement) -> str:
    return json.dumps(row.machine, sort_keys=True)


def _match_machines(a: Sequence[Measurement], b: Sequence[Measurement]) -> tuple[bool, list[str]]:
    """Return whether rows are compared within one machine, and what to say if not."""
    machines = {_machine(row) for row in a}, {_machine(row) for row in b}
    if machines[0] & machines[1] or not (a and b):
        return True, []
    if len(machines[0]) > 1 or len(machines[1]) > 1:
        raise ChangeError(
            f"A holds rows of {plural(len(machines[0]), 'machine')} and B of {len(machines[1])} others: "
            "compare files of one machine each."
        )
    return False, [
        f"The runs are of two machines: A of {describe_machine(a[0].machine)}; B of {describe_machine(b[0].machine)}. "
        "Faster and slower say as much of these as of the code."
    ]


def _latest(rows: Iterable[Measurement], same_machine: bool) -> dict[tuple[Any, ...], Measurement]:
    """Return the latest row of each identity."""
    ordered = sorted(rows, key=lambda row: datetime.datetime.fromisoformat(row.date).timestamp())
    return {(*_identity(row), _machine(row) if same_machine else ""): row for row in ordered}


def _identity(row: Measurement) -> tuple[Any, ...]:
    where = (row.direction, row.threads, row.device, row.cache, row.sweep)
    return (row.measure, row.problem, row.spec, row.extents, row.provider, *where)


def _unchanged(a: Measurement | None, b: Measurement | None) -> bool:
    """Whether nothing but noise can lie between two rows: another library of equal versions on the same machine."""
    if a is None or b is None or "ours" in (a.role, b.role) or a.machine != b.machine:
        return False
    versions = [{name: v for name, v in row.versions.items() if name not in _OURS} for row in (a, b)]
    return versions[0] == versions[1]


def _contents(rows: Sequence[Measurement]) -> str:
    if not rows:
        return "no sound row"
    problems = list(dict.fromkeys(row.title for row in rows))
    shown = ", ".join(problems[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")
    threads = ", ".join(map(str, sorted({row.threads for row in rows})))
    return f"{shown} (threads {threads})"
