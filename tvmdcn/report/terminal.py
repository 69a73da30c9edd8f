# SPDX-License-Identifier: Apache-2.0
"""The report on a terminal, for machines that have no browser: the same verdicts as tables.

Needs none of the packages that draw pages.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tvmdcn.bench.comparison import Line, Section
from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.roof import Roof
from tvmdcn.bench.words import describe_measure
from tvmdcn.report.changes import Change, Changes, Kind
from tvmdcn.report.changes_section import FINDINGS, describe_row
from tvmdcn.report.rendering import ABSENT, milliseconds, plural, ratio, significant
from tvmdcn.report.roofline import ceilings, stands
from tvmdcn.report.verdict import Place, covers, describe_aim, places, unsteady

__all__ = ["show_changes", "show_report"]

# Below this many columns the table keeps what the verdict rests on.
_WIDE = 116


def _text(value: object, style: str = "") -> Text:
    """Return a text from outside: neither markup nor control sequences of a terminal."""
    line = " ".join(str(value).split())
    return Text("".join(letter if letter.isprintable() else "\ufffd" for letter in line), style=style)


def show_report(
    console: Console, sections: Sequence[Section], roofs: Sequence[Roof] = (), notes: Sequence[str] = ()
) -> None:
    """Print verdicts, tables, failures and what a reader must know.

    Parameters
    ----------
    console : Console
        Where to; its width decides how many columns are shown.
    sections : sequence of Section
        What :func:`tvmdcn.bench.comparison.organize` made of the rows.
    roofs : sequence of Roof
        Measured roofs, for the share of each layer.
    notes : sequence of str
        What a reader must know before trusting it.
    """
    machine = None
    for place in places(sections):
        if place.machine != machine:
            machine = place.machine
            console.print(_text(machine, "bold"))
        console.print(_headline(place))
        console.print(_table(place, roofs, console.width))
        for mark in place.marks:
            console.print(_text(mark, "dim"))
        for verdict in place.section.verdicts:
            console.print(_text(describe_aim(verdict), "red" if verdict.misses else "green"))
        for row in place.failures:
            console.print(Text("failed: ", "red").append(_text(f"{row.provider} on {row.problem}: {row.reason}")))
        console.print()
    _show_around(console, sections)
    _show_notes(console, notes)


def _headline(place: Place) -> Panel:
    shown = place.section
    wins, known = place.wins
    lines = Text()
    if shown.speedup is not None:
        lines.append(ratio(shown.speedup), "bold green" if shown.speedup.value >= 1 else "bold red")
        lines.append(f" as fast as the fastest peer; faster on {wins} of {plural(known, 'layer')}")
        lines.append(
            f" ({ratio(shown.speedup.lowest)} to {ratio(shown.speedup.highest)}, mean of {covers(shown.speedup)})"
        )
    if shown.cost is not None:
        lines.append("\n" if lines else "")
        lines.append(ratio(shown.cost), "bold").append(f" the time of {place.plain} of the same shape")
    if shown.growth is not None:
        lines.append("\n").append(ratio(shown.growth), "bold").append(" the time of our own forward")
    if not lines:
        lines.append("Nothing of ours stands beside a peer or a plain convolution: no ratio.")
    if place.worst_error is not None:
        lines.append("\n\u2713 ", "green").append(f"correct, error at most {place.worst_error:.0e}")
    if place.failures:
        lines.append("\n").append(f"{plural(len(place.failures), 'row')} failed", "red")
    return Panel(lines, title=_text(place.title, "bold"), title_align="left", box=box.ROUNDED)


def _table(place: Place, roofs: Sequence[Roof], width: int) -> Table:
    shown = place.section
    wide = width >= _WIDE
    shares = {stand.layer: stand.share for stand in stands(shown, ceilings(roofs, shown)) if _subject(shown, stand.row)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True, overflow="ellipsis", max_width=26, min_width=10)
    kinds = [name for name in shown.providers if shown.roles[name] == "ours" and (wide or name == shown.subject)]
    for name in kinds:
        table.add_column(_text(name.removeprefix("ours-")), justify="right", no_wrap=True)
    table.add_column("fastest peer", justify="right", no_wrap=True, overflow="ellipsis", min_width=16)
    table.add_column("vs peer", justify="right", no_wrap=True)
    if wide:
        table.add_column("", no_wrap=True)
        table.add_column("conv2d", justify="right", no_wrap=True)
    table.add_column("vs conv2d", justify="right", no_wrap=True)
    if wide:
        table.add_column("GFLOP/s", justify="right", no_wrap=True)
    if any(share is not None for share in shares.values()):
        table.add_column("of roof", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for label, line in zip(place.labels(), shown.lines, strict=True):
        cells = [
            _text(label),
            *(_cell(line.rows.get(name), "green" if name == shown.subject else "") for name in kinds),
        ]
        cells += [_peer(line), _ratio(line.speedup)]
        if wide:
            cells += [_bar(line.speedup), _cell(line.floor)]
        cells.append(Text(ratio(line.cost)))
        if wide:
            cells.append(Text(ABSENT if line.gflops is None else f"{line.gflops:.0f}"))
        if any(share is not None for share in shares.values()):
            share = shares.get(line.problem)
            cells.append(Text(ABSENT if share is None else f"{share:.0%}"))
        error = None if line.ours is None else line.ours.max_rel_error
        cells.append(Text(ABSENT if error is None else f"\u2713 {error:.0e}"))
        table.add_row(*cells)
    return table


def _subject(shown: Section, row: Measurement) -> bool:
    return row.provider == shown.subject


def _cell(row: Measurement | None, style: str = "") -> Text:
    if row is None:
        return Text("")
    if row.status == "failed":
        return Text("failed", "red")
    return Text(milliseconds(row.median_ms) + ("~" if unsteady(row) else ""), style)


def _peer(line: Line) -> Text:
    peer = line.fastest_peer
    if peer is None:
        failed = any(row.role == "peer" for row in line.rows.values())
        return Text("failed", "red") if failed else Text(ABSENT)
    return _text(f"{peer.provider} {milliseconds(peer.median_ms)}") + ("~" if unsteady(peer) else "")


def _ratio(value: float | None) -> Text:
    return Text(ratio(value), "" if value is None else "bold green" if value >= 1 else "bold red")


def _bar(value: float | None) -> Text:
    """Return a bar of one cell per half, so that twice as fast is twice as long; cut at eight cells."""
    length = 0 if value is None else min(round(2 * value), 8)
    return Text("\u2587" * length, "green" if value is not None and value >= 1 else "red")


def _show_around(console: Console, sections: Sequence[Section]) -> None:
    rows = [(section, row) for section in sections for row in section.extra if row.status == "ok"]
    if not rows:
        return
    table = Table(
        title="Around the kernel", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("what")
    for name in ("threads", "median ms", "above the kernel, \u00b5s"):
        table.add_column(name, justify="right")
    for section, row in rows:
        above = section.above_kernel(row)
        extra = ABSENT if above is None else f"{above * 1000:.1f}"
        table.add_row(_text(describe_measure(row)), str(row.threads), milliseconds(row.median_ms), extra)
    console.print(table)


def _show_notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(Text("note: ", "yellow").append(_text(note)))


# --- two runs ----------------------------------------------------------------------------------------------


def show_changes(console: Console, changes: Changes, notes: Sequence[str] = ()) -> None:
    """Print what changed between two runs, and what the findings rest on."""
    found = changes.of(*FINDINGS)
    if found:
        console.print(_changed(found, console.width))
    bad = changes.count(Kind.SLOWER, Kind.BROKEN)
    console.print(Text(changes.verdict, "bold red" if bad else "bold green"))
    console.print(Text(changes.basis, "dim"))
    only = {kind: len(changes.of(kind)) for kind in (Kind.ONLY_A, Kind.ONLY_B, Kind.FAILED)}
    for kind, count in only.items():
        if count:
            console.print(Text(f"{plural(count, 'row')} {kind.value}.", "dim"))
    _show_notes(console, [*changes.notes, *notes])


def _changed(found: Sequence[Change], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", no_wrap=True, overflow="ellipsis", max_width=26)
    table.add_column("provider", no_wrap=True, overflow="ellipsis")
    table.add_column("what", no_wrap=width >= _WIDE)
    for name in ("A, ms", "B, ms", "B over A", "interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("finding", no_wrap=True)
    for change in found:
        row = change.row
        times = [milliseconds(side.median_ms) if side is not None else ABSENT for side in (change.a, change.b)]
        good = change.kind in (Kind.FASTER, Kind.REPAIRED)
        style = "green" if good else "red"
        numbers = [ABSENT] * 3
        if change.ratio is not None and change.low is not None and change.high is not None:
            numbers = [f"{change.ratio:.3f}", f"{change.low:.3f}\u2013{change.high:.3f}", significant(change.p, 2)]
        finding = change.kind.value if row.reason is None else f"{change.kind.value}: {row.reason}"
        what = [_text(row.problem), _text(row.provider), _text(describe_row(row))]
        table.add_row(*what, *times, *numbers, _text(finding, style))
    return table
