# SPDX-License-Identifier: Apache-2.0
"""Two runs on a page: what got slower and faster, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.words import describe_layer, describe_measure
from tvmdcn.report.changes import Change, Changes, Kind
from tvmdcn.report.charts import COLORS, Numbers, PageSection, chart
from tvmdcn.report.rendering import plural, render, render_markdown

__all__ = ["FINDINGS", "describe_row", "section"]

FINDINGS = (Kind.SLOWER, Kind.BROKEN, Kind.FASTER, Kind.REPAIRED)
"""What a reader looks for first."""

# A chart of more rows than this is no picture any more; those nearest to no change are left to the table.
_MOST_DRAWN = 60
_COLORS = {
    Kind.SLOWER: COLORS["bad"],
    Kind.FASTER: COLORS["good"],
    Kind.SAME: COLORS["faint"],
    Kind.CONTROL: COLORS["floor"],
}


def describe_row(row: Measurement) -> str:
    """Return what was measured and where, without the layer."""
    what = row.direction if row.measure == "call" else describe_measure(row)
    text = f"{what}, {plural(row.threads, 'thread')}" if row.device == "cpu" else f"{what}, {row.device}"
    if row.cache != "warm":
        text += f", {row.cache} caches"
    return text


def section(changes: Changes) -> PageSection:
    """Return what changed between two runs."""
    content: dict[str, Any] = {
        "changes": changes,
        "figure": _draw(changes),
        "found": changes.of(*FINDINGS),
        "rest": [change for change in changes.rows if change.kind not in FINDINGS],
        "describe_row": describe_row,
        "describe_layer": describe_layer,
        "Kind": Kind,
    }
    return PageSection(
        anchor="changes",
        title="Changes from A to B",
        html=render("changes.html.j2", **content),
        markdown=render_markdown("changes.md.j2", **content),
        numbers=[_numbers(changes)],
    )


def _numbers(changes: Changes) -> Numbers:
    columns = (
        *("measure", "layer", "description", "direction", "threads", "device", "cache", "provider", "role", "finding"),
        *("ratio", "low", "high", "p_holm", "a_median_ms", "b_median_ms", "a_status", "b_status", "a_date", "b_date"),
        *("reason", "rough"),
    )
    rows = []
    for change in changes.rows:
        row, a, b = change.row, change.a, change.b
        name = (row.measure, row.problem, describe_layer(row.spec, row.extents), row.direction, row.threads)
        who = (row.device, row.cache, row.provider, row.role, change.kind.value)
        times = (None if a is None else a.median_ms, None if b is None else b.median_ms)
        states = (None if a is None else a.status, None if b is None else b.status)
        dates = (None if a is None else a.date, None if b is None else b.date)
        found = (change.ratio, change.low, change.high, change.p)
        rows.append([*name, *who, *found, *times, *states, *dates, row.reason, change.rough])
    return Numbers("changes", columns, rows)


def _draw(changes: Changes) -> Any:
    """Return the chart of all ratios with their intervals, the slowest first."""
    import altair as alt

    timed = [change for change in changes.rows if change.ratio is not None]
    if not timed:
        return None
    drawn = _most_telling(timed)
    values = [
        {
            "row": f"{c.row.problem}, {c.row.provider} ({describe_row(c.row)})",
            "ratio": c.ratio,
            "low": c.low,
            "high": c.high,
            "finding": c.kind.value,
            "p": "not tested" if c.p is None else f"{c.p:.2g}",
            "a_ms": c.a.median_ms if c.a is not None else None,
            "b_ms": c.b.median_ms if c.b is not None else None,
        }
        for c in drawn
    ]
    kinds = [kind for kind in _COLORS if any(change.kind is kind for change in drawn)]
    order = list(dict.fromkeys(str(value["row"]) for value in values))
    base = alt.Chart(alt.InlineData(values=values))
    y = alt.Y("row:N", sort=order, title=None).axis(
        ticks=False, domain=False, grid=True, gridOpacity=0.5, labelLimit=420
    )
    x = alt.X("ratio:Q", scale=alt.Scale(type="log", nice=False, padding=24))
    x = x.axis(title="time of B, A = 1 (logarithmic)", format="~g", tickCount=7)
    scale = alt.Scale(domain=[kind.value for kind in kinds], range=[_COLORS[kind] for kind in kinds])
    color = alt.Color("finding:N", scale=scale).legend(title=None)
    edge = 1 + changes.threshold
    band = alt.Chart(alt.InlineData(values=[{"from": 1 / edge, "to": edge}]))
    layers = [
        band.mark_rect(color=COLORS["tint"]).encode(x="from:Q", x2="to:Q"),
        alt.Chart(alt.InlineData(values=[{"one": 1}])).mark_rule(color=COLORS["faint"]).encode(x="one:Q"),
        base.mark_rule(strokeWidth=2).encode(y=y, x="low:Q", x2="high:Q", color=color),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            y=y,
            x=x,
            color=color,
            tooltip=[
                alt.Tooltip("row:N", title="what"),
                alt.Tooltip("finding:N"),
                alt.Tooltip("ratio:Q", title="B over A", format=".3f"),
                alt.Tooltip("low:Q", title="from", format=".3f"),
                alt.Tooltip("high:Q", title="to", format=".3f"),
                alt.Tooltip("p:N", title="p, corrected"),
                alt.Tooltip("a_ms:Q", title="A, ms", format=".4~g"),
                alt.Tooltip("b_ms:Q", title="B, ms", format=".4~g"),
            ],
        ),
    ]
    left = len(timed) - len(drawn)
    omitted = (
        f" {plural(left, 'row')} nearer to no change {'is' if left == 1 else 'are'} in the table only." if left else ""
    )
    return chart(
        alt.layer(*layers).properties(width="container", height=20 * len(order)),
        says=changes.verdict,
        read=(
            "One row per measurement; right of 1 is slower in B. Lines are intervals at "
            f"{1 - changes.level:.0%} of each row by itself; within the band a change is below the threshold. "
            f"A finding must also survive the correction for their number.{omitted}"
        ),
    )


def _most_telling(timed: Sequence[Change]) -> list[Change]:
    """Return as many rows as can be drawn: findings first, then ours, then the largest ratios; from slow to fast."""

    def weight(change: Change) -> tuple[bool, bool, float]:
        ratio = change.ratio or 1.0
        return change.kind not in FINDINGS, change.row.role != "ours", -max(ratio, 1 / ratio)

    return sorted(sorted(timed, key=weight)[:_MOST_DRAWN], key=lambda change: -(change.ratio or 1.0))
