# SPDX-License-Identifier: Apache-2.0
"""The roofline: what this machine was measured to be able to do, and how near to it each schedule comes.

The model is that of Williams, Waterman and Patterson ("Roofline: an insightful visual performance model for multicore
architectures", 2009): a kernel that does I operations per byte moved reaches at most min(I x bandwidth, peak). Both
roofs are measured on the machine itself, never taken from a data sheet.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any

from tvmdcn.bench.comparison import Section
from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.roof import Roof
from tvmdcn.report.charts import COLORS, Numbers, PageSection, chart, color_of
from tvmdcn.report.places import describe_machine, describe_place, plain_convolution
from tvmdcn.report.rendering import plural, render, render_markdown, significant
from tvmdcn.spec import DeformConv2dSpec, Extents

__all__ = ["Ceiling", "Stand", "ceilings", "column_bytes", "section", "stands"]

_SHARED = ("offset", "mask")  # what a plain convolution of the same shape does not read


@dataclass(frozen=True)
class Ceiling:
    """The roofs of one machine at one number of threads: operations and bytes per second, with who reached them.

    Parameters
    ----------
    memory, cache : Roof or None
        Copying within memory, and within the last-level cache.
    matmul : Roof or None
        Multiplying matrices of the dtype.
    """

    memory: Roof | None = None
    cache: Roof | None = None
    matmul: Roof | None = None

    @property
    def ridges(self) -> list[float]:
        """The operations per byte from which arithmetic, no longer copying, is the limit: of memory, of the cache."""
        peak = self.matmul.rate if self.matmul is not None else None
        rates = [roof.rate for roof in (self.memory, self.cache) if roof is not None and roof.rate]
        return [] if peak is None else [peak / rate for rate in rates]

    def at(self, intensity: float) -> float | None:
        """Return the GFLOP/s that memory and arithmetic allow at so many operations per byte; None if not known."""
        if self.memory is None or self.matmul is None or self.memory.rate is None or self.matmul.rate is None:
            return None
        return min(intensity * self.memory.rate, self.matmul.rate)


@dataclass(frozen=True)
class Stand:
    """Where a row stands under the roofs: operations per byte, and the billions of operations per second it reaches."""

    layer: str
    row: Measurement
    intensity: float
    gflops: float
    roof: float | None

    @property
    def share(self) -> float | None:
        """The part of the roof that is reached; above 1 where the tensors stay in caches from call to call."""
        return None if self.roof is None else self.gflops / self.roof


def column_bytes(spec: DeformConv2dSpec, extents: Extents) -> int:
    """Return the bytes that a kernel moves that is not fused: it writes the sampled columns and reads them again."""
    height, width = spec.output_size(extents.height, extents.width)
    elements = extents.batch * spec.in_channels * spec.taps * height * width
    item = spec.bytes_moved(extents) // sum(prod(spec.shape_of(n, extents)) for n in (*spec.inputs, *spec.outputs))
    return spec.bytes_moved(extents) + 2 * elements * item


def _bytes(row: Measurement) -> int:
    """Return the least bytes that a row's provider has to move: each tensor once."""
    spec, extents = row.spec, row.extents
    total = spec.bytes_moved(extents)
    if row.role != "floor":
        return total
    sizes = {name: prod(spec.shape_of(name, extents)) for name in (*spec.inputs, *spec.outputs)}
    kept = sum(size for name, size in sizes.items() if name.removeprefix("grad_") not in _SHARED)
    return total * kept // sum(sizes.values())


def ceilings(roofs: Iterable[Roof], section: Section) -> Ceiling:
    """Return the highest of the roofs that were measured on a section's machine, threads, device and dtype."""
    found: dict[str, Roof] = {}
    for roof in roofs:
        same = (_frozen(roof.machine), roof.device, roof.threads) == (
            *(_frozen(section.machine), section.device),
            section.threads,
        )
        if not same or roof.rate is None or (roof.roof == "matmul" and roof.dtype != section.dtype):
            continue
        name = roof.level if roof.roof == "copy" else roof.roof
        best = found.get(str(name))
        if best is None or best.rate is None or roof.rate > best.rate:
            found[str(name)] = roof
    return Ceiling(found.get("memory"), found.get("cache"), found.get("matmul"))


def _frozen(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)


def stands(section: Section, ceiling: Ceiling) -> list[Stand]:
    """Return where our schedules and the plain convolution of each layer stand."""
    found = []
    for line in section.lines:
        rows = [row for row in line.rows.values() if row.role == "ours" and row.median_ms is not None]
        for row in (*rows, *([line.floor] if line.floor is not None else [])):
            assert row.median_ms is not None
            intensity = row.operations / _bytes(row)
            found.append(
                Stand(line.problem, row, intensity, row.operations / row.median_ms / 1e6, ceiling.at(intensity))
            )
    return found


