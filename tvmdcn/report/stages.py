# SPDX-License-Identifier: Apache-2.0
"""Where the time goes: rows of the kind ``stages``, that ``tvmdcn stages`` writes, as bars and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvmdcn.bench.breakdown import KIND, Breakdown
from tvmdcn.bench.schema import MeasurementError
from tvmdcn.report.charts import COLORS, Numbers, PageSection, chart
from tvmdcn.report.places import describe_machine
from tvmdcn.report.rendering import plural, render, render_markdown

__all__ = ["section"]

_REST = "rest"
_COLORS = {
    "layout": "peer-3",
    "plan": "peer-1",
    "sampling": "ours-2",
    "samples": "ours-2",
    "product": "ours",
    "column gradients": "ours",
    "weight's product": "peer-2",
    "epilogue": "floor",
    _REST: "grid",
}
_MEANING = {
    "layout": "the image to channels-last and back, zeros to add to, the output's gradient laid out",
    "plan": "where each sample reads, and with which weights",
    "sampling": "the samples of a tile of pixels",
    "samples": "each corner of the image read once, for samples, sums and the input's gradient",
    "product": "samples times weights, in registers",
    "column gradients": "the output's gradient times weights, in registers",
    "weight's product": "samples times the output's gradient, added up",
    "epilogue": "bias and layout of the output; of gradients, the sums over blocks of channels",
    _REST: "the call, loops, memory and threads, with every stage switched off",
}


@dataclass(frozen=True)
class _Place:
    """The breakdowns of one machine, direction and number of threads."""

    machine: str
    direction: str
    threads: int
    found: Sequence[Breakdown]

    @property
    def title(self) -> str:
        """What tells the place from others."""
        return f"{self.direction.capitalize()}, {plural(self.threads, 'thread')}; {self.machine}"

    @property
    def stages(self) -> list[str]:
        """The names of the stages, in the order in which they run."""
        ordered = sorted(self.found, key=lambda breakdown: -len(breakdown.stages))  # others may lack one
        return list(dict.fromkeys(stage.name for breakdown in ordered for stage in breakdown.stages))


def section(rows: Sequence[Mapping[str, Any]]) -> PageSection | None:
    """Return where the time of layers goes.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of any kind; those of stages are shown, of equal ones the latest.

    Returns
    -------
    PageSection or None
        None if there is no row of stages.
    """
    mine = [row for row in rows if row.get("kind") == KIND]
    if not mine:
        return None
    notes, failures = [], []
    latest: dict[tuple[Any, ...], Breakdown] = {}
    for row in mine:
        if row.get("status") == "failed":
            failures.append((str(row.get("problem")), str(row.get("reason"))))
            continue
        try:
            found = Breakdown.of(row)
        except MeasurementError as error:
            notes.append(str(error))
            continue
        key = (json.dumps(found.machine, sort_keys=True), found.direction, found.threads, found.title, found.schedule)
        if key not in latest or latest[key].date <= found.date:
            latest[key] = found
    places: dict[tuple[Any, ...], list[Breakdown]] = {}
    for key, found in latest.items():
        places.setdefault(key[:3], []).append(found)
    shown = [
        _Place(describe_machine(group[0].machine), group[0].direction, group[0].threads, group)
        for group in places.values()
    ]
    content = {
        "places": shown,
        "charts": [_draw(place) for place in shown],
        "failures": failures,
        "meaning": _MEANING,
        "title_of": _title,
    }
    return PageSection(
        anchor="stages",
        title="Where the time goes",
        html=render("stages.html.j2", **content),
        markdown=render_markdown("stages.md.j2", **content),
        numbers=[_numbers(shown)],
        notes=notes,
    )


def _title(place: _Place, breakdown: Breakdown) -> str:
    """Return what tells a breakdown from the others of its place."""
    schedules = {other.schedule for other in place.found}
    return breakdown.title if len(schedules) == 1 else f"{breakdown.title}, {breakdown.schedule}"


def _numbers(places: Sequence[_Place]) -> Numbers:
    rows: list[list[Any]] = []
    for place in places:
        for found in place.found:
            for stage in found.stages:
                times = (stage.ms, stage.running_ms, stage.reverse_ms, stage.low_ms, stage.high_ms)
                where = (place.machine, place.threads, found.title, found.schedule)
                rows.append([*where, stage.name, *times, found.rest_ms, found.whole_ms, found.shipped_ms, found.date])
    columns = (
        *("machine", "threads", "layer", "schedule", "stage", "mean_ms", "running_order_ms", "reverse_order_ms"),
        *("low_ms", "high_ms", "rest_ms", "with_switches_ms", "shipped_ms", "date"),
    )
    return Numbers("stages", columns, rows)


def _draw(place: _Place) -> Any:
    import altair as alt

    names = [*place.stages, _REST]
    values: list[dict[str, Any]] = []
    for found in place.found:
        parts: list[tuple[str, float, float | None, float | None]]
        parts = [(stage.name, stage.ms, stage.low_ms, stage.high_ms) for stage in found.stages]
        parts += [(_REST, found.rest_ms, None, None)]
        total = sum(max(ms, 0.0) for _, ms, _, _ in parts)
        for order, (name, ms, low, high) in enumerate(parts):
            values.append(
                {
                    "layer": _title(place, found),
                    "stage": name,
                    "order": order,
                    # What takes no time may have come out below 0, within the error; the others then add up to more.
                    "share": max(ms, 0.0) / total,
                    "ms": ms,
                    "from_ms": low,
                    "to_ms": high,
                }
            )
    bars = (
        alt.Chart(alt.InlineData(values=values), width="container", height=24 * len(place.found))
        .mark_bar()
        .encode(
            x=alt.X(
                "share:Q",
                stack="zero",
                axis=alt.Axis(format="%"),
                scale=alt.Scale(domain=[0, 1], nice=False),
                title="share of the time",
            ),
            y=alt.Y("layer:N", sort=None, title=None),
            color=alt.Color(
                "stage:N",
                scale=alt.Scale(domain=names, range=[COLORS[_COLORS.get(name, "faint")] for name in names]),
                title=None,
            ),
            order=alt.Order("order:O"),
            tooltip=[
                alt.Tooltip("layer:N"),
                alt.Tooltip("stage:N"),
                alt.Tooltip("ms:Q", format=".4g", title="ms"),
                alt.Tooltip("share:Q", format=".1%"),
                alt.Tooltip("from_ms:Q", format=".4g", title="at least, ms"),
                alt.Tooltip("to_ms:Q", format=".4g", title="at most, ms"),
            ],
        )
    )
    return chart(bars, says=_says(place), read=_read(place), title=place.title)


def _says(place: _Place) -> str:
    """Return what the largest stage of each layer is, in one sentence."""
    largest: dict[str, int] = {}
    for found in place.found:
        name = max(found.stages, key=lambda stage: stage.ms).name
        largest[name] = largest.get(name, 0) + 1
    parts = [f"{name} in {count}" for name, count in sorted(largest.items(), key=lambda pair: -pair[1])]
    return f"Of {plural(len(place.found), 'layer')} the largest part is {', '.join(parts)}."


def _read(place: _Place) -> str:
    overheads = sorted(found.overhead for found in place.found)
    spread = f"{overheads[0]:.2f} to {overheads[-1]:.2f}" if len(overheads) > 1 else f"{overheads[0]:.2f}"
    return (
        "A bar is the time of one call, divided into stages. Measured, not estimated: the kernel is compiled with a "
        "switch for each stage, gives the same bits as the one that ships, and stages are switched on one after the "
        "other, in the order in which they run and in the other one. A stage's part is the mean of what it added in "
        "both; the parts add up to the whole. What it added in one and in the other, and what that moves if turns "
        "are redrawn, are the ends of the range that a hover shows: stages that a processor works on at once have "
        f"no exact share. With all switches on a call takes {spread} times that of the kernel that ships."
    )
