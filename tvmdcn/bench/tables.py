# SPDX-License-Identifier: Apache-2.0
"""What a benchmark prints: tables of times, memory, sizes and roofs, and what is not to be trusted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tvmdcn.bench.comparison import GeometricMean, Line, Section, Sweep, Verdict, organize, thread_gains
from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.roof import Roof
from tvmdcn.bench.words import describe_measure

__all__ = ["memory_table", "milliseconds", "print_rows", "roof_table", "section_table", "sweep_table"]

_MIB = 1 << 20
_MOST_NOISY = 8  # rows that are named


def milliseconds(value: float | None) -> str:
    """Return a time in as many digits as it is worth."""
    if value is None:
        return "-"
    if value < 0.1:
        return f"{value:.4f}"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def threads_in_words(count: int) -> str:
    """Return a number of threads in words."""
    return "1 thread" if count == 1 else f"{count} threads"


def _ratio(value: float | None, good: bool | None = None) -> Text:
    style = "" if value is None or good is None else "green" if good else "red"
    return Text("-" if value is None else f"{value:.2f}x", style)


def _cell(line: Line, provider: str) -> Text:
    row = line.rows.get(provider)
    if row is None:
        return Text("")
    if row.status == "failed":
        return Text("failed", "red")
    fastest = row in (line.fastest_peer, line.floor)
    text = milliseconds(row.median_ms) + (" ~" if row.noisy else "")
    return Text(text, "bold" if fastest or row is line.ours else "")


def section_table(section: Section) -> Table:
    """Return the terminal's table of a section: a line per problem, and the geometric means."""
    backward = section.direction == "backward"
    caption = (
        "bold: ours, the fastest peer, the faster plain convolution. "
        "vs peer: times as fast as it. vs conv2d: our time in units of the plain convolution's."
    )
    if backward:
        caption += " vs forward: our time in units of our own forward's. All gradients, against all of the peers'."
    if any(row.noisy for line in section.lines for row in line.rows.values()):
        caption += " ~: unsteady."
    table = Table(title=f"{_place(section)}: median milliseconds per call", caption=caption)
    table.add_column("problem", no_wrap=True)
    for provider in section.providers:
        table.add_column(provider, justify="right")
    for name in ("vs peer", "vs conv2d", *(("vs forward",) if backward else ()), "GFLOP/s", "max error"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in section.lines:
        ours, speedup = line.ours, line.speedup
        error = None if ours is None else ours.max_rel_error
        table.add_row(
            Text(line.problem),
            *(_cell(line, provider) for provider in section.providers),
            _ratio(speedup, None if speedup is None else speedup >= 1),
            _ratio(line.cost),
            *((_ratio(line.growth),) if backward else ()),
            "-" if line.gflops is None else f"{line.gflops:.0f}",
            "-" if error is None else f"{error:.0e}",
        )
    table.add_section()
    table.add_row(
        "geometric mean",
        *(_against(section, provider) for provider in section.providers),
        _mean(section.speedup),
        _mean(section.cost),
        *((_mean(section.growth),) if backward else ()),
        "",
        "",
    )
    return table


def _place(section: Section) -> str:
    return f"{section.machine.get('cpu', 'unknown processor')}, {section.title}"


def _against(section: Section, provider: str) -> str:
    mean = section.against(provider)
    return "" if mean is None or provider == section.subject else f"{mean.value:.2f}x ours"


def _mean(mean: GeometricMean | None) -> str:
    if mean is None:
        return "-"
    return f"{mean.value:.2f}x" + (f" ({mean.count}/{mean.total})" if mean.count < mean.total else "")


def memory_table(section: Section) -> Table | None:
    """Return the terminal's table of a section's memory; None if nothing is known."""
    rows = [row for line in section.lines for row in line.rows.values() if row.memory_bytes is not None]
    if not rows:
        return None
    resolution = max(row.memory_resolution_bytes or 0 for row in rows)
    title = f"{section.title}: peak MiB beyond inputs and outputs"
    table = Table(
        title=title,
        min_width=len(title),
        caption=f"What this image takes beyond a small one, and the weights; known to {_mib(resolution)} MiB.",
    )
    table.add_column("problem", no_wrap=True)
    providers = [name for name in section.providers if any(row.provider == name for row in rows)]
    for provider in providers:
        table.add_column(provider, justify="right")
    for line in section.lines:
        found = (line.rows.get(provider) for provider in providers)
        table.add_row(Text(line.problem), *(_mib(row.memory_bytes if row else None) for row in found))
    return table


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / _MIB:.1f}"


def sweep_table(section: Section, sweep: Sweep) -> Table:
    """Return the terminal's table of one layer at several sizes, with the time per pixel."""
    title = f"{sweep.problem}, {_place(section)}: median milliseconds (microseconds per output pixel)"
    table = Table(title=title, caption=" ".join(_kernels(sweep)), min_width=len(title))
    table.add_column("batch x height x width", no_wrap=True)
    for provider in sweep.rows:
        table.add_column(provider, justify="right")
    for index, extents in enumerate(sweep.extents):
        found = [rows[index] for rows in sweep.rows.values()]
        table.add_row(f"{extents.batch} x {extents.height} x {extents.width}", *map(_per_pixel, found))
    return table