def section(sections: Sequence[Section], roofs: Sequence[Roof]) -> PageSection | None:
    """Return the roofline of every place that layers were measured in.

    Returns
    -------
    PageSection or None
        None if nothing of ours was timed.
    """
    shown = []
    tables: list[list[Any]] = []
    for found in sections:
        ceiling = ceilings(roofs, found)
        points = stands(found, ceiling)
        if not any(point.row.role == "ours" for point in points):
            continue
        ours = [point for point in points if point.row.provider == found.subject]
        shown.append({"place": describe_place(found), "chart": _draw(found, ceiling, points), "stands": ours})
        shown[-1] |= {"says": _says(found, ceiling, points), "subject": found.subject, "column_bytes": column_bytes}
        tables += [_numbers_row(found, point) for point in points]
    if not shown:
        return None
    measured = [roof for roof in roofs if roof.rate is not None]
    content = {"places": shown, "roofs": measured, "has_roofs": bool(measured)}
    columns = (
        *("machine", "device", "direction", "threads", "cache", "dtype", "layout", "layer", "provider", "operations"),
        *("bytes", "bytes_not_fused", "intensity", "gflops", "roof_gflops", "share_of_roof"),
    )
    return PageSection(
        anchor="roofline",
        title="Roofline",
        html=render("roofline.html.j2", **content),
        markdown=render_markdown("roofline.md.j2", **content),
        numbers=[Numbers("roofline", columns, tables), _roof_numbers(measured)],
    )


def _numbers_row(section: Section, point: Stand) -> list[Any]:
    row = point.row
    where = (section.device, section.direction, section.threads, section.cache, section.dtype, section.layout)
    moved = (_bytes(row), column_bytes(row.spec, row.extents) if row.role == "ours" else None)
    reached = (point.intensity, point.gflops, point.roof, point.share)
    return [describe_machine(section.machine), *where, point.layer, row.provider, row.operations, *moved, *reached]


def _roof_numbers(roofs: Sequence[Roof]) -> Numbers:
    columns = (
        *("machine", "device", "threads", "roof", "level", "dtype", "provider", "rate", "best_rate", "unit"),
        *("size", "spread", "noisy", "runs", "date"),
    )
    rows = [
        [
            *(describe_machine(roof.machine), roof.device, roof.threads, roof.roof, roof.level, roof.dtype),
            *(roof.provider, roof.rate, roof.best_rate, roof.unit, roof.size, roof.spread, roof.noisy),
            *(roof.runs, roof.date),
        ]
        for roof in roofs
    ]
    return Numbers("roofs", columns, rows)


# --- the chart ---------------------------------------------------------------------------------------------


