# SPDX-License-Identifier: Apache-2.0
"""What rows say when set beside each other: per problem the ratios, over the problems their geometric means.

Only rows of one machine and one number of threads are compared. Both the terminal's table and the report show
what is computed here.
"""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvmdcn.measurement import Measurement
from tvmdcn.spec import DeformConv2dSpec, Extents

__all__ = ["GeometricMean", "Line", "Section", "describe_layer", "geometric_mean", "organize", "thread_gains"]

# The schedule that stands for us, and the order of columns; others follow in the order of their first row.
_SUBJECTS = ("ours-tuned", "ours-default", "ours-naive")
_ROLE_ORDER = {"ours": 0, "peer": 1, "floor": 2}


@dataclass(frozen=True)
class GeometricMean:
    """A geometric mean of ratios, with how many problems of how many it covers, and its extremes."""

    value: float
    count: int
    total: int
    lowest: float
    highest: float


def geometric_mean(ratios: Sequence[float | None]) -> GeometricMean | None:
    """Return the geometric mean of the ratios that are known; None if none is.

    Raises
    ------
    ValueError
        If a ratio is not positive.
    """
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return None
    if min(known) <= 0:
        raise ValueError(f"a geometric mean needs positive ratios, got {min(known)}.")
    value = math.exp(math.fsum(map(math.log, known)) / len(known))
    return GeometricMean(value, len(known), len(ratios), min(known), max(known))


@dataclass(frozen=True)
class Line:
    """One problem of a section: its rows by provider, and the ratios."""

    problem: str
    spec: DeformConv2dSpec
    extents: Extents
    rows: Mapping[str, Measurement]
    subject: str | None

    def _fastest(self, role: str) -> Measurement | None:
        usable = [row for row in self.rows.values() if row.role == role and row.median_ms is not None]
        return min(usable, key=lambda row: row.median_ms or 0.0, default=None)

    @property
    def ours(self) -> Measurement | None:
        """The row that stands for us, unless it failed."""
        row = self.rows.get(self.subject or "")
        return row if row is not None and row.median_ms is not None else None

    @property
    def fastest_peer(self) -> Measurement | None:
        """The fastest of those that compute the same."""
        return self._fastest("peer")

    @property
    def floor(self) -> Measurement | None:
        """The faster of the plain convolutions."""
        return self._fastest("floor")

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the fastest peer we are."""
        return _ratio(self.fastest_peer, self.ours)

    @property
    def cost(self) -> float | None:
        """Our time in units of the plain convolution's."""
        return _ratio(self.ours, self.floor)

    @property
    def gflops(self) -> float | None:
        """Our billions of operations per second, sampling not counted."""
        ours = self.ours
        return None if ours is None or not ours.median_ms else ours.operations / ours.median_ms / 1e6


def _ratio(above: Measurement | None, below: Measurement | None) -> float | None:
    if above is None or below is None or above.median_ms is None or not below.median_ms:
        return None
    return above.median_ms / below.median_ms


@dataclass(frozen=True)
class Section:
    """The rows of one machine at one number of threads.

    `subject` is the provider that stands for us, the best kind of schedule that was measured; `versions` are
    those that most rows have; `extra` are rows of other measures than calls; `superseded` counts rows that a
    later one of the same kind replaced.
    """

    machine: Mapping[str, Any]
    threads: int
    providers: Sequence[str]
    roles: Mapping[str, str]
    subject: str | None
    lines: Sequence[Line]
    versions: Mapping[str, str]
    extra: Sequence[Measurement] = field(default=())
    superseded: int = 0

    @property
    def speedup(self) -> GeometricMean | None:
        """Over the problems, how many times as fast as the fastest peer we are."""
        return geometric_mean([line.speedup for line in self.lines])

    @property
    def cost(self) -> GeometricMean | None:
        """Over the problems, our time in units of the plain convolution's."""
        return geometric_mean([line.cost for line in self.lines])

    def against(self, provider: str) -> GeometricMean | None:
        """Over the problems, the time of a provider in units of ours."""
        return geometric_mean([_ratio(_timed(line, provider), line.ours) for line in self.lines])

    def differences(self, row: Measurement) -> list[str]:
        """Return how a row's versions differ from those that most rows of the section have."""
        names = sorted({*row.versions, *self.versions})
        return [
            f"{name} {row.versions.get(name, 'absent')} instead of {self.versions.get(name, 'absent')}"
            for name in names
            if row.versions.get(name) != self.versions.get(name)
        ]


