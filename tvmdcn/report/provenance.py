# SPDX-License-Identifier: Apache-2.0
"""Where the figures come from, and what a reader must know before trusting them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tvmdcn.bench.comparison import Section
from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.roof import Roof
from tvmdcn.bench.row import Row
from tvmdcn.bench.rows import read_row_file
from tvmdcn.report.charts import COLORS, Numbers, PageSection, chart
from tvmdcn.report.places import describe_machine, describe_place, describe_size
from tvmdcn.report.rendering import plural, render, render_markdown
from tvmdcn.report.verdict import unsteady

__all__ = ["Sources", "notes", "read_sources", "section"]


@dataclass(frozen=True)
class Sources:
    """What was read of one or several files of rows.

    Parameters
    ----------
    paths : sequence of Path
        The files.
    measurements, roofs, others : sequence
        Their rows by kind, in their order.
    complaints : sequence of str
        Lines that are left out, and why.
    warnings : sequence of str
        Lines that are used, and what is odd about them.
    """

    paths: Sequence[Path]
    measurements: Sequence[Measurement]
    roofs: Sequence[Roof]
    others: Sequence[dict[str, Any]]
    complaints: Sequence[str]
    warnings: Sequence[str]

    @property
    def rows(self) -> list[Row]:
        """All rows that this version knows, of layers and of roofs."""
        return [*self.measurements, *self.roofs]

    @property
    def dates(self) -> str:
        """The days of the rows, as one day or as a span."""
        days = sorted(row.date[:10] for row in self.rows)
        return "" if not days else days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read files of rows; broken lines are left out and named.

    Raises
    ------
    OSError
        If a file cannot be read.
    """
    files = [read_row_file(path) for path in paths]
    return Sources(
        paths=list(paths),
        measurements=[row for file in files for row in file.measurements],
        roofs=[row for file in files for row in file.roofs],
        others=[row for file in files for row in file.others],
        complaints=[text for file in files for text in file.complaints],
        warnings=[text for file in files for text in file.warnings],
    )


def notes(sources: Sources, sections: Sequence[Section]) -> list[str]:
    """Return what a reader must know before trusting a report: the gravest first."""
    found = list(sources.complaints)
    if not sources.rows:
        names = ", ".join(map(str, sources.paths)) or "no file"
        found.append(f"there is no sound row in {names}. Measure with scripts/benchmark.py --output FILE.")
    machines = {json.dumps(row.machine, sort_keys=True) for row in sources.rows}
    if len(machines) > 1:
        found.append(
            f"The rows come from {len(machines)} machines. Each has tables of its own; "
            "no ratio is taken between machines."
        )
    different: Counter[str] = Counter()
    for shown in sections:
        for row in _shown(shown):
            different.update(shown.differences(row))
    for difference, count in different.items():
        found.append(f"Other versions in {plural(count, 'row')}: {difference}. They are marked \u2020.")
    found += _about_noise(sources)
    failed = sum(row.status == "failed" for shown in sections for row in _shown(shown))
    if failed:
        found.append(f"{plural(failed, 'row')} failed; the reasons are below each table.")
    found += sources.warnings
    replaced = sum(shown.superseded for shown in sections)
    if replaced:
        found.append(f"{plural(replaced, 'row')} left out: the same was measured again later.")
    return found


def _about_noise(sources: Sources) -> list[str]:
    timed = [row for row in sources.measurements if row.status == "ok" and row.role != "floor"]
    noisy = [row for row in timed if unsteady(row)]
    if not noisy:
        return []
    worst = max(noisy, key=lambda row: (row.p90 or 0.0) / (row.median_ms or 1.0))
    assert worst.median_ms is not None
    assert worst.p90 is not None
    assert worst.p10 is not None
    low, high = worst.p10 / worst.median_ms, worst.p90 / worst.median_ms
    return [
        f"{len(noisy)} of {plural(len(timed), 'row')} are unsteady and marked ~; the widest, {worst.provider} on "
        f"{worst.title}, spans {low:.0%} to {high:.0%} of its median from the 10th to the 90th percentile. "
        "Was the machine busy? Measure these again."
    ]


def _shown(section: Section) -> list[Measurement]:
    return [*(row for line in section.lines for row in line.rows.values()), *section.extra]