def _draw(section: Section, ceiling: Ceiling, points: Sequence[Stand]) -> Any:
    import altair as alt

    plain = plain_convolution(section.direction)
    names = [name for name in section.providers if section.roles[name] == "ours"]
    names = [name for name in names if any(point.row.provider == name for point in points)]
    colors = [COLORS[color_of(name, "ours")] for name in names]
    if any(point.row.role == "floor" for point in points):
        names, colors = [*names, plain], [*colors, COLORS["floor"]]
    values = [
        {
            "layer": point.layer,
            "provider": point.row.provider if point.row.role == "ours" else plain,
            "intensity": point.intensity,
            "gflops": point.gflops,
            "share": "roof not measured" if point.share is None else f"{point.share:.0%}",
            "median_ms": point.row.median_ms,
        }
        # What is drawn last lies on top: ours, the best kind of schedule.
        for point in sorted(points, key=lambda point: -section.providers.index(point.row.provider))
    ]
    chosen = alt.selection_point(fields=["provider"], bind="legend", name="chosen")
    low, high = min(p.intensity for p in points) / 2, max(p.intensity for p in points) * 2
    ridges = ceiling.ridges
    if ridges:
        low, high = min(low, min(ridges) / 2), max(high, max(ridges) * 2)
    x = alt.X("intensity:Q", scale=alt.Scale(type="log", nice=False, domain=[low, high]))
    x = x.axis(
        title="operations per byte that has to be moved (FLOP/byte, logarithmic)", format="~g", tickCount=6, grid=False
    )
    y = alt.Y("gflops:Q", scale=alt.Scale(type="log", nice=False, padding=16))
    y = y.axis(title="GFLOP/s (logarithmic)", format="~g", tickCount=6, grid=False)
    dots = (
        alt.Chart(alt.InlineData(values=values))
        .mark_point(filled=True, size=70)
        .encode(
            x=x,
            y=y,
            color=alt.Color("provider:N", scale=alt.Scale(domain=names, range=colors)).legend(title=None, columns=6),
            opacity=alt.when(chosen).then(alt.value(0.9)).otherwise(alt.value(0.1)),
            tooltip=[
                alt.Tooltip("layer:N"),
                alt.Tooltip("provider:N"),
                alt.Tooltip("gflops:Q", title="GFLOP/s", format=".4~g"),
                alt.Tooltip("intensity:Q", title="FLOP/byte", format=".3~g"),
                alt.Tooltip("share:N", title="of the roof"),
                alt.Tooltip("median_ms:Q", title="median, ms", format=".4~g"),
            ],
        )
        .add_params(chosen)
    )
    roofs = _roof_lines(ceiling, low, high)
    layers = [dots]
    if roofs:
        line = alt.Chart(alt.InlineData(values=roofs)).encode(x=x, y=y)
        dashes = alt.Scale(domain=["memory", "cache", "arithmetic"], range=[[1, 0], [5, 4], [1, 0]])
        dash = alt.StrokeDash("roof:N", legend=None, scale=dashes)
        layers = [line.mark_line(color=COLORS["faint"], strokeWidth=2).encode(strokeDash=dash, detail="roof:N"), dots]
        # Beside its line, away from the others: memory's under it, the cache's above, the product's at its end.
        beside = {"memory": ("left", 12, 6), "cache": ("left", 4, -14), "arithmetic": ("right", 0, -8)}
        for end in (end for end in roofs if end["label"] is not None):
            align, dx, dy = beside[end["roof"]]
            text = alt.Chart(alt.InlineData(values=[end])).encode(x=x, y=y, text="label:N")
            layers.append(text.mark_text(align=align, dx=dx, dy=dy, color=COLORS["faint"]))
    return chart(
        alt.layer(*layers).properties(width="container", height=340),
        says=_says(section, ceiling, points),
        read=(
            "To the right, a layer reuses each byte more; up is faster. No kernel can be above the lines that were "
            "measured: the slope is copying in memory (dashed: in the last-level cache, which small layers may "
            "use), the flat part multiplying matrices. Sampling is not counted as operations, so the flat roof is out "
            "of reach for a deformable layer. Hover for the layer and its share of the roof."
        )
        if roofs
        else "The roofs of this machine were not measured: run scripts/benchmark.py --roofs, and give its rows too.",
    )


def _roof_lines(ceiling: Ceiling, low: float, high: float) -> list[dict[str, Any]]:
    """Return the ends of the roofs between two intensities, with a label at one of them."""
    peak = ceiling.matmul.rate if ceiling.matmul is not None else None
    lines: list[dict[str, Any]] = []
    for name, roof in (("memory", ceiling.memory), ("cache", ceiling.cache)):
        if roof is not None and roof.rate:
            end = high if peak is None else peak / roof.rate
            label = f"{name} {significant(roof.rate)} {roof.unit}"
            lines.append({"roof": name, "intensity": low, "gflops": low * roof.rate, "label": label})
            lines.append({"roof": name, "intensity": end, "gflops": end * roof.rate, "label": None})
    if ceiling.matmul is not None and peak is not None:
        label = f"matrix product {significant(peak)} {ceiling.matmul.unit} ({ceiling.matmul.provider})"
        start = min(ceiling.ridges, default=low)
        lines.append({"roof": "arithmetic", "intensity": start, "gflops": peak, "label": None})
        lines.append({"roof": "arithmetic", "intensity": high, "gflops": peak, "label": label})
    return lines


def _says(section: Section, ceiling: Ceiling, points: Sequence[Stand]) -> str:
    ours = [point for point in points if point.row.provider == section.subject]
    text = f"{describe_place(section)}: {section.subject} reaches "
    fast, slow = max(ours, key=lambda p: p.gflops), min(ours, key=lambda p: p.gflops)
    if ceiling.matmul is None or not ceiling.matmul.rate:
        return f"{text}{significant(slow.gflops)} ({slow.layer}) to {significant(fast.gflops)} GFLOP/s ({fast.layer})."
    shares = [point.gflops / ceiling.matmul.rate for point in ours]
    bound = sum(point.roof is not None and point.roof < ceiling.matmul.rate for point in ours)
    return (
        f"{text}{min(shares):.0%} to {max(shares):.0%} of the rate of a matrix product (median {median(shares):.0%}); "
        f"memory bounds {bound} of {plural(len(ours), 'layer')}."
    )