def _timed(line: Line, provider: str) -> Measurement | None:
    row = line.rows.get(provider)
    return row if row is not None and row.median_ms is not None else None


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def organize(rows: Iterable[Measurement]) -> list[Section]:
    """Set rows beside each other, one section per machine and number of threads.

    The machine with the most rows comes first. Where a problem was measured more than once with a provider,
    the row with the latest date is used.
    """
    by_place: dict[tuple[str, int], list[Measurement]] = {}
    for row in rows:
        by_place.setdefault((_frozen(row.machine), row.threads), []).append(row)
    size = Counter({machine: 0 for machine, _ in by_place})
    for (machine, _), found in by_place.items():
        size[machine] += len(found)
    order = sorted(by_place, key=lambda place: (-size[place[0]], place[0], place[1]))
    return [_section(by_place[place]) for place in order]


def _section(rows: list[Measurement]) -> Section:
    latest: dict[tuple[Any, ...], Measurement] = {}
    for row in rows:
        key = (row.measure, row.problem, row.spec, row.extents, row.provider)
        if key not in latest or _moment(row) >= _moment(latest[key]):
            latest[key] = row
    used = list(latest.values())
    calls = [row for row in used if row.measure == "call"]
    providers = list(dict.fromkeys(row.provider for row in calls))
    roles = {row.provider: row.role for row in calls}
    providers.sort(
        key=lambda name: (
            _ROLE_ORDER[roles[name]],
            _SUBJECTS.index(name) if name in _SUBJECTS else len(_SUBJECTS),
        )
    )
    timed = {row.provider for row in calls if row.status == "ok"}
    ours = [name for name in providers if roles[name] == "ours"]
    subject = next((name for name in ours if name in timed), ours[0] if ours else None)
    by_problem: dict[tuple[str, DeformConv2dSpec, Extents], dict[str, Measurement]] = {}
    for row in calls:
        by_problem.setdefault((row.problem, row.spec, row.extents), {})[row.provider] = row
    versions = Counter(_frozen(row.versions) for row in used).most_common(1)[0][0]
    return Section(
        machine=rows[0].machine,
        threads=rows[0].threads,
        providers=providers,
        roles=roles,
        subject=subject,
        lines=[Line(*key, found, subject) for key, found in by_problem.items()],
        versions=json.loads(versions),
        extra=[row for row in used if row.measure != "call"],
        superseded=len(rows) - len(used),
    )


def _moment(row: Measurement) -> float:
    return datetime.datetime.fromisoformat(row.date).timestamp()


def thread_gains(sections: Sequence[Section]) -> list[tuple[Line, dict[int, float]]]:
    """Return, per problem, how many times as fast we are with more threads than with the fewest.

    Of the first machine only.
    """
    if not sections:
        return []
    same = [section for section in sections if section.machine == sections[0].machine]
    gains = []
    for line in same[0].lines:
        gain = {}
        for section in same[1:]:
            for other in section.lines:
                if (other.problem, other.spec, other.extents) == (line.problem, line.spec, line.extents):
                    ratio = _ratio(line.ours, other.ours) if line.subject == other.subject else None
                    if ratio is not None:
                        gain[section.threads] = ratio
        if gain:
            gains.append((line, gain))
    return gains


def describe_layer(spec: DeformConv2dSpec, extents: Extents) -> str:
    """Return a layer in a few characters: sizes, kernel, and whatever is not usual."""
    kernel = "\u00d7".join(map(str, spec.kernel_size))
    image = f"{extents.batch}\u00d7{spec.in_channels}\u00d7{extents.height}\u00d7{extents.width}"
    text = f"{image} \u2192 {spec.out_channels}, {kernel}"
    if spec.stride != (1, 1):
        text += f", stride {_short(spec.stride)}"
    same = tuple(d * (k - 1) // 2 for k, d in zip(spec.kernel_size, spec.dilation, strict=True))
    if spec.padding != same * 2:
        text += f", padding {_short(spec.padding)}"
    if spec.dilation != (1, 1):
        text += f", dilation {_short(spec.dilation)}"
    if spec.groups > 1:
        text += f", {spec.groups} groups"
    if spec.offset_groups > 1:
        text += f", {spec.offset_groups} offset groups"
    if not spec.mask:
        text += ", no mask"
    if spec.dtype != "float32":
        text += f", {spec.dtype}"
    if spec.layout != "NCHW":
        text += f", {spec.layout}"
    return text


def _short(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "\u00d7".join(map(str, values))
