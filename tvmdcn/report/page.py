# SPDX-License-Identifier: Apache-2.0
"""Rows and records to one self-contained HTML page, and Markdown.

A report quotes measured rows only: no record of a tuning run ends up in a ratio, and rows of different
machines are never set beside each other.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tvmdcn.bench.comparison import GeometricMean, Section, Verdict, organize, thread_gains
from tvmdcn.bench.measurement import Measurement, MeasurementError, read_rows
from tvmdcn.bench.words import describe_layer, describe_measure
from tvmdcn.errors import TvmdcnError
from tvmdcn.extras import require
from tvmdcn.report.data import SchedulePair, ScheduleView, Trial, TuningHistory
from tvmdcn.report.figures import color_of, draw_bars, draw_tuning
from tvmdcn.report.schedule_pairs import cached_pairs
from tvmdcn.tuning.history import histories as recorded_histories

__all__ = [
    "SchedulePair",
    "ScheduleView",
    "Trial",
    "TuningHistory",
    "benchmark_block",
    "main",
    "report",
    "report_command",
    "update_block",
]

# A program longer than this says nothing to a reader, and makes the page too large to send.
MAX_LINES = 1500
# The spread from which a figure is marked as unsteady: 90th percentile over median.
UNSTEADY = 1.25


def benchmark_block(rows: Sequence[Measurement]) -> str:
    """Return the verdicts and the tables of rows in Markdown, for a page that has its own frame."""
    require("report", "a report")
    return _render("benchmark.md.j2", _Content(rows, [], [], [])).strip() + "\n"


def update_block(page: str | Path, rows: Sequence[Measurement]) -> None:
    """Replace what stands in a page between the two marks of a benchmark.

    Raises
    ------
    MeasurementError
        If the page has not the two marks, or there are no rows.
    OSError
        If the page cannot be read or written.
    """
    text = Path(page).read_text(encoding="utf-8")
    begin, end = (re.search(rf"^<!-- benchmark:{mark}\b.*-->$", text, re.MULTILINE) for mark in ("begin", "end"))
    if begin is None or end is None or end.start() < begin.end():
        raise MeasurementError(
            f"{page} has no place for a benchmark: a line <!-- benchmark:begin --> and below it <!-- benchmark:end -->."
        )
    if not rows:
        raise MeasurementError(f"there are no rows for {page}.")
    Path(page).write_text(f"{text[: begin.end()]}\n{benchmark_block(rows)}{text[end.start() :]}", encoding="utf-8")


def report(
    rows_files: Iterable[str | Path],
    records_dir: str | Path | None,
    output_html: str | Path,
    output_markdown: str | Path | None = None,
    *,
    histories: Sequence[TuningHistory] = (),
    schedules: Sequence[SchedulePair] | None = None,
) -> list[str]:
    """Write a report of measured rows.

    Parameters
    ----------
    rows_files : iterable of str or Path
        Files of rows (JSON lines), as ``scripts/benchmark.py`` writes them.
    records_dir : str or Path, optional
        Tuning records, whose histories are shown beside `histories`.
    output_html : str or Path
        The page: one file, without anything from the network.
    output_markdown : str or Path, optional
        The same without figures.
    histories : sequence of TuningHistory
        Tuning runs to show.
    schedules : sequence of SchedulePair, optional
        Schedules to show side by side; by default those of the rows' layers that are in the cache
        (:func:`tvmdcn.report.schedule_pairs.cached_pairs`).

    Returns
    -------
    list of str
        What a reader must know before trusting it: broken lines, rows of other versions. They are in the
        report.

    Raises
    ------
    MeasurementError
        If no file holds a sound row.
    RecordsError
        If a tuning history cannot be read.
    MissingExtra
        If the packages of the extra "report" are not installed.
    OSError
        If a file cannot be read or written.
    """
    require("report", "a report")
    rows: list[Measurement] = []
    broken: list[str] = []
    paths = [Path(path) for path in rows_files]
    for path in paths:
        found, complaints = read_rows(path)
        rows += found
        broken += complaints
    if not rows:
        names = ", ".join(map(str, paths)) or "no file"
        detail = f" {broken[0]}" if broken else ""
        raise MeasurementError(f"there is no sound row in {names}.{detail} Measure with scripts/benchmark.py.")
    if records_dir is not None:
        histories = [*histories, *recorded_histories(Path(records_dir))]
    pairs = cached_pairs(rows) if schedules is None else list(schedules)
    content = _Content(rows, broken, list(histories), pairs)
    for template, output in (("report.html.j2", output_html), ("report.md.j2", output_markdown)):
        if output is not None:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            Path(output).write_text(_render(template, content), encoding="utf-8", errors="replace")
    return content.notes


@dataclass
class _Content:
    """What the templates show, worked out from the rows."""

    rows: Sequence[Measurement]
    broken: Sequence[str]
    histories: Sequence[TuningHistory]
    schedules: Sequence[SchedulePair]

    def __post_init__(self) -> None:
        """Organize the rows once."""
        self.sections = organize(self.rows)
        self.gains = thread_gains(self.sections)
        self.gain_threads = sorted({threads for _, gain in self.gains for threads in gain})
        self.commands = list(dict.fromkeys(row.command for row in self.rows))
        self.notes = [*self.broken, *self._notes()]

    def _notes(self) -> list[str]:
        notes = []
        machines = {json.dumps(section.machine, sort_keys=True) for section in self.sections}
        if len(machines) > 1:
            notes.append(
                f"The rows come from {len(machines)} machines. Each has tables of its own; "
                "no ratio is taken between machines."
            )
        different: Counter[str] = Counter()
        for row in self.used:
            for difference in self.section_of(row).differences(row):
                different[difference] += 1
        for difference, count in different.items():
            notes.append(f"Other versions in {_plural(count, 'row')}: {difference}. They are marked \u2020.")
        replaced = sum(section.superseded for section in self.sections)
        if replaced:
            notes.append(f"{_plural(replaced, 'row')} left out: the same was measured again later.")
        failed = sum(row.status == "failed" for row in self.used)
        if failed:
            notes.append(f"{_plural(failed, 'row')} failed; the reasons are below each table.")
        return notes

    @property
    def used(self) -> list[Measurement]:
        """The rows that the tables show."""
        return [
            row
            for section in self.sections
            for row in (*(row for line in section.lines for row in line.rows.values()), *section.extra)
        ]

    def section_of(self, row: Measurement) -> Section:
        """Return the section that shows a row."""
        place = (row.machine, row.direction, row.threads)
        return next(s for s in self.sections if (s.machine, s.direction, s.threads) == place)

    @property
    def dates(self) -> str:
        """The days of the rows, as one day or as a span."""
        days = sorted(row.date[:10] for row in self.rows)
        return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"

    def failures(self, section: Section) -> list[Measurement]:
        """Return the rows of a section that failed."""
        return [row for row in self.used if row.status == "failed" and self.section_of(row) is section]

    def unsteady(self, row: Measurement) -> bool:
        """Whether a row's times were spread so far that its median is to be doubted."""
        return row.median_ms is not None and row.p90 is not None and row.p90 > UNSTEADY * row.median_ms

    def marks(self, section: Section) -> list[str]:
        """Return what the marks in a section's table mean, those that are there."""
        shown = [row for line in section.lines for row in line.rows.values() if row.status == "ok"]
        notes = []
        if any(self.unsteady(row) for row in shown):
            notes.append("~ unsteady: the 90th percentile lies more than 25 % above the median.")
        other = dict.fromkeys(difference for row in shown for difference in section.differences(row))
        if other:
            notes.append(f"\u2020 other versions: {', '.join(other)}.")
        return notes

    def bars(self, section: Section) -> Any:
        """Return the bar chart of a section."""
        return draw_bars(section, f"bars-{self.sections.index(section)}")

    def tuning(self, history: TuningHistory) -> Any:
        """Return the tuning curve of a history."""
        return draw_tuning(history, f"tuning-{self.histories.index(history)}")

    def decisions(self, pair: SchedulePair) -> list[tuple[str, str, str]]:
        """Return what both schedules decide, as (name, left, right)."""
        names = dict.fromkeys((*pair.left.decisions, *pair.right.decisions))
        return [(n, pair.left.decisions.get(n, ""), pair.right.decisions.get(n, "")) for n in names]

    def programs(self, pair: SchedulePair) -> list[tuple[ScheduleView, list[tuple[str, bool]], int]]:
        """Return, for each side, its lines with whether they differ, and how many lines are left out."""
        left, right = (view.tir.splitlines() for view in (pair.left, pair.right))
        marks = ([True] * len(left), [True] * len(right))
        for block in difflib.SequenceMatcher(None, left, right, autojunk=True).get_matching_blocks():
            marks[0][block.a : block.a + block.size] = [False] * block.size
            marks[1][block.b : block.b + block.size] = [False] * block.size
        return [
            (view, list(zip(lines, mark, strict=True))[:MAX_LINES], max(len(lines) - MAX_LINES, 0))
            for view, lines, mark in ((pair.left, left, marks[0]), (pair.right, right, marks[1]))
        ]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _covers(mean: GeometricMean) -> str:
    """Say over how many of the layers a mean is taken."""
    if mean.count == mean.total:
        return _plural(mean.total, "layer")
    return f"{mean.count} of {_plural(mean.total, 'layer')}"


