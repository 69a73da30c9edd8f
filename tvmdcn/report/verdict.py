# SPDX-License-Identifier: Apache-2.0
"""The verdict: per layer our schedules and every peer, the ratios between them, and what failed and why.

Ratios are taken between rows of one place only: machine, device, direction, threads, caches, dtype and layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvmdcn.bench.comparison import GeometricMean, Line, Section, Verdict, thread_gains
from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.words import describe_layer, describe_measure
from tvmdcn.report.charts import COLORS, PageSection, chart, color_of
from tvmdcn.report.exports import measurement_numbers
from tvmdcn.report.places import describe_machine, describe_place, plain_convolution
from tvmdcn.report.rendering import plural, ratio, render, render_markdown
from tvmdcn.report.sweeps import draw_sweep

__all__ = ["Place", "covers", "describe_aim", "places", "section"]

# From this 90th percentile on, in units of the median, an older row is unsteady; newer ones say so themselves.
UNSTEADY = 1.25


@dataclass(frozen=True)
class Place:
    """A section of the comparison with what a report says of it.

    Parameters
    ----------
    section : Section
        The rows, beside each other.
    number : int
        Its place among the sections, for ids.
    """

    section: Section
    number: int

    @property
    def title(self) -> str:
        """What was measured where, without the machine."""
        return describe_place(self.section)

    @property
    def machine(self) -> str:
        """The machine on one line."""
        return describe_machine(self.section.machine)

    @property
    def plain(self) -> str:
        """What the plain convolution is called here."""
        return plain_convolution(self.section.direction)

    @property
    def rows(self) -> list[Measurement]:
        """The rows of calls."""
        return [row for line in self.section.lines for row in line.rows.values()]

    @property
    def failures(self) -> list[Measurement]:
        """The rows that failed, of calls and of other measures."""
        return [row for row in (*self.rows, *self.section.extra) if row.status == "failed"]

    @property
    def wins(self) -> tuple[int, int]:
        """On how many layers ours is at least as fast as the fastest peer, and of how many."""
        known = [line.speedup for line in self.section.lines if line.speedup is not None]
        return sum(value >= 1 for value in known), len(known)

    @property
    def worst_error(self) -> float | None:
        """The largest error of the rows that stand for us."""
        errors = [line.ours.max_rel_error for line in self.section.lines if line.ours is not None]
        return max((error for error in errors if error is not None), default=None)

    @property
    def marks(self) -> list[str]:
        """What the marks in the table mean, those that are there."""
        timed = [row for row in self.rows if row.status == "ok"]
        notes = []
        if any(unsteady(row) for row in timed):
            notes.append("~ unsteady: times spread so far that the median is to be doubted.")
        other = dict.fromkeys(difference for row in timed for difference in self.section.differences(row))
        if other:
            notes.append(f"\u2020 other versions: {', '.join(other)}.")
        return notes

    def labels(self) -> list[str]:
        """Return a name for each line that no other line of the place has."""
        names = [line.problem for line in self.section.lines]
        return [
            name if names.count(name) == 1 else f"{name} ({describe_layer(line.spec, line.extents)})"
            for name, line in zip(names, self.section.lines, strict=True)
        ]


def unsteady(row: Measurement) -> bool:
    """Whether a row's times were spread so far that its median is to be doubted."""
    if row.noisy is not None:
        return row.noisy
    return row.median_ms is not None and row.p90 is not None and row.p90 > UNSTEADY * row.median_ms


def covers(mean: GeometricMean) -> str:
    """Say over how many of the layers a mean is taken."""
    return plural(mean.total, "layer") if mean.count == mean.total else f"{mean.count} of {plural(mean.total, 'layer')}"


def describe_aim(verdict: Verdict) -> str:
    """Say on how many of its layers an aim is met, and on which it is not."""
    misses, count = verdict.misses, len(verdict.ratios)
    text = f"Aim: {verdict.aim.text}. Met on {count - len(misses)} of {count}"
    if not misses:
        return f"{text}, the {'lowest' if verdict.aim.at_least else 'highest'} {ratio(verdict.worst)}."
    return f"{text}; not on " + ", ".join(f"{line.problem} ({ratio(value)})" for line, value in misses) + "."