def _per_pixel(row: Measurement | None) -> Text:
    if row is None or row.median_ms is None:
        return Text("") if row is None else Text("failed", "red")
    mark = " ~" if row.noisy else ""
    return Text(f"{milliseconds(row.median_ms)} ({row.median_ms * 1e3 / row.pixels:.3g}){mark}")


def _kernels(sweep: Sweep) -> list[str]:
    """Return, of each provider with artifacts, whether one kernel served all sizes."""
    said = []
    for provider, rows in sweep.rows.items():
        artifacts, timed = sweep.artifacts(provider), sum(row is not None and row.status == "ok" for row in rows)
        if len(artifacts) == 1:
            said.append(f"{provider}: one kernel for {timed} sizes, {artifacts[0]}.")
        elif artifacts:
            said.append(f"{provider}: {len(artifacts)} kernels for {timed} sizes.")
    return said


def roof_table(roofs: Sequence[Roof]) -> Table:
    """Return the terminal's table of roofs."""
    table = Table(title="what this machine can do", caption="median (fastest call)")
    for name in ("roof", "by", "threads"):
        table.add_column(name, justify="right" if name == "threads" else "left")
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_column("how")
    for row in roofs:
        rate = Text("failed", "red")
        if row.rate is not None and row.best_rate is not None:
            rate = Text(f"{row.rate:.0f} ({row.best_rate:.0f}) {row.unit}{' ~' if row.noisy else ''}")
        table.add_row(row.title, row.provider, str(row.threads), rate, Text(row.reason or f"{row.method}, {row.size}"))
    return table


def _verdict(verdict: Verdict) -> Text:
    misses, count = verdict.misses, len(verdict.ratios)
    text = f"{verdict.aim.text}: {count - len(misses)} of {count}"
    if misses:
        text += "; not " + ", ".join(f"{line.problem} ({ratio:.2f}x)" for line, ratio in misses)
    return Text(text, "red" if misses else "green")


def print_rows(console: Console, rows: Sequence[Measurement], roofs: Sequence[Roof] = ()) -> None:
    """Print what rows say: tables, verdicts, overheads, unsteady rows, failures."""
    sections = organize(rows)
    warm = {section.place for section in sections}
    for section in sections:
        # Memory is the same with cold caches.
        told = section.cache == "cold" and section.place._replace(cache="warm") in warm
        memory = None if told else memory_table(section)
        for table in (section_table(section) if section.lines else None, memory):
            if table is not None:
                console.print(table)
        for sweep in section.sweeps:
            console.print(sweep_table(section, sweep))
        for verdict in section.verdicts:
            console.print(_verdict(verdict))
        for row in section.extra:
            if row.status == "ok":
                above = section.above_kernel(row)
                more = "" if above is None else f", {above * 1e3:.1f} us above the kernel"
                console.print(
                    f"{describe_measure(row)}: {milliseconds(row.median_ms)} ms "
                    f"(median of {row.runs}, {threads_in_words(row.threads)}){more}",
                    markup=False,
                )
    for line, gains in thread_gains(sections):
        text = ", ".join(f"{gain:.2f}x at {threads}" for threads, gain in gains.items())
        console.print(f"{line.title} ({line.spec.flops(line.extents) / 1e9:.1f} GFLOP): {text} threads", markup=False)
    if roofs:
        console.print(roof_table(roofs))
    _print_doubts(console, [*rows, *roofs])


def _print_doubts(console: Console, rows: Sequence[Measurement | Roof]) -> None:
    noisy = [row for row in rows if row.noisy]
    for row in noisy[:_MOST_NOISY]:
        console.print(f"unsteady: {_what(row)}: {row.noise}", markup=False, style="yellow")
    if noisy:
        console.print(
            f"{len(noisy)} of {len(rows)} rows are unsteady: measure again on an idle machine, or with more --rounds.",
            markup=False,
            style="yellow",
        )
    for row in rows:
        if row.status == "failed":
            console.print(f"failed: {_what(row)}: {row.reason}", markup=False)
    for note in dict.fromkeys((row.provider, row.note) for row in rows if row.note):
        console.print("{}: {}".format(*note), markup=False)


def _what(row: Measurement | Roof) -> str:
    parts = [f"{row.provider} on {row.title}"]
    if isinstance(row, Measurement):
        size = row.extents
        parts += [f"{size.batch} x {size.height} x {size.width}"] if row.sweep else []
        parts += [row.spec.dtype] if row.spec.dtype != "float32" else []
        parts += [row.spec.layout] if row.spec.layout != "NCHW" else []
        parts += ["cold caches"] if row.cache == "cold" else []
    return ", ".join([*parts, threads_in_words(row.threads)])
