# SPDX-License-Identifier: Apache-2.0
"""What rows say when set beside each other: per problem the ratios, over the problems their geometric means.

Only rows of one machine, one number of threads and one direction are compared; with one exception, our backward
in units of our own forward. Both the terminal's table and the report show what is computed here.
"""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvmdcn.bench.measurement import DIRECTIONS, Measurement
from tvmdcn.spec import DeformConv2dSpec, Extents

__all__ = [
    "Aim",
    "GeometricMean",
    "Line",
    "Section",
    "Verdict",
    "geometric_mean",
    "organize",
    "thread_gains",
]

# The schedule that stands for us, and the order of columns; others follow in the order of their first row.
_SUBJECTS = ("ours-tuned", "ours-default", "ours-naive")
_NO_MORE_THAN_KERNEL = ("call", "overhead_numpy", "overhead_torch", "first_result")
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
    """One problem of a section: its rows by provider, and the ratios.

    `forward` are, of gradients, the rows of the layer itself.
    """

    problem: str
    spec: DeformConv2dSpec
    extents: Extents
    rows: Mapping[str, Measurement]
    subject: str | None
    forward: Mapping[str, Measurement] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The layer's name, with the direction if it is backward."""
        return next(iter(self.rows.values())).title

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
    def growth(self) -> float | None:
        """Our time in units of our own forward's; of gradients only."""
        return _ratio(self.ours, self.forward.get(self.subject or ""))

    def against(self, provider: str) -> float | None:
        """Return a provider's time in units of ours."""
        return _ratio(self.rows.get(provider), self.ours)

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
class Aim:
    """A ratio to stay below, or to reach, on some of the layers."""

    text: str
    limit: float
    ratio: Callable[[Line], float | None]
    layers: Callable[[DeformConv2dSpec], bool]
    at_least: bool = False

    def met_by(self, ratio: float) -> bool:
        """Whether a ratio is as good as the limit."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit


@dataclass(frozen=True)
class Verdict:
    """An aim, and the ratio of each layer it is for."""

    aim: Aim
    ratios: Sequence[tuple[Line, float]]

    @property
    def misses(self) -> list[tuple[Line, float]]:
        """The layers that fall short."""
        return [(line, ratio) for line, ratio in self.ratios if not self.aim.met_by(ratio)]

    @property
    def worst(self) -> float:
        """The ratio farthest from the aim, or nearest to missing it."""
        ratios = [ratio for _, ratio in self.ratios]
        return min(ratios) if self.aim.at_least else max(ratios)


_AIMS = {
    "forward": (),
    "backward": (
        Aim(
            "at most 2.2\u00d7 our own forward, on layers with one offset group",
            2.2,
            lambda line: line.growth,
            lambda spec: spec.offset_groups == 1,
        ),
        Aim(
            "at most 1.5\u00d7 a plain convolution's backward, on layers with one offset group and one group",
            1.5,
            lambda line: line.cost,
            lambda spec: spec.offset_groups == spec.groups == 1,
        ),
        Aim(
            "at least 8\u00d7 as fast as torchvision's backward",
            8.0,
            lambda line: line.against("torchvision"),
            lambda spec: True,
            at_least=True,
        ),
    ),
}


@dataclass(frozen=True)
class Section:
    """The rows of one machine at one number of threads and in one direction.

    `subject` is the provider that stands for us, the best kind of schedule that was measured; `versions` are
    those that most rows have; `extra` are rows of other measures than calls; `superseded` counts rows that a
    later one of the same kind replaced.
    """

    machine: Mapping[str, Any]
    threads: int
    direction: str
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

    @property
    def growth(self) -> GeometricMean | None:
        """Over the problems, our time in units of our own forward's; of gradients only."""
        return geometric_mean([line.growth for line in self.lines])

    @property
    def verdicts(self) -> list[Verdict]:
        """The aims that something was measured for."""
        found = []
        for aim in _AIMS[self.direction]:
            ratios = [(line, aim.ratio(line)) for line in self.lines if aim.layers(line.spec)]
            known = [(line, ratio) for line, ratio in ratios if ratio is not None]
            found += [Verdict(aim, known)] if known else []
        return found

    def against(self, provider: str) -> GeometricMean | None:
        """Over the problems, the time of a provider in units of ours."""
        return geometric_mean([line.against(provider) for line in self.lines])

    def above_kernel(self, row: Measurement) -> float | None:
        """Return the milliseconds that a call takes beyond the kernel's own, on the same tensors of torch."""
        if row.measure in _NO_MORE_THAN_KERNEL or row.role != "ours" or row.median_ms is None:
            return None
        kernel = next((other for other in self.extra if other.measure == "overhead_torch"), None)
        return None if kernel is None or kernel.median_ms is None else row.median_ms - kernel.median_ms

    def differences(self, row: Measurement) -> list[str]:
        """Return how a row's versions differ from those that most rows of the section have."""
        names = sorted({*row.versions, *self.versions})
        return [
            f"{name} {row.versions.get(name, 'absent')} instead of {self.versions.get(name, 'absent')}"
            for name in names
            if row.versions.get(name) != self.versions.get(name)
        ]


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def organize(rows: Iterable[Measurement]) -> list[Section]:
    """Set rows beside each other, one section per machine, direction and number of threads.

    The machine with the most rows comes first. Where a problem was measured more than once with a provider,
    the row with the latest date is used.
    """
    by_place: dict[tuple[str, str, int], list[Measurement]] = {}
    for row in rows:
        by_place.setdefault((_frozen(row.machine), row.direction, row.threads), []).append(row)
    size = Counter({machine: 0 for machine, _, _ in by_place})
    for (machine, _, _), found in by_place.items():
        size[machine] += len(found)
    order = sorted(by_place, key=lambda at: (-size[at[0]], at[0], DIRECTIONS.index(at[1]), at[2]))
    return [_section(by_place[at], by_place.get((at[0], "forward", at[2]), [])) for at in order]


