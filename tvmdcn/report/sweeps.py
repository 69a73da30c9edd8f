# SPDX-License-Identifier: Apache-2.0
"""The chart of a sweep: what one layer costs at other batches and image sizes."""

from __future__ import annotations

from typing import Any

from tvmdcn.bench.comparison import Sweep
from tvmdcn.bench.measurement import Measurement
from tvmdcn.report.charts import COLORS, chart, color_of
from tvmdcn.report.rendering import plural, significant

__all__ = ["draw_sweep"]


def draw_sweep(place: str, sweep: Sweep) -> Any:
    """Return the chart of a sweep: operations per second over batch or image size.

    Parameters
    ----------
    place : str
        Where it was measured, in words.
    sweep : Sweep
        Rows by provider, one per size.

    Returns
    -------
    Markup or None
        None if nothing was timed.
    """
    import altair as alt

    by_batch = "image_size" not in sweep.axes
    timed = [row for series in sweep.rows.values() for row in series if row is not None and row.median_ms]
    if not timed:
        return None
    drawn = [name for name in sweep.rows if any(row.provider == name for row in timed)]
    roles = {row.provider: row.role for row in timed}
    values = [_value(row, by_batch) for row in timed]
    chosen = alt.selection_point(fields=["provider"], bind="legend", name="chosen")
    title = "images in the batch (logarithmic)" if by_batch else "pixels of the output, of all images (logarithmic)"
    x = alt.X("size:Q", scale=alt.Scale(type="log", nice=False, padding=16)).axis(title=title, format="~s", tickCount=6)
    colors = [COLORS[color_of(name, roles[name])] for name in drawn]
    lines = (
        alt.Chart(alt.InlineData(values=values))
        .mark_line(point={"size": 45, "filled": True}, strokeWidth=2)
        .encode(
            x=x,
            y=alt.Y("gflops:Q", scale=alt.Scale(zero=True)).axis(title="GFLOP/s", tickCount=6),
            color=alt.Color("provider:N", scale=alt.Scale(domain=drawn, range=colors)).legend(title=None, columns=6),
            opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.12)),
            tooltip=[
                alt.Tooltip("provider:N"),
                alt.Tooltip("extents:N", title="sizes"),
                alt.Tooltip("median_ms:Q", title="median, ms", format=".4~g"),
                alt.Tooltip("ns_per_pixel:Q", title="ns per pixel", format=".3~g"),
                alt.Tooltip("gflops:Q", title="GFLOP/s", format=".4~g"),
                alt.Tooltip("artifact:N", title="kernel"),
            ],
        )
        .add_params(chosen)
    )
    return chart(
        lines.properties(width="container", height=260),
        title=f"{sweep.problem}, other sizes",
        says=f"{place}: {_says(timed)}",
        read="Higher is faster; a level line means that one kernel serves every size equally well. Hover for "
        "milliseconds and the kernel that was called, click a name to single it out.",
    )


def _value(row: Measurement, by_batch: bool) -> dict[str, Any]:
    assert row.median_ms is not None
    extents = row.extents
    return {
        "provider": row.provider,
        "size": extents.batch if by_batch else row.pixels,
        "extents": f"{extents.batch} \u00d7 {extents.height} \u00d7 {extents.width}",
        "median_ms": row.median_ms,
        "ns_per_pixel": row.median_ms * 1e6 / row.pixels,
        "gflops": row.operations / row.median_ms / 1e6,
        "artifact": row.artifact,
    }


def _says(timed: list[Measurement]) -> str:
    ours = [row for row in timed if row.role == "ours"]
    if not ours:
        return f"{plural(len(timed), 'row')} of other libraries, none of ours."
    subject = ours[0].provider
    rates = [row.operations / row.median_ms / 1e6 for row in ours if row.provider == subject and row.median_ms]
    kernels = {row.artifact for row in ours if row.provider == subject and row.artifact}
    by = "one kernel" if len(kernels) == 1 else f"{len(kernels)} kernels" if kernels else "kernels not named"
    return (
        f"{subject} keeps {significant(min(rates))} to {significant(max(rates))} GFLOP/s over "
        f"{plural(len(rates), 'size')}, with {by}."
    )