def _milliseconds(value: float | None) -> str:
    """Write a time with three significant digits, or more where they stand before the point."""
    if value is None:
        return "\u2013"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def _ratio(value: GeometricMean | float | None) -> str:
    if value is None:
        return "\u2013"
    number = value.value if isinstance(value, GeometricMean) else value
    return f"{number:.2f}\u00d7"


def _aim(verdict: Verdict) -> str:
    """Say on how many of its layers an aim is met, and on which it is not."""
    misses, count = verdict.misses, len(verdict.ratios)
    text = f"Aim: {verdict.aim.text}. Met on {count - len(misses)} of {count}"
    if not misses:
        return f"{text}, the {'lowest' if verdict.aim.at_least else 'highest'} {_ratio(verdict.worst)}."
    return f"{text}; not on " + ", ".join(f"{line.problem} ({_ratio(ratio)})" for line, ratio in misses) + "."


def _markdown(value: object) -> str:
    """Escape a text for a cell of a Markdown table: nothing in it is markup, and it stays on its line."""
    text = " ".join(str(value).split())
    for plain, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(plain, entity)
    # An underscore within a word is none of Markdown's, and names are full of them.
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _fence(text: str) -> str:
    """Return a fence that is longer than any within the text."""
    return "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)


def _size(count: float) -> str:
    """Write a number of bytes."""
    if not count:
        return "unknown"
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"