def _latest(rows: Iterable[Measurement]) -> list[Measurement]:
    latest: dict[tuple[Any, ...], Measurement] = {}
    for row in rows:
        key = (row.measure, row.problem, row.spec, row.extents, row.provider)
        if key not in latest or _moment(row) >= _moment(latest[key]):
            latest[key] = row
    return list(latest.values())


def _by_problem(rows: Iterable[Measurement]) -> dict[tuple[str, DeformConv2dSpec, Extents], dict[str, Measurement]]:
    by_problem: dict[tuple[str, DeformConv2dSpec, Extents], dict[str, Measurement]] = {}
    for row in rows:
        if row.measure == "call":
            by_problem.setdefault((row.problem, row.spec, row.extents), {})[row.provider] = row
    return by_problem


def _section(rows: list[Measurement], forward_rows: list[Measurement]) -> Section:
    used = _latest(rows)
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
    direction = rows[0].direction
    forward = {} if direction == "forward" else _by_problem(_latest(forward_rows))
    versions = Counter(_frozen(row.versions) for row in used).most_common(1)[0][0]
    return Section(
        machine=rows[0].machine,
        threads=rows[0].threads,
        direction=direction,
        providers=providers,
        roles=roles,
        subject=subject,
        lines=[
            Line(problem, spec, extents, found, subject, forward.get((problem, _layer(found), extents), {}))
            for (problem, spec, extents), found in _by_problem(calls).items()
        ],
        versions=json.loads(versions),
        extra=[row for row in used if row.measure != "call"],
        superseded=len(rows) - len(used),
    )


def _layer(rows: Mapping[str, Measurement]) -> DeformConv2dSpec:
    return next(iter(rows.values())).layer


def _moment(row: Measurement) -> float:
    return datetime.datetime.fromisoformat(row.date).timestamp()


def thread_gains(sections: Sequence[Section]) -> list[tuple[Line, dict[int, float]]]:
    """Return, per problem, how many times as fast we are with more threads than with the fewest.

    Of the first machine only; forward, then backward.
    """
    gains = []
    for direction in DIRECTIONS:
        same = [s for s in sections if s.machine == sections[0].machine and s.direction == direction]
        for line in same[0].lines if same else ():
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