def places(sections: Sequence[Section]) -> list[Place]:
    """Return the sections of a comparison that hold layers, numbered."""
    return [Place(section, number) for number, section in enumerate(sections, 1) if section.lines]


def section(sections: Sequence[Section], *, full: bool = True) -> PageSection | None:
    """Return the verdict over measured rows.

    Parameters
    ----------
    sections : sequence of Section
        What :func:`tvmdcn.bench.comparison.organize` made of the rows.
    full : bool
        Whether the Markdown holds more than the tables of layers.

    Returns
    -------
    PageSection or None
        None if there are no rows.
    """
    if not sections:
        return None
    gains = thread_gains(sections)
    content: dict[str, Any] = {
        "places": places(sections),
        "sections": sections,
        "gains": gains,
        "gain_threads": sorted({threads for _, gain in gains for threads in gain}),
        "full": full,
        "unsteady": unsteady,
        "covers": covers,
        "aim": describe_aim,
        "dots": _dots,
        "curve": draw_sweep,
        "color_of": color_of,
        "describe_layer": describe_layer,
        "describe_measure": describe_measure,
        "memory": _memory,
    }
    return PageSection(
        anchor="verdict",
        title="Verdict",
        html=render("verdict.html.j2", **content),
        markdown=render_markdown("verdict.md.j2", **content),
        numbers=measurement_numbers(sections),
    )


def _memory(place: Place) -> list[tuple[Line, dict[str, int]]]:
    """Return, per layer, the peak bytes beyond inputs and outputs of each provider that has been watched."""
    found = []
    for line in place.section.lines:
        known = {name: row.memory_bytes for name, row in line.rows.items() if row.memory_bytes is not None}
        if known:
            found.append((line, known))
    return found


# --- the chart ---------------------------------------------------------------------------------------------


def _dots(place: Place) -> Any:
    """Return the chart of a place: per layer each provider's time, in units of the plain convolution's."""
    use_floor = any(line.floor is not None for line in place.section.lines)
    values, links = [], []
    shown = place.section
    for label, line in zip(place.labels(), shown.lines, strict=True):
        unit = line.floor if use_floor else line.ours
        if unit is None or unit.median_ms is None:
            continue
        # What is drawn last lies on top: ours.
        for provider, row in sorted(line.rows.items(), key=lambda item: -shown.providers.index(item[0])):
            # The naive schedule lies far off any scale: it is drawn only if there is nothing else of ours.
            if row.median_ms is None or (provider == "ours-naive" != shown.subject):
                continue
            values.append({"layer": label, "subject": provider == shown.subject, **_dot(row, unit.median_ms)})
        ours, peer = line.ours, line.fastest_peer
        if ours is not None and peer is not None and ours.median_ms and peer.median_ms:
            ends = {"from": ours.median_ms / unit.median_ms, "to": peer.median_ms / unit.median_ms}
            links.append({"layer": label, **ends, "wins": ours.median_ms <= peer.median_ms})
    if not values:
        return None
    return chart(
        _draw_dots(place, values, links, f"{place.plain} = 1" if use_floor else "ours = 1"),
        says=_says(place),
        read=_read(place, use_floor),
    )


def _dot(row: Measurement, unit: float) -> dict[str, Any]:
    assert row.median_ms is not None
    assert row.p10 is not None
    assert row.p90 is not None
    return {
        "provider": row.provider,
        "time": row.median_ms / unit,
        "low": row.p10 / unit,
        "high": row.p90 / unit,
        "median_ms": row.median_ms,
        "p10_ms": row.p10,
        "p90_ms": row.p90,
        "gflops": row.operations / row.median_ms / 1e6,
        "max_error": "not compared" if row.max_rel_error is None else f"{row.max_rel_error:.1e}",
    }