def _describe_machine(machine: dict[str, Any]) -> str:
    """Return a machine on one line, of the fields it has."""
    parts = [str(machine.get("cpu", "unknown processor"))]
    if "target" in machine:
        parts.append(str(machine["target"]))
    if "cores" in machine:
        parts.append(f"{machine['cores']} cores")
    if machine.get("hypervisor"):
        parts.append("virtual machine")
    if isinstance(machine.get("l2_bytes"), int):
        parts.append(f"L2 {_size(machine['l2_bytes'])}")
    if "system" in machine:
        parts.append(str(machine["system"]))
    return ", ".join(parts)


def _render(template: str, content: _Content) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tvmdcn.report", "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        ms=_milliseconds,
        ratio=_ratio,
        md=_markdown,
        fence=_fence,
        machine=_describe_machine,
        plural=_plural,
        covers=_covers,
        aim=_aim,
        measure=describe_measure,
    )
    return environment.get_template(template).render(content=content, color_of=color_of, describe_layer=describe_layer)


@click.command("report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("rows", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--records",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Tuning records whose history is shown.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    show_default=True,
    help="The page.",
)
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write Markdown too.")
@click.option(
    "--update",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Replace the tables between the marks benchmark:begin and benchmark:end of this Markdown file.",
)
def report_command(
    rows: tuple[Path, ...], records: Path | None, output: Path, markdown: Path | None, update: Path | None
) -> None:
    """Make one HTML page, and Markdown, of measured ROWS."""
    try:
        notes = report(rows, records, output, markdown)
        if update is not None:
            update_block(update, [row for path in rows for row in read_rows(path)[0]])
    except (TvmdcnError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for note in notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{output} ({output.stat().st_size / 2**10:.0f} KiB)")
    for path in (markdown, update):
        if path is not None:
            click.echo(str(path))


main = report_command

if __name__ == "__main__":
    main()
