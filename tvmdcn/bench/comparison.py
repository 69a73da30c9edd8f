# SPDX-License-Identifier: Apache-2.0
"""What rows say when set beside each other: per problem the ratios, over the problems their geometric means.

Only rows of one machine, device, direction, number of threads, state of the caches, dtype and layout are compared; with
one exception, our backward in units of our own forward. Both the terminal's table and the report show what is computed
here.
"""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tvmdcn.bench.lines import Line, Verdict, ratio_of, verdicts_of
from tvmdcn.bench.measurement import CACHES, DIRECTIONS, Measurement
from tvmdcn.spec import DeformConv2dSpec, Extents

__all__ = [
    "GeometricMean",
    "Line",
    "Place",
    "Section",
    "Sweep",
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
class Sweep:
    """One layer at several sizes.

    Parameters
    ----------
    problem, spec
        The layer, or its gradients.
    axes : sequence of str
        What was varied, of :data:`tvmdcn.bench.measurement.SWEEPS`.
    extents : sequence of Extents
        The sizes, by batch, then by pixels.
    rows : mapping of str to sequence of Measurement or None
        By provider, in the order of the sizes; None where there is no row.
    """

    problem: str
    spec: DeformConv2dSpec
    axes: Sequence[str]
    extents: Sequence[Extents]
    rows: Mapping[str, Sequence[Measurement | None]]

    def artifacts(self, provider: str) -> list[str]:
        """Return the artifacts that a provider's rows came from: one, where one kernel served all sizes."""
        return list(dict.fromkeys(row.artifact for row in self.rows[provider] if row and row.artifact))


class Place(NamedTuple):
    """What the rows of a section have in common."""

    machine: str
    device: str
    direction: str
    threads: int
    cache: str
    dtype: str
    layout: str

    @classmethod
    def of(cls, row: Measurement) -> Place:
        """Return the place of a row."""
        spec = row.spec
        return cls(_frozen(row.machine), row.device, row.direction, row.threads, row.cache, spec.dtype, spec.layout)


@dataclass(frozen=True)
class Section:
    """The rows of one machine and device, in one direction, at one number of threads, cache, dtype and layout.

    `subject` is the provider that stands for us, the best kind of schedule that was measured; `versions` are
    those that most rows have; `extra` are rows of other measures than calls; `superseded` counts rows that a
    later one of the same kind replaced. `sweeps` are layers at several sizes, and in no line.
    """

    machine: Mapping[str, Any]
    place: Place
    providers: Sequence[str]
    roles: Mapping[str, str]
    subject: str | None
    lines: Sequence[Line]
    versions: Mapping[str, str]
    extra: Sequence[Measurement] = field(default=())
    superseded: int = 0
    sweeps: Sequence[Sweep] = field(default=())

    @property
    def device(self) -> str:
        """What computed."""
        return self.place.device

    @property
    def direction(self) -> str:
        """One of :data:`tvmdcn.bench.measurement.DIRECTIONS`."""
        return self.place.direction

    @property
    def threads(self) -> int:
        """The number of threads."""
        return self.place.threads

    @property
    def cache(self) -> str:
        """One of :data:`tvmdcn.bench.measurement.CACHES`."""
        return self.place.cache

    @property
    def dtype(self) -> str:
        """What the tensors hold."""
        return self.place.dtype

    @property
    def layout(self) -> str:
        """The order of the tensors."""
        return self.place.layout

    @property
    def title(self) -> str:
        """The direction, the threads, and what is not usual: "backward, 2 threads, cold caches, float16"."""
        parts = [self.direction, "1 thread" if self.threads == 1 else f"{self.threads} threads"]
        parts += [self.device] if self.device != "cpu" else []
        parts += ["cold caches"] if self.cache == "cold" else []
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [self.layout] if self.layout != "NCHW" else []
        return ", ".join(parts)

    @property
    def unsteady(self) -> list[Measurement]:
        """The rows whose times are not to be trusted."""
        rows = [row for line in self.lines for row in line.rows.values()]
        rows += [row for sweep in self.sweeps for found in sweep.rows.values() for row in found if row is not None]
        return [row for row in (*rows, *self.extra) if row.noisy]

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
        return verdicts_of(self.direction, self.lines)

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
    """Set rows beside each other, one section per place.

    The machine with the most rows comes first; then forward before backward, warm before cold, fewer threads before
    more. Where a problem was measured more than once with a provider, the row with the latest date is used.
    """
    by_place: dict[Place, list[Measurement]] = {}
    for row in rows:
        by_place.setdefault(Place.of(row), []).append(row)
    size: Counter[str] = Counter()
    for place, found in by_place.items():
        size[place.machine] += len(found)
    dtypes = list(dict.fromkeys(place.dtype for place in by_place))

    def rank(place: Place) -> tuple[Any, ...]:
        usual = place.layout != "NCHW", place.dtype != "float32", dtypes.index(place.dtype)
        moment = DIRECTIONS.index(place.direction), CACHES.index(place.cache), place.threads
        return -size[place.machine], place.machine, place.device, *usual, *moment

    return [
        _section(place, by_place[place], by_place.get(place._replace(direction="forward"), []))
        for place in sorted(by_place, key=rank)
    ]


def _latest(rows: Iterable[Measurement]) -> list[Measurement]:
    latest: dict[tuple[Any, ...], Measurement] = {}
    for row in rows:
        key = (row.measure, row.problem, row.spec, row.extents, row.provider, row.sweep)
        if key not in latest or _moment(row) >= _moment(latest[key]):
            latest[key] = row
    return list(latest.values())


def _by_problem(rows: Iterable[Measurement]) -> dict[tuple[str, DeformConv2dSpec, Extents], dict[str, Measurement]]:
    by_problem: dict[tuple[str, DeformConv2dSpec, Extents], dict[str, Measurement]] = {}
    for row in rows:
        if row.measure == "call" and not row.sweep:
            by_problem.setdefault((row.problem, row.spec, row.extents), {})[row.provider] = row
    return by_problem


def _sweeps(rows: Iterable[Measurement]) -> list[Sweep]:
    found: dict[tuple[str, DeformConv2dSpec, tuple[str, ...]], list[Measurement]] = {}
    for row in rows:
        if row.measure == "call" and row.sweep:
            found.setdefault((row.problem, row.spec, row.sweep), []).append(row)
    sweeps = []
    for (problem, spec, axes), of_layer in found.items():
        by_size: dict[Extents, dict[str, Measurement]] = {}
        for row in of_layer:
            by_size.setdefault(row.extents, {})[row.provider] = row
        sizes = sorted(by_size, key=lambda e: (e.batch, e.height * e.width, e.height))
        providers = dict.fromkeys(row.provider for row in of_layer)
        table = {name: [by_size[extents].get(name) for extents in sizes] for name in providers}
        sweeps.append(Sweep(problem, spec, axes, sizes, table))
    return sweeps


def _section(place: Place, rows: list[Measurement], forward_rows: list[Measurement]) -> Section:
    used = _latest(rows)
    calls = [row for row in used if row.measure == "call" and not row.sweep]
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
    forward = {} if place.direction == "forward" else _by_problem(_latest(forward_rows))
    versions = Counter(_frozen(row.versions) for row in used).most_common(1)[0][0]
    return Section(
        machine=rows[0].machine,
        place=place,
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
        sweeps=_sweeps(used),
    )


def _layer(rows: Mapping[str, Measurement]) -> DeformConv2dSpec:
    return next(iter(rows.values())).layer


def _moment(row: Measurement) -> float:
    return datetime.datetime.fromisoformat(row.date).timestamp()


def thread_gains(sections: Sequence[Section]) -> list[tuple[Line, dict[int, float]]]:
    """Return, per problem, how many times as fast we are with more threads than with the fewest.

    Of the first section's machine, device, cache, dtype and layout only; forward, then backward.
    """
    gains = []
    for direction in DIRECTIONS:
        same = [s for s in sections if s.place == sections[0].place._replace(direction=direction, threads=s.threads)]
        for line in same[0].lines if same else ():
            gain = {}
            for section in same[1:]:
                for other in section.lines:
                    if (other.problem, other.spec, other.extents) == (line.problem, line.spec, line.extents):
                        ratio = ratio_of(line.ours, other.ours) if line.subject == other.subject else None
                        if ratio is not None:
                            gain[section.threads] = ratio
            if gain:
                gains.append((line, gain))
    return gains