def section(sources: Sources, sections: Sequence[Section]) -> PageSection | None:
    """Return where the rows come from: machines, versions, commits, dates, commands, and how steady they are.

    Returns
    -------
    PageSection or None
        None if there are no rows.
    """
    if not sources.rows:
        return None
    machines: dict[str, list[Row]] = {}
    for row in sources.rows:
        machines.setdefault(json.dumps(row.machine, sort_keys=True), []).append(row)
    shown = [
        {
            "name": describe_machine(rows[0].machine),
            "fields": [_fact(str(name), value) for name, value in rows[0].machine.items()],
            "count": len(rows),
            "versions": _counted((f"{name} {version}" for row in rows for name, version in row.versions.items()), rows),
            "commits": _counted((row.commit for row in rows if row.commit), rows),
            "pinned": _counted((str(list(row.affinity)) for row in rows if row.affinity), rows),
            "dates": sorted({row.date[:10] for row in rows}),
        }
        for rows in machines.values()
    ]
    content = {
        "machines": shown,
        "commands": list(dict.fromkeys(row.command for row in sources.rows)),
        "paths": [(str(path)) for path in sources.paths],
        "steadiness": _draw_spread(sources, sections),
    }
    rows = [
        [describe_machine(row.machine), row.provider, row.date, row.command, row.commit, json.dumps(row.versions)]
        for row in sources.rows
    ]
    return PageSection(
        anchor="provenance",
        title="Where the figures come from",
        html=render("provenance.html.j2", **content),
        markdown=render_markdown("provenance.md.j2", **content),
        numbers=[Numbers("provenance", ("machine", "provider", "date", "command", "commit", "versions"), rows)],
    )


def _fact(name: str, value: Any) -> tuple[str, str]:
    """Return a field of a machine in words."""
    if name.endswith("_bytes") and isinstance(value, int):
        return name.removesuffix("_bytes").replace("_", " "), describe_size(value)
    return name.replace("_", " "), "yes" if value is True else "no" if value is False else str(value)


def _counted(texts: Any, rows: Sequence[Row]) -> list[str]:
    """Return each text once, the most frequent first, with its count where it is not in all rows."""
    counts = Counter(texts).most_common()
    return [text if count == len(rows) else f"{text} ({plural(count, 'row')})" for text, count in counts]


def _draw_spread(sources: Sources, sections: Sequence[Section]) -> Any:
    """Return the chart of how far the times of each row are spread."""
    import altair as alt

    timed = [(row, describe_place(shown)) for shown in sections for row in _shown(shown) if row.median_ms]
    if not timed:
        return None
    values = [
        {
            "provider": row.provider,
            "layer": row.title,
            "place": place,
            "spread": _width(row),
            "median_ms": row.median_ms,
            "unsteady": unsteady(row),
        }
        for row, place in timed
    ]
    providers = list(dict.fromkeys(row.provider for row, _ in timed))
    ticks = [0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    drawn = (
        alt.Chart(alt.InlineData(values=values))
        .mark_tick(thickness=1.5, size=14)
        .encode(
            x=alt.X("spread:Q", scale=alt.Scale(type="symlog", constant=0.02, domainMin=0)).axis(
                format="~%", title="10th to 90th percentile, of the median", values=ticks
            ),
            y=alt.Y("provider:N", sort=providers, title=None).axis(ticks=False, domain=False),
            color=alt.when("datum.unsteady").then(alt.value(COLORS["bad"])).otherwise(alt.value(COLORS["ours"])),
            tooltip=[
                alt.Tooltip("layer:N"),
                alt.Tooltip("provider:N"),
                alt.Tooltip("place:N", title="where"),
                alt.Tooltip("spread:Q", title="10 to 90 %, of the median", format=".1%"),
                alt.Tooltip("median_ms:Q", title="median, ms", format=".4~g"),
            ],
        )
        .properties(width="container", height=20 * len(providers))
    )
    odd = sum(unsteady(row) for row, _ in timed)
    middle = median(_width(row) for row, _ in timed)
    return chart(
        drawn,
        title="How steady the times are",
        says=(
            f"Half of the {plural(len(timed), 'row')} spread over {middle:.1%} of their median or less, from the 10th "
            f"to the 90th percentile; {odd} {'is' if odd == 1 else 'are'} unsteady."
        ),
        read="One tick per row; further left is steadier, red is unsteady. Far to the right, something else ran.",
    )


def _width(row: Measurement) -> float:
    """Return how far a row's times are spread, 10th to 90th percentile, in units of the median."""
    assert row.median_ms is not None
    assert row.p10 is not None
    assert row.p90 is not None
    return (row.p90 - row.p10) / row.median_ms