def _draw_dots(place: Place, values: list[dict[str, Any]], links: list[dict[str, Any]], unit: str) -> Any:
    import altair as alt

    shown = place.section
    drawn = [name for name in shown.providers if any(value["provider"] == name for value in values)]
    order = list(dict.fromkeys(value["layer"] for value in values))
    y = alt.Y("layer:N", sort=order, title=None).axis(ticks=False, domain=False, grid=True, gridOpacity=0.5)
    # Ours is filled and large; the floor a diamond; who is who also without colours.
    colors = [COLORS[color_of(name, shown.roles[name])] for name in drawn]
    shapes = [{"ours": "circle", "peer": "square", "floor": "diamond"}[shown.roles[name]] for name in drawn]
    chosen = alt.selection_point(fields=["provider"], bind="legend", name="chosen")
    base = alt.Chart(alt.InlineData(values=values))
    fade = alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.12))
    color = alt.Color("provider:N", scale=alt.Scale(domain=drawn, range=colors)).legend(title=None, columns=6)
    shape = alt.Shape("provider:N", scale=alt.Scale(domain=drawn, range=shapes)).legend(title=None)
    x = alt.X("time:Q", scale=alt.Scale(type="log", nice=False, padding=24))
    x = x.axis(title=f"time, {unit} (further left is faster; logarithmic)", format="~g", tickCount=8)
    band = alt.Chart(alt.InlineData(values=links)).mark_rule(strokeWidth=7, opacity=0.28)
    good = alt.when("datum.wins").then(alt.value(COLORS["good"])).otherwise(alt.value(COLORS["bad"]))
    layers = [
        # Vega warns of a layer without data.
        *([band.encode(y=y, x="from:Q", x2="to:Q", color=good)] if links else []),
        alt.Chart(alt.InlineData(values=[{"one": 1}]))
        .mark_rule(strokeDash=[4, 3], strokeWidth=1.4, color=COLORS["floor"])
        .encode(x="one:Q"),
        # The first layer of those that share a legend has to bear what a click on it sets.
        base.mark_rule(strokeWidth=1.2)
        .encode(y=y, x="low:Q", x2="high:Q", color=color, opacity=fade)
        .add_params(chosen),
        base.mark_point(filled=True, opacity=1).encode(
            y=y,
            x=x,
            color=color,
            shape=shape,
            opacity=fade,
            size=alt.when("datum.subject").then(alt.value(150)).otherwise(alt.value(60)),
            tooltip=[
                alt.Tooltip("layer:N"),
                alt.Tooltip("provider:N"),
                alt.Tooltip("median_ms:Q", title="median, ms", format=".4~g"),
                alt.Tooltip("p10_ms:Q", title="10 %, ms", format=".4~g"),
                alt.Tooltip("p90_ms:Q", title="90 %, ms", format=".4~g"),
                alt.Tooltip("time:Q", title="in units of 1", format=".3~g"),
                alt.Tooltip("gflops:Q", title="GFLOP/s", format=".3~r"),
                alt.Tooltip("max_error:N", title="max error"),
            ],
        ),
    ]
    return alt.layer(*layers).properties(width="container", height=24 * len(order))


def _says(place: Place) -> str:
    wins, count = place.wins
    mean = place.section.speedup
    if mean is None:
        return f"{place.title}: no layer has both a time of ours and one of a peer."
    ranked = sorted((line.speedup, line.problem) for line in place.section.lines if line.speedup is not None)
    (low, least), (high, most) = ranked[0], ranked[-1]
    text = f"{place.section.subject} is faster than the fastest peer on {wins} of {plural(count, 'layer')}"
    return f"{text}: {ratio(high)} on {most}, {ratio(low)} on {least}." if count > 1 else f"{text}: {ratio(high)}."


def _read(place: Place, use_floor: bool) -> str:
    text = "One row per layer, further left is faster; "
    if use_floor:
        text += f"the dashed line at 1 is {place.plain} of the same shape, the faster of its two layouts. "
    else:
        text += "the dashed line at 1 is ours. "
    text += "The band joins ours with the fastest peer, green where ours is faster; thin lines span the 10th to 90th "
    text += "percentile. Hover for milliseconds and error, click a name above to single it out."
    naive = place.section.against("ours-naive")
    if naive is not None and place.section.subject != "ours-naive":
        text += f" ours-naive, {naive.value:.0f} times as slow as {place.section.subject}, is only in the table."
    return text
